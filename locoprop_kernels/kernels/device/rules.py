"""Update rules as Triton functions, the arithmetic of :mod:`locoprop_kernels.rules` in registers.

Each is ``rule(delta, grad, s0, s1, s2, lr, step, HYPER)`` and returns the new ``delta, s0, s1, s2``; ``s0 ...`` are the
rule's slots in the order of ``Rule.slots``, unused ones are passed through. ``HYPER`` is the rule itself, so that
hyper-parameters go by name; what is computed from them alone is rounded once, from float64. Ours are also told whether
the target has instructions for division and roots.
"""

from typing import Any

import triton
import triton.language as tl

from locoprop_kernels import rules
from locoprop_kernels.kernels.device.arithmetic import LEAST_EPS, quotient, root
from locoprop_kernels.kernels.device.functions import expm1

__all__ = ["FUNCTIONS", "SLOTS", "lookup"]

SLOTS = 3  # most slots that a rule can have
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def sgd(delta, grad, s0, s1, s2, lr, step, HYPER: tl.constexpr, PTX: tl.constexpr = False):
    momentum: tl.constexpr = HYPER.momentum
    if momentum == 0:
        return delta - lr * grad, s0, s1, s2
    else:
        s0 = momentum * s0 + grad
        if HYPER.nesterov:
            return delta - lr * grad - lr * momentum * s0, s0, s1, s2
        else:
            return delta - lr * s0, s0, s1, s2


@triton.jit
def rmsprop(delta, grad, s0, s1, s2, lr, step, HYPER: tl.constexpr, PTX: tl.constexpr = False):
    alpha: tl.constexpr = HYPER.alpha
    rest: tl.constexpr = 1 - HYPER.alpha
    momentum: tl.constexpr = HYPER.momentum
    eps: tl.constexpr = HYPER.eps
    fast: tl.constexpr = PTX and HYPER.eps >= LEAST_EPS
    s0 = alpha * s0 + rest * grad * grad
    mean_square = s0
    if HYPER.centered:
        s1 = s1 + rest * (grad - s1)
        mean_square = tl.maximum(s0 - s1 * s1, 0.0)
    if HYPER.flavor == "tensorflow":
        move = lr * quotient(grad, root(mean_square + eps, fast), fast)
        rate = 1.0
    else:
        move = quotient(grad, root(mean_square, fast) + eps, fast)
        rate = lr
    if momentum != 0:
        if HYPER.centered:
            s2 = momentum * s2 + move
            move = s2
        else:
            s1 = momentum * s1 + move
            move = s1
    return delta - rate * move, s0, s1, s2


@triton.jit
def adam(delta, grad, s0, s1, s2, lr, step, HYPER: tl.constexpr, PTX: tl.constexpr = False):
    rest1: tl.constexpr = 1 - HYPER.betas[0]
    beta2: tl.constexpr = HYPER.betas[1]
    rest2: tl.constexpr = 1 - HYPER.betas[1]
    eps: tl.constexpr = HYPER.eps
    log1: tl.constexpr = HYPER.log_betas[0]
    log2: tl.constexpr = HYPER.log_betas[1]
    fast: tl.constexpr = PTX and HYPER.eps >= LEAST_EPS
    s0 = s0 + rest1 * (grad - s0)
    s1 = beta2 * s1 + rest2 * grad * grad
    # This is 1 - beta**step without the cancellation.
    correction1 = -expm1(step * log1)
    root_correction2 = tl.sqrt(-expm1(step * log2))
    if HYPER.flavor == "tensorflow":
        move = (root_correction2 / correction1) * quotient(s0, root(s1, fast) + eps, fast)
    else:
        root1 = quotient(root(s1, fast), root_correction2, fast)
        move = quotient(quotient(s0, root1 + eps, fast), correction1, fast)
    return delta - lr * move, s0, s1, s2


@triton.jit
def adagrad(delta, grad, s0, s1, s2, lr, step, HYPER: tl.constexpr, PTX: tl.constexpr = False):
    s0 = s0 + grad * grad
    if HYPER.flavor == "tensorflow":
        move = quotient(grad, root(tl.maximum(s0, TINY), PTX), PTX)
    else:
        eps: tl.constexpr = HYPER.eps
        fast: tl.constexpr = PTX and HYPER.eps >= LEAST_EPS
        move = quotient(grad, root(s0, fast) + eps, fast)
    return delta - lr * move, s0, s1, s2


FUNCTIONS = {rules.SGD: sgd, rules.RMSprop: rmsprop, rules.Adam: adam, rules.Adagrad: adagrad}


def lookup(rule: rules.Rule) -> Any:
    """The Triton function of a rule, or ``None``.

    A rule of the user's own has it in an attribute ``triton_fn``. A subclass of ours may override the arithmetic, so
    it does not inherit the function.
    """
    return getattr(rule, "triton_fn", None) or FUNCTIONS.get(type(rule))
