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
from locoprop_kernels.schedule import Schedule, Tiles, build, validate

__all__ = ["ALIGNMENT", "Key", "Layer", "Piece", "Plan"]

ALIGNMENT = 256  # bytes; of every piece of scratch
_KEPT_TABLES = 16
_NO_CODE = -1
_PREPARE = 64  # tile size of the copies into the scratch
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Layer:
    """What a plan needs to know about a problem."""

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


def _float_bits(value: float) -> int:
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


@dataclass(eq=False)
class Piece:
    """Where a parameter's results lie: byte offsets of Δ and of the slots, and their shape."""

    delta: int
    slots: list[int]
    rows: int
    columns: int
    stride: int


@dataclass(eq=False)
class Plan:
    """Layout, tables and tile lists of all steps with one :class:`Key`.

    Attributes:
        key: what it was made for.
        schedule: the work lists.
        results_bytes: size of the buffer for increments and new state, which outlives the step.
        scratch_bytes: size of the buffer for everything else.
        pieces: per layer ``{"weight" | "bias": where its results lie}``.
        trace_slots: partial sums of one local step.
        trace_ranges: per layer, ``[(first, last), ...]`` of its own among them.
        captured: whether a CUDA graph reads the tables, which must live as long as the process then.
    """

    key: Key
    schedule: Schedule = field(init=False)
    results_bytes: int = field(init=False)
    scratch_bytes: int = field(init=False)
    pieces: list[dict[str, Piece]] = field(init=False)
    trace_slots: int = field(init=False)
    trace_ranges: list[list[tuple[int, int]]] = field(init=False)
    captured: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        key, config = self.key, self.key.config
        sizes = [(layer.batch, layer.inputs if layer.weight else 1, layer.outputs) for layer in key.layers]
        tiles = Tiles(config.n, config.b, config.k)
        self.schedule = build(sizes, tiles, key.programs or 1)
        if key.programs:
            validate(self.schedule, sizes, tiles, key.programs)
        self._results, self._scratch = _Arena(), _Arena()
        self._in_results: list[tuple[int, int]] = []  # (layer, column) of offsets into the results
        self._in_scratch: list[tuple[int, int]] = []
        self._template: NDArray[np.int64] = np.zeros((len(key.layers), c.WIDTH.value), np.int64)
        self.pieces, self.trace_ranges, self.trace_slots = [], [], 0
        self._prepare_x_tiles: list[tuple[int, int, int]] = []
        self._prepare_a0_tiles: list[tuple[int, int, int]] = []
        self._softmax_tiles: list[tuple[int, int]] = []
        self._partial_tiles: list[tuple[int, int, int, int]] = []
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
        self._relative = tuple(
            tuple(np.array(cells, np.int64).reshape(-1, 2).T) for cells in (self._in_results, self._in_scratch)
        )
        lists = (
            self.schedule.activation_tiles,
            self.schedule.activation_offsets,
            self.schedule.update_tiles,
            self.schedule.update_offsets,
            self.schedule.activations_per_block,
            self.schedule.updates_per_block,
            np.array(self._prepare_x_tiles, np.int32).reshape(-1, 3),
            np.array(self._prepare_a0_tiles, np.int32).reshape(-1, 3),
            np.array(self._softmax_tiles, np.int32).reshape(-1, 2),
            np.array(self._partial_tiles, np.int32).reshape(-1, 4),
        )
        (
            self.activation_tiles,
            self.activation_offsets,
            self.update_tiles,
            self.update_offsets,
            self.activations_per_block,
            self.updates_per_block,
            self.prepare_x_tiles,
            self.prepare_a0_tiles,
            self.softmax_tiles,
            self.partial_tiles,
        ) = (torch.from_numpy(np.ascontiguousarray(values)).to(key.device) for values in lists)

    def _lay_out(self, index: int, layer: Layer, code: int) -> None:
        key, config = self.key, self.key.config
        itemsize = key.operand.itemsize
        n = _round_up(layer.outputs, config.n)
        b = _round_up(layer.batch, max(config.b, config.r))
        k = _round_up(layer.inputs, max(config.k, config.r))
        n_blocks, b_blocks = n // config.n, -(-layer.batch // config.b)
        k_blocks = -(-layer.inputs // config.k) if layer.weight else 1
        row = self._template[index]

        def scratch(column: Any, elements: int, size: int) -> None:
            row[column.value] = self._scratch.take(elements, size)
            self._in_scratch.append((index, column.value))

        row[c.BATCH.value], row[c.INPUTS.value], row[c.OUTPUTS.value] = layer.batch, layer.inputs, layer.outputs
        row[c.N_BLOCKS.value], row[c.B_BLOCKS.value], row[c.K_BLOCKS.value] = n_blocks, b_blocks, k_blocks
        row[c.FIRST_BLOCK.value] = self.schedule.first_block[index]
        row[c.TRANSFER.value] = code
        row[c.PARAMETER.value] = _float_bits(layer.parameter)
        row[c.SCALE.value] = _float_bits(layer.scale)
        if layer.weight:
            row[c.REDUCED.value] = layer.inputs
            if layer.x_in_place:
                row[c.X_STRIDE.value] = layer.inputs
            else:
                scratch(c.X, b * k, itemsize)
                row[c.X_STRIDE.value] = k
                self._prepare_x_tiles += self._square_tiles(index, b, k)
            if key.transposed:
                scratch(c.XT, b * k, itemsize)
                row[c.XT_STRIDE.value] = b
            row[c.WEIGHT.value + c.COPY_SIZE.value] = n * k
            scratch(c.WEIGHT_COPY, n * k * (2 if key.form == "gram" else 1), itemsize)
            scratch(c.AMAX, 3 * n_blocks * k_blocks, 4)
            rows = _round_up(-(-layer.batch // layer.splits), config.r)
            splits = -(-layer.batch // rows)
            if splits > 1:
                row[c.SPLIT_ROWS.value], row[c.SPLITS.value] = rows, splits
                scratch(c.PARTIALS, splits * n * k, 4)
                self._partial_tiles += [(index, *place) for place in np.ndindex(n_blocks, k_blocks, splits)]
        row[c.E_STRIDE.value], row[c.ROW_SUMS_STRIDE.value], row[c.ROWS.value] = b, n, layer.rows
        if key.form == "gram":
            if layer.bias:
                row[c.BIAS.value + c.COPY_SIZE.value] = n
                scratch(c.BIAS_COPY, 2 * n, 4)
        else:
            scratch(c.A0, n * b, key.preactivation.itemsize)
            scratch(c.E, n * b, itemsize)
            self._prepare_a0_tiles += self._square_tiles(index, b, n)
            scratch(c.ROW_SUMS, b_blocks * n, 4)
            row[c.ROW_SUM_COUNT.value] = b_blocks
        if key.form == "softmax":
            scratch(c.CHANGE, n * b, 4)
            self._softmax_tiles += [(index, block) for block in range(b_blocks)]

        pieces = {}
        if layer.weight:
            row[c.WEIGHT.value + c.STRIDE.value] = k
            pieces["weight"] = self._lay_out_parameter(index, c.WEIGHT.value, n, k, layer.outputs, layer.inputs)
        if layer.bias:
            pieces["bias"] = self._lay_out_parameter(index, c.BIAS.value, n, 1, layer.outputs, 1)
        self.pieces.append(pieces)

        ranges = []
        for column, count in (
            (c.TRACE_ACTIVATION, n_blocks * b_blocks * config.parts),
            (c.TRACE_UPDATE, n_blocks * (k_blocks * config.parts + 1)),
        ):
            row[column.value] = self.trace_slots
            ranges.append((self.trace_slots, self.trace_slots + count))
            self.trace_slots += count
        self.trace_ranges.append(ranges)

    def _lay_out_parameter(self, index: int, base: int, rows: int, stride: int, n: int, k: int) -> Piece:
        offsets = [self._results.take(rows * stride, 4) for _ in range(1 + len(self.key.slots))]
        for column, offset in zip((c.DELTA.value, *range(c.NEW.value, c.NEW.value + 3)), offsets, strict=False):
            self._template[index, base + column] = offset
            self._in_results.append((index, base + column))
        return Piece(offsets[0], offsets[1:], n, k, stride)

    def _square_tiles(self, index: int, rows: int, columns: int) -> list[tuple[int, int, int]]:
        return [(index, i, j) for i in range(-(-rows // _PREPARE)) for j in range(-(-columns // _PREPARE))]

    def table(
        self, results: Tensor, scratch: Tensor, inputs: Sequence[dict[int, int]], rates: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """The layer table with all addresses, and the learning rates, on the device.

        Args:
            results: the buffer for increments and state.
            scratch: the other buffer.
            inputs: per layer ``{column: address or stride of the caller's}``.
            rates: learning rates.
        """
        table = self._template.copy()
        for buffer, cells in zip((results, scratch), self._relative, strict=True):
            table[cells[0], cells[1]] += buffer.data_ptr()
        for row, values in zip(table, inputs, strict=True):
            row[list(values)] = list(values.values())
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
            "prepare_a0": {"SOURCE": preactivation, "TARGET": preactivation, "PRECISION": "ieee", **prepare},
        }
