"""Products of tiles, the slices that epilogues work on, and the scale of float16 increments."""

import triton
import triton.language as tl

from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.device.memory import address


@triton.jit
def dot(left, right, accumulator, P: tl.constexpr):
    """``accumulator + left · right`` of tiles in the operands' dtype."""
    if P.interpreted:  # the interpreter takes bfloat16 for integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, accumulator, input_precision=P.precision)


@triton.jit
def product(left_ptr, left_offsets, right_ptr, right_offsets, right_step, length, P: tl.constexpr):
    """Product over ``length`` columns of ``left`` and rows of ``right``; ``block_r`` of these are ``right_step`` apart.

    All scratch is zero-padded to whole tiles, so the loop needs no masks. Offsets of 32 bits behind a pointer that
    moves take half of the registers that pointers would.
    """
    accumulator = tl.zeros((left_offsets.shape[0], right_offsets.shape[1]), tl.float32)
    for _ in range(0, length, P.block_r):
        accumulator = dot(tl.load(left_ptr + left_offsets), tl.load(right_ptr + right_offsets), accumulator, P)
        left_ptr += P.block_r
        right_ptr += right_step
    return accumulator


@triton.jit
def _halves(tile):
    """Left and right half: an epilogue on a slice of a tile needs a part of the registers."""
    return tl.split(tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def _halved(tiles):
    halves = ()
    for i in tl.static_range(len(tiles)):
        halves = halves + _halves(tiles[i])
    return halves


@triton.jit
def sliced(tile, SLICES: tl.constexpr):
    """``tile`` cut into ``SLICES`` (1, 2, 4 or 8) blocks of columns, in order."""
    slices = (tile,)
    if SLICES > 1:
        slices = _halved(slices)
    if SLICES > 2:
        slices = _halved(slices)
    if SLICES > 4:
        slices = _halved(slices)
    return slices


@triton.jit
def increment_scale(row_ptr, n_block, t, P: tl.constexpr):
    """Power of two by which the update of local step ``t`` scales Δ, to about 2⁻⁶: float16 has no range for less.

    It is taken from the largest |Δ| before the update (at the first from Δ_1 itself, which a first pass has left
    there), so there is headroom of 2²¹ for growth in one local step. ``E`` is scaled alike.
    """
    BLOCKS: tl.constexpr = P.block_r
    n_blocks = tl.load(row_ptr + c.N_BLOCKS)
    k_blocks = tl.load(row_ptr + c.K_BLOCKS)
    amax_ptr = address(row_ptr, c.AMAX, tl.float32) + ((tl.maximum(t, 1) % 3) * n_blocks + n_block) * k_blocks
    amax = tl.zeros((BLOCKS,), tl.float32)
    for start in range(0, k_blocks, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        amax = tl.maximum(amax, tl.load(amax_ptr + blocks, blocks < k_blocks, 0.0))
    return scale_of(tl.max(amax, 0))


@triton.jit
def scale_of(largest):
    """Power of two that brings ``largest`` to about 2⁻⁶; 1 for 0."""
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    exponent = tl.where(largest == 0, 0, tl.minimum(tl.maximum(-6 - exponent, -100), 100))
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)
