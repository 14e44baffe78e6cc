"""What is done to every number of an array: loops of whole vectors.

numba's own assignments to a part of an array come with code for messages about shapes, which takes seconds to compile.
"""

from __future__ import annotations

import numpy as np

from locoprop_kernels.cpu_kernels.bfloat16 import narrowed, rounded, widened
from locoprop_kernels.cpu_kernels.jit import jit, with_whole_registers

__all__ = [
    "add",
    "add_multiple",
    "copy",
    "dot",
    "fill",
    "multiply",
    "narrow",
    "round_to_bfloat16",
    "scale",
    "total",
    "total_of_absolutes",
    "widen",
]

_ZERO = np.float32(0.0)


@jit
def fill(out, number):
    """Set all of ``out`` to a number."""
    with_whole_registers()
    for k in range(out.shape[0]):
        out[k] = number


@jit
def copy(numbers, out):
    """Write ``numbers`` to the beginning of ``out``."""
    with_whole_registers()
    for k in range(numbers.shape[0]):
        out[k] = numbers[k]


@jit
def scale(factor, numbers, out):
    """Write ``factor · numbers`` to the beginning of ``out``."""
    with_whole_registers()
    for k in range(numbers.shape[0]):
        out[k] = factor * numbers[k]


@jit
def add(numbers, number):
    """Add a number to each of ``numbers``."""
    with_whole_registers()
    for k in range(numbers.shape[0]):
        numbers[k] += number


@jit
def multiply(numbers, factor):
    """Multiply each of ``numbers``."""
    with_whole_registers()
    for k in range(numbers.shape[0]):
        numbers[k] *= factor


@jit
def add_multiple(to, factor, numbers):
    """Add ``factor · numbers``."""
    with_whole_registers()
    for k in range(to.shape[0]):
        to[k] += factor * numbers[k]


@jit
def total(numbers):
    """The sum."""
    with_whole_registers()
    found = _ZERO
    for k in range(numbers.shape[0]):
        found += numbers[k]
    return found


@jit
def dot(one, other):
    """The sum of the products."""
    with_whole_registers()
    found = _ZERO
    for k in range(one.shape[0]):
        found += one[k] * other[k]
    return found


@jit
def total_of_absolutes(one, other):
    """The sum of ``|one + other|``; NaN where one of them is."""
    with_whole_registers()
    found = _ZERO
    for k in range(one.shape[0]):
        found += abs(one[k] + other[k])
    return found


@jit
def widen(bits, out):
    """Write numbers in bfloat16, given by their bits, to the beginning of ``out`` in float32."""
    with_whole_registers()
    for k in range(bits.shape[0]):
        out[k] = widened(bits[k])


@jit
def narrow(numbers, bits):
    """The opposite: rounded to bfloat16."""
    with_whole_registers()
    for k in range(numbers.shape[0]):
        bits[k] = narrowed(numbers[k])


@jit
def round_to_bfloat16(numbers, out):
    """Write ``numbers`` to the beginning of ``out``, rounded to bfloat16 but in float32."""
    with_whole_registers()
    for k in range(numbers.shape[0]):
        out[k] = rounded(numbers[k])
