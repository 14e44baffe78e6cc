"""What is kept of a layer's calls until a step uses it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from locoprop_kernels.autocasting import without_autocast
from locoprop_torch.kept import KeptRows
from locoprop_torch.masks import trained_weight
from locoprop_torch.sharding import is_sharded
from locoprop_torch.unit import Measured

__all__ = ["Gradients", "Pass"]


@dataclass(eq=False)
class Gradients:
    """Gradients at a pass.

    Attributes:
        output: ``∂L/∂A``, where a target or the unit of ``γ`` needs it.
        activation: ``∂L/∂f(A)``, where a target needs it and the activation is a module.
        order: of the backward pass, if it began here and the unit of ``γ`` is to be measured.
    """

    output: Tensor | None = None
    activation: Tensor | None = None
    order: int | None = None

    def add(self, other: Gradients) -> None:
        """Add those of another backward pass."""
        self.order = other.order if self.order is None else self.order
        for name in ("output", "activation"):
            old, new = getattr(self, name), getattr(other, name)
            if new is not None:
                setattr(self, name, new if old is None else old + new)


@dataclass(eq=False)
class Pass:
    """One call of a layer. Its tensors are the forward pass's own, not copies, and ``None`` once a step has used them.

    They are ``None`` too once copies have been made of the rows that a step will take, see :class:`KeptRows`.

    Attributes:
        module: the module that was called.
        x: its input.
        preactivation: its output.
        versions: how often either had been written to.
        kept: copies of the rows that a step will take, in place of all of them.
        size: how many rows it has; known where some are to be chosen.
        offset: how many rows there are before it in the step, likewise.
        settled: whether it has what it will have to give, if no other pass counts.
        counted: whether a backward pass through it has added to the parameters' gradients.
        over: whether its graph is gone, so that no other backward pass will come through it.
        gradients: what the backward passes that count have brought.
        arriving: by the number of a backward pass, what it has brought, until it is known to count.
        output: what several processes have measured at its output, see :mod:`locoprop_torch.unit`.
        number: of the call, counted through the process.
    """

    module: nn.Module
    x: Tensor | None
    preactivation: Tensor | None
    versions: tuple[int, int]
    kept: KeptRows | None = None
    size: int = 0
    offset: int | None = None
    settled: bool = False
    counted: bool = False
    over: bool = False
    gradients: Gradients | None = None
    arriving: dict[int, Gradients] | None = None
    output: Measured | None = None
    number: int = field(default_factory=itertools.count().__next__)

    def arrive(self, number: int, gradients: Gradients) -> None:
        """Gradients have come in a backward pass."""
        if self.arriving is None:
            self.arriving = {}
        self.arriving.setdefault(number, Gradients()).add(gradients)

    def keep(self, number: int) -> None:
        """The backward pass counts: what has come in it does too."""
        if self.arriving is not None and number in self.arriving:
            if self.gradients is None:
                self.gradients = Gradients()
            self.gradients.add(self.arriving.pop(number))

    def drop(self, number: int) -> None:
        """The backward pass does not count."""
        if self.arriving is not None:
            self.arriving.pop(number, None)

    @property
    def is_measured(self) -> bool:
        """Whether the unit of ``γ`` is to be measured by gradients that have come to it."""
        found = [self.gradients, *(self.arriving or {}).values()]
        return any(one is not None and one.order is not None for one in found)

    @property
    def released(self) -> bool:
        """Whether a step has used it."""
        return self.x is None and self.kept is None

    @property
    def overwritten(self) -> bool:
        """Whether somebody has written over its input."""
        return self.x is not None and self.x._version != self.versions[0]

    @property
    def output_overwritten(self) -> bool:
        """Whether somebody has written over its output, as an activation function in place does."""
        return self.preactivation is not None and self.preactivation._version != self.versions[1]

    def release(self) -> None:
        """Let go of the tensors, which the graph behind the loss would keep until the next forward pass."""
        if self.kept is not None:
            self.kept.release()
        self.x = self.preactivation = self.kept = self.gradients = self.arriving = None

    def uncount(self) -> None:
        """Forget that it counts; a later backward pass through the same graph may count it again."""
        self.counted = False
        self.gradients = None
        if self.kept is None:
            self.offset = None

    def keep_rows(self, kept: KeptRows) -> None:
        """Hold these rows in place of all."""
        self.kept, self.x, self.preactivation = kept, None, None

    def restored(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Input and pre-activation in dtypes that a local problem takes; the latter anew where it was overwritten.

        That is of the forward pass only as long as the weights are.

        Args:
            name: the layer's, for messages.
            dtype: the weight's.

        Raises:
            ValueError: the input was overwritten since the forward pass.
        """
        x, a = self.x, self.preactivation
        assert x is not None
        assert a is not None
        if self.overwritten:
            raise ValueError(
                f"the input of layer {name!r} was overwritten in place between the forward pass and step()"
            )
        overwritten = self.output_overwritten
        if not overwritten and x.dtype is dtype and a.dtype is dtype:
            return x, a
        allowed = (dtype, torch.bfloat16, torch.float16)
        if x.dtype not in allowed:
            self.x = x = x.to(dtype)
        if overwritten:
            if is_sharded(trained_weight(self.module)):
                raise ValueError(
                    f"the output of layer {name!r} was overwritten in place, and its weight is sharded by now: take "
                    "activation functions that are not in place"
                )
            with torch.no_grad(), without_autocast():
                a = type(self.module).forward(self.module, x.to(dtype))
        elif a.dtype not in allowed:
            a = a.to(dtype)
        self.preactivation, self.versions = a, (x._version, a._version)
        return x, a
