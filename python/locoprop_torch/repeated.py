"""A step that is like the one before: nothing of it is looked up, decided or checked anew.

In a training loop, steps differ in numbers and in what is in tensors. So a step is kept with all that it was made from
otherwise, and where the next one has the same, it is made of the same calls. To find that out is one comparison for
all tensors, and takes a fraction of the time of making them. All that is unusual (several passes, masks, convolutions,
shares of several processes) is made anew in every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor

from locoprop_kernels.metadata import Metadata
from locoprop_kernels.patches import Rows
from locoprop_kernels.sampling import Sampling
from locoprop_torch.layers import ModelLayers
from locoprop_torch.step import Call, Solved, calls_of
from locoprop_torch.work import Place

if TYPE_CHECKING:
    from locoprop_torch.optimizer import LocoProp

__all__ = ["Preparation"]


class Preparation:
    """Prepares the steps of an optimiser: like the one before where that can be, else anew."""

    def __init__(self) -> None:
        self._before: _RepeatedStep | None = None
        # What kinds of problems the step before had. Only after two with the same is one kept: batches that differ in
        # size from step to step would gain nothing from it.
        self._kinds: list[tuple[int, ...]] = []

    def prepared(self, optimizer: LocoProp, where: Mapping[int, Place]) -> Solved:
        """The calls of the backend that make a step, checked and not solved yet.

        Args:
            optimizer: the optimiser.
            where: the place of every parameter, by its ``id``.

        Raises:
            TypeError, ValueError: a layer cannot be trained as it is; none is, then.
        """
        optimizer._model_layers.output_gradient.look(optimizer._layers)
        if self._before is not None and (again := self._before.again(optimizer, where)) is not None:
            return again
        self._before = None
        solved = calls_of(optimizer, where)
        kinds = [call.checked.kind for call in solved.calls if call.checked is not None]
        if kinds == self._kinds and _can_be_repeated(solved):
            self._before = _RepeatedStep(solved, optimizer)
        self._kinds = kinds
        return solved


def _can_be_repeated(solved: Solved) -> bool:
    """Whether another step can be made of the same calls."""
    works = [work for call in solved.calls for work in call.work]
    return bool(works) and not solved.elsewhere and all(work.repeats for work in works)


class _RepeatedStep:
    """A step, and what another one has to have in common with it.

    Args:
        solved: the step, whose problems have been checked.
        optimizer: the optimiser.
    """

    def __init__(self, solved: Solved, optimizer: LocoProp) -> None:
        self._calls, self._idle = solved.calls, solved.idle
        self._works = [work for call in solved.calls for work in call.work]
        self._trained = [one for work in self._works for one in work.trained.values()]
        # Others would be those of an optimiser that has loaded a state, which has the same rules and parameters.
        self._groups = [one.place.group for one in self._trained]
        self._parameters = [one.parameter for one in self._trained]
        self._ids = [id(parameter) for parameter in self._parameters]
        layers, ours = optimizer._layers.values(), set(self._ids)
        self._layers = len(layers)
        self._untrained = [p for layer in layers for p in layer.parameters.values() if id(p) not in ours]
        self._asked = _asked(optimizer, self._calls)
        self._slots = [slot for work in self._works for state in work.states.values() for slot in state.kept.values()]
        biases = [work.problem.bias for work in self._works if work.problem.bias is not None]
        self._tensors_of_problems = [*(work.problem.weight for work in self._works), *biases]
        rows = [(work.problem.x, work.problem.preactivation) for work in self._works]
        tensors, self._rows = self._tensors([one.gradient for one in self._trained], rows)
        self._metadata = Metadata(tensors)

    def again(self, optimizer: LocoProp, where: Mapping[int, Place]) -> Solved | None:
        """The step that is to be made, up to the solution; ``None`` where it is another one, and nothing was changed.

        Args:
            optimizer: the optimiser.
            where: the place of every parameter, by its ``id``.

        Raises:
            ValueError: the model has another module or parameter in a layer's place.
        """
        layers, state = optimizer._model_layers, optimizer.state
        if len(layers.captured) != self._layers or _asked(optimizer, self._calls) != self._asked:
            return None
        places = [where[number] for number in self._ids if number in where]
        gradients = [gradient for p in self._parameters if (gradient := p.grad) is not None]
        kept = [state.get(parameter) or {} for parameter in self._parameters]
        slots = [*chain.from_iterable([slots.values() for slots in kept])]
        if (
            len(places) != len(self._groups)
            or not all(map(is_, [place.group for place in places], self._groups))
            or len(gradients) != len(self._trained)
            or [parameter for parameter in self._untrained if parameter.grad is not None]
            or len(slots) != len(self._slots)
            or not all(map(is_, slots, self._slots))
        ):
            return None
        rows = self._rows_of_step(layers, optimizer._sampling())
        if rows is None:
            return None
        tensors, others = self._tensors(gradients, rows)
        if others != self._rows or not self._metadata.fits(tensors):
            return None
        for one, gradient, place in zip(self._trained, gradients, places, strict=True):
            one.gradient, one.place = gradient, place
        for work, own in zip(self._works, rows, strict=True):
            work.take_anew(own, layers.output_gradient)
        for call in self._calls:
            call.look_up_rates(optimizer)
        return Solved(self._calls, self._idle)

    def _rows_of_step(
        self, layers: ModelLayers, sampling: Sampling | None
    ) -> list[tuple[Tensor | Rows, Tensor | Rows]] | None:
        """The rows of each layer; ``None`` where they are not those of a single pass, or there are masks or shares."""
        for layer in layers.captured.values():
            if layers.masks(layer) or layer.outputs is not None:
                return None
        found = []
        for work in self._works:
            rows = work.layer.only_rows(sampling)
            if rows is None:
                return None
            found.append(rows)
        return found

    def _tensors(
        self, gradients: Sequence[Tensor], rows: Sequence[tuple[Tensor | Rows, Tensor | Rows]]
    ) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
        """All tensors that the step looks at, and the descriptions of rows that are none."""
        tensors, others = [*self._tensors_of_problems, *gradients, *self._slots], []
        for part in chain.from_iterable(rows):
            if isinstance(part, Tensor):
                tensors.append(part)
            else:
                others.append(part.described())
        return tensors, others


def _asked(optimizer: LocoProp, calls: Sequence[Call]) -> list[Any]:
    """What says what a step is to do for the layers, but for numbers."""
    return [optimizer.local_loss, *[(id(c.group["rule"]), c.group["transfer"]) for c in calls]]
