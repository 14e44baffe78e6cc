"""Brings what the caller owns into the layout of the tiles: any strides in, zero-padded and aligned out."""

from typing import Any

import triton
import triton.language as tl

from locoprop_kernels.kernels import columns as c
from locoprop_kernels.kernels.tiles import address, as_operand, callers_address, stride

NOWHERE = tl.constexpr(-1)


@triton.jit
def _prepare_kernel(
    table_ptr,
    tiles_ptr,
    SOURCE_COLUMN: tl.constexpr,
    WIDTH_COLUMN: tl.constexpr,
    PADDED_WIDTH_COLUMN: tl.constexpr,
    PLAIN_COLUMN: tl.constexpr,
    TRANSPOSED_COLUMN: tl.constexpr,
    TRANSPOSED_STRIDE_COLUMN: tl.constexpr,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy tiles of ``[B, width]`` matrices to a plain target, a transposed one, or both (column -1: not that one)."""
    tile_ptr = tiles_ptr + tl.program_id(0) * 3
    row_ptr = table_ptr + tl.load(tile_ptr) * c.WIDTH
    rows = tl.load(tile_ptr + 1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.load(tile_ptr + 2) * BLOCK + tl.arange(0, BLOCK)
    valid = (rows < tl.load(row_ptr + c.BATCH))[:, None] & (columns < tl.load(row_ptr + WIDTH_COLUMN))[None, :]
    offsets = rows.to(tl.int64)[:, None] * tl.load(row_ptr + SOURCE_COLUMN + 1) + columns.to(tl.int64)[
        None, :
    ] * tl.load(row_ptr + SOURCE_COLUMN + 2)
    value = tl.load(callers_address(row_ptr, SOURCE_COLUMN, SOURCE) + offsets, valid, 0.0)
    value = as_operand(value.to(tl.float32), TARGET, PRECISION, INTERPRETED)
    padded = (rows < tl.load(row_ptr + c.E_STRIDE))[:, None] & (columns < tl.load(row_ptr + PADDED_WIDTH_COLUMN))[
        None, :
    ]
    if PLAIN_COLUMN >= 0:
        target = rows.to(tl.int64)[:, None] * stride(row_ptr, PLAIN_COLUMN + 1) + columns[None, :]
        tl.store(address(row_ptr, PLAIN_COLUMN, TARGET) + target, value, padded)
    if TRANSPOSED_COLUMN >= 0:
        target = columns.to(tl.int64)[:, None] * stride(row_ptr, TRANSPOSED_STRIDE_COLUMN) + rows[None, :]
        tl.store(address(row_ptr, TRANSPOSED_COLUMN, TARGET) + target, tl.trans(value), tl.trans(padded))


def prepare_x(table: Any, tiles: Any, constants: dict[str, Any], transposed: bool) -> None:
    """Round ``X`` to the operands' dtype, with a transposed copy where ``transposed``."""
    xt = c.XT if transposed else NOWHERE
    columns = (c.X_SOURCE, c.INPUTS, c.WEIGHT_STRIDE, c.X, xt, c.XT_STRIDE)
    _launch(table, tiles, columns, constants)


def prepare_a0(table: Any, tiles: Any, constants: dict[str, Any]) -> None:
    """Transpose ``A0``."""
    columns = (c.A0_SOURCE, c.OUTPUTS, c.ROW_SUMS_STRIDE, NOWHERE, c.A0, c.E_STRIDE)
    _launch(table, tiles, columns, constants)


def _launch(table: Any, tiles: Any, columns: tuple[Any, ...], constants: dict[str, Any]) -> None:
    if len(tiles):
        _prepare_kernel[(len(tiles),)](table, tiles, *(column.value for column in columns), **constants)
