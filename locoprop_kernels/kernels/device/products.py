"""Products of tiles, the slices that epilogues work on, and the scales of operands in float16 and float8."""

import triton
import triton.language as tl

from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.device.memory import address, widened


@triton.jit
def dot(left, right, accumulator, P: tl.constexpr):
    """``accumulator + left · right`` of tiles in the operands' dtype."""
    if P.interpreted:  # the interpreter takes bfloat16 for integers
        left, right = widened(left), widened(right)
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
    """Power of two by which the update of local step ``t`` scales Δ, as float16 and float8 have no range for less.

    It is taken from the largest |Δ| before the update (at the first from Δ_1 itself, which a first pass has left
    there), so there is headroom for growth in one local step: 2²¹ in float16, 28 in float8.
    """
    n_blocks, k_blocks = tl.load(row_ptr + c.N_BLOCKS), tl.load(row_ptr + c.K_BLOCKS)
    first = ((tl.maximum(t, 1) % 3) * n_blocks + n_block) * k_blocks
    return scale_of(_largest(address(row_ptr, c.AMAX, tl.float32) + first, k_blocks, P), P)


@triton.jit
def difference_scale(row_ptr, n_block, t, P: tl.constexpr):
    """Power of two by which ``E`` of local step ``t`` is scaled: in float16 that of Δ.

    In float8 it is taken from the largest |E| of the local step before, at the first from E_1 itself: what a tile notes
    there in the loop is what it has noted ahead of it.
    """
    if P.operand == tl.float16:
        scale = increment_scale(row_ptr, n_block, t - 1, P)
    else:
        n_blocks, b_blocks = tl.load(row_ptr + c.N_BLOCKS), tl.load(row_ptr + c.B_BLOCKS)
        first = ((tl.maximum(t - 1, 1) % 3) * n_blocks + n_block) * b_blocks
        scale = scale_of(_largest(address(row_ptr, c.E_AMAX, tl.float32) + first, b_blocks, P), P)
    return scale


@triton.jit
def keep_largest_difference(row_ptr, n_block, b_block, t, largest):
    """Note the largest |E| of an activation tile in local step ``t``, for :func:`difference_scale` of the next."""
    n_blocks, b_blocks = tl.load(row_ptr + c.N_BLOCKS), tl.load(row_ptr + c.B_BLOCKS)
    place = ((t % 3) * n_blocks + n_block) * b_blocks + b_block
    tl.store(address(row_ptr, c.E_AMAX, tl.float32) + place, largest)


@triton.jit
def inputs_scale(row_ptr, P: tl.constexpr):
    """Power of two by which ``X`` is scaled: 1 but in float8, where it is exact."""
    scale = 1.0
    if P.operand == tl.float8e4nv:
        scale = scale_of(tl.load(address(row_ptr, c.X_AMAX, tl.float32)), P, True)
    return scale


@triton.jit
def _largest(amax_ptr, count, P: tl.constexpr):
    """The largest of ``count`` numbers, none of them negative."""
    BLOCKS: tl.constexpr = P.block_r
    amax = tl.zeros((BLOCKS,), tl.float32)
    for start in range(0, count, BLOCKS):
        places = start + tl.arange(0, BLOCKS)
        amax = tl.maximum(amax, tl.load(amax_ptr + places, places < count, 0.0))
    return tl.max(amax, 0)


@triton.jit
def scale_of(largest, P: tl.constexpr, EXACT: tl.constexpr = False):
    """Power of two for numbers of which ``largest`` is the largest, or with ``EXACT = False`` about so; 1 for 0.

    It leaves room for growth above a guess: ``largest`` comes to 2⁻⁶ in float16, which ends at 2¹⁶, and to 2³ in
    float8, which ends at 448, or up to twice that. The product of two scales is a float32, too.
    """
    EXPONENT: tl.constexpr = 7 if EXACT else (-6 if P.operand == tl.float16 else 3)
    LIMIT: tl.constexpr = 100 if P.operand == tl.float16 else 60
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    exponent = tl.where(largest == 0, 0, tl.minimum(tl.maximum(EXPONENT - exponent, -LIMIT), LIMIT))
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)
