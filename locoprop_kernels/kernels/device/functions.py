"""Transfer functions and their divergences as Triton functions, each ``f(a, p)`` with ``p`` the function's parameter.

Written out from exp, so that they run in the interpreter too and are exact to a few ulp near zero, where increments
live. Polynomials are near-minimax fits (iteratively reweighted least squares in float64). Divergences,
``F(a) - F(a0) - (a - a0) f(a0)``, are the difference of nearly equal numbers: they are float64 throughout.
"""

from typing import Any

import triton
import triton.language as tl

from locoprop_kernels import constants
from locoprop_kernels.kernels.device.arithmetic import power_of_two, reciprocal
from locoprop_kernels.transfers import Transfer

ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_TWO_OVER_PI = tl.constexpr(0.7978845608028654)
ROOT_HALF_OVER_PI = tl.constexpr(0.3989422804014327)
HALF_PI = tl.constexpr(1.5707963267948966)
QUARTER_PI = tl.constexpr(0.7853981633974483)
NODES = tl.constexpr(constants.QUADRATURE_NODES)
WEIGHTS = tl.constexpr(constants.QUADRATURE_WEIGHTS)
SELU_ALPHA = tl.constexpr(constants.SELU_ALPHA)
SELU_SCALE = tl.constexpr(constants.SELU_SCALE)
# In the order of Horner's scheme.
DILOGARITHM_SERIES = tl.constexpr(constants.DILOGARITHM_SERIES[::-1])
DILOGARITHM_AT_ONE = tl.constexpr(1.6449340668482264)  # π²/6


@triton.jit
def expm1(x):
    p = 1.9993183864148653e-04
    p = p * x + 1.3997446865613656e-03
    p = p * x + 8.3330719222609959e-03
    p = p * x + 4.1665315826582755e-02
    p = p * x + 1.6666668022947084e-01
    p = p * x + 5.0000004165464984e-01
    return tl.where(tl.abs(x) < 0.5, x + x * x * p, tl.exp(x) - 1.0)


@triton.jit
def _log1p_unit(u):
    """``log(1 + u)`` for ``0 <= u <= 1``: ``2 artanh(u / (2 + u))``."""
    s = u / (2.0 + u)
    z = s * s
    p = 0.12150466870241948
    p = p * z + 0.1071382912702807
    p = p * z + 0.14308442369689164
    p = p * z + 0.19999438873165157
    p = p * z + 0.3333333781096087
    return 2.0 * s + 2.0 * s * z * p


@triton.jit
def tanh(a, p):
    z = a * a
    q = 0.00220335680925435
    q = q * z - 0.00823984798782201
    q = q * z + 0.0217245631324637
    q = q * z - 0.05395086774146304
    q = q * z + 0.13333236522911354
    q = q * z - 0.3333333153047966
    size = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(a)) + 1.0)
    return tl.where(z < 0.37, a + a * z * q, tl.where(a < 0, -size, size))


@triton.jit
def sigmoid(a, p):
    return 1.0 / (1.0 + tl.exp(-a))


@triton.jit
def relu(a, p):
    return tl.where(a < 0, 0.0, a)  # not max: NaN must stay NaN


@triton.jit
def leaky_relu(a, p):
    return tl.where(a < 0, a * p, a)


@triton.jit
def squared_relu(a, p):
    r = relu(a, p)
    return r * r


@triton.jit
def softplus(a, p):
    b = a * p
    return (relu(b, p) + _log1p_unit(tl.exp(-tl.abs(b)))) / p


@triton.jit
def elu(a, p):
    return tl.where(a < 0, p * expm1(tl.minimum(a, 0.0)), a)


@triton.jit
def selu(a, p):
    return elu(a, SELU_ALPHA) * SELU_SCALE


@triton.jit
def celu(a, p):
    return tl.where(a < 0, p * expm1(tl.minimum(a, 0.0) / p), a)


@triton.jit
def softsign(a, p):
    return a / (1.0 + tl.abs(a))


@triton.jit
def _clamp(a, least, most):
    return tl.where(a < least, least, tl.where(a > most, most, a))  # NaN stays NaN


@triton.jit
def hardtanh(a, p):
    return _clamp(a, p, -p)  # p is min_val; lookup() sees to it that max_val is -p


@triton.jit
def relu6(a, p):
    return _clamp(a, 0.0, 6.0)


@triton.jit
def logsigmoid(a, p):
    return -softplus(-a, 1.0)


@triton.jit
def mish(a, p):
    u = tl.exp(-tl.abs(a))  # tanh(softplus(a)) = n / (n + 2) with n = exp(a) (exp(a) + 2), without overflow
    n, two = tl.where(a < 0, u * (u + 2.0), 1.0 + 2.0 * u), tl.where(a < 0, 2.0, 2.0 * u * u)
    return a * n / (n + two)


@triton.jit
def arctan(a, p):
    size = tl.abs(a)
    x = tl.where(size > 1.0, 1.0 / tl.where(size > 1.0, size, 1.0), a)
    z = x * x
    q = 0.00113489513517838
    q = q * z - 0.0074227210580558
    q = q * z + 0.02276051641707661
    q = q * z - 0.0449466500172308
    q = q * z + 0.06759586453807868
    q = q * z - 0.08818854507369008
    q = q * z + 0.11060246168401283
    q = q * z - 0.1428013098161156
    q = q * z + 0.19999692628497187
    q = q * z - 0.33333327433814963
    t = x + x * z * q
    return tl.where(size > 1.0, tl.where(a < 0, t - HALF_PI, HALF_PI - t), t)


@triton.jit
def tanh_divergence(a, a0, p, F: tl.constexpr):
    size, size0 = tl.abs(a), tl.abs(a0)
    u, u0 = tl.exp(-2.0 * size), tl.exp(-2.0 * size0)
    t0 = (1.0 - u0) / (1.0 + u0)
    difference = size + tl.log(1.0 + u) - size0 - tl.log(1.0 + u0)
    return difference - (a - a0) * tl.where(a0 < 0, -t0, t0)


@triton.jit
def sigmoid_divergence(a, a0, p, F: tl.constexpr):
    difference = tl.maximum(a, 0.0) - tl.maximum(a0, 0.0)
    difference += tl.log(1.0 + tl.exp(-tl.abs(a))) - tl.log(1.0 + tl.exp(-tl.abs(a0)))
    return difference - (a - a0) / (1.0 + tl.exp(-a0))


@triton.jit
def relu_divergence(a, a0, p, F: tl.constexpr):
    r, r0 = tl.maximum(a, 0.0), tl.maximum(a0, 0.0)
    return 0.5 * (r * r - r0 * r0) - (a - a0) * r0


@triton.jit
def leaky_relu_divergence(a, a0, p, F: tl.constexpr):
    f, f0 = tl.where(a < 0, a * p, a), tl.where(a0 < 0, a0 * p, a0)
    return 0.5 * (a * f - a0 * f0) - (a - a0) * f0


@triton.jit
def squared_relu_divergence(a, a0, p, F: tl.constexpr):
    r, r0 = tl.maximum(a, 0.0), tl.maximum(a0, 0.0)
    return (r * r * r - r0 * r0 * r0) / 3.0 - (a - a0) * r0 * r0


@triton.jit
def _dilogarithm(a):
    """``-Li2(-exp(a))``, from the Bernoulli series in ``log(1 + exp(-|a|))`` and the inversion formula."""
    y = tl.log(1.0 + tl.exp(-tl.abs(a)))
    y2 = y * y
    s = 0.0 * y
    for i in tl.static_range(8):
        s = s * y2 + DILOGARITHM_SERIES[i]
    tail = y + y2 * 0.25 + s * y2 * y
    return tl.where(a > 0, a * a * 0.5 + DILOGARITHM_AT_ONE - tail, tail)


@triton.jit
def softplus_divergence(a, a0, p, F: tl.constexpr):
    b, b0 = a * p, a0 * p
    f0 = tl.maximum(b0, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(b0)))
    return (_dilogarithm(b) - _dilogarithm(b0) - (b - b0) * f0) / (p * p)


@triton.jit
def elu_divergence(a, a0, p, F: tl.constexpr):
    r, r0 = tl.maximum(a, 0.0), tl.maximum(a0, 0.0)
    low, low0 = a - r, a0 - r0
    e, e0 = tl.exp(low), tl.exp(low0)
    difference = 0.5 * (r * r - r0 * r0) + p * (e - low - e0 + low0)
    return difference - (a - a0) * (r0 + p * (e0 - 1.0))


@triton.jit
def selu_divergence(a, a0, p, F: tl.constexpr):
    return elu_divergence(a, a0, SELU_ALPHA, F) * SELU_SCALE


@triton.jit
def celu_divergence(a, a0, p, F: tl.constexpr):
    r, r0 = tl.maximum(a, 0.0), tl.maximum(a0, 0.0)
    low, low0 = a - r, a0 - r0
    e, e0 = p * tl.exp(low / p), p * tl.exp(low0 / p)
    difference = 0.5 * (r * r - r0 * r0) + p * (e - low - e0 + low0)
    return difference - (a - a0) * (r0 + e0 - p)


@triton.jit
def softsign_divergence(a, a0, p, F: tl.constexpr):
    size, size0 = tl.abs(a), tl.abs(a0)
    return size - size0 - tl.log((1.0 + size) / (1.0 + size0)) - (a - a0) * a0 / (1.0 + size0)


@triton.jit
def _clamp_divergence(a, a0, least, most):
    c, c0 = _clamp(a, least, most), _clamp(a0, least, most)
    return c * a - c0 * a0 - 0.5 * (c * c - c0 * c0) - (a - a0) * c0


@triton.jit
def hardtanh_divergence(a, a0, p, F: tl.constexpr):
    return _clamp_divergence(a, a0, p, -p)


@triton.jit
def relu6_divergence(a, a0, p, F: tl.constexpr):
    return _clamp_divergence(a, a0, 0.0, 6.0)


@triton.jit
def logsigmoid_divergence(a, a0, p, F: tl.constexpr):
    return softplus_divergence(-a, -a0, 1.0, F)


@triton.jit
def _arctan_float64(a):
    """Taylor series after two reductions, to ``|x| <= tan(π/8)``."""
    size = tl.abs(a)
    x = tl.where(size > 1.0, 1.0 / tl.where(size > 1.0, size, 1.0), size)
    steep = x > 0.41421356237309503
    y = tl.where(steep, (x - 1.0) / (x + 1.0), x)
    z = y * y
    s = 0.0 * z
    for i in tl.static_range(20):
        s = 1.0 / (39 - 2 * i) - z * s
    t = y * s + tl.where(steep, QUARTER_PI, 0.0)
    t = tl.where(size > 1.0, HALF_PI - t, t)
    return tl.where(a < 0, -t, t)


@triton.jit
def arctan_divergence(a, a0, p, F: tl.constexpr):
    logs = 0.5 * (tl.log(1.0 + a * a) - tl.log(1.0 + a0 * a0))
    return a * (_arctan_float64(a) - _arctan_float64(a0)) - logs


@triton.jit
def gelu(a, p):
    return 0.5 * a * (1.0 + tl.erf(a * ROOT_HALF))


@triton.jit
def gelu_tanh(a, p):
    return 0.5 * a * (1.0 + tanh((a + 0.044715 * a * a * a) * ROOT_TWO_OVER_PI, p))


@triton.jit
def silu(a, p):
    return a / (1.0 + tl.exp(-a))


@triton.jit
def _gelu_potential(a):
    return 0.5 * ((a * a - 1.0) * 0.5 * (1.0 + tl.erf(a * ROOT_HALF)) + a * tl.exp(-0.5 * a * a) * ROOT_HALF_OVER_PI)


@triton.jit
def gelu_divergence(a, a0, p, F: tl.constexpr):
    f0 = 0.5 * a0 * (1.0 + tl.erf(a0 * ROOT_HALF))
    return _gelu_potential(a) - _gelu_potential(a0) - (a - a0) * f0


@triton.jit
def _silu_potential(a):
    return a * (tl.maximum(a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(a)))) - _dilogarithm(a)


@triton.jit
def silu_divergence(a, a0, p, F: tl.constexpr):
    return _silu_potential(a) - _silu_potential(a0) - (a - a0) * a0 / (1.0 + tl.exp(-a0))


@triton.jit
def quadrature_divergence(a, a0, p, F: tl.constexpr):
    """For an ``F`` without a potential: Gauss-Legendre along the segment, of float32 values."""
    p32 = p.to(tl.float32)
    start = F(a0.to(tl.float32), p32)
    mean = tl.zeros_like(a)
    for i in tl.static_range(32):
        value = F((a0 + NODES[i] * (a - a0)).to(tl.float32), p32) - start
        mean += WEIGHTS[i] * value.to(tl.float64)
    return (a - a0) * mean


@triton.jit
def tanh_near(a0, change, p, PTX: tl.constexpr):
    """``u (1 - t²) / (1 + t u)`` with ``t = tanh(a0)`` and ``u = tanh(change)``.

    Both are written with ``q = exp(-2 |a0|)``, so that nothing cancels where ``t`` is nearly 1.
    """
    z = change * change
    u = change * (1.0 + z * (0.11643429 * z - 0.33206817))
    q = power_of_two(-2.885390081777927 * tl.abs(a0), PTX)
    more, less = 0.5 + 0.5 * q, 0.5 - 0.5 * q
    return u * q * reciprocal(more * (more + tl.where(a0 < 0, -less, less) * u), PTX)


@triton.jit
def sigmoid_near(a0, change, p, PTX: tl.constexpr):
    """By ``sigmoid(a) = (1 + tanh(a / 2)) / 2``."""
    return 0.5 * tanh_near(0.5 * a0, 0.5 * change, p, PTX)


# ``f(a0 + change) - f(a0)`` where no change is above a half: right to 15 bits, and much cheaper than both values.
NEAR = {tanh: tanh_near, sigmoid: sigmoid_near}

FUNCTIONS = {
    # The kernels know it without a function.
    "identity": (None, None),
    "tanh": (tanh, tanh_divergence),
    "sigmoid": (sigmoid, sigmoid_divergence),
    "relu": (relu, relu_divergence),
    "leaky_relu": (leaky_relu, leaky_relu_divergence),
    "squared_relu": (squared_relu, squared_relu_divergence),
    "softplus": (softplus, softplus_divergence),
    "elu": (elu, elu_divergence),
    "selu": (selu, selu_divergence),
    "celu": (celu, celu_divergence),
    "softsign": (softsign, softsign_divergence),
    "hardtanh": (hardtanh, hardtanh_divergence),
    "relu6": (relu6, relu6_divergence),
    "logsigmoid": (logsigmoid, logsigmoid_divergence),
    "arctan": (arctan, arctan_divergence),
    "gelu": (gelu, gelu_divergence),
    "gelu_tanh": (gelu_tanh, quadrature_divergence),
    "silu": (silu, silu_divergence),
    "mish": (mish, quadrature_divergence),
}


def lookup(transfer: Transfer) -> tuple[Any, Any] | None:
    """``(f, divergence)`` as Triton functions; ``None`` if there are none."""
    if transfer.triton_fn is not None and transfer.elementwise:
        return transfer.triton_fn, quadrature_divergence
    if transfer.name == "hardtanh" and transfer.parameters[0] != -transfer.parameters[1]:
        return None  # a Triton function takes one parameter
    return FUNCTIONS.get(transfer.name)
