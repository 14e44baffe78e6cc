"""Everything about a step that does not change from one to the next: the layout of the scratch, tables, tile lists.

A step then allocates two buffers (results and scratch), fills addresses into a copy of the table and launches. Filled
tables are kept too, by content: PyTorch's allocator gives a training loop the same addresses again and again, so that
in the steady state nothing is copied to the device at all. A table is never written twice, which is what makes its
asynchronous copy safe and its address fit for a CUDA graph.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from locoprop_kernels.kernels import columns as c
from locoprop_kernels.kernels.configs import Config
from locoprop_kernels.schedule import Schedule, build, most_expensive_first, validate

__all__ = ["ALIGNMENT", "Cells", "Key", "Layer", "Piece", "Place", "Plan", "float_bits"]

ALIGNMENT = 256  # bytes; of every piece of scratch
_KEPT_TABLES = 16
_NO_CODE = -1
_PREPARE = 64  # tile size of the copies into the scratch
# Lists of tiles beside those of the schedule, and how many numbers a tile has.
_TILE_LISTS = {"prepare_x": 3, "chunked_x": 3, "prepare_a0": 3, "softmax": 2, "partial": 4}
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Layer:
    """What a plan needs to know about a problem; sizes are those of a group."""

    batch: int
    inputs: int
    outputs: int
    function: Any  # None for the identity, and for softmax
    divergence: Any
    parameter: float
    weight: bool
    bias: bool
    x_in_place: bool
    scale: float
    rows: int  # of X; batch is K in the Gram driver
    splits: int = 1  # parts of the batch in the products of update tiles
    groups: int = 1
    x_chunks: bool = False  # whether X comes in chunks, which are copied to where the kernels read it
    a0_chunks: bool = False


@dataclass(frozen=True)
class Key:
    """What a plan is made for; equal keys share one."""

    layers: tuple[Layer, ...]
    device: torch.device
    parameter: torch.dtype
    x: torch.dtype
    preactivation: torch.dtype
    operand: torch.dtype
    precision: str
    rule: Any
    hyper: tuple[float, ...]
    slots: tuple[str, ...]
    form: str  # "product", "gram" or "softmax"
    counts_steps: bool
    regulariser: Any  # its gradient as a Triton function, or None
    masked: bool  # whether any problem has a mask
    trace: bool
    transposed: bool
    interpreted: bool
    config: Config
    programs: int  # of the single launch; 0 for the grouped driver


class _Arena:
    """Hands out offsets in a buffer that is allocated later."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, elements: int, itemsize: int) -> int:
        offset = self.size
        self.size += -(-elements * itemsize // ALIGNMENT) * ALIGNMENT
        return offset


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _sources(functions: tuple[Any, ...]) -> str:
    """What Triton's cache on disk would not notice: it knows functions in a tuple by their names alone."""
    keys = "".join(str(getattr(function, "cache_key", "")) for function in functions)
    return hashlib.sha256(keys.encode()).hexdigest()


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

    def view(self, buffer: Tensor, dtype: torch.dtype, groups: int, rows: int, columns: int) -> Tensor:
        """``[groups, rows, columns]`` of ``buffer``."""
        strides = (self.step // dtype.itemsize, self.stride, 1)
        return buffer[self.offset :].view(dtype).as_strided((groups, rows, columns), strides)


@dataclass(eq=False)
class Piece:
    """Where a parameter's results lie, Δ and the slots, and the shape of a group's."""

    delta: Place
    slots: list[Place]
    rows: int
    columns: int


@dataclass(eq=False)
class Cells:
    """What one step fills into the rows of a layer.

    Attributes:
        values: ``{column: address or number}``, of the first group.
        steps: ``{column: bytes to the next group}``, for addresses.
    """

    values: dict[int, int] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)


@dataclass(eq=False)
class Plan:
    """Layout, tables and tile lists of all steps with one :class:`Key`.

    Attributes:
        key: what it was made for.
        resident: how many programs of the single launch the device holds at once.
        schedule: the work lists of the single launch; ``None`` for launches per phase.
        results_bytes: size of the buffer for increments and new state, which outlives the step.
        scratch_bytes: size of the buffer for everything else.
        pieces: per layer ``{"weight" | "bias": where its results lie}``.
        chunks: per layer ``{"x" | "a0": where to copy what comes in chunks}``, in the scratch.
        trace_slots: partial sums of one local step.
        trace_ranges: per layer, ``[(first, last), ...]`` of its own among them.
        captured: whether a CUDA graph reads the tables, which must live as long as the process then.

    Raises:
        ValueError: the key asks for more programs than are resident.
    """

    key: Key
    resident: int
    schedule: Schedule | None = field(init=False)
    results_bytes: int = field(init=False)
    scratch_bytes: int = field(init=False)
    pieces: list[dict[str, Piece]] = field(init=False)
    chunks: list[dict[str, Place]] = field(init=False)
    trace_slots: int = field(init=False)
    trace_ranges: list[list[tuple[int, int]]] = field(init=False)
    captured: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        key, tiles = self.key, self.key.config.tiles
        groups = [layer.groups for layer in key.layers]
        sizes = [
            size
            for layer in key.layers
            for size in [(layer.batch, layer.inputs if layer.weight else 1, layer.outputs)] * layer.groups
        ]
        self.schedule = build(sizes, tiles, key.programs) if key.programs else None
        if self.schedule is not None:
            validate(self.schedule, sizes, tiles, self.resident)
        self._results, self._scratch = _Arena(), _Arena()
        self._template: NDArray[np.int64] = np.zeros((sum(groups), c.WIDTH.value), np.int64)
        self._in_results = np.zeros(self._template.shape, bool)  # where the template holds offsets into the results
        self._in_scratch = np.zeros(self._template.shape, bool)
        self._rows = [slice(end - count, end) for count, end in zip(groups, np.cumsum(groups).tolist(), strict=True)]
        self.pieces, self.chunks, self.trace_ranges, self.trace_slots = [], [], [], 0
        self._blocks = 0
        self._tiles: dict[str, list[NDArray[np.int32]]] = {name: [] for name in _TILE_LISTS}
        functions: list[tuple[Any, Any]] = []
        for index, layer in enumerate(key.layers):
            pair = (layer.function, layer.divergence)
            if layer.function is not None and pair not in functions:
                functions.append(pair)
            self._lay_out(index, layer, functions.index(pair) if layer.function is not None else _NO_CODE)
        self.results_bytes, self.scratch_bytes = self._results.size, self._scratch.size
        self.transfers = tuple(function for function, _ in functions)
        self.divergences = tuple(divergence for _, divergence in functions) if key.trace else ()
        self._tables: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self._kept_for_graphs: list[tuple[Tensor, Tensor]] = []
        self._relative = (np.nonzero(self._in_results), np.nonzero(self._in_scratch))
        if self.schedule is None:
            activation, update = most_expensive_first(sizes, tiles)
        else:
            activation, update = self.schedule.activation_tiles, self.schedule.update_tiles
        self.activation_tiles, self.update_tiles = self._upload_list(activation), self._upload_list(update)
        self.prepare_x_tiles, self.chunked_x_tiles, self.prepare_a0_tiles, self.softmax_tiles, self.partial_tiles = (
            self._upload_list(np.concatenate([np.zeros((0, width), np.int32), *self._tiles[name]]))
            for name, width in _TILE_LISTS.items()
        )

    def _upload_list(self, values: NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.key.device)

    @cached_property
    def work_lists(self) -> tuple[Tensor, ...]:
        """Tiles and offsets of both phases, and the tiles per n-block of each, as the single launch takes them."""
        assert self.schedule is not None
        return (
            self.activation_tiles,
            self._upload_list(self.schedule.activation_offsets),
            self.update_tiles,
            self._upload_list(self.schedule.update_offsets),
            self._upload_list(self.schedule.activations_per_block),
            self._upload_list(self.schedule.updates_per_block),
        )

    def _lay_out(self, index: int, layer: Layer, code: int) -> None:
        """Reserve what a layer needs in the two buffers, and fill its rows of the template."""
        key, config = self.key, self.key.config
        n, b, k = (
            _round_up(size, tile)
            for size, tile in ((layer.outputs, config.n), (layer.batch, config.b), (layer.inputs, config.k))
        )
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
            c.TRANSFER: code,
            c.PARAMETER: float_bits(layer.parameter),
            c.SCALE: float_bits(layer.scale),
            c.E_STRIDE: b,
            c.ROW_SUMS_STRIDE: n,
        }
        for column, value in cells.items():
            self._set(index, column, value)
        self._blocks += n_blocks * layer.groups
        self.pieces.append({})
        self.chunks.append({})
        if layer.weight:
            self._lay_out_x(index, layer, b, k)
            self._lay_out_products(index, layer, n, k, n_blocks, k_blocks)
            self._lay_out_results(index, "weight", c.WEIGHT.value, n, k, layer.outputs, layer.inputs)
        if layer.bias:
            self._lay_out_results(index, "bias", c.BIAS.value, n, 1, layer.outputs, 1)
            if key.form == "gram":
                self._set(index, c.BIAS_COPY_SIZE, n)
                self._scratch_place(index, c.BIAS_COPY, 2 * n, 4)
        if key.form != "gram":
            self._lay_out_activations(index, layer, n, b, b_blocks)
        self.trace_ranges.append(
            [
                self._lay_out_trace(index, c.TRACE_ACTIVATION, n_blocks * b_blocks * config.parts),
                self._lay_out_trace(index, c.TRACE_UPDATE, n_blocks * (k_blocks * config.parts + 1)),
            ]
        )

    def _lay_out_x(self, index: int, layer: Layer, b: int, k: int) -> None:
        self._set(index, c.REDUCED, layer.inputs)
        self._set(index, c.X_STRIDE, k)
        if not layer.x_in_place:
            x = self._scratch_place(index, c.X, b * k, self.key.operand.itemsize, k)
            name = "chunked_x" if layer.x_chunks else "prepare_x"
            self._add_tiles(name, index, -(-b // _PREPARE), -(-k // _PREPARE))
            if layer.x_chunks:
                self._prepare_in_place(index, "x", c.X_SOURCE, x, (k, 1))
        if self.key.transposed:
            self._scratch_place(index, c.XT, b * k, self.key.operand.itemsize)
            self._set(index, c.XT_STRIDE, b)

    def _lay_out_products(self, index: int, layer: Layer, n: int, k: int, n_blocks: int, k_blocks: int) -> None:
        """The copy of Δ that is multiplied, its scales, and partial products."""
        copies = 2 if self.key.form == "gram" else 1
        self._set(index, c.WEIGHT_STRIDE, k)
        self._set(index, c.WEIGHT_COPY_SIZE, n * k)
        self._scratch_place(index, c.WEIGHT_COPY, copies * n * k, self.key.operand.itemsize)
        self._scratch_place(index, c.AMAX, 3 * n_blocks * k_blocks, 4)
        rows = _round_up(-(-layer.batch // layer.splits), self.key.config.r)
        splits = -(-layer.batch // rows)
        if splits > 1:
            self._set(index, c.SPLIT_ROWS, rows)
            self._set(index, c.SPLITS, splits)
            self._scratch_place(index, c.PARTIALS, splits * n * k, 4)
            self._add_tiles("partial", index, n_blocks, k_blocks, splits)

    def _lay_out_activations(self, index: int, layer: Layer, n: int, b: int, b_blocks: int) -> None:
        a0 = self._scratch_place(index, c.A0, n * b, self.key.preactivation.itemsize, b)
        self._add_tiles("prepare_a0", index, -(-b // _PREPARE), -(-n // _PREPARE))
        if layer.a0_chunks:
            self._prepare_in_place(index, "a0", c.A0_SOURCE, a0, (1, b))
        self._scratch_place(index, c.E, n * b, self.key.operand.itemsize)
        self._scratch_place(index, c.ROW_SUMS, b_blocks * n, 4)
        self._set(index, c.ROW_SUM_COUNT, b_blocks)
        if self.key.form == "softmax":
            self._scratch_place(index, c.CHANGE, n * b, 4)
            self._add_tiles("softmax", index, b_blocks)

    def _lay_out_results(self, index: int, name: str, base: int, rows: int, stride: int, n: int, k: int) -> None:
        columns = [base + c.DELTA.value, *(base + c.NEW.value + i for i in range(len(self.key.slots)))]
        delta, *slots = (
            self._take(self._results, self._in_results, index, column, rows * stride, 4, stride) for column in columns
        )
        self.pieces[index][name] = Piece(delta, slots, n, k)

    def _lay_out_trace(self, index: int, column: Any, count: int) -> tuple[int, int]:
        """Slots for partial sums; returns the layer's first, and the first after it."""
        first, groups = self.trace_slots, self.key.layers[index].groups
        self._set(index, column, first + count * np.arange(groups))
        self.trace_slots += count * groups
        return first, self.trace_slots

    def _set(self, index: int, column: Any, value: int | NDArray[np.int64]) -> None:
        self._template[self._rows[index], column.value] = value

    def _prepare_in_place(self, index: int, name: str, column: Any, place: Place, strides: tuple[int, int]) -> None:
        """Chunks are copied to their place, and rounded and padded there."""
        rows, first = self._rows[index], column.value
        self.chunks[index][name] = place
        self._template[rows, first] = place.offset + place.step * np.arange(rows.stop - rows.start)
        self._in_scratch[rows, first] = True
        self._template[rows, first + 1 : first + 3] = strides

    def _scratch_place(self, index: int, column: Any, elements: int, itemsize: int, stride: int = 1) -> Place:
        return self._take(self._scratch, self._in_scratch, index, column.value, elements, itemsize, stride)

    def _take(
        self,
        arena: _Arena,
        relative: NDArray[np.bool_],
        index: int,
        column: int,
        elements: int,
        itemsize: int,
        stride: int,
    ) -> Place:
        """A piece of a buffer for each group of a layer, whose offsets go into the template."""
        groups, step = self.key.layers[index].groups, _round_up(elements * itemsize, ALIGNMENT)
        offset = arena.take((groups - 1) * step // itemsize + elements, itemsize)
        self._template[self._rows[index], column] = offset + step * np.arange(groups)
        relative[self._rows[index], column] = True
        return Place(offset, step, stride)

    def _add_tiles(self, name: str, index: int, *counts: int) -> None:
        """One tile for each place of a grid, in every group of a layer."""
        rows = self._rows[index]
        grid = np.indices((rows.stop - rows.start, *counts), np.int32).reshape(1 + len(counts), -1).T
        grid[:, 0] += rows.start
        self._tiles[name].append(grid)

    def table(
        self, results: Tensor, scratch: Tensor, inputs: Sequence[Cells], rates: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """The layer table with all addresses, and the learning rates, on the device.

        Args:
            results: the buffer for increments and state.
            scratch: the other buffer.
            inputs: per layer, addresses and strides of the caller's.
            rates: learning rates.
        """
        table = self._template.copy()
        for buffer, cells in zip((results, scratch), self._relative, strict=True):
            table[cells[0], cells[1]] += buffer.data_ptr()
        for place, own in zip(self._rows, inputs, strict=True):
            rows = table[place]
            rows[:, list(own.values)] = list(own.values.values())
            if own.steps:
                rows[:, list(own.steps)] += np.arange(len(rows))[:, None] * list(own.steps.values())
        blob = table.tobytes() + np.array(rates, np.float32).tobytes()
        stream = torch.cuda.current_stream(self.key.device).cuda_stream if self.key.device.type == "cuda" else 0
        content = blob + struct.pack("<q", stream)
        known = self._tables.get(content)
        if known is not None:
            self._tables.move_to_end(content)
        else:
            known = self._upload(blob)
            self._tables[content] = known
            if len(self._tables) > _KEPT_TABLES:
                self._tables.popitem(last=False)
        if self.key.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.captured = True
            self._kept_for_graphs.append(known)
        split = self._template.nbytes
        return known[0][:split].view(torch.int64), known[0][split:].view(torch.float32)

    def _upload(self, blob: bytes) -> tuple[Tensor, Tensor]:
        host = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
        if self.key.device.type != "cuda":
            return host, host
        host = host.pin_memory()
        return host.to(self.key.device, non_blocking=True), host

    @cached_property
    def constants(self) -> dict[str, dict[str, Any]]:
        """Compile-time arguments of each kernel."""
        key, config = self.key, self.key.config
        operand, parameter = _TRITON_DTYPES[key.operand], _TRITON_DTYPES[key.parameter]
        preactivation = _TRITON_DTYPES[key.preactivation]
        precision = key.precision if key.operand == torch.float32 else "ieee"
        products = {
            "OPERAND": operand,
            "PRECISION": precision,
            "INTERPRETED": key.interpreted,
            "TRACE": key.trace,
            "BLOCK_N": config.n,
            "BLOCK_R": config.r,
        }
        activation = {
            "TRANSFERS": self.transfers,
            "DIVERGENCES": self.divergences,
            "SOURCES": _sources((*self.transfers, *self.divergences)),
            "PREACTIVATION": preactivation,
            "BLOCK_B": config.b,
        }
        update = {
            "RULE": key.rule,
            "HYPER": key.hyper,
            "SLOTS": len(key.slots),
            "COUNTS_STEPS": key.counts_steps,
            "REGULARISER": key.regulariser,
            "MASKED": key.masked,
            "PARAMETER": parameter,
            "TRANSPOSED": key.transposed,
            "BLOCK_K": config.k,
        }
        commit = {name: update[name] for name in ("PARAMETER", "SLOTS", "COUNTS_STEPS", "BLOCK_K")}
        prepare = {"BLOCK": _PREPARE, "INTERPRETED": key.interpreted}
        options = {} if key.interpreted else config.options
        rowwise = {**options, "num_warps": 8} if options else {}  # whole tiles in registers, without a product
        parts = {"PARTS": config.parts}
        cooperative = {} if key.interpreted else {"launch_cooperative_grid": True}
        return {
            "activation": {**products, **parts, **activation, "ROWWISE": key.form == "softmax", **options},
            "partial": {
                **{name: products[name] for name in ("OPERAND", "PRECISION", "INTERPRETED", "BLOCK_N", "BLOCK_R")},
                **{name: update[name] for name in ("TRANSPOSED", "BLOCK_K")},
                **parts,
                **options,
            },
            "update": {
                **products,
                **parts,
                **update,
                "GRAM": key.form == "gram",
                "SPLIT": len(self.partial_tiles) > 0,
                **options,
            },
            "single": {**products, **parts, **activation, **update, **options, **cooperative},
            "softmax": {**products, "PREACTIVATION": preactivation, "BLOCK_B": config.b, **rowwise},
            "commit": {
                **commit,
                "BLOCK_N": config.n,
                "STRIP": config.k if key.interpreted else min(2048 // config.n, config.k),
                "INTERPRETED": key.interpreted,
                **rowwise,
            },
            "prepare_x": {"SOURCE": _TRITON_DTYPES[key.x], "TARGET": operand, "PRECISION": precision, **prepare},
            "chunked_x": {"SOURCE": operand, "TARGET": operand, "PRECISION": precision, **prepare},
            "prepare_a0": {"SOURCE": preactivation, "TARGET": preactivation, "PRECISION": "ieee", **prepare},
        }
