"""Rows of which only those are there that local steps take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from locoprop_kernels.patches import CHUNK_BYTES, Rows
from locoprop_kernels.sampling import set_size

__all__ = ["ChosenRows", "fitted"]


class ChosenRows(Rows):
    """Rows ``[B, K]``, or ``[G, B, K]``, of which some sets have been kept, see :mod:`locoprop_kernels.sampling`.

    Args:
        batch: ``B``, how many rows the whole has.
        sets: ``S``, into how many sets it falls.
        kept: sets by their number, ``[b, K]`` or ``[G, b, K]``, of one dtype and device.

    Raises:
        ValueError: there are none, or all of them are empty.
    """

    def __init__(self, batch: int, sets: int, kept: Mapping[int, Tensor]) -> None:
        if not any(rows.shape[-2] for rows in kept.values()):
            raise ValueError(f"kept must hold rows of one of the {sets} sets at least, got none")
        self.sets, self.kept = sets, dict(kept)
        first = next(iter(self.kept.values()))
        *groups, _, columns = first.shape
        super().__init__((*groups, batch, columns), first.dtype, first.device)

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """All rows: they are not there, as only the sets that local steps take were kept.

        Raises:
            ValueError: always, for that reason.
        """
        raise ValueError(f"only {len(self.kept)} of {self.sets} sets of rows were kept, so all rows cannot be formed")

    def every(self, start: int, step: int) -> Tensor:
        """The set ``start`` of ``step = S``; in place of one that was not kept, another one cut or filled to its size.

        That happens only where the number of local steps or the seed was changed after the rows had been chosen.

        Raises:
            ValueError: ``step`` is not ``S``.
        """
        if step != self.sets:
            raise ValueError(f"step must be {self.sets}, the sets that rows were kept of, got {step}")
        found = self.kept.get(start)
        if found is None or not found.shape[-2]:
            filled = [rows for rows in self.kept.values() if rows.shape[-2]]
            found = filled[start % len(filled)]
        return fitted(found, set_size(self.shape[-2], self.sets, start))

    def described(self) -> tuple[Any, ...]:
        return *super().described(), self.sets

    def group(self, index: int) -> ChosenRows:
        if len(self.shape) == 2:
            super().group(index)
        return ChosenRows(self.shape[-2], self.sets, {number: rows[index] for number, rows in self.kept.items()})


def fitted(rows: Tensor, size: int) -> Tensor:
    """``size`` rows out of ``rows``, spread evenly: some left out or repeated; mostly there are as many anyway."""
    found = rows.shape[-2]
    if found == size or not found:
        return rows
    places = (2 * torch.arange(size, device=rows.device) + 1) * found // (2 * size)
    return rows.index_select(-2, places)
