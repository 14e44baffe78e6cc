"""Inputs of convolutions as rows of unfolded patches, formed a bounded chunk at a time.

A convolution is a linear layer whose examples are the positions of its output: row ``(n, o_1, ..)`` of ``X`` is the
patch of example ``n`` that output position ``(o_1, ..)`` sees. On the padded input all patches together are a strided
view, so nothing is copied until a chunk of rows is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from locoprop_kernels.scratch import take

__all__ = [
    "CHUNK_BYTES",
    "KEPT_BYTES",
    "Patches",
    "Rows",
    "Stacked",
    "described",
    "every",
    "one_after_another",
    "row_chunks",
    "several",
]

CHUNK_BYTES = 16 * 2**20
KEPT_BYTES = 256 * 2**20  # that one layer at a time may hold over its local loop: few layers need more
_RUN = 16  # numbers side by side in an input, from which on CPUs copy patches faster row by row


def _blocks(sizes: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Indices of consecutive blocks that cover leading dimensions of ``sizes``, each of at most ``limit`` elements."""
    inner = math.prod(sizes[1:])
    if inner > limit:
        for i in range(sizes[0]):
            for block in _blocks(sizes[1:], limit):
                yield (slice(i, i + 1), *block)
        return
    step = max(1, limit // inner)
    for start in range(0, sizes[0], step):
        yield (slice(start, start + step),)


class Rows:
    """Rows ``[B, K]``, or ``[G, B, K]`` of ``G`` groups, that are not held as one tensor.

    Attributes:
        shape: ``(B, K)`` or ``(G, B, K)``.
        dtype: of the chunks.
        device: of the chunks.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """Consecutive rows ``[b, K]`` or ``[G, b, K]``, of any strides.

        Each chunk is of at most ``max_bytes`` (but of at least one row) where it has to be formed.
        """
        # No abstract method: isinstance() takes ten times as long where a class has one.
        raise NotImplementedError(f"{type(self).__name__} must define chunks")

    def every(self, start: int, step: int) -> Tensor:
        """Rows ``start``, ``start + step``, ...: ``[b, K]`` or ``[G, b, K]``."""
        found, first = [], 0
        for chunk in self.chunks():
            found.append(chunk[..., (start - first) % step :: step, :])
            first += chunk.shape[-2]
        return torch.cat(found, -2)

    def several(self, starts: Sequence[int], step: int) -> Tensor:
        """:meth:`every` for each of ``starts``, one after another."""
        return torch.cat([self.every(start, step) for start in starts], -2)

    def group(self, index: int) -> Rows:
        """The rows ``[B, K]`` of one group.

        Raises:
            TypeError: these rows have no groups.
        """
        raise TypeError(f"{type(self).__name__} of shape {list(self.shape)} has no groups")

    def described(self) -> tuple[Any, ...]:
        """See :func:`described`."""
        return type(self), self.shape, self.dtype, self.device


def described(x: Tensor | Rows) -> tuple[Any, ...]:
    """All that checks and plans look at: two that differ in the values of their elements alone have the same.

    Raises:
        RuntimeError: a tensor has no strides, as sparse ones.
    """
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device, x.layout
    return x.described()


def row_chunks(x: Tensor | Rows, max_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
    """Consecutive rows of ``x``: a tensor as it is, :class:`Rows` in chunks of at most ``max_bytes``."""
    if isinstance(x, Tensor):
        yield x
    else:
        yield from x.chunks(max_bytes)


def every(x: Tensor | Rows, start: int, step: int) -> Tensor:
    """Rows ``start``, ``start + step``, ... of ``x``; of a tensor a view, of :class:`Rows` only these are formed."""
    return x[..., start::step, :] if isinstance(x, Tensor) else x.every(start, step)


def several(x: Tensor | Rows, starts: Sequence[int], step: int) -> Tensor:
    """:func:`every` for each of ``starts``, one after another: a copy, in memory that can be kept."""
    if isinstance(x, Tensor):
        places = _places(x.shape[-2], tuple(starts), step).to(x.device)
        copy = take([*x.shape[:-2], len(places), x.shape[-1]], x.dtype, x.device)
        return torch.index_select(x, -2, places, out=copy)
    return x.several(starts, step)


def one_after_another(x: Rows, starts: Sequence[int], step: int) -> Tensor:
    """:func:`every` for each of ``starts``, one after another; no copy where they lie so, as rows that were kept do."""
    parts = [x.every(start, step) for start in starts]
    first, place, rows = parts[0], parts[0].storage_offset(), 0
    memory = first.untyped_storage().data_ptr()
    for part in parts:
        follows = part.storage_offset() == place and part.untyped_storage().data_ptr() == memory
        if part.dim() != 2 or not part.is_contiguous() or not follows:
            return torch.cat(parts, -2)
        place, rows = place + part.numel(), rows + part.shape[0]
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


# All layers of a forward pass with a batch of one size ask for the same.
@lru_cache(maxsize=8)
def _places(count: int, starts: tuple[int, ...], step: int) -> Tensor:
    """Numbers of the rows ``start``, ``start + step``, ... below ``count``, for one of ``starts`` after another."""
    return torch.from_numpy(np.concatenate([np.arange(start, count, step, dtype=np.int64) for start in starts]))


class Stacked(Rows):
    """The rows of several inputs, one after another.

    Args:
        parts: tensors ``[B_i, K]`` (or ``[G, B_i, K]``) or :class:`Rows`, of one ``K``, ``G``, dtype and device.

    Raises:
        ValueError: there are no parts, or they do not fit together.
    """

    def __init__(self, parts: Sequence[Tensor | Rows]) -> None:
        if not parts:
            raise ValueError("parts of Stacked must hold at least one tensor, got none")
        kinds = {((*part.shape[:-2], part.shape[-1]), part.dtype, part.device) for part in parts}
        if len(kinds) > 1:
            raise ValueError(f"parts of Stacked must agree in G, K, dtype and device, got {sorted(map(str, kinds))}")
        self.parts = tuple(parts)
        *groups, _, columns = parts[0].shape
        rows = sum(part.shape[-2] for part in parts)
        super().__init__((*groups, rows, columns), parts[0].dtype, parts[0].device)

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        for part in self.parts:
            yield from row_chunks(part, max_bytes)

    def every(self, start: int, step: int) -> Tensor:
        found, first = [], 0
        for part in self.parts:
            if (place := (start - first) % step) < part.shape[-2]:
                found.append(every(part, place, step))
            first += part.shape[-2]
        return torch.cat(found, -2)

    def described(self) -> tuple[Any, ...]:
        return *super().described(), *map(described, self.parts)

    def group(self, index: int) -> Stacked:
        return Stacked([part[index] if isinstance(part, Tensor) else part.group(index) for part in self.parts])


class Patches(Rows):
    """The patches of a convolution's input as rows ``[B, K]``: ``B`` = examples × output positions.

    Columns are ordered like a weight ``[N, C, *kernel_size]`` flattened from dimension 1 on; with ``channels_last``
    like one ``[N, *kernel_size, C]``.

    Args:
        x: padded input, ``[examples, C, *spatial]``, any strides.
        kernel_size: one integer per spatial dimension; likewise the following.
        stride: step between patches.
        dilation: step inside a patch.
        channels_last: order of the columns.
        groups: ``G`` of the convolution; ``None`` for rows without a dimension for groups. Each group has
            ``C / G`` channels, and the rows are ``[G, B, K]``.

    Attributes:
        view: all patches as a strided view of the input, ``[examples, *outputs, *columns]``, with groups ``[examples,
            *outputs, G, *columns]``. The address of element ``(row, column)`` is a function of the row plus a function
            of the column.

    Raises:
        ValueError: numbers of dimensions differ, the input is smaller than a patch, or the groups do not divide ``C``.
    """

    def __init__(
        self,
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        channels_last: bool = False,
        groups: int | None = None,
    ) -> None:
        spatial = len(kernel_size)
        if not x.dim() - 2 == spatial == len(stride) == len(dilation):
            raise ValueError(
                f"x must be [examples, C, *spatial] with {spatial} spatial dimensions, stride and dilation must have "
                f"one entry each, got {list(x.shape)}, {stride}, {dilation}"
            )
        spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True)]
        if any(size < span for size, span in zip(x.shape[2:], spans, strict=True)):
            raise ValueError(f"the padded input must hold a patch of {spans}, got {list(x.shape[2:])}")
        if groups is not None and (groups < 1 or x.shape[1] % groups):
            raise ValueError(f"groups must divide the {x.shape[1]} channels of x, got {groups}")
        self._source = (x, kernel_size, stride, dilation, channels_last)
        self._groups = groups
        steps = x.stride()
        outputs = [(size - span) // s + 1 for size, span, s in zip(x.shape[2:], spans, stride, strict=True)]
        output_steps = [step * s for step, s in zip(steps[2:], stride, strict=True)]
        kernel_steps = [step * d for step, d in zip(steps[2:], dilation, strict=True)]
        channels = x.shape[1] // (groups or 1)
        columns, column_steps = [channels, *kernel_size], [steps[1], *kernel_steps]
        if channels_last:
            columns, column_steps = [*columns[1:], columns[0]], [*column_steps[1:], column_steps[0]]
        lead, lead_steps = ([], []) if groups is None else ([groups], [channels * steps[1]])
        self._positions = [x.shape[0], *outputs]
        self.view = x.as_strided(
            [*self._positions, *lead, *columns], [steps[0], *output_steps, *lead_steps, *column_steps]
        )
        super().__init__((*lead, math.prod(self._positions), math.prod(columns)), x.dtype, x.device)

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        k, positions, d = self.shape[-1], len(self._positions), self.view.dim()
        lead = d - positions - len(self._source[1]) - 1  # dimensions for groups: none or one
        rows, columns = range(positions), range(positions + lead, d)
        groups, groups_size = range(positions, positions + lead), self.shape[:-2]
        by_rows = self.device.type != "cpu" or (self.view.stride(-1) == 1 and self.view.shape[-1] >= _RUN)
        row_bytes = math.prod(groups_size) * k * self.dtype.itemsize
        for block in _blocks(self._positions, max(1, max_bytes // row_bytes)):
            patches = self.view[block]
            if by_rows:
                yield patches.permute(*groups, *rows, *columns).reshape(*groups_size, -1, k)
            else:  # as [K, b]: the copy then runs along the output, which is mostly longer than a row of the kernel
                yield patches.permute(*groups, *columns, *rows).reshape(*groups_size, k, -1).mT

    def every(self, start: int, step: int) -> Tensor:
        rows = torch.arange(min(start, self.shape[-2]), self.shape[-2], step, device=self.device)
        patches = self.view[torch.unravel_index(rows, self._positions)].flatten(1 if self._groups is None else 2)
        return patches if self._groups is None else patches.movedim(0, 1)

    def group(self, index: int) -> Patches:
        if self._groups is None:
            return super().group(index)  # type: ignore[return-value]
        x, kernel_size, stride, dilation, channels_last = self._source
        return Patches(x.chunk(self._groups, 1)[index], kernel_size, stride, dilation, channels_last)
