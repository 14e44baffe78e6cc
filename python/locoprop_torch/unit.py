"""The unit of an activation learning rate that is given per example, found at the first step.

A loss that is a mean over ``n`` terms has gradients ``n`` times smaller than one that is a sum, and a target
``Y = f(A0) - γ ∂L/∂A0`` moves ``n`` times less far for the same ``γ``. Nobody tells an optimiser what ``n`` is: the
examples of a batch, its tokens, or examples times outputs. But at the output of a model, before training, the gradient
of a single term is about one: a probability minus a label, or a residual of targets of the usual size. So the unit is

    u = RMS over the rows of the output layer of  max_j |∂L/∂A0_ij|

at the first step. The largest element of a row, not its norm, makes this independent of the number of outputs: it is
near one both for a class too many and for residuals in all outputs.

All ``L`` captured layers move at once, and each of them to correct the same error, so each gets a share of it:

    γ = scale / (L u) · n / n_out

which moves the targets of all layers together by about ``scale``, counted at the output; ``n`` is the number of rows of
the layer, ``n_out`` that of the output layer. The two differ where an example has several rows, as the positions of a
convolution, that lead to one row of the output: each of 64 positions that are averaged sees a 64th of the gradient, and
without the factor its target would move a 64th as far. Later steps keep ``L u n_out``, so that targets come nearer as
the loss falls, and take ``n`` as it is then: with a mean, a smaller batch has larger gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from locoprop_kernels.arguments import is_finite, is_number, shown
from locoprop_kernels.patches import Rows, row_chunks

if TYPE_CHECKING:
    from locoprop_torch.capture import CapturedLayer

__all__ = ["PER_EXAMPLE", "Measured", "OutputGradient", "PerExample", "unscaling"]

# A gradient that has shrunk by more than this between the backward pass and the step was scaled for mixed precision, by
# a power of two; one that has shrunk by less was clipped.
_CLIPPED = 2.0**-6


def unscaling(factor: float) -> float:
    """What a gradient was multiplied by to undo a scaling of the loss, if its norm has changed by ``factor``."""
    if not 0 < factor < _CLIPPED:
        return 1.0
    return 2.0 ** round(math.log2(factor))


@dataclass(frozen=True)
class PerExample:
    """An activation learning rate in a unit that depends neither on the batch nor on how the loss averages.

    A layer with ``n`` rows has ``γ = scale / (L u) · n / n_out``. The first step finds ``L``, the number of captured
    layers that take part in it, ``n_out``, the number of rows of the model's output layer, and ``u``, the root mean
    square over these rows of ``max_j |∂L/∂A0_ij|``. ``L u n_out`` is kept from then on, and ``n`` is that of each step.

    Args:
        scale: how far the targets of all layers together move at first, where 1 is about as far as the gradient of one
            example says; ``> 0``.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not is_number(self.scale):
            raise TypeError(f"scale of PerExample must be a number, got {shown(self.scale)}")
        if not (is_finite(self.scale) and self.scale > 0):
            raise ValueError(f"scale of PerExample must be finite and > 0, got {shown(self.scale)}")
        object.__setattr__(self, "scale", float(self.scale))

    def __repr__(self) -> str:
        return f"{self.scale!r} per example"

    @classmethod
    def parsed(cls, text: str) -> PerExample:
        """The value that has this ``repr``: checkpoints hold no objects.

        Raises:
            ValueError: there is none.
        """
        number, _, unit = text.partition(" ")
        if unit != "per example":
            raise ValueError(f"activation_lr must be a number or like '1.0 per example', got {text!r}")
        return cls(float(number))


#: The default, from the study in ``bench/results/defaults``.
PER_EXAMPLE = PerExample(5.0)


class Measured(NamedTuple):
    """What was measured at the output of a pass.

    Attributes:
        order: counts the measurements.
        squares: the sum of ``(max_j |∂L/∂A_ij|)²`` over its rows.
        rows: their number.
        settled: whether ``squares`` are of the gradient as it is at the step already.
    """

    order: int
    squares: Tensor
    rows: int
    settled: bool = False

    @classmethod
    def of(cls, order: int, rows: Tensor | Rows) -> Measured | None:
        """Measure ``∂L/∂A``, ``[n, N]`` or ``[G, n, N]``; ``None`` where it has no elements."""
        if not math.prod(rows.shape):
            return None
        largest = torch.cat([chunk.abs().amax(-1) for chunk in row_chunks(rows)], -1)
        # Groups are parts of the same examples.
        largest = largest if largest.dim() == 1 else largest.amax(0)
        return cls(order, largest.double().square().sum(), len(largest))

    def at_step(self, layer: CapturedLayer) -> float:
        """The sum of squares, of the gradient as it is at the step."""
        return float(self.squares) * (1.0 if self.settled else layer.unscaled() ** 2)


class OutputGradient:
    """Measures the unit at the first layer that a backward pass comes to, which is the model's last.

    Attributes:
        size: ``L u`` times the number of rows that it was measured on; ``None`` before the first step.
        layer: the name of the layer that it was measured at.
        rate: ``γ`` of a layer with as many rows as the output layer has had in the latest step, for a scale of one.
        wanted: whether anybody has a :class:`PerExample`.
    """

    def __init__(self) -> None:
        self.size: float | None = None
        self.layer: str | None = None
        self.rate: float | None = None
        self.wanted = False
        # What the three will be once the step that is being made has been committed.
        self._next: tuple[float | None, str | None, float | None] = (None, None, None)
        # The latest backward pass of which the first layer is known.
        self._number = -1
        self._order = itertools.count()

    def begins(self, number: int) -> int | None:
        """A backward pass has come to the output of a layer.

        Args:
            number: the number of the backward pass.

        Returns:
            A number that counts the backward passes, if this is the first layer that it comes to and its gradient is to
            be measured; ``None`` otherwise.
        """
        if not self.wanted or self.size is not None or number == self._number:
            return None
        self._number = number
        return next(self._order)

    def look(self, layers: Mapping[str, CapturedLayer]) -> None:
        """Find the rate of a step that is being made; :meth:`keep` makes it last.

        Args:
            layers: the captured layers by name, with the passes that count.
        """
        size, name = (self.size, self.layer) if self.size is not None or not self.wanted else _measured(layers)
        rate = self.rate
        if size is not None:
            rows = _count_rows(layers[name]) if name is not None and name in layers else 0
            # A step that does not go through this layer takes the rate of the last one that did.
            if rows or rate is None:
                rate = max(rows, 1) / size
        self._next = size, name, rate

    def activation_lr(self, given: Any, layer: CapturedLayer) -> float:
        """``γ`` of a layer in the step that is being made, for its hyper-parameter: a number is ``γ`` itself."""
        if not isinstance(given, PerExample):
            return float(given)
        size, _, rate = self._next
        if size is None or rate is None:
            return given.scale
        rows = _count_rows(layer)
        # A layer that has a gradient but no rows is one of which nothing is known.
        return given.scale * (rows / size if rows else rate)

    def keep(self) -> None:
        """The step has been made."""
        self.size, self.layer, self.rate = self._next

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, in plain numbers and text; empty before the first step."""
        return {} if self.size is None else {"size": self.size, "layer": self.layer, "rate": self.rate}

    def load(self, state: Mapping[str, Any]) -> None:
        """Resume from :meth:`state`."""
        self.size, self.layer, self.rate = state.get("size"), state.get("layer"), state.get("rate")


def _measured(layers: Mapping[str, CapturedLayer]) -> tuple[float | None, str | None]:
    """``size`` and ``layer`` from what the passes that count have brought; ``None`` if that is nothing usable."""
    found = {
        name: sorted(measured for captured in layer.passes if (measured := layer.measured(captured)) is not None)
        for name, layer in layers.items()
    }
    # Backward passes within others, as those of checkpoints are, begin at layers inside of the model.
    name = min((name for name, some in found.items() if some), key=lambda name: found[name][0], default=None)
    if name is None:
        return None, None
    rows = sum(measured.rows for measured in found[name])
    mean = sum(measured.at_step(layers[name]) for measured in found[name]) / rows
    moving = sum(bool(layer.passes) for layer in layers.values())
    size = moving * math.sqrt(mean) * rows if mean >= 0 else math.nan
    return (size, name) if math.isfinite(size) and size > 0 else (None, None)


def _count_rows(layer: CapturedLayer) -> int:
    """How many rows the passes of a layer that count have, in all."""
    return sum(
        captured.size or (0 if a is None else layer.layout.outputs(a).shape[-2])
        for captured in layer.passes
        for a in (captured.preactivation,)
    )
