"""Parameters' gradients as backward passes have left them, by which a step sees what was done to them since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from locoprop_torch.sharding import is_sharded
from locoprop_torch.unit import unscaling

__all__ = ["SeenGradients"]


class SeenGradients:
    """The gradients of a layer's parameters as the latest backward pass has left them.

    Args:
        name: the layer's, for messages.
        parameters: the layer's, by kind.
    """

    def __init__(self, name: str, parameters: Mapping[str, nn.Parameter]) -> None:
        self._name, self._parameters = name, parameters
        self._seen: dict[str, _SeenGradient] = {}
        # Whether the last gradient was one of sharded parameters, which FSDP2 has averaged over the processes.
        self._averaged = False

    def note(self, kind: str, parameter: Tensor, keep: bool, measured: bool) -> None:
        """A backward pass has added to the gradient of a parameter.

        Args:
            kind: of the parameter.
            parameter: the parameter, or the whole one that a sharded one is at present.
            keep: a copy of the gradient, which a target needs.
            measured: whether the gradient of the model's output is measured, so that its norm is needed.
        """
        self._averaged = is_sharded(parameter)
        gradient = parameter.grad
        if gradient is not None and not self._averaged:
            copy = gradient.detach().clone() if keep else None
            norm = gradient.detach().norm() if measured else None
            self._seen[kind] = _SeenGradient(TensorWeakRef(gradient), gradient._version, copy, norm)

    @property
    def are_discarded(self) -> bool:
        """Whether all gradients are gone: ``None``, or overwritten with zeros."""
        return all(self._is_discarded(kind, parameter) for kind, parameter in self._parameters.items())

    def _is_discarded(self, kind: str, parameter: nn.Parameter) -> bool:
        gradient = parameter.grad
        if is_sharded(parameter):
            # Until they are averaged, gradients are where only FSDP2 knows.
            return gradient is None and self._averaged
        seen = self._seen.get(kind)
        return gradient is None or seen is None or seen.is_discarded(gradient)

    def unscaled(self, trained: Mapping[str, nn.Parameter]) -> float:
        """What gradients were multiplied by since the backward pass to undo a scaling of the loss.

        Args:
            trained: the parameters that have one, by kind.
        """
        for kind, parameter in trained.items():
            assert parameter.grad is not None
            if kind in self._seen and (factor := self._seen[kind].shrunk(parameter.grad)) is not None:
                return unscaling(factor)
        return 1.0

    def factor(self, trained: Mapping[str, nn.Parameter]) -> float:
        """The number that gradients were multiplied by since the backward pass, as by ``GradScaler``.

        Args:
            trained: the parameters that have one, by kind.

        Raises:
            ValueError: they were changed in another way. Elements that were set to zero do not count.
        """
        factors = set()
        for kind, parameter in trained.items():
            seen, gradient = self._seen.get(kind), parameter.grad
            assert gradient is not None
            if (factor := 1.0 if seen is None else seen.factor(gradient)) is not None:
                factors.add(factor)
        factor = min(factors, default=1.0)
        # A NaN among them makes this false as well.
        if not all(abs(other - factor) <= 1e-2 * abs(factor) for other in factors):
            raise ValueError(
                f"the gradients of layer {self._name!r} were changed otherwise than by multiplication with one number "
                "since the backward pass, which only the target 'dual' can follow"
            )
        return factor


class _SeenGradient(NamedTuple):
    """A parameter's gradient as a backward pass has left it.

    Attributes:
        tensor: the gradient.
        version: how often it had been written to.
        copy: its values, where a target needs them.
        norm: its norm, where the gradient of the model's output was measured.
    """

    tensor: TensorWeakRef
    version: int
    copy: Tensor | None
    norm: Tensor | None = None

    def shrunk(self, now: Tensor) -> float | None:
        """The norm of the parameter's gradient ``now`` over what it was; ``None`` where that is not known."""
        return float(now.norm()) / float(self.norm) if self.norm is not None and self.norm > 0 else None

    def is_discarded(self, now: Tensor) -> bool:
        """Whether the parameter's gradient ``now`` is zeros that somebody has written over this one."""
        if self.tensor() is now and now._version == self.version:
            return False
        # Only what somebody has written to is looked at: that waits for the device.
        return now.layout == torch.strided and not bool(now.any())

    def factor(self, now: Tensor) -> float | None:
        """The number with ``now = number * gradient``, in all elements where neither is zero.

        1 without a copy, ``None`` where there is no such element, NaN where there is no such number.
        """
        before = self.copy
        if before is None:
            return 1.0
        if before.shape != now.shape:
            return float("nan")
        both = (before != 0) & (now != 0)
        old, new = before[both].double(), now[both].double()
        if not len(old) or not bool(torch.isfinite(new).all()):
            # A step with what is not finite is skipped anyway.
            return None
        factor = float((old * new).sum() / (old * old).sum())
        close = (new - factor * old).abs() <= 16 * torch.finfo(now.dtype).eps * (factor * old).abs()
        return factor if bool(close.all()) else float("nan")
