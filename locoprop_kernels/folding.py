"""The bias as one more column of the weight, whose input is always one: half the operations for small layers.

The paper writes layers like this throughout. ``[Δ δ]`` is one matrix ``[N, K + 1]``, and so are gradients and state.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from locoprop_kernels import rules
from locoprop_kernels.problem import LocalProblem, State, accumulation_dtype, of_outputs
from locoprop_kernels.scratch import take
from locoprop_kernels.settings import Settings
from locoprop_kernels.solution import Increment

__all__ = ["allocated", "begin", "can_fold", "unfolded"]


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


def allocated(problem: LocalProblem, old: State) -> Increment:
    """Memory for increment and state as matrices, all by ``"weight"``; :func:`begin` writes to it."""
    weight = problem.weight
    shape = [*weight.shape[:-1], weight.shape[-1] + 1]
    dtype = accumulation_dtype(weight.dtype)
    delta = take(shape, dtype, weight.device)
    state = {
        slot: take(shape, dtype, weight.device) if value.dim() else value.clone()
        for slot, value in old["weight"].items()
    }
    memory = [delta, *(value for value in state.values() if value.dim())]
    return Increment({"weight": delta}, {"weight": state}, memory)


def begin(problem: LocalProblem, old: State, scale: float, some: slice, part: Increment) -> dict[str, Tensor]:
    """Set an increment to zero and its state to the old one.

    Args:
        problem: the problem.
        old: the rule's state before the loop.
        scale: of the gradients.
        some: which outputs.
        part: what :func:`allocated` has of them.

    Returns:
        the scaled gradients at the start, likewise a matrix.
    """
    assert problem.grad_weight is not None
    assert problem.grad_bias is not None
    delta = part.delta["weight"].zero_()
    start = take(delta.shape, delta.dtype, delta.device)
    _join(start, problem.grad_weight, problem.grad_bias, some)
    if scale != 1:
        start.mul_(scale)
    for slot, value in part.state["weight"].items():
        if value.dim():
            _join(value, old["weight"][slot], old["bias"][slot], some)
    return {"weight": start}


def unfolded(increment: Increment) -> Increment:
    """A folded increment, as weight and bias: views of it."""
    delta, state = increment.delta["weight"], increment.state["weight"]
    return replace(
        increment,
        delta={"weight": delta[..., :-1], "bias": delta[..., -1]},
        state={
            "weight": {slot: value[..., :-1] if value.dim() else value for slot, value in state.items()},
            "bias": {slot: value[..., -1] if value.dim() else value for slot, value in state.items()},
        },
    )


def _join(to: Tensor, matrix: Tensor, column: Tensor, some: slice) -> None:
    to[..., :-1] = of_outputs("weight", matrix, some)
    to[..., -1] = of_outputs("bias", column, some)
