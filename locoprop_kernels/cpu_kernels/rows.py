"""Rows of the batch as CPU kernels read them: where they lie, or in a copy."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from locoprop_kernels.patches import Rows, one_after_another, several
from locoprop_kernels.sampling import set_size

__all__ = ["VECTOR", "Located", "located"]

#: Numbers of the widest vector register, and of a line of the caches: where rows are no multiple of it, what is left
#: over takes as long as many whole ones.
VECTOR = 16
# Rows of this length, or a multiple of it, share few places of a cache.
_CONFLICT = 512


class Which(NamedTuple):
    """Which rows local steps take.

    Attributes:
        firsts: address of the first row of each local step but the first ``[T - 1]``.
        step: how many rows further the next one is.
        counts: address of how many each takes ``[T - 1]``.
        most: the most that one takes.
        memory: what the addresses are of.
    """

    firsts: int
    step: int
    counts: int
    most: int
    memory: NDArray[np.int64]


class Located(NamedTuple):
    """Rows in float32, each of them contiguous.

    Attributes:
        rows: all of them, or those that are taken.
        length: how long a row is, with zeros behind it.
        which: which of them are taken.
    """

    rows: Tensor
    length: int
    which: Which


def located(
    rows: Tensor | Rows, sets: int, order: tuple[int, ...], rounding: torch.dtype, multiple: int = 1
) -> Located:
    """Rows where they are, if that will do, or in a copy.

    Args:
        rows: all rows, or those that were chosen.
        sets: into how many sets they fall.
        order: the set of each local step.
        rounding: the dtype that they are rounded to; they are held in float32.
        multiple: what the length of a row must be a multiple of: there are zeros behind it where it is not.
    """
    batch, columns = rows.shape
    length = -(-columns // multiple) * multiple
    if multiple > 1 and length % _CONFLICT == 0:
        length += multiple
    numbers = None
    if not isinstance(rows, Tensor):
        numbers = tuple(dict.fromkeys(order))
        rows = one_after_another(rows, numbers, sets)
    elif length != columns or rounding is not torch.float32:  # of which only what is taken need be copied
        numbers = tuple(dict.fromkeys(order))
        rows = several(rows, numbers, sets)
    if rounding is not torch.float32:
        rows = rows.to(rounding)
    if length != columns:
        longer = torch.zeros(len(rows), length, dtype=torch.float32, device=rows.device)
        longer[:, :columns] = rows
        rows = longer
    elif rows.dtype is not torch.float32 or rows.stride(1) != 1:
        rows = rows.to(torch.float32).contiguous()
    return Located(rows, length, _which(batch, sets, order, numbers))


# All layers of a step with a batch of one size ask for the same.
@lru_cache(maxsize=8)
def _which(batch: int, sets: int, order: tuple[int, ...], numbers: tuple[int, ...] | None) -> Which:
    """Which rows local steps take.

    Args:
        batch: how many rows there are.
        sets: into how many sets they fall.
        order: the set of each local step.
        numbers: the sets that are there, one behind the other; ``None`` where all rows are, as they are.
    """
    sizes = {number: set_size(batch, sets, number) for number in order}
    firsts, step = {number: number for number in sizes}, sets
    if numbers is not None:
        first, step = 0, 1
        for number in numbers:
            firsts[number] = first
            first += sizes[number]
    memory = np.array([[firsts[number] for number in order], [sizes[number] for number in order]], np.int64)
    address = memory.ctypes.data
    return Which(address, step, address + memory.strides[0], max(sizes.values()), memory)
