"""The bias as one more column of the weight, whose input is always one: half the operations for small layers.

The paper writes layers like this throughout. ``[Δ δ]`` is one matrix ``[N, K + 1]``, and so are gradients and state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from locoprop_kernels import rules
from locoprop_kernels.problem import LocalProblem, State, accumulation_dtype
from locoprop_kernels.scratch import take
from locoprop_kernels.settings import Settings
from locoprop_kernels.solution import Increment

__all__ = ["can_fold", "folded", "unfolded"]


def can_fold(problem: LocalProblem, old: State, settings: Settings) -> bool:
    """Whether weight and bias of a problem can be updated as one matrix: nothing treats them differently.

    With operands that are rounded it is not done: rounded biases would be less accurate than they are.
    """
    trained = problem.trained()
    if len(trained) < 2 or problem.rate_weight != problem.rate_bias or settings.regulariser is not None:
        return False
    if problem.mask_weight is not None or problem.mask_bias is not None or not rules.is_elementwise(settings.rule):
        return False
    if settings.operands(problem) is not accumulation_dtype(problem.weight.dtype):
        return False
    return not settings.rule.counts_steps or bool(old["weight"]["step"] == old["bias"]["step"])


def folded(problem: LocalProblem, old: State, scale: float) -> tuple[dict[str, Tensor], Increment]:
    """The scaled gradients at the start, and an increment of zeros with the state: matrices, all by ``"weight"``."""
    assert problem.grad_weight is not None
    assert problem.grad_bias is not None
    dtype, biases = accumulation_dtype(problem.weight.dtype), old["bias"]
    start = _joined(problem.grad_weight, problem.grad_bias, dtype).mul_(scale)
    delta = take(start.shape, dtype, start.device).zero_()
    state = {
        slot: _joined(value, biases[slot], dtype) if value.dim() else value.clone()
        for slot, value in old["weight"].items()
    }
    memory = [delta, *(value for value in state.values() if value.dim())]
    return {"weight": start}, Increment({"weight": delta}, {"weight": state}, memory)


def unfolded(increment: Increment) -> Increment:
    """A folded increment, as weight and bias: views of it."""
    delta, state = increment.delta["weight"], increment.state["weight"]
    return Increment(
        {"weight": delta[..., :-1], "bias": delta[..., -1]},
        {
            "weight": {slot: value[..., :-1] if value.dim() else value for slot, value in state.items()},
            "bias": {slot: value[..., -1] if value.dim() else value for slot, value in state.items()},
        },
        increment.memory,
    )


def _joined(matrix: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
    *lead, rows, columns = matrix.shape
    joined = take([*lead, rows, columns + 1], dtype, matrix.device)
    joined[..., :-1] = matrix
    joined[..., -1] = column
    return joined
