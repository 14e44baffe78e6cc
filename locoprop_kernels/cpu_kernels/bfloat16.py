"""Numbers in bfloat16, which have the upper half of the bits of a float32 number."""

from __future__ import annotations

import numpy as np

from locoprop_kernels.cpu_kernels.jit import jit

__all__ = ["narrowed", "rounded", "widened"]

_HALF = np.int32(16)


@jit
def _rounded_bits(value):
    """Bits whose upper half are the number nearest to a float32 number in bfloat16, or else the even one."""
    bits = np.float32(value).view(np.int32)
    odd = (bits >> _HALF) & np.int32(1)
    # Of a NaN, the bit that makes it one may be in the lower half.
    return np.int32(bits + np.int32(0x7FFF) + odd) if value == value else np.int32(bits | np.int32(0x400000))


@jit
def rounded(value):
    """A float32 number rounded to bfloat16; in float32."""
    return np.int32(_rounded_bits(value) & np.int32(-0x10000)).view(np.float32)


@jit
def narrowed(value):
    """A float32 number rounded to bfloat16; as its sixteen bits."""
    return np.uint16(np.uint32(_rounded_bits(value)) >> np.uint32(16))


@jit
def widened(bits):
    """The number of sixteen bits, in float32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
