"""Transfer functions for the CPU kernels, in float32: on blocks ``[r, n]`` of pre-activations, in place.

What is written without a call of the C library, numba makes into vector instructions: the exponential function, and
with it tanh and the sigmoid function. Errors are of 1 to 3 units in the last place, relative to the value.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

import numpy as np

from locoprop_kernels.constants import SELU_ALPHA, SELU_SCALE
from locoprop_kernels.cpu_kernels.jit import jit, with_whole_registers
from locoprop_kernels.transfers import Transfer

__all__ = ["CODES", "KNOWN", "SOFTMAX", "arguments_of", "differences", "elementwise", "elementwise_differences"]

(IDENTITY, TANH, SIGMOID, RELU, LEAKY_RELU, SQUARED_RELU, ELU) = range(7)
(SELU, SOFTPLUS, HARDTANH, GELU, GELU_TANH, SILU, SOFTMAX) = range(7, 14)
#: The number that kernels know a transfer function by.
CODES = {
    "identity": IDENTITY,
    "tanh": TANH,
    "sigmoid": SIGMOID,
    "relu": RELU,
    "leaky_relu": LEAKY_RELU,
    "squared_relu": SQUARED_RELU,
    "elu": ELU,
    "selu": SELU,
    "softplus": SOFTPLUS,
    "hardtanh": HARDTANH,
    "gelu": GELU,
    "gelu_tanh": GELU_TANH,
    "silu": SILU,
    "softmax": SOFTMAX,
}

#: The functions whose small differences follow from ``f(a)``, so that it pays to keep that.
KNOWN = (TANH, SIGMOID)

_ZERO, _HALF, _ONE, _TWO = (np.float32(value) for value in (0.0, 0.5, 1.0, 2.0))
_LOG2_E = np.float32(1 / math.log(2))
# log 2 in two parts, of which the first has so few bits that its multiples are exact.
_LOG_2 = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)
_TINY = np.float32(1e-30)
_LEAST, _MOST = np.float32(-87.3), np.float32(88.7)
# exp(x) = 1 + x + x² p(x) for |x| <= log(2) / 2, and tanh(x) = x + x³ p(x²) for |x| <= 0.65: minimax polynomials, with
# relative errors of 3e-9 and 7e-9.
_EXP = tuple(np.float32(c) for c in (0.499999934, 0.166665201, 0.0416683942, 0.00836878057, 0.00138144671))
_TANH = tuple(np.float32(c) for c in (-0.333332598, 0.133308302, -0.053688010, 0.0204693812, -0.00551512210))
# erf(x) = x p(x²) for |x| <= 0.9, else 1 - exp(-p(|x|)) up to 4; log(1 + y) = 2 s + s³ p(s²) with s = y / (2 + y) for y
# from 0 to 1: likewise, with errors of 1e-8, 2e-9 and 4e-9.
_ERF = tuple(
    np.float32(c) for c in (1.12837911, -0.376125246, 0.112821408, -0.0267789084, 0.00501196226, -0.000609035778)
)
_ERFC = tuple(
    np.float32(c)
    for c in (0.000177487251, 1.12774956, 0.637059689, 0.104037419, -0.0222771168, 0.00305561558, -0.000197182628)
)
_LOG1P = tuple(np.float32(c) for c in (0.666663170, 0.400249094, 0.279606044, 0.281783253))
_ERF_NEAR, _ERF_FAR = np.float32(0.9), np.float32(4.0)
_NEAR, _SMALL = np.float32(0.34), np.float32(0.65)
_ROOT_HALF = np.float32(math.sqrt(0.5))
_GELU = np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)
_SELU = np.float32(SELU_SCALE), np.float32(SELU_ALPHA)
_BIAS, _MANTISSA = np.int32(127), np.int32(23)


@lru_cache(maxsize=64)
def arguments_of(transfer: Transfer) -> tuple[int, np.float32, np.float32]:
    """A transfer function as kernels take it: its code and two parameters, which are zero where it has none."""
    first, second = (np.float32(value) for value in (*transfer.parameters, 0.0, 0.0)[:2])
    return CODES[transfer.name], first, second


# In loops, calls that are left keep them from becoming loops of vectors.
_inlined = partial(jit, inline=True)


@_inlined
def _chosen(condition, one, other):
    """``one if condition else other``, both of which are there: LLVM makes no branch of it, and so a vector."""
    mask, first, second = -np.int32(condition), np.float32(one).view(np.int32), np.float32(other).view(np.int32)
    return np.int32((first & mask) | (second & ~mask)).view(np.float32)


@_inlined
def _near_one(x):
    """``exp(x) - 1`` for ``|x| <= log(2) / 2``."""
    return x + x * x * ((((_EXP[4] * x + _EXP[3]) * x + _EXP[2]) * x + _EXP[1]) * x + _EXP[0])


@_inlined
def _exp(x):
    """``exp(x)``; 0 where it is below float32's normal numbers."""
    clamped = min(max(x, _LEAST), _MOST)
    whole = np.rint(clamped * _LOG2_E)
    rest = (clamped - whole * _LOG_2[0]) - whole * _LOG_2[1]
    half = np.int32(whole) >> np.int32(1)
    low = np.int32((half + _BIAS) << _MANTISSA).view(np.float32)
    high = np.int32((np.int32(whole) - half + _BIAS) << _MANTISSA).view(np.float32)
    value = (_near_one(rest) + _ONE) * low * high
    if x < _LEAST:
        value = _ZERO
    if x > _MOST:
        value = np.float32(np.inf)
    return value if x == x else x


@_inlined
def _expm1(x):
    return _chosen(abs(x) <= _NEAR, _near_one(x), _exp(x) - _ONE)


@_inlined
def _tanh_near_zero(x):
    """``tanh(x)`` for ``|x| <= 0.65``."""
    q = x * x
    return x + x * q * ((((_TANH[4] * q + _TANH[3]) * q + _TANH[2]) * q + _TANH[1]) * q + _TANH[0])


@_inlined
def _tanh(x):
    near = _tanh_near_zero(x)
    far = _ONE - _TWO / (_exp(_TWO * abs(x)) + _ONE)
    far = far if x >= _ZERO else -far
    value = _chosen(abs(x) <= _SMALL, near, far)
    return value if x == x else x


@_inlined
def _sigmoid(x):
    return _ONE / (_ONE + _exp(-x))


@_inlined
def _erf(x):
    q, size = x * x, abs(x)
    near = x * (((((_ERF[5] * q + _ERF[4]) * q + _ERF[3]) * q + _ERF[2]) * q + _ERF[1]) * q + _ERF[0])
    t = size if not size > _ERF_FAR else _ERF_FAR
    power = (((((_ERFC[6] * t + _ERFC[5]) * t + _ERFC[4]) * t + _ERFC[3]) * t + _ERFC[2]) * t + _ERFC[1]) * t + _ERFC[0]
    far = _ONE - _exp(-power)
    return _chosen(size <= _ERF_NEAR, near, far if x >= _ZERO else -far)


@_inlined
def _log1p(y):
    """``log(1 + y)`` for ``y`` from 0 to 1."""
    s = y / (_TWO + y)
    q = s * s + _TINY  # squares below float32's normal numbers take a hundred times as long
    return s * (_TWO + q * (((_LOG1P[3] * q + _LOG1P[2]) * q + _LOG1P[1]) * q + _LOG1P[0]))


@jit
def _softmax(a):
    most = a.max()
    total = _ZERO
    for n in range(a.shape[0]):
        a[n] = _exp(a[n] - most)
        total += a[n]
    for n in range(a.shape[0]):
        a[n] /= total


@jit
def _softmax_difference(p, a):
    """``softmax(a + p) - softmax(a)`` of one row, in place of ``p``."""
    largest = _ZERO
    for n in range(p.shape[0]):
        largest += abs(p[n])
    if largest <= _ONE:
        # With s = softmax(a) and u = exp(p) - 1 it is s (u - Σ s u) / (1 + Σ s u).
        _softmax(a)
        total = _ZERO
        for n in range(p.shape[0]):
            p[n] = _expm1(p[n])
            total += a[n] * p[n]
        for n in range(p.shape[0]):
            p[n] = a[n] * (p[n] - total) / (_ONE + total)
    else:
        for n in range(p.shape[0]):
            p[n] += a[n]
        _softmax(p)
        _softmax(a)
        for n in range(p.shape[0]):
            p[n] -= a[n]


@jit
def differences(code, p, a, outputs, p0, p1):
    """``f(a + p) - f(a)`` in place of ``p``; ``a`` is lost.

    In increment form ``p`` is small beside ``a``, and so is the difference beside the two values: where there is a
    formula that takes no difference of rounded values, its error is a hundredth. For tanh it is the addition theorem,
    ``tanh(a + p) - tanh(a) = tanh(p) (1 - tanh(a) tanh(a + p))``; the sigmoid function is ``(1 + tanh(a / 2)) / 2``.
    Of small changes it is taken without the value at ``a + p``: with ``t = tanh(a)`` and ``u = tanh(p)`` it is
    ``u (1 - t²) / (1 + t u)``, whose denominator vanishes where ``t`` and ``u`` are almost 1 and -1.

    Args:
        code: of the function, see :data:`CODES`; ``p0`` and ``p1`` are its parameters.
        p: changes of the pre-activations of some rows and outputs ``[r, n]``, contiguous.
        a: the pre-activations, likewise.
        outputs: how many of the outputs count.
    """
    if code == SOFTMAX:
        for r in range(p.shape[0]):
            _softmax_difference(p[r, :outputs], a[r, :outputs])
    else:
        elementwise_differences(code, p.reshape(-1), a.reshape(-1), a.reshape(-1)[:0], p0, p1)


@jit
def _are_small(p):
    """Whether all of some numbers are so near to zero that :func:`_tanh_near_zero` is for them."""
    with_whole_registers()
    others = np.int32(0)
    for n in range(p.shape[0]):
        others += np.int32(0) if abs(p[n]) <= _SMALL else np.int32(1)
    return others == 0


@_inlined
def _tanh_difference(t, u):
    """``tanh(a + p) - tanh(a)`` where ``t = tanh(a)`` and ``u = tanh(p)``."""
    return u * (_ONE - t * t) / (_ONE + t * u)


@_inlined
def _sigmoid_difference(s, u):
    """``σ(a + p) - σ(a)`` where ``s = σ(a)`` and ``u = tanh(p / 2)``."""
    return _TWO * u * s * (_ONE - s) / (_ONE + (_TWO * s - _ONE) * u)


@jit
def elementwise_differences(code, p, a, known, p0, p1):
    """``f(a + p) - f(a)`` in place of ``p``, for functions ``f`` that take each number ``[n]`` by itself.

    Args:
        code: of the function, see :data:`CODES`; ``p0`` and ``p1`` are its parameters.
        p: changes of the pre-activations.
        a: the pre-activations; they are lost, but for the functions in :data:`KNOWN`.
        known: ``f(a)`` for the functions in :data:`KNOWN`, or no numbers where it is not there.
    """
    with_whole_registers()
    # Small changes are found by the same instructions whether all are small or not: none depends on the others.
    if code == TANH:
        small = _are_small(p)
        changes = p if small else p.copy()
        for n in range(known.shape[0]):
            p[n] = _tanh_difference(known[n], _tanh_near_zero(p[n]))
        for n in range(0 if known.shape[0] else p.shape[0]):
            p[n] = _tanh_difference(_tanh(a[n]), _tanh_near_zero(p[n]))
        for n in range(0 if small else p.shape[0]):
            large = _tanh(changes[n]) * (_ONE - _tanh(a[n]) * _tanh(a[n] + changes[n]))
            p[n] = _chosen(abs(changes[n]) <= _SMALL, p[n], large)
    elif code == SIGMOID:
        small = _are_small(p)
        changes = p if small else p.copy()
        for n in range(known.shape[0]):
            p[n] = _sigmoid_difference(known[n], _tanh_near_zero(_HALF * p[n]))
        for n in range(0 if known.shape[0] else p.shape[0]):
            p[n] = _sigmoid_difference(_sigmoid(a[n]), _tanh_near_zero(_HALF * p[n]))
        for n in range(0 if small else p.shape[0]):
            before, after = _sigmoid(a[n]), _sigmoid(a[n] + changes[n])
            large = _tanh(_HALF * changes[n]) * (before * (_ONE - after) + after * (_ONE - before))
            p[n] = _chosen(abs(changes[n]) <= _SMALL, p[n], large)
    elif code in (RELU, LEAKY_RELU):
        slope = p0 if code == LEAKY_RELU else _ZERO
        for n in range(p.shape[0]):
            before, after = a[n], a[n] + p[n]
            across = (after if after > _ZERO else slope * after) - (before if before > _ZERO else slope * before)
            inside = p[n] if before > _ZERO else slope * p[n]
            value = inside if (before > _ZERO) == (after > _ZERO) else across
            p[n] = value if after == after else after
    elif code != IDENTITY:
        for n in range(p.shape[0]):
            p[n] += a[n]
        elementwise(code, p, p0, p1)
        elementwise(code, a, p0, p1)
        for n in range(p.shape[0]):
            p[n] -= a[n]


@jit
def elementwise(code, a, p0, p1):
    """``f(a)`` in place of ``a`` ``[n]``, of a function in :data:`KNOWN` or one without a formula for differences."""
    with_whole_registers()
    if code == TANH:
        for n in range(a.shape[0]):
            a[n] = _tanh(a[n])
    elif code == SIGMOID:
        for n in range(a.shape[0]):
            a[n] = _sigmoid(a[n])
    elif code == SQUARED_RELU:
        for n in range(a.shape[0]):
            a[n] = a[n] * a[n] if not a[n] < _ZERO else _ZERO
    elif code == ELU:
        for n in range(a.shape[0]):
            a[n] = a[n] if not a[n] < _ZERO else p0 * _expm1(a[n])
    elif code == SELU:
        for n in range(a.shape[0]):
            negative = _SELU[1] * _expm1(min(a[n], _ZERO))
            a[n] = _SELU[0] * (a[n] if not a[n] < _ZERO else negative)
    elif code == SOFTPLUS:
        for n in range(a.shape[0]):
            scaled = p0 * a[n]
            a[n] = (max(scaled, _ZERO) + _log1p(_exp(-abs(scaled)))) / p0
    elif code == HARDTANH:
        for n in range(a.shape[0]):
            least = a[n] if not a[n] < p0 else p0
            a[n] = least if not least > p1 else p1
    elif code == GELU:
        for n in range(a.shape[0]):
            a[n] = a[n] * _HALF * (_ONE + _erf(a[n] * _ROOT_HALF))
    elif code == GELU_TANH:
        for n in range(a.shape[0]):
            inner = _GELU[0] * (a[n] + _GELU[1] * a[n] * a[n] * a[n])
            a[n] = a[n] * _HALF * (_ONE + _tanh(inner))
    elif code == SILU:
        for n in range(a.shape[0]):
            a[n] = a[n] * _sigmoid(a[n])
