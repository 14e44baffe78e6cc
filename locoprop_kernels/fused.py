"""Update rules in one pass over memory, by the kernels of torch's own fused optimisers.

A local step with few rows costs little more than the update of the weights. Written out, an update is five or six
operations that each read and write all of them; ``torch._fused_adam_`` and its relatives, which run
``torch.optim.Adam(fused=True)``, are one. On GPUs the local loop has kernels of its own.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from locoprop_kernels.rules import Adam, RMSprop

__all__ = ["adam_", "rmsprop_", "usable"]

_AVAILABLE = hasattr(torch, "_fused_adam_") and hasattr(torch, "_fused_adamw_")
# So many steps that Adam's bias corrections are exactly one.
_MANY = 2.0**100


def usable(tensors: list[Tensor]) -> bool:
    """Whether the fused kernels can work on these: on a CPU, contiguous, all float32 or all float64."""
    dtype = tensors[0].dtype
    if not _AVAILABLE or dtype not in (torch.float32, torch.float64):
        return False
    return all(tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)


def adam_(
    deltas: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], lr: float, step: int, rule: Adam
) -> None:
    """One step of :class:`locoprop_kernels.rules.Adam`, in place on increments and their moments.

    Args:
        deltas: increments, of any shape.
        grads: their gradients; left as they are.
        states: the rule's state of each.
        lr: learning rate.
        step: number of steps so far, this one included.
        rule: the hyper-parameters.
    """
    beta1, beta2 = rule.betas
    if rule.flavor == "tensorflow":
        # Its eps is not corrected, so neither may the mean square be: all corrections go into the rate.
        lr, count = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step), _MANY
    else:
        count = float(step)
    means, mean_squares = ([state[slot] for state in states] for slot in ("exp_avg", "exp_avg_sq"))
    _adam((deltas, grads, means, mean_squares), lr, (beta1, beta2), rule.eps, count)


def rmsprop_(
    deltas: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], lr: float, rule: RMSprop
) -> None:
    """One step of :class:`locoprop_kernels.rules.RMSprop` in torch's arithmetic, not centered; in place.

    RMSprop is Adam with ``β1 = 0`` and no bias correction, whose mean is the gradient itself. With momentum, the buffer
    ``buf = μ buf + g / (√v + eps)`` is what AdamW does to a parameter at a learning rate of -1, with ``μ - 1`` for its
    weight decay.

    Args:
        deltas: increments, of any shape.
        grads: their gradients; left as they are.
        states: the rule's state of each.
        lr: learning rate.
        rule: the hyper-parameters.
    """
    betas = (0.0, rule.alpha)
    mean_squares = [state["square_avg"] for state in states]
    if not rule.momentum:
        _adam((deltas, grads, grads, mean_squares), lr, betas, rule.eps, _MANY)
        return
    buffers = [state["momentum_buffer"] for state in states]
    _adam((buffers, grads, grads, mean_squares), -1.0, betas, rule.eps, _MANY, weight_decay=rule.momentum - 1)
    for delta, buffer in zip(deltas, buffers, strict=True):
        delta.add_(buffer, alpha=-lr)


def _adam(
    tensors: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: float,
    weight_decay: float = 0.0,
) -> None:
    """AdamW on ``(parameters, gradients, means, mean squares)``."""
    parameters, grads, means, mean_squares = tensors
    torch._fused_adamw_(
        parameters,
        grads,
        means,
        mean_squares,
        [],
        [_count(step)] * len(parameters),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


@lru_cache(maxsize=64)
def _count(step: float) -> Tensor:
    """A number of steps as the kernels take it: a tensor, which they only read."""
    return torch.tensor(step, dtype=torch.float32, device="cpu")
