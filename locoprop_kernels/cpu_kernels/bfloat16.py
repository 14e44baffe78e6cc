"""Numbers in bfloat16, which have the upper half of the bits of a float32 number."""

from __future__ import annotations

import numpy as np

from locoprop_kernels.cpu_kernels.jit import jit

__all__ = ["narrowed", "rounded", "widened"]

_HALF = np.int32(16)


@jit
def rounded(value):
    """A float32 number rounded to bfloat16, the nearest or else the even one; in float32."""
    bits = np.float32(value).view(np.int32)
    odd = (bits >> _HALF) & np.int32(1)
    found = np.int32((bits + np.int32(0x7FFF) + odd) & np.int32(-0x10000)).view(np.float32)
    return found if value == value else value


@jit
def narrowed(value):
    """The same as its sixteen bits."""
    bits = np.float32(value).view(np.int32)
    odd = (bits >> _HALF) & np.int32(1)
    # Of a NaN, a bit that makes it one may be in the lower half.
    found = bits + np.int32(0x7FFF) + odd if value == value else bits | np.int32(0x400000)
    return np.uint16(np.uint32(found) >> np.uint32(16))


@jit
def widened(bits):
    """The number of sixteen bits, in float32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
