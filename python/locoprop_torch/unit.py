"""The unit of an activation learning rate that is given per example, found at the first step.

A loss that is a mean over ``n`` terms has gradients ``n`` times smaller than one that is a sum, and a target
``Y = f(A0) - γ ∂L/∂A0`` moves ``n`` times less far for the same ``γ``. Nobody tells an optimiser what ``n`` is: the
examples of a batch, its tokens, or examples times outputs. But at the output of a model, before training, the gradient
of a single term is about one: a probability minus a label, or a residual of targets of the usual size. So the unit is

    u = RMS over the rows of the output layer of  max_j |∂L/∂A0_ij|

at the first step, and ``γ = PerExample.scale / u``: at first the target of an output moves by about ``scale``. The
largest element of a row, not its norm, makes this independent of the number of outputs: it is near one both for a class
too many and for residuals in all outputs. Later steps keep ``u``, so that targets come nearer as the loss falls, and
only correct it for the number of rows: with a mean, a smaller batch has larger gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from locoprop_kernels.patches import row_chunks
from locoprop_kernels.problem import is_number, shown

if TYPE_CHECKING:
    from locoprop_torch.capture import CapturedLayer

__all__ = ["PER_EXAMPLE", "Measured", "OutputGradient", "PerExample"]

# A gradient that has shrunk by more than this between the backward pass and the step was scaled for mixed precision;
# one that has shrunk by less was clipped.
_CLIPPED = 2.0**-6


@dataclass(frozen=True)
class PerExample:
    """An activation learning rate in a unit that depends neither on the batch nor on how the loss averages.

    Args:
        scale: how far the target of an output moves at first, where 1 is about as far as the gradient of one example
            says; ``> 0``.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not is_number(self.scale):
            raise TypeError(f"scale of PerExample must be a number, got {shown(self.scale)}")
        if not (math.isfinite(self.scale) and self.scale > 0):
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


#: The default: what the output of a single example wants, a few times over.
PER_EXAMPLE = PerExample(3.0)


class Measured(NamedTuple):
    """What was measured at the output of a pass.

    Attributes:
        order: counts the measurements.
        squares: the sum of ``(max_j |∂L/∂A_ij|)²`` over its rows.
        rows: their number.
    """

    order: int
    squares: Tensor
    rows: int


class OutputGradient:
    """Measures the unit at the first layer that a backward pass comes to, which is the model's last.

    Attributes:
        size: ``u`` times the number of rows that it was measured on; ``None`` before the first step.
        layer: the name of the layer that it was measured at.
        rate: ``1 / u`` for the number of rows of the latest step.
    """

    def __init__(self) -> None:
        self.size: float | None = None
        self.layer: str | None = None
        self.rate: float | None = None
        # The latest backward pass of which the first layer is known.
        self._number = -1
        self._order = itertools.count()

    def reach(self, layer: CapturedLayer, number: int, gradient: Tensor) -> Measured | None:
        """A backward pass has come to the output of a layer.

        Args:
            layer: the layer.
            number: the number of the backward pass.
            gradient: ``∂L/∂A`` in the shape of the module's output.

        Returns:
            What was measured; ``None`` where nothing is to be.
        """
        if self.size is not None or number == self._number or not gradient.numel():
            return None
        self._number = number
        rows = layer.layout.outputs(gradient.detach())
        largest = [chunk.abs().amax(-1).float() for chunk in row_chunks(rows)]
        # Groups are parts of the same examples.
        whole = torch.cat(largest, -1)
        whole = whole if whole.dim() == 1 else whole.amax(0)
        return Measured(next(self._order), whole.square().sum(), len(whole))

    def activation_lr(self, given: Any, layers: Mapping[str, CapturedLayer]) -> float:
        """``γ`` for this step.

        Args:
            given: the hyper-parameter: a number is ``γ`` itself.
            layers: the captured layers by name, with the passes that count.
        """
        if not isinstance(given, PerExample):
            return float(given)
        if self.size is None:
            self._measure(layers)
        if self.size is not None:
            rows = _count_rows(layers[self.layer]) if self.layer is not None and self.layer in layers else 0
            # A step that does not go through this layer takes the rate of the last one that did.
            if rows or self.rate is None:
                self.rate = max(rows, 1) / self.size
        return given.scale * (1.0 if self.rate is None else self.rate)

    def _measure(self, layers: Mapping[str, CapturedLayer]) -> None:
        """Find ``size`` from what the passes that count have brought; leave it if they have brought nothing usable."""
        found = {
            name: sorted(captured.output for captured in layer.passes if captured.output is not None)
            for name, layer in layers.items()
        }
        # Backward passes within others, as those of checkpoints are, begin at layers inside of the model.
        name = min((name for name, some in found.items() if some), key=lambda name: found[name][0], default=None)
        if name is None:
            return
        rows = sum(measured.rows for measured in found[name])
        mean = float(torch.stack([measured.squares for measured in found[name]]).sum()) / rows
        factor = layers[name].shrunk()
        size = math.sqrt(mean) * rows * (factor if factor < _CLIPPED else 1.0)
        if math.isfinite(size) and size > 0:
            self.size, self.layer = size, name

    @contextmanager
    def as_before_if_refused(self) -> Iterator[None]:
        """Forget what is measured within if that raises: a step is a transaction."""
        before = self.size, self.layer, self.rate
        try:
            yield
        except BaseException:
            self.size, self.layer, self.rate = before
            raise

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, in plain numbers and text; empty before the first step."""
        return {} if self.size is None else {"size": self.size, "layer": self.layer, "rate": self.rate}

    def load(self, state: Mapping[str, Any]) -> None:
        """Resume from :meth:`state`."""
        self.size, self.layer, self.rate = state.get("size"), state.get("layer"), state.get("rate")


def _count_rows(layer: CapturedLayer) -> int:
    """How many rows the passes of a layer that count have, in all."""
    return sum(
        captured.size or (0 if a is None else layer.layout.outputs(a).shape[-2])
        for captured in layer.passes
        for a in (captured.preactivation,)
    )
