"""Where everything lies that a step works on: offsets in its buffer, the layer table, the lists of tiles.

All of it follows from the sizes of the layers, so it is worked out once and kept with the plan.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from locoprop_kernels.kernels.configs import Config
from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.sampling import set_size
from locoprop_kernels.settings import Settings

__all__ = ["ALIGNMENT", "COPY_BLOCK", "Kind", "LayerPlan", "Layout", "Piece", "Place", "float_bits"]

ALIGNMENT = 256
"""Bytes that every piece of a buffer is aligned to."""
COPY_BLOCK = 64
"""Tile size of the copies into the scratch."""
_NO_CODE = -1
# Columns of the last strides of a tensor, by that of its address, and how many strides that are.
_STRIDES: dict[int, tuple[int, list[int]]] = {
    c.X_SOURCE.value: (2, [c.X_SOURCE.value + 1, c.X_SOURCE.value + 2]),
    c.A0_SOURCE.value: (2, [c.A0_SOURCE.value + 1, c.A0_SOURCE.value + 2]),
}
for _base, _dims in ((c.WEIGHT.value, 2), (c.BIAS.value, 1)):
    _STRIDES[_base + c.GRAD.value] = _dims, [_base + c.GRAD_ROW.value]
    _STRIDES[_base + c.VALUE.value] = _dims, [_base + c.VALUE_ROW.value, _base + c.VALUE_COLUMN.value][:_dims]
# Lists of tiles beside those of the schedule, and how many numbers a tile has.
_TILE_LISTS = {"prepare_x": 4, "chunked_x": 4, "prepare_a0": 4, "softmax": 2, "partial": 4}


@dataclass(frozen=True)
class LayerPlan:
    """What a layout needs to know about a layer; sizes are those of a group.

    Attributes:
        batch: ``B``, or the most rows of a local step; ``K`` in the Gram form, whose ``X`` is ``XᵀX``.
        inputs: ``K``.
        outputs: ``N``.
        rows: ``B`` in every form.
        function: the transfer function in Triton; ``None`` for the identity, and for softmax.
        divergence: its matching loss in Triton.
        parameter: the transfer function's parameter.
        weight: whether the weight is trained.
        bias: whether the bias is trained.
        x_in_place: whether kernels read ``X`` where it is.
        scale: factor of the matching loss.
        splits: splits of the batch in the products of update tiles.
        groups: how many layers of these sizes lie side by side.
        x_chunks: whether ``X`` comes in chunks, which are copied to where kernels read it.
        a0_chunks: the same of ``A0``.
        sets: into how many sets the batch falls, of which a local step takes one.
    """

    batch: int
    inputs: int
    outputs: int
    rows: int
    function: Any
    divergence: Any
    parameter: float
    weight: bool
    bias: bool
    x_in_place: bool
    scale: float
    splits: int = 1
    groups: int = 1
    x_chunks: bool = False
    a0_chunks: bool = False
    sets: int = 1


@dataclass(frozen=True)
class Kind:
    """What the layers of a layout have in common.

    Attributes:
        form: ``"product"``, ``"gram"`` or ``"softmax"``.
        config: tile sizes and launch options.
        operand: dtype of the products' operands.
        preactivation: dtype of ``A0``.
        slots: names of the tensors of the rule's state.
        transposed: whether the update tile reads a transposed copy of ``X``.
        samples: how many sets of rows local steps have of their own; 0 where all take all rows.
        driver: how the problems are launched.
        staged: dtype of what comes in chunks, before it is scaled; ``None`` where ``X`` has no scale.
    """

    form: str
    config: Config
    operand: torch.dtype
    preactivation: torch.dtype
    slots: tuple[str, ...]
    transposed: bool
    samples: int = 0
    driver: str = "grouped"
    staged: torch.dtype | None = None


class _Arena:
    """Hands out offsets in a buffer that is allocated later."""

    def __init__(self, table: tuple[int, ...]) -> None:
        self.size = 0
        self.offsets: NDArray[np.bool_] = np.zeros(table, bool)  # where the layer table holds offsets into it

    def take(self, elements: int, itemsize: int) -> int:
        offset = self.size
        self.size += -(-elements * itemsize // ALIGNMENT) * ALIGNMENT
        return offset


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@lru_cache(maxsize=1024)
def float_bits(value: float) -> int:
    """``value`` as float32, for a column of the table."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


@dataclass(frozen=True)
class Place:
    """Where the matrices of a layer's groups lie in a buffer.

    Attributes:
        offset: of the first, in bytes.
        step: from one group to the next, in bytes.
        stride: from one row to the next, in elements.
    """

    offset: int
    step: int
    stride: int

    def view(self, buffer: Tensor, dtype: torch.dtype, groups: int, rows: int, columns: int, offset: int = 0) -> Tensor:
        """``[groups, rows, columns]`` of ``buffer``, ``offset`` elements behind."""
        strides = (self.step // dtype.itemsize, self.stride, 1)
        return buffer[self.offset :].view(dtype)[offset:].as_strided((groups, rows, columns), strides)


@dataclass(eq=False)
class Piece:
    """Where a parameter's results lie, Δ and the slots, and the shape of a group's."""

    delta: Place
    slots: list[Place]
    rows: int
    columns: int


class Layout:
    """The layout of a plan.

    Attributes:
        template: the layer table, with offsets in place of addresses; int64 ``[rows, columns]``, a row for each group.
        rows: which rows of the table are a layer's.
        bytes: size of the buffer: increments and new state, the results, and everything else, the scratch.
        pieces: per layer ``{"weight" | "bias": where its results lie}``.
        chunks: per layer ``{"x" | "a0": where to copy what comes in chunks}``, in the scratch.
        trace_slots: partial sums of one local step.
        trace_ranges: per layer, ``[(first, last), ...]`` of its own among them.
        functions: the different pairs of transfer function and divergence; their place is the code in the table.
        tiles: lists of tiles beside those of the schedule, by name.
        largest_x: where the largest |X| of each row of the table is found, in the scratch; empty without scales of X.
    """

    def __init__(self, layers: tuple[LayerPlan, ...], kind: Kind) -> None:
        self.layers, self.kind = layers, kind
        groups = [layer.groups for layer in layers]
        self.template: NDArray[np.int64] = np.zeros((sum(groups), c.WIDTH.value), np.int64)
        self.rows = [slice(end - count, end) for count, end in zip(groups, np.cumsum(groups).tolist(), strict=True)]
        self.pieces: list[dict[str, Piece]] = [{} for _ in layers]
        self.chunks: list[dict[str, Place]] = [{} for _ in layers]
        self.trace_ranges: list[list[tuple[int, int]]] = []
        self.trace_slots = 0
        self.functions: list[tuple[Any, Any]] = []
        self._arena, self._blocks = _Arena(self.template.shape), 0
        self.largest_x = self._lay_out_largest_x()
        self._lists: dict[str, list[NDArray[np.int32]]] = {name: [] for name in _TILE_LISTS}
        for index, layer in enumerate(layers):
            self._lay_out(index, layer)
        self.tiles = {
            name: np.concatenate([np.zeros((0, width), np.int32), *self._lists[name]])
            for name, width in _TILE_LISTS.items()
        }
        self.bytes = self._arena.size
        # Places in the table, and for each the number of what is added there.
        self._places: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    def connect(self, sources: Sequence[tuple[Sequence[int], Sequence[Tensor | int]]]) -> None:
        """Note where the addresses of the caller's tensors go, and put their strides into the template.

        Args:
            sources: of each layer, the columns that its problem fills and what it fills in, see
                :class:`locoprop_kernels.kernels.inputs.Sources`. All later steps bring tensors of the same strides.
        """
        places = [np.flatnonzero(self._arena.offsets)]
        for rows, own in zip(self.rows, sources, strict=True):
            group = np.arange(rows.stop - rows.start)
            for column, source in zip(*own, strict=True):
                places.append((rows.start + group) * c.WIDTH.value + column)
                if isinstance(source, Tensor):
                    # There is one counter of steps for all groups.
                    lead = source.stride(0) * source.element_size() if source.dim() else 0
                    self.template[rows, column] = lead * group
                    dims, columns = _STRIDES.get(column, (0, []))
                    for place, stride in zip(columns, source.stride()[-dims:], strict=False):
                        self.template[rows, place] = stride
        counts = [len(own) for own in places]
        self._places = np.concatenate(places), np.repeat(np.arange(len(places)), counts)

    def table(self, values: Sequence[int]) -> NDArray[np.int64]:
        """The layer table with all addresses.

        Args:
            values: the address of the buffer; and of each layer, the addresses and numbers that :meth:`connect` was
                given the columns of, in that order.
        """
        assert self._places is not None
        table, (places, numbers) = self.template.copy(), self._places
        table.reshape(-1)[places] += np.array(values, np.int64)[numbers]
        return table

    def counts(self, settings: Settings) -> NDArray[np.int32]:
        """Examples of each row of the table in each local step: ``[rows, iterations + 1]``.

        It is empty where all local steps take all rows, and no kernel reads it.
        """
        counts = np.zeros((len(self.template) if self.kind.samples else 0, settings.iterations + 1), np.int32)
        if self.kind.samples:
            for rows, layer in zip(self.rows, self.layers, strict=True):
                sets = settings.set_order(layer.sets)
                counts[rows, 1:] = [set_size(layer.rows, layer.sets, number) for number in sets]
        return counts

    def _lay_out(self, index: int, layer: LayerPlan) -> None:
        """Reserve what a layer needs in the buffer, and fill its rows of the template."""
        form, config = self.kind.form, self.kind.config
        sizes = ((layer.outputs, config.n), (layer.batch, config.b), (layer.inputs, config.k))
        n, b, k = (_round_up(size, tile) for size, tile in sizes)
        n_blocks, b_blocks = n // config.n, -(-layer.batch // config.b)
        k_blocks = -(-layer.inputs // config.k) if layer.weight else 1
        group = np.arange(layer.groups)
        cells: dict[Any, Any] = {
            c.GROUP: group,
            c.BATCH: layer.batch,
            c.INPUTS: layer.inputs,
            c.OUTPUTS: layer.outputs,
            c.ROWS: layer.rows,
            c.N_BLOCKS: n_blocks,
            c.B_BLOCKS: b_blocks,
            c.K_BLOCKS: k_blocks,
            c.FIRST_BLOCK: self._blocks + n_blocks * group,
            c.TRANSFER: self._code(layer),
            c.PARAMETER: float_bits(layer.parameter),
            c.SCALE: float_bits(layer.scale),
            c.SETS: float_bits(layer.sets),
            c.E_STRIDE: b,
            c.ROW_SUMS_STRIDE: n,
        }
        for column, value in cells.items():
            self._set(index, column, value)
        self._blocks += n_blocks * layer.groups
        if layer.weight:
            self._lay_out_x(index, layer, b, k)
            self._lay_out_products(index, layer, n, k, n_blocks, k_blocks)
            self._lay_out_results(index, "weight", c.WEIGHT.value, n, k, layer.outputs, layer.inputs)
        if layer.bias:
            self._lay_out_results(index, "bias", c.BIAS.value, n, 1, layer.outputs, 1)
            if form == "gram":
                self._set(index, c.BIAS_COPY_SIZE, n)
                self._take(index, c.BIAS_COPY.value, 2 * n, 4)
        if form != "gram":
            self._lay_out_activations(index, layer, n, b, b_blocks)
        self.trace_ranges.append(
            [
                self._lay_out_trace(index, c.TRACE_ACTIVATION, n_blocks * b_blocks * config.slices),
                self._lay_out_trace(index, c.TRACE_UPDATE, n_blocks * (k_blocks * config.slices + 1)),
            ]
        )

    def _lay_out_largest_x(self) -> slice:
        """An aligned number for each row of the table, side by side; none where ``X`` has no scale."""
        rows = len(self.template) if self.kind.staged else 0
        start = self._arena.take(rows, 16)
        self.template[:rows, c.X_AMAX.value] = start + 16 * np.arange(rows)
        self._arena.offsets[:rows, c.X_AMAX.value] = True
        return slice(start, start + 16 * rows)

    def _lay_out_x(self, index: int, layer: LayerPlan, b: int, k: int) -> None:
        self._set(index, c.REDUCED, layer.inputs)
        self._set(index, c.X_STRIDE, k)
        steps = max(1, self.kind.samples)
        self._set(index, c.X_STEP, b * k)
        if not layer.x_in_place:
            x = self._take(index, c.X.value, steps * b * k, self.kind.operand.itemsize, k)
            grid = (steps, -(-b // COPY_BLOCK), -(-k // COPY_BLOCK))
            self._add_tiles("chunked_x" if layer.x_chunks else "prepare_x", index, *grid)
            if layer.x_chunks:
                if self.kind.staged:
                    x = self._take(index, c.X_SOURCE.value, steps * b * k, self.kind.staged.itemsize, k)
                self._prepare_from(index, "x", c.X_SOURCE, x, (k, 1))
        if self.kind.transposed:
            self._take(index, c.XT.value, steps * b * k, self.kind.operand.itemsize)
            self._set(index, c.XT_STRIDE, b)

    def _lay_out_products(self, index: int, layer: LayerPlan, n: int, k: int, n_blocks: int, k_blocks: int) -> None:
        """The copy of Δ that is multiplied, its scales, and partial products; the rows driver has none of them."""
        self._set(index, c.WEIGHT_STRIDE, k)
        if self.kind.driver == "rows":
            return
        copies = 2 if self.kind.form == "gram" else 1
        self._set(index, c.WEIGHT_COPY_SIZE, n * k)
        self._take(index, c.WEIGHT_COPY.value, copies * n * k, self.kind.operand.itemsize)
        self._take(index, c.AMAX.value, 3 * n_blocks * k_blocks, 4)
        rows = _round_up(-(-layer.batch // layer.splits), self.kind.config.r)
        splits = -(-layer.batch // rows)
        if splits > 1:
            self._set(index, c.SPLIT_ROWS, rows)
            self._set(index, c.SPLITS, splits)
            self._take(index, c.PARTIALS.value, splits * n * k, 4)
            self._add_tiles("partial", index, n_blocks, k_blocks, splits)

    def _lay_out_activations(self, index: int, layer: LayerPlan, n: int, b: int, b_blocks: int) -> None:
        steps = max(1, self.kind.samples)
        self._set(index, c.A0_STEP, n * b)
        a0 = self._take(index, c.A0.value, steps * n * b, self.kind.preactivation.itemsize, b)
        self._add_tiles("prepare_a0", index, steps, -(-b // COPY_BLOCK), -(-n // COPY_BLOCK))
        if layer.a0_chunks:
            self._prepare_from(index, "a0", c.A0_SOURCE, a0, (1, b))
        self._take(index, c.E.value, n * b, self.kind.operand.itemsize)
        self._take(index, c.E_AMAX.value, 3 * (n // self.kind.config.n) * b_blocks, 4)
        self._take(index, c.ROW_SUMS.value, b_blocks * n, 4)
        self._set(index, c.ROW_SUM_COUNT, b_blocks)
        if self.kind.form == "softmax":
            self._take(index, c.CHANGE.value, n * b, 4)
            self._add_tiles("softmax", index, b_blocks)

    def _lay_out_results(self, index: int, name: str, base: int, rows: int, stride: int, n: int, k: int) -> None:
        """Δ and the rule's state, and the copy of ``G_0``."""
        columns = [base + c.DELTA.value, *(base + c.NEW.value + i for i in range(len(self.kind.slots)))]
        delta, *slots = (self._take(index, column, rows * stride, 4, stride) for column in columns)
        self.pieces[index][name] = Piece(delta, slots, n, k)
        self._take(index, base + c.START.value, rows * stride, 4, stride)

    def _lay_out_trace(self, index: int, column: Any, count: int) -> tuple[int, int]:
        """Slots for partial sums; returns the layer's first, and the first after it."""
        first, groups = self.trace_slots, self.layers[index].groups
        self._set(index, column, first + count * np.arange(groups))
        self.trace_slots += count * groups
        return first, self.trace_slots

    def _set(self, index: int, column: Any, value: int | NDArray[np.int64]) -> None:
        self.template[self.rows[index], column.value] = value

    def _prepare_from(self, index: int, name: str, column: Any, place: Place, strides: tuple[int, int]) -> None:
        """Chunks are copied to ``place``, and from there rounded and padded to their own, mostly the same."""
        rows, first = self.rows[index], column.value
        self.chunks[index][name] = place
        self.template[rows, first] = place.offset + place.step * np.arange(rows.stop - rows.start)
        self._arena.offsets[rows, first] = True
        self.template[rows, first + 1 : first + 3] = strides

    def _take(self, index: int, column: int, elements: int, itemsize: int, stride: int = 1) -> Place:
        """A piece of the buffer for each group of a layer, whose offsets go into the template."""
        groups, step = self.layers[index].groups, _round_up(elements * itemsize, ALIGNMENT)
        offset = self._arena.take((groups - 1) * step // itemsize + elements, itemsize)
        self.template[self.rows[index], column] = offset + step * np.arange(groups)
        self._arena.offsets[self.rows[index], column] = True
        return Place(offset, step, stride)

    def _code(self, layer: LayerPlan) -> int:
        """The place of the layer's transfer function among all."""
        if layer.function is None:
            return _NO_CODE
        pair = (layer.function, layer.divergence)
        if pair not in self.functions:
            self.functions.append(pair)
        return self.functions.index(pair)

    def _add_tiles(self, name: str, index: int, *counts: int) -> None:
        """One tile for each place of a grid, in every group of a layer."""
        rows = self.rows[index]
        grid = np.indices((rows.stop - rows.start, *counts), np.int32).reshape(1 + len(counts), -1).T
        grid[:, 0] += rows.start
        self._lists[name].append(grid)
