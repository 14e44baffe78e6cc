"""Update rules for the CPU kernels, in float32: on vectors of a weight's row, or of a bias.

The rules of :mod:`locoprop_kernels.rules`, but for centered RMSprop and TensorFlow's Adagrad, are of three families.
Their hyper-parameters are one array, and what changes from local step to local step is another, so that no rule needs
a kernel of its own.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from locoprop_kernels import rules
from locoprop_kernels.cpu_kernels.jit import jit
from locoprop_kernels.cpu_kernels.vectors import load, normal, root, spread, store

__all__ = ["HYPERPARAMETERS", "Family", "factors", "family_of", "update", "vectors_of"]

#: How many hyper-parameters a family has at most.
HYPERPARAMETERS = 6
_ONE = np.float32(1.0)
# With momentum and without are different codes, and so is an Adam whose mean has more of the new gradient than the old.
_SGD, _MOMENTUM, _SQUARES, _SQUARES_MOMENTUM, _ADAM, _ADAM_SHORT = range(6)


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
        code = _MOMENTUM if rule.momentum else _SGD
        return Family.of(code, slots, rule.momentum, of_gradient, of_buffer)
    if isinstance(rule, rules.RMSprop) and not rule.centered:
        inside = rule.flavor == "tensorflow"
        eps = (rule.eps, 0.0) if inside else (0.0, rule.eps)
        slots = ("square_avg", "momentum_buffer" if rule.momentum else "")
        code = _SQUARES_MOMENTUM if rule.momentum else _SQUARES
        return Family.of(code, slots, rule.alpha, 1 - rule.alpha, *eps, rule.momentum, inside)
    if isinstance(rule, rules.Adagrad) and rule.flavor == "torch":
        return Family.of(_SQUARES, ("sum", ""), 1.0, 1.0, 0.0, rule.eps)
    if isinstance(rule, rules.Adam):
        beta1, beta2 = rule.betas
        # The mean goes a part of the way from one end: with the lesser part it is most exact, as in torch.lerp.
        code, part = (_ADAM, 1 - beta1) if beta1 > 0.5 else (_ADAM_SHORT, beta1)
        return Family.of(code, ("exp_avg_sq", "exp_avg"), beta2, part, 1 - beta2, rule.eps)
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
def vectors_of(code, factors, hyper):
    """What :func:`update` takes of a rule: the family's code, and what a local step multiplies with, as vectors.

    Args:
        code: of the family.
        factors: of the local step, see :func:`factors`.
        hyper: the hyper-parameters.
    """
    lr, other = factors[0], factors[1]
    if code == _SQUARES_MOMENTUM:
        # Where the learning rate is part of the buffer, it is not a factor of the buffer.
        lr, other = (_ONE, lr) if hyper[5] else (lr, _ONE)
    four = spread(hyper[0]), spread(hyper[1]), spread(hyper[2]), spread(hyper[3])
    return code, spread(lr), spread(other), four, spread(hyper[4])


@partial(jit, inline=True)  # vectors are handed over in registers
def update(rule, delta, squares, buffer, grad):
    """One local step of a vector of elements, in place.

    What is below float32's normal numbers becomes zero. Where a gradient is zero for good, as that of a dead unit,
    what decays would never get there: it ends where ``0.9 m`` is rounded to ``m``, and slows all products with it down.

    Args:
        rule: what :func:`vectors_of` returns.
        delta: address of their increments.
        squares: that of the first slot; not used where the rule has none.
        buffer: that of the second.
        grad: their gradients, a vector.
    """
    code, lr, other, (h0, h1, h2, h3), momentum = rule
    before = load(delta)
    if code in (_ADAM, _ADAM_SHORT):
        mean, beta2, part, rest2, eps = load(buffer), h0, h1, h2, h3
        mean = normal(mean + part * (grad - mean) if code == _ADAM else grad + part * (mean - grad))
        square = normal(beta2 * load(squares) + rest2 * (grad * grad))
        store(buffer, mean)
        store(squares, square)
        step = mean / (root(square) * other + eps)
    elif code in (_SQUARES, _SQUARES_MOMENTUM):
        old, new, inside, outside = h0, h1, h2, h3
        square = normal(old * load(squares) + new * (grad * grad))
        store(squares, square)
        step = grad / (root(square + inside) + outside)
        if code == _SQUARES_MOMENTUM:
            step = normal(momentum * load(buffer) + other * step)
            store(buffer, step)
    else:
        step = grad
        if code == _MOMENTUM:
            momentum, of_gradient, of_buffer = h0, h1, h2
            found = normal(momentum * load(buffer) + grad)
            store(buffer, found)
            step = of_gradient * grad + of_buffer * found
    store(delta, normal(before - lr * step))
