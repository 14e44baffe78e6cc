"""What the local loop asks of a form: a way to evaluate the local gradient as the increment grows."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["ChangeForm", "Form"]


class Form(ABC):
    """Evaluates what the local objective has of the layer's rows."""

    @abstractmethod
    def gradient(self, delta: dict[str, Tensor], t: int, start: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        """``start + scale * (EᵀX, Σ_batch E)`` at ``delta``, for local step ``t > 0``; nothing for what is frozen.

        The tensors hold until the next call.
        """

    @abstractmethod
    def divergence(self, delta: dict[str, Tensor], t: int) -> Tensor:
        """Matching loss between ``f(A)`` and ``f(A0)`` before local step ``t``, summed over the batch; float64."""


class ChangeForm(Form):
    """A form that evaluates the change of the gradient by itself."""

    @abstractmethod
    def change(self, delta: dict[str, Tensor], t: int) -> dict[str, Tensor]:
        """``EᵀX`` ``[N, K]`` and ``Σ_batch E`` ``[N]`` at ``delta``, for local step ``t``: new tensors.

        There is none for what is frozen.
        """

    def gradient(self, delta: dict[str, Tensor], t: int, start: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        grads = self.change(delta, t)
        for name, grad in grads.items():
            torch.add(start[name], grad, alpha=scale, out=grad)
        return grads
