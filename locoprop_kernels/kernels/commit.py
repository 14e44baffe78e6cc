"""Applies the increments and the new state, if a flag on the device says so: the end of the transaction."""

import triton
import triton.language as tl
from torch import Tensor

from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.device.memory import address, callers_address, stride, to_dtype
from locoprop_kernels.kernels.spec import Spec, StepArguments

_STRIP_ELEMENTS = 2048


@triton.jit
def _commit_parameter(parameter_ptr, place, P: tl.constexpr, U: tl.constexpr):
    """Part of a parameter and its state; ``place`` is ``(rows, columns, n, width, row_stride)``."""
    rows, columns, n, width, row_stride = place
    valid = (rows < n)[:, None] & (columns < width)[None, :]
    long_rows, long_columns = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    new_offsets = long_rows * row_stride + columns[None, :]
    delta = tl.load(address(parameter_ptr, c.DELTA, tl.float32) + new_offsets)
    value_ptrs = callers_address(parameter_ptr, c.VALUE, U.parameter) + (
        long_rows * tl.load(parameter_ptr + c.VALUE_ROW) + long_columns * tl.load(parameter_ptr + c.VALUE_COLUMN)
    )
    value = tl.load(value_ptrs, valid, 0.0).to(tl.float32) + delta
    tl.store(value_ptrs, to_dtype(value, U.parameter, P.interpreted), valid)
    SLOTS: tl.constexpr = U.slots
    for i in tl.static_range(SLOTS):
        slot = tl.load(address(parameter_ptr, c.NEW + i, tl.float32) + new_offsets)
        old_ptrs = callers_address(parameter_ptr, c.OLD + i, tl.float32) + (long_rows * width + columns[None, :])
        tl.store(old_ptrs, slot, valid)


@triton.jit
def _count_steps(parameter_ptr, iterations):
    step_ptr = callers_address(parameter_ptr, c.STEP, tl.int64)
    tl.store(step_ptr, tl.load(step_ptr) + iterations)


@triton.jit(do_not_specialize=["iterations"])
def _commit_kernel(table_ptr, tiles_ptr, ok_ptr, iterations, STRIP: tl.constexpr, P: tl.constexpr, U: tl.constexpr):
    if tl.load(ok_ptr) != 0:
        tile_ptr = tiles_ptr + tl.program_id(0) * 3
        row_ptr = table_ptr + tl.load(tile_ptr) * c.WIDTH
        n_block, k_block = tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
        n = tl.load(row_ptr + c.OUTPUTS)
        rows = n_block * P.block_n + tl.arange(0, P.block_n)
        weight_ptr, bias_ptr = row_ptr + c.WEIGHT, row_ptr + c.BIAS
        has_weight = tl.load(weight_ptr + c.GRAD) != 0
        has_bias = (tl.load(bias_ptr + c.GRAD) != 0) & (k_block == 0)
        first = (n_block == 0) & (k_block == 0) & (tl.load(row_ptr + c.GROUP) == 0)
        if has_weight:
            row_stride = stride(weight_ptr, c.STRIDE)
            k = tl.load(row_ptr + c.INPUTS)
            for strip in range(0, P.block_k, STRIP):
                columns = k_block * P.block_k + strip + tl.arange(0, STRIP)
                _commit_parameter(weight_ptr, (rows, columns, n, k, row_stride), P, U)
            if U.counts_steps:
                if first:
                    _count_steps(weight_ptr, iterations)
        if has_bias:
            _commit_parameter(bias_ptr, (rows, tl.arange(0, 1), n, 1, 1), P, U)
            if U.counts_steps:
                if first:
                    _count_steps(bias_ptr, iterations)


def strip(spec: Spec) -> int:
    """How many columns of a tile to commit at a time."""
    tiles = spec.tiles
    return tiles.block_k if tiles.interpreted else min(_STRIP_ELEMENTS // tiles.block_n, tiles.block_k)


def launch(step: StepArguments, tiles: Tensor, ok: Tensor, spec: Spec) -> None:
    """Commit all layers where the bool ``ok`` is true; ``tiles`` are the update tiles."""
    _commit_kernel[(len(tiles),)](
        step.table, tiles, ok, step.iterations, STRIP=strip(spec), P=spec.tiles, U=spec.stored, **spec.wide
    )
