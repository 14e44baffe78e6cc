"""Update rules for the CPU kernels, in float32: on rows of a weight, or on a bias.

The rules of :mod:`locoprop_kernels.rules`, but for centered RMSprop and TensorFlow's Adagrad, are of three families.
Their hyper-parameters are one array, and what changes from local step to local step is another, so that no rule needs
a kernel of its own.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from locoprop_kernels import rules
from locoprop_kernels.cpu_kernels.jit import jit, with_whole_registers

__all__ = ["HYPERPARAMETERS", "Family", "factors", "family_of", "update"]

#: How many hyper-parameters a family has at most.
HYPERPARAMETERS = 6
_ONE = np.float32(1.0)
_MOMENTUM, _SQUARES, _ADAM = range(3)


class Family(NamedTuple):
    """A rule as the kernels take it.

    Attributes:
        code: of the family.
        slots: names of the state tensors, in the kernels' order; ``""`` for one that the rule does not have.
        hyper: the hyper-parameters, and zeros ``[HYPERPARAMETERS]``, float32.
        hyper_address: where they are.
    """

    code: int
    slots: tuple[str, str]
    hyper: NDArray[np.float32]
    hyper_address: int

    @classmethod
    def of(cls, code: int, slots: tuple[str, str], *values: float) -> Family:
        """A family with these hyper-parameters."""
        hyper = np.array([*values, *(HYPERPARAMETERS - len(values)) * (0.0,)], np.float32)
        return cls(code, slots, hyper, hyper.ctypes.data)


def family_of(rule: rules.Rule) -> Family | None:
    """The family of a rule of the package; ``None`` for rules that the kernels do not have."""
    return _family(rule) if rules.is_elementwise(rule) else None


@lru_cache(maxsize=16)
def _family(rule: rules.Rule) -> Family | None:
    if isinstance(rule, rules.SGD):
        of_gradient, of_buffer = (1.0, rule.momentum) if rule.nesterov or not rule.momentum else (0.0, 1.0)
        slots = ("", "momentum_buffer" if rule.momentum else "")
        return Family.of(_MOMENTUM, slots, rule.momentum, of_gradient, of_buffer)
    if isinstance(rule, rules.RMSprop) and not rule.centered:
        inside = rule.flavor == "tensorflow"
        eps = (rule.eps, 0.0) if inside else (0.0, rule.eps)
        slots = ("square_avg", "momentum_buffer" if rule.momentum else "")
        return Family.of(_SQUARES, slots, rule.alpha, 1 - rule.alpha, *eps, rule.momentum, inside)
    if isinstance(rule, rules.Adagrad) and rule.flavor == "torch":
        return Family.of(_SQUARES, ("sum", ""), 1.0, 1.0, 0.0, rule.eps, 0.0, 0.0)
    if isinstance(rule, rules.Adam):
        rests = (1 - beta for beta in rule.betas)  # which rounded decays would not give
        return Family.of(_ADAM, ("exp_avg_sq", "exp_avg"), rule.betas[1], *rests, rule.eps)
    return None


# All layers of a step ask for the same, and without Adam all steps do.
@lru_cache(maxsize=16)
def factors(rule: rules.Rule, rates: tuple[float, ...], steps: int) -> tuple[NDArray[np.float32], int]:
    """What local steps at these learning rates, after so many steps, multiply with ``[T, 2]``, and its address."""
    found = np.ones((len(rates), 2))
    found[:, 0] = rates
    if isinstance(rule, rules.Adam):
        for t in range(len(rates)):
            first, second = (1 - beta ** (steps + t + 1) for beta in rule.betas)
            found[t, 0] *= (math.sqrt(second) if rule.flavor == "tensorflow" else 1.0) / first
            found[t, 1] = 1.0 if rule.flavor == "tensorflow" else 1 / math.sqrt(second)
    rounded = found.astype(np.float32)
    return rounded, rounded.ctypes.data


@jit
def update(code, delta, grad, squares, buffer, factors, hyper):
    """One local step of some elements, in place.

    Args:
        code: of the family.
        delta: increments ``[k]``.
        grad: their gradients.
        squares: the first slot; where the rule has none, anything.
        buffer: the second slot, likewise.
        factors: of this local step, see :func:`factors`.
        hyper: the hyper-parameters.
    """
    with_whole_registers()
    lr, root = factors[0], factors[1]
    if code == _ADAM:
        beta2, rest1, rest2, eps = hyper[0], hyper[1], hyper[2], hyper[3]
        for k in range(delta.shape[0]):
            mean = buffer[k] + rest1 * (grad[k] - buffer[k])
            square = beta2 * squares[k] + rest2 * (grad[k] * grad[k])
            buffer[k] = mean
            squares[k] = square
            delta[k] -= lr * mean / (np.sqrt(square) * root + eps)
    elif code == _SQUARES:
        old, new, inside, outside, momentum = hyper[0], hyper[1], hyper[2], hyper[3], hyper[4]
        # Where the learning rate is part of the buffer, it is not a factor of the buffer.
        before, after = (lr, _ONE) if hyper[5] else (_ONE, lr)
        if momentum:
            for k in range(delta.shape[0]):
                square = old * squares[k] + new * (grad[k] * grad[k])
                squares[k] = square
                step = momentum * buffer[k] + before * grad[k] / (np.sqrt(square + inside) + outside)
                buffer[k] = step
                delta[k] -= after * step
        else:
            for k in range(delta.shape[0]):
                square = old * squares[k] + new * (grad[k] * grad[k])
                squares[k] = square
                delta[k] -= lr * grad[k] / (np.sqrt(square + inside) + outside)
    else:
        momentum, of_gradient, of_buffer = hyper[0], hyper[1], hyper[2]
        if momentum:
            for k in range(delta.shape[0]):
                step = momentum * buffer[k] + grad[k]
                buffer[k] = step
                delta[k] -= lr * (of_gradient * grad[k] + of_buffer * step)
        else:
            for k in range(delta.shape[0]):
                delta[k] -= lr * grad[k]
