"""With ``rows``: copies of the rows of a pass that local steps will take, in place of all of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from locoprop_kernels.chosen import ChosenRows, fitted
from locoprop_kernels.patches import Rows, several
from locoprop_kernels.sampling import Sampling, set_order
from locoprop_kernels.scratch import give_back

__all__ = ["KeptRows", "joined", "starts_of"]


@dataclass(eq=False)
class KeptRows:
    """The rows of a pass that local steps will take: of all sets those that come first in the order.

    Row ``i`` of the pass is row ``offset + i`` of the step, and belongs to the set of that number modulo ``sets``.

    Attributes:
        size: how many rows the pass has.
        sampling: what said which rows these are.
        sets: ``S``, into how many sets the rows of the step fall.
        offset: how many rows the passes before it have.
        x: rows of the input for each local step that takes a set, ``[b, K]`` or ``[G, b, K]``.
        preactivation: those of the pre-activation, ``[b, N]`` or ``[G, b, N]``.
        memory: what ``x`` and ``preactivation`` are views of, where it can be kept for the next step.
    """

    size: int
    sampling: Sampling
    sets: int
    offset: int
    x: list[Tensor]
    preactivation: list[Tensor]
    memory: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, x: Tensor | Rows, preactivation: Tensor | Rows, sampling: Sampling, sets: int, offset: int) -> KeptRows:
        """Copy the rows of a pass that local steps will take.

        Args:
            x: all rows of its input, ``[B, K]`` or ``[G, B, K]``.
            preactivation: all rows of its output.
            sampling: what says which rows to take.
            sets: ``S``.
            offset: how many rows the passes before it have.
        """
        size = x.shape[-2]
        starts = starts_of(sampling, sets, offset)
        sizes = [len(range(start, size, sets)) for start in starts]
        copies = several(x, starts, sets), several(preactivation, starts, sets)
        inputs, outputs = (list(rows.split(sizes, -2)) for rows in copies)
        return cls(size, sampling, sets, offset, inputs, outputs, copies)

    def release(self) -> None:
        """Let go of the rows: their memory is that of the next ones."""
        give_back(*self.memory)
        self.x, self.preactivation, self.memory = [], [], ()

    @property
    def filled(self) -> bool:
        """Whether there is a row at all: a few may have been left without one by passes that no longer count."""
        return any(rows.shape[-2] for rows in self.x)

    def thin(self, sets: int) -> None:
        """Keep what is left if the rows of the step fall into ``sets`` sets: more than so far, and nested ones.

        They are not nested only where a pass was chosen for another step, or for another number of ``rows``. Then as
        many rows stay as there should be.
        """
        if sets == self.sets:
            return
        ratio = sets // self.sets
        nested = ratio * self.sets == sets and ratio & (ratio - 1) == 0
        starts = starts_of(self.sampling, sets, self.offset)

        def left(rows: Tensor, start: int) -> Tensor:
            if nested:
                return rows[..., start // self.sets :: ratio, :]
            return fitted(rows, len(range(start, self.size, sets)))

        self.x, self.preactivation = (
            _copied([left(rows, start) for rows, start in zip(parts, starts, strict=True)])
            for parts in (self.x, self.preactivation)
        )
        self.sets, self.memory = sets, ()

    def to(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """``x`` and ``preactivation`` in dtypes that a local problem takes, if the weight has ``dtype``."""
        allowed = (dtype, torch.bfloat16, torch.float16)
        x, a = (
            [rows if rows.dtype in allowed else rows.to(dtype) for rows in own] for own in (self.x, self.preactivation)
        )
        return x, a


def joined(parts: Sequence[KeptRows], dtype: torch.dtype) -> tuple[ChosenRows, ChosenRows]:
    """Inputs and pre-activations of several passes as one, for a weight of ``dtype``.

    Args:
        parts: in order, of one number of sets.
        dtype: of the weight.
    """
    sampling, sets = parts[0].sampling, parts[0].sets
    size = sum(part.size for part in parts)
    numbers = set_order(sampling.seed, sets, min(part.sampling.steps for part in parts))
    found = []
    for columns in zip(*(part.to(dtype) for part in parts), strict=True):
        kinds = {rows[0].dtype for rows in columns}
        kept = {}
        for t, number in enumerate(numbers):
            rows = [own[t] if len(kinds) == 1 else own[t].to(dtype) for own in columns]
            kept[number] = rows[0] if len(rows) == 1 else torch.cat(rows, -2)
        found.append(ChosenRows(size, sets, kept))
    return found[0], found[1]


def starts_of(sampling: Sampling, sets: int, offset: int) -> list[int]:
    """The first row of a pass that each local step takes; they take every ``sets``-th from there."""
    return [(number - offset) % sets for number in set_order(sampling.seed, sets, sampling.steps)]


def _copied(parts: Sequence[Tensor]) -> list[Tensor]:
    """Copies, which do not keep what they are parts of alive."""
    return list(torch.cat(list(parts), -2).split([part.shape[-2] for part in parts], -2))
