"""Grouped driver: launches per phase of a local step, each over all layers. The end of a launch is the barrier.

Between the activation and the update phase there may be one of partial products: a layer of few update tiles and many
examples (a convolution, say) would keep most programs waiting.
"""

from typing import Any

import triton
import triton.language as tl

from locoprop_kernels.kernels import columns as c
from locoprop_kernels.kernels.tiles import activation_tile, partial_tile, update_tile


@triton.jit(do_not_specialize=["t", "trace_stride"])
def _activation_kernel(
    table_ptr,
    tiles_ptr,
    t,
    trace_ptr,
    trace_stride,
    TRANSFERS: tl.constexpr,
    DIVERGENCES: tl.constexpr,
    SOURCES: tl.constexpr,
    OPERAND: tl.constexpr,
    PREACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TRACE: tl.constexpr,
    ROWWISE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
):
    tile_ptr = tiles_ptr + tl.program_id(0) * 3
    row_ptr = table_ptr + tl.load(tile_ptr) * c.WIDTH
    activation_tile(
        row_ptr,
        tl.load(tile_ptr + 1),
        tl.load(tile_ptr + 2),
        t,
        trace_ptr,
        trace_stride,
        TRANSFERS,
        DIVERGENCES,
        OPERAND,
        PREACTIVATION,
        PRECISION,
        INTERPRETED,
        TRACE,
        ROWWISE,
        BLOCK_N,
        BLOCK_B,
        BLOCK_R,
        PARTS,
    )


@triton.jit(do_not_specialize=["t"])
def _partial_kernel(
    table_ptr,
    tiles_ptr,
    t,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
):
    tile_ptr = tiles_ptr + tl.program_id(0) * 4
    row_ptr = table_ptr + tl.load(tile_ptr) * c.WIDTH
    partial_tile(
        row_ptr,
        tl.load(tile_ptr + 1),
        tl.load(tile_ptr + 2),
        tl.load(tile_ptr + 3),
        t,
        OPERAND,
        PRECISION,
        INTERPRETED,
        TRANSPOSED,
        BLOCK_N,
        BLOCK_K,
        BLOCK_R,
        PARTS,
    )


@triton.jit(do_not_specialize=["t", "iterations", "trace_stride"])
def _update_kernel(
    table_ptr,
    tiles_ptr,
    rates_ptr,
    t,
    iterations,
    prox,
    bad_ptr,
    trace_ptr,
    trace_stride,
    RULE: tl.constexpr,
    HYPER: tl.constexpr,
    SLOTS: tl.constexpr,
    COUNTS_STEPS: tl.constexpr,
    REGULARISER: tl.constexpr,
    MASKED: tl.constexpr,
    OPERAND: tl.constexpr,
    PARAMETER: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TRACE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GRAM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
):
    tile_ptr = tiles_ptr + tl.program_id(0) * 3
    row_ptr = table_ptr + tl.load(tile_ptr) * c.WIDTH
    update_tile(
        row_ptr,
        tl.load(tile_ptr + 1),
        tl.load(tile_ptr + 2),
        t,
        t == iterations - 1,
        tl.load(rates_ptr + t),
        prox,
        bad_ptr,
        trace_ptr,
        trace_stride,
        RULE,
        HYPER,
        SLOTS,
        COUNTS_STEPS,
        REGULARISER,
        MASKED,
        OPERAND,
        PARAMETER,
        PRECISION,
        INTERPRETED,
        TRACE,
        TRANSPOSED,
        GRAM,
        SPLIT,
        BLOCK_N,
        BLOCK_K,
        BLOCK_R,
        PARTS,
    )


def launch_activation(table: Any, tiles: Any, t: int, trace: Any, trace_stride: int, constants: dict[str, Any]) -> None:
    """``E`` of all layers before local step ``t``; ``tiles`` ``[count, 3]``, one program each."""
    _activation_kernel[(len(tiles),)](table, tiles, t, trace, trace_stride, **constants)


def launch_partial(table: Any, tiles: Any, t: int, constants: dict[str, Any]) -> None:
    """Products over parts of the batch; ``tiles`` ``[count, 4]``, one program each."""
    _partial_kernel[(len(tiles),)](table, tiles, t, **constants)


def launch_update(
    table: Any,
    tiles: Any,
    rates: Any,
    t: int,
    iterations: int,
    prox: float,
    bad: Any,
    trace: Any,
    trace_stride: int,
    constants: dict[str, Any],
) -> None:
    """Local step ``t`` of all layers; ``tiles`` ``[count, 3]``, one program each."""
    _update_kernel[(len(tiles),)](table, tiles, rates, t, iterations, prox, bad, trace, trace_stride, **constants)
