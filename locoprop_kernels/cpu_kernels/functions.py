"""Transfer functions for the CPU kernels, in float32: on blocks ``[n, r]`` of pre-activations, in place.

What is written without a call of the C library, numba makes into vector instructions: the exponential function, and
with it tanh and the sigmoid function. Errors are of 1 to 3 units in the last place, relative to the value.
"""

from __future__ import annotations

import math

import numpy as np

from locoprop_kernels.constants import SELU_ALPHA, SELU_SCALE
from locoprop_kernels.cpu_kernels.jit import jit

__all__ = ["CODES", "SOFTMAX", "apply"]

SOFTMAX = 13
#: The number that kernels know a transfer function by.
CODES = {
    "identity": 0,
    "tanh": 1,
    "sigmoid": 2,
    "relu": 3,
    "leaky_relu": 4,
    "squared_relu": 5,
    "elu": 6,
    "selu": 7,
    "softplus": 8,
    "hardtanh": 9,
    "gelu": 10,
    "gelu_tanh": 11,
    "silu": 12,
    "softmax": SOFTMAX,
}

_ZERO, _HALF, _ONE, _TWO = (np.float32(value) for value in (0.0, 0.5, 1.0, 2.0))
_LOG2_E = np.float32(1 / math.log(2))
# log 2 in two parts, of which the first has so few bits that its multiples are exact.
_LOG_2 = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)
_LEAST, _MOST = np.float32(-87.3), np.float32(88.7)
# exp(x) = 1 + x + x² p(x) for |x| <= log(2) / 2, and tanh(x) = x + x³ p(x²) for |x| <= 0.65: minimax polynomials, with
# relative errors of 3e-9 and 7e-9.
_EXP = tuple(np.float32(c) for c in (0.499999934, 0.166665201, 0.0416683942, 0.00836878057, 0.00138144671))
_TANH = tuple(np.float32(c) for c in (-0.333332598, 0.133308302, -0.053688010, 0.0204693812, -0.00551512210))
_SMALL = np.float32(0.65)
_ROOT_HALF = np.float32(math.sqrt(0.5))
_GELU = np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)
_SELU = np.float32(SELU_SCALE), np.float32(SELU_ALPHA)
_BIAS, _MANTISSA = np.int32(127), np.int32(23)


@jit
def _exp(x):
    """``exp(x)``; 0 where it is below float32's normal numbers."""
    clamped = min(max(x, _LEAST), _MOST)
    whole = np.rint(clamped * _LOG2_E)
    rest = (clamped - whole * _LOG_2[0]) - whole * _LOG_2[1]
    series = ((((_EXP[4] * rest + _EXP[3]) * rest + _EXP[2]) * rest + _EXP[1]) * rest + _EXP[0]) * rest * rest
    half = np.int32(whole) >> np.int32(1)
    low = np.int32((half + _BIAS) << _MANTISSA).view(np.float32)
    high = np.int32((np.int32(whole) - half + _BIAS) << _MANTISSA).view(np.float32)
    value = ((series + rest) + _ONE) * low * high
    if x < _LEAST:
        value = _ZERO
    if x > _MOST:
        value = np.float32(np.inf)
    return value if x == x else x


@jit
def _tanh(x):
    q = x * x
    near = x + x * q * ((((_TANH[4] * q + _TANH[3]) * q + _TANH[2]) * q + _TANH[1]) * q + _TANH[0])
    far = _ONE - _TWO / (_exp(_TWO * abs(x)) + _ONE)
    far = far if x >= _ZERO else -far
    value = near if abs(x) <= _SMALL else far
    return value if x == x else x


@jit
def _sigmoid(x):
    return _ONE / (_ONE + _exp(-x))


@jit
def _softmax(a):
    """Over the outputs, in each row."""
    for r in range(a.shape[0]):
        row = a[r]
        most = row.max()
        total = _ZERO
        for n in range(row.shape[0]):
            row[n] = _exp(row[n] - most)
            total += row[n]
        for n in range(row.shape[0]):
            row[n] /= total


@jit
def apply(code, a, p0, p1):
    """``f(a)`` in place of ``a``.

    Args:
        code: of the function, see :data:`CODES`; ``p0`` and ``p1`` are its parameters.
        a: pre-activations of some rows and outputs ``[r, n]``.
    """
    if code == SOFTMAX:
        _softmax(a)
    else:
        _elementwise(code, a.reshape(-1), p0, p1)


@jit
def _elementwise(code, a, p0, p1):
    """The same of numbers ``[n]``, none of which depends on another."""
    if code == 1:
        for n in range(a.shape[0]):
            a[n] = _tanh(a[n])
    elif code == 2:
        for n in range(a.shape[0]):
            a[n] = _sigmoid(a[n])
    elif code == 3:
        for n in range(a.shape[0]):
            a[n] = a[n] if not a[n] < _ZERO else _ZERO
    elif code == 4:
        for n in range(a.shape[0]):
            a[n] = a[n] if not a[n] < _ZERO else p0 * a[n]
    elif code == 5:
        for n in range(a.shape[0]):
            a[n] = a[n] * a[n] if not a[n] < _ZERO else _ZERO
    elif code == 6:
        for n in range(a.shape[0]):
            a[n] = a[n] if not a[n] < _ZERO else p0 * np.float32(math.expm1(a[n]))
    elif code == 7:
        for n in range(a.shape[0]):
            negative = _SELU[1] * np.float32(math.expm1(min(a[n], _ZERO)))
            a[n] = _SELU[0] * (a[n] if not a[n] < _ZERO else negative)
    elif code == 8:
        for n in range(a.shape[0]):
            scaled = p0 * a[n]
            a[n] = (max(scaled, _ZERO) + np.float32(math.log1p(_exp(-abs(scaled))))) / p0
    elif code == 9:
        for n in range(a.shape[0]):
            least = a[n] if not a[n] < p0 else p0
            a[n] = least if not least > p1 else p1
    elif code == 10:
        for n in range(a.shape[0]):
            a[n] = a[n] * _HALF * (_ONE + np.float32(math.erf(a[n] * _ROOT_HALF)))
    elif code == 11:
        for n in range(a.shape[0]):
            inner = _GELU[0] * (a[n] + _GELU[1] * a[n] * a[n] * a[n])
            a[n] = a[n] * _HALF * (_ONE + _tanh(inner))
    elif code == 12:
        for n in range(a.shape[0]):
            a[n] = a[n] * _sigmoid(a[n])
