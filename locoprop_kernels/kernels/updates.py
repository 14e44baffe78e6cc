"""Update rules as Triton functions, the arithmetic of :mod:`locoprop_kernels.rules` in registers.

Each is ``rule(delta, grad, s0, s1, s2, lr, step, HYPER)`` and returns the new ``delta, s0, s1, s2``; ``s0 ...`` are the
rule's slots in the order of ``Rule.slots``, unused ones are passed through. ``HYPER`` is a tuple of Python floats:
what is computed from it is rounded once, from float64.
"""

import math
from typing import Any

import triton
import triton.language as tl

from locoprop_kernels import rules
from locoprop_kernels.kernels.functions import expm1

SLOTS = 3  # most slots that a rule can have
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def sgd(delta, grad, s0, s1, s2, lr, step, HYPER: tl.constexpr):
    momentum: tl.constexpr = HYPER[0]
    if momentum == 0:
        return delta - lr * grad, s0, s1, s2
    else:
        s0 = momentum * s0 + grad
        if HYPER[1] != 0:  # nesterov
            return delta - lr * grad - lr * momentum * s0, s0, s1, s2
        else:
            return delta - lr * s0, s0, s1, s2


@triton.jit
def rmsprop(delta, grad, s0, s1, s2, lr, step, HYPER: tl.constexpr):
    alpha: tl.constexpr = HYPER[0]
    rest: tl.constexpr = HYPER[1]
    momentum: tl.constexpr = HYPER[2]
    eps: tl.constexpr = HYPER[3]
    centered: tl.constexpr = HYPER[4]
    tensorflow: tl.constexpr = HYPER[5]
    s0 = alpha * s0 + rest * grad * grad
    mean_square = s0
    if centered != 0:
        s1 = s1 + rest * (grad - s1)
        mean_square = tl.maximum(s0 - s1 * s1, 0.0)
    if tensorflow != 0:
        move = lr * (grad / tl.sqrt(mean_square + eps))
        rate = 1.0
    else:
        move = grad / (tl.sqrt(mean_square) + eps)
        rate = lr
    if momentum != 0:
        if centered != 0:
            s2 = momentum * s2 + move
            move = s2
        else:
            s1 = momentum * s1 + move
            move = s1
    return delta - rate * move, s0, s1, s2


@triton.jit
def adam(delta, grad, s0, s1, s2, lr, step, HYPER: tl.constexpr):
    rest1: tl.constexpr = HYPER[0]
    beta2: tl.constexpr = HYPER[1]
    rest2: tl.constexpr = HYPER[2]
    eps: tl.constexpr = HYPER[3]
    s0 = s0 + rest1 * (grad - s0)
    s1 = beta2 * s1 + rest2 * grad * grad
    # 1 - beta**step, without the cancellation
    correction1 = -expm1(step * HYPER[4])
    root_correction2 = tl.sqrt(-expm1(step * HYPER[5]))
    if HYPER[6] != 0:  # tensorflow
        move = (root_correction2 / correction1) * (s0 / (tl.sqrt(s1) + eps))
    else:
        move = (s0 / (tl.sqrt(s1) / root_correction2 + eps)) / correction1
    return delta - lr * move, s0, s1, s2


@triton.jit
def adagrad(delta, grad, s0, s1, s2, lr, step, HYPER: tl.constexpr):
    s0 = s0 + grad * grad
    if HYPER[1] != 0:  # tensorflow
        root = tl.sqrt(tl.maximum(s0, TINY))
    else:
        root = tl.sqrt(s0) + HYPER[0]
    return delta - lr * (grad / root), s0, s1, s2


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -1e4  # 0**step is 0 as exp(-1e4) is


def lookup(rule: rules.Rule) -> tuple[Any, tuple[float, ...]] | None:
    """The Triton function of a rule and its ``HYPER``; ``None`` if there is none.

    A rule of one's own takes part by having an attribute ``triton_function`` (and ``triton_hyper``, a tuple of floats).
    """
    own = getattr(rule, "triton_function", None)
    if own is not None:
        return own, tuple(getattr(rule, "triton_hyper", ()))
    tensorflow = float(getattr(rule, "flavor", "torch") == "tensorflow")
    kind = type(rule)  # a subclass may override the arithmetic
    if kind is rules.SGD and isinstance(rule, rules.SGD):
        return sgd, (rule.momentum, float(rule.nesterov))
    if kind is rules.RMSprop and isinstance(rule, rules.RMSprop):
        hyper = (rule.alpha, 1 - rule.alpha, rule.momentum, rule.eps, float(rule.centered), tensorflow)
        return rmsprop, hyper
    if kind is rules.Adam and isinstance(rule, rules.Adam):
        (beta1, beta2), eps = rule.betas, rule.eps
        return adam, (1 - beta1, beta2, 1 - beta2, eps, _log(beta1), _log(beta2), tensorflow)
    if kind is rules.Adagrad and isinstance(rule, rules.Adagrad):
        return adagrad, (rule.eps, tensorflow)
    return None
