"""Reading and writing: addresses and strides from the layer table, and conversions between dtypes."""

import triton
import triton.language as tl


@triton.jit
def address(row_ptr, column, dtype: tl.constexpr):
    """An address of ours, aligned for vector loads."""
    # The hint is lost if it is put before the cast.
    return tl.multiple_of(tl.load(row_ptr + column).to(tl.pointer_type(dtype)), 16)


@triton.jit
def address_for_fours(row_ptr, column, dtype: tl.constexpr):
    """An address of ours for stores from an epilogue: aligned to four elements, what a thread has of float32 tensors.

    With eight of 16 bits to a thread, all that they are computed from would have to change threads.
    """
    return tl.multiple_of(tl.load(row_ptr + column).to(tl.pointer_type(dtype)), dtype.primitive_bitwidth // 2)


@triton.jit
def callers_address(row_ptr, column, dtype: tl.constexpr):
    """An address of the caller's, aligned to its elements alone."""
    return tl.load(row_ptr + column).to(tl.pointer_type(dtype))


@triton.jit
def stride(row_ptr, column):
    """A stride of ours: a multiple of a tile."""
    return tl.multiple_of(tl.load(row_ptr + column), 16)


@triton.jit
def bits_to_float(bits):
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def is_finite(value):
    return tl.abs(value) < float("inf")


@triton.jit
def _round_bits(value, BITS: tl.constexpr):
    """Round float32 to nearest even in all but its last ``BITS`` bits."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + (1 << (BITS - 1)) - 1 + ((bits >> BITS) & 1)) & -(1 << BITS)
    return tl.where(is_finite(value), rounded.to(tl.float32, bitcast=True), value)


@triton.jit
def _to_float8(value):
    """Round float32 to float8e4nv as GPUs do: to nearest even, and to 448 at most.

    The interpreter would truncate, wrap around, and knows no NaN there.
    """
    # A sum with 1.5 · 2^14 has no bits below 2^-9, which is the last one of small numbers.
    small = (value + 24576.0) - 24576.0
    rounded = tl.where(tl.abs(value) < 0.015625, small, _round_bits(value, 20))
    bounded = tl.minimum(tl.maximum(rounded, -448.0), 448.0)
    bits = bounded.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return tl.where(is_finite(value), bits, 0x7F).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def widened(value):
    """An operand in float32, for the interpreter."""
    wide = value.to(tl.float32)
    if value.dtype == tl.float8e4nv:
        wide = tl.where((value.to(tl.uint8, bitcast=True) & 0x7F) == 0x7F, float("nan"), wide)
    return wide


@triton.jit
def to_dtype(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round float32 to ``DTYPE``, to nearest; the interpreter would truncate to bfloat16 and to float8."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        value = _round_bits(value, 16)
    if INTERPRETED and DTYPE == tl.float8e4nv:
        result = _to_float8(value)
    else:
        result = value.to(DTYPE)
    return result


@triton.jit
def as_operand(value, P: tl.constexpr):
    """Round float32 to the operands' dtype; to nearest for TF32 too, which the matrix unit would truncate."""
    if P.precision == "tf32":
        value = _round_bits(value, 13)
    elif P.operand == tl.float16:
        # It is scaled by a guess: what outgrew that saturates, and what is not finite stays so.
        bounded = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
        value = tl.where(is_finite(value), bounded, value)
    elif P.operand == tl.float8e4nv:  # likewise, as the conversion saturates; it has a NaN and no infinity
        value = tl.where(is_finite(value), value, float("nan"))
    return to_dtype(value, P.operand, P.interpreted)
