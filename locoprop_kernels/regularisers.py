"""Regularisers of the local problems beyond the proximal term ``λ/2 ‖W - W_0‖²``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locoprop_kernels.arguments import shown

__all__ = ["Regulariser", "as_regulariser"]


@dataclass(frozen=True)
class Regulariser:
    """A regulariser by its gradient, added to the local gradient ``G_t`` of weights and biases alike.

    It is a term of the local objective as the proximal term is: ``reduction="mean"`` does not divide it, and it counts
    from the first local step on.

    Args:
        torch_fn: ``(W_t, W_0) -> gradient``: the parameter now and at the start, of any shape, to a tensor of that
            shape.
        triton_fn: the same as a ``@triton.jit`` function of two float32 blocks ``(w, w0)``, for the Triton backend.
        value: ``(W_t, W_0) -> value`` of the term, elementwise or its sum; needed for ``trace=True``.
    """

    torch_fn: Callable[[Tensor, Tensor], Tensor]
    triton_fn: Any = None
    value: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not callable(self.torch_fn):
            raise TypeError(f"torch_fn of Regulariser must be callable, got {shown(self.torch_fn)}")
        if self.value is not None and not callable(self.value):
            raise TypeError(f"value of Regulariser must be callable or None, got {shown(self.value)}")

    def gradient(self, parameter: Tensor, delta: Tensor) -> Tensor:
        """The gradient at ``parameter + delta``, in the dtype of ``delta``.

        Raises:
            ValueError: ``torch_fn`` does not return a tensor of the parameter's shape.
        """
        start = parameter.to(delta.dtype)
        gradient = self.torch_fn(start + delta, start)
        if not isinstance(gradient, Tensor) or gradient.shape != delta.shape:
            got = list(gradient.shape) if isinstance(gradient, Tensor) else type(gradient).__name__
            raise ValueError(f"regulariser must return a tensor of shape {list(delta.shape)}, got {got}")
        return gradient

    def increase(self, parameter: Tensor, delta: Tensor) -> Tensor:
        """What the term has grown by since the start: float64, ``[]``."""
        assert self.value is not None
        start = parameter.double()
        return torch.sum(self.value(start + delta.double(), start)) - torch.sum(self.value(start, start))


def as_regulariser(regulariser: Any) -> Regulariser | None:
    """A :class:`Regulariser` or ``None`` as it is; a function is taken for the gradient.

    Raises:
        TypeError: it is something else.
    """
    if regulariser is None or isinstance(regulariser, Regulariser):
        return regulariser
    if not callable(regulariser):
        raise TypeError(f"regulariser must be a Regulariser, a function or None, got {type(regulariser).__name__}")
    return Regulariser(regulariser)
