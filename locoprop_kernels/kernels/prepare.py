"""Brings what the caller owns into the layout of the tiles: any strides in, zero-padded, scaled and aligned out."""

import triton
import triton.language as tl
from torch import Tensor

from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.device.memory import address, as_operand, callers_address, stride
from locoprop_kernels.kernels.device.products import inputs_scale
from locoprop_kernels.kernels.spec import Copy


@triton.jit
def _tile(table_ptr, tiles_ptr, C: tl.constexpr):
    """This program's layer, how many elements its matrix lies behind the first one, and rows and columns of its tile.

    Where each local step has rows of its own, there is a matrix for each.
    """
    tile_ptr = tiles_ptr + tl.program_id(0) * 4
    row_ptr = table_ptr + tl.load(tile_ptr) * c.WIDTH
    step = tl.load(tile_ptr + 1) * stride(row_ptr, C.step)
    rows = tl.load(tile_ptr + 2) * C.block + tl.arange(0, C.block)
    columns = tl.load(tile_ptr + 3) * C.block + tl.arange(0, C.block)
    return row_ptr, step, rows, columns


@triton.jit
def _source(row_ptr, step, rows, columns, C: tl.constexpr):
    """A tile of the source in float32, zero outside it; ``step`` elements behind the first."""
    valid = (rows < tl.load(row_ptr + c.BATCH))[:, None] & (columns < tl.load(row_ptr + C.width))[None, :]
    offsets = rows.to(tl.int64)[:, None] * tl.load(row_ptr + C.source + 1)
    offsets += columns.to(tl.int64)[None, :] * tl.load(row_ptr + C.source + 2)
    return tl.load(callers_address(row_ptr, C.source, C.dtype) + step + offsets, valid, 0.0).to(tl.float32)


@triton.jit
def _largest_kernel(table_ptr, tiles_ptr, C: tl.constexpr):
    """Raise each layer's ``X_AMAX`` to the largest absolute value of its source; bits of such floats sort as floats."""
    row_ptr, step, rows, columns = _tile(table_ptr, tiles_ptr, C)
    largest = tl.max(tl.max(tl.abs(_source(row_ptr, step, rows, columns, C)), 1), 0)
    tl.atomic_max(address(row_ptr, c.X_AMAX, tl.int32), largest.to(tl.int32, bitcast=True))


@triton.jit
def _prepare_kernel(table_ptr, tiles_ptr, C: tl.constexpr):
    """Copy tiles of ``[B, width]`` matrices to a plain target, a transposed one, or both."""
    row_ptr, step, rows, columns = _tile(table_ptr, tiles_ptr, C)
    value = as_operand(_source(row_ptr, step, rows, columns, C) * inputs_scale(row_ptr, C), C)
    padded = (rows < tl.load(row_ptr + c.E_STRIDE))[:, None]
    padded &= (columns < tl.load(row_ptr + C.padded_width))[None, :]
    if C.plain >= 0:
        target = rows.to(tl.int64)[:, None] * stride(row_ptr, C.plain + 1) + columns[None, :]
        tl.store(address(row_ptr, C.plain, C.operand) + step + target, value, padded)
    if C.transposed >= 0:
        target = columns.to(tl.int64)[:, None] * stride(row_ptr, C.transposed_stride) + rows[None, :]
        tl.store(address(row_ptr, C.transposed, C.operand) + step + target, tl.trans(value), tl.trans(padded))


def launch(table: Tensor, tiles: Tensor, copy: Copy) -> None:
    """Copy a matrix of every layer; ``tiles`` ``[count, 4]``: layer, local step, rows, columns."""
    if len(tiles):
        _prepare_kernel[(len(tiles),)](table, tiles, C=copy)


def launch_largest(table: Tensor, tiles: Tensor, copy: Copy) -> None:
    """Find the largest number of a matrix of every layer, for its scale; ``tiles`` as of :func:`launch`."""
    if len(tiles):
        _largest_kernel[(len(tiles),)](table, tiles, C=copy)
