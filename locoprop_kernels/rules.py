"""First-order update rules that drive the local iterations.

Each rule works on the *increment* ``Δ`` of one tensor since the forward pass and keeps its state in a dictionary of
tensors that persists over local and outer steps. ``flavor="torch"`` is the arithmetic of ``torch.optim``;
``flavor="tensorflow"`` that of TensorFlow 1, which the paper's notebook uses:

* RMSprop starts its mean square at one, keeps ``eps`` inside the root and the learning rate inside the momentum buffer;
* Adam's ``eps`` is not bias-corrected;
* Adagrad has no ``eps``, only its initial accumulator.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from locoprop_kernels import fused
from locoprop_kernels.arguments import as_flag, check_choice, is_finite, is_number, shown

__all__ = ["SGD", "Adagrad", "Adam", "RMSprop", "Rule", "available", "get", "is_elementwise"]

_FLAVORS = ("torch", "tensorflow")


def _checked_number(rule: Rule, name: str, value: Any, below: float = math.inf) -> float:
    if not is_number(value):
        raise TypeError(f"{name} of {type(rule).__name__} must be a number, got {shown(value)}")
    if not (is_finite(value) and 0 <= value < below):
        bound = f"< {below:g}" if below < math.inf else "finite"
        raise ValueError(f"{name} of {type(rule).__name__} must be >= 0 and {bound}, got {shown(value)}")
    # Checkpoints and kernels know a rule by its repr, in which one of NumPy's is not what it is in Python.
    return value if type(value) in (int, float) else float(value)


def _check_interval(rule: Rule, name: str, below: float = math.inf) -> None:
    object.__setattr__(rule, name, _checked_number(rule, name, getattr(rule, name), below))


def _check_flag(rule: Rule, name: str) -> None:
    object.__setattr__(rule, name, as_flag(f"{name} of {type(rule).__name__}", getattr(rule, name)))


def _check_flavor(rule: Rule, flavor: Any) -> None:
    check_choice(f"flavor of {type(rule).__name__}", flavor, _FLAVORS)


class Rule(ABC):
    """An update rule: what :func:`locoprop_kernels.local_steps_` asks of it.

    A rule of your own runs on the reference backend as it is. The Triton backend asks for an attribute more:
    ``triton_fn``, a ``@triton.jit`` function of blocks, ``(delta, grad, s0, s1, s2, lr, step, HYPER)`` to
    ``(delta, s0, s1, s2)``, where ``s0`` ... are up to three slots in order and unused ones are passed through.
    ``HYPER`` is the rule itself, at compile time: ``HYPER.alpha`` is its hyper-parameter ``alpha``. Make the rule a
    frozen dataclass: kernels are kept, and checkpoints compared, by its ``repr``.
    """

    @property
    @abstractmethod
    def slots(self) -> dict[str, float]:
        """Names of the state tensors and the value that each one starts at."""

    @property
    def counts_steps(self) -> bool:
        """Whether the update depends on the number of steps taken so far (the state then has an integer ``"step"``)."""
        return False

    @abstractmethod
    def update_(self, delta: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        """One step, in place on ``delta`` and the tensors of ``state``.

        Args:
            delta: increment ``Δ`` of the parameter, any shape.
            grad: gradient of the local objective, same shape; left as it is.
            state: one tensor per slot, same shape.
            lr: learning rate of this local iteration.
            step: number of steps of this rule so far, this one included (1 at the first).
        """

    def update_all_(
        self, deltas: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], lr: float, step: int
    ) -> None:
        """:meth:`update_` of several tensors, as it would update each by itself.

        Args:
            deltas: the increments.
            grads: the gradients.
            states: the rule's state of each.
            lr: learning rate.
            step: number of steps, as there.
        """
        # A subclass may have other arithmetic than what the fused kernels stand for.
        if is_elementwise(self) and self._update_fused_(deltas, grads, states, lr, step):
            return
        for delta, grad, state in zip(deltas, grads, states, strict=True):
            self.update_(delta, grad, state, lr, step)

    def _update_fused_(
        self, deltas: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], lr: float, step: int
    ) -> bool:
        """:meth:`update_all_` by torch's own fused kernels, if they can work on these tensors: whether it was done."""
        return False


@dataclass(frozen=True)
class SGD(Rule):
    """Gradient descent, also with momentum (Polyak, 1964) or Nesterov's momentum (Sutskever et al., 2013).

    With the gradient ``G`` and ``m`` for ``momentum``, a local step is ``Δ ← Δ - lr G`` without momentum; with it
    ``buf ← m buf + G`` and ``Δ ← Δ - lr buf``, or with ``nesterov`` ``Δ ← Δ - lr (G + m buf)``. torch and TensorFlow
    agree in this.

    Args:
        momentum: ``m >= 0``; 0 for none.
        nesterov: whether to look ahead; needs a momentum.
    """

    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check_interval(self, "momentum")
        _check_flag(self, "nesterov")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov of SGD needs a momentum > 0, got momentum=0.0")

    @property
    def slots(self) -> dict[str, float]:
        return {"momentum_buffer": 0.0} if self.momentum else {}

    def update_(self, delta: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        if not self.momentum:
            delta.add_(grad, alpha=-lr)
            return
        buffer = state["momentum_buffer"].mul_(self.momentum).add_(grad)
        if self.nesterov:
            delta.add_(grad, alpha=-lr).add_(buffer, alpha=-lr * self.momentum)
        else:
            delta.add_(buffer, alpha=-lr)


@dataclass(frozen=True)
class RMSprop(Rule):
    """RMSprop, the paper's local rule; defaults as in its experiments with torch's arithmetic.

    Args:
        alpha: decay of the mean square.
        momentum: 0 for none.
        eps: added to the root (torch) or inside it (tensorflow).
        centered: subtract the squared mean gradient from the mean square.
        flavor: ``"torch"`` or ``"tensorflow"``, see the module.
    """

    alpha: float = 0.9
    momentum: float = 0.999
    eps: float = 1e-6
    centered: bool = False
    flavor: str = "torch"

    def __post_init__(self) -> None:
        _check_interval(self, "alpha", below=1.0)
        _check_flag(self, "centered")
        _check_interval(self, "momentum")
        _check_interval(self, "eps")
        _check_flavor(self, self.flavor)

    @property
    def slots(self) -> dict[str, float]:
        slots = {"square_avg": 1.0 if self.flavor == "tensorflow" else 0.0}
        if self.centered:
            slots["grad_avg"] = 0.0
        if self.momentum:
            slots["momentum_buffer"] = 0.0
        return slots

    def update_(self, delta: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        if self._update_fused_([delta], [grad], [state], lr, step):
            return
        mean_square = state["square_avg"].mul_(self.alpha).addcmul_(grad, grad, value=1 - self.alpha)
        if self.centered:
            mean = state["grad_avg"].lerp_(grad, 1 - self.alpha)
            mean_square = mean_square.addcmul(mean, mean, value=-1).clamp_min_(
                0
            )  # a rounded difference may be negative
        if self.flavor == "tensorflow":
            denominator = (mean_square + self.eps).sqrt_()
            if self.momentum:
                delta.sub_(state["momentum_buffer"].mul_(self.momentum).addcdiv_(grad, denominator, value=lr))
            else:
                delta.addcdiv_(grad, denominator, value=-lr)
            return
        denominator = mean_square.sqrt().add_(self.eps)
        if self.momentum:
            delta.add_(state["momentum_buffer"].mul_(self.momentum).addcdiv_(grad, denominator), alpha=-lr)
        else:
            delta.addcdiv_(grad, denominator, value=-lr)

    def _update_fused_(
        self, deltas: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], lr: float, step: int
    ) -> bool:
        written = (value for state in states for value in state.values())
        if self.centered or self.flavor != "torch" or not fused.usable([*deltas, *grads, *written]):
            return False
        fused.rmsprop_(deltas, grads, states, lr, self)
        return True


@dataclass(frozen=True)
class Adam(Rule):
    """Adam (Kingma and Ba, 2015).

    With the gradient ``G``, in the ``n``-th local step of the rule: ``m ← β₁ m + (1 - β₁) G``,
    ``v ← β₂ v + (1 - β₂) G²`` and ``Δ ← Δ - lr m/(1 - β₁ⁿ) / (√(v/(1 - β₂ⁿ)) + eps)``. TensorFlow adds ``eps`` before
    the root is corrected: ``Δ ← Δ - lr √(1 - β₂ⁿ)/(1 - β₁ⁿ) m / (√v + eps)``.

    Args:
        betas: ``(β₁, β₂)``, decays of the mean and of the mean square, each in ``[0, 1)``.
        eps: added to the root, ``>= 0``.
        flavor: ``"torch"`` or ``"tensorflow"``, see the module.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    flavor: str = "torch"

    def __post_init__(self) -> None:
        if not isinstance(self.betas, (Sequence, np.ndarray)):  # a set has no order
            raise TypeError(f"betas of Adam must be two numbers, got {shown(self.betas)}")
        betas = tuple(_checked_number(self, f"betas[{i}]", beta, 1.0) for i, beta in enumerate(self.betas))
        if len(betas) != 2:
            raise ValueError(f"betas of Adam must be two numbers, got {shown(self.betas)}")
        object.__setattr__(self, "betas", betas)
        _check_interval(self, "eps")
        _check_flavor(self, self.flavor)

    @property
    def slots(self) -> dict[str, float]:
        return {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    @property
    def counts_steps(self) -> bool:
        return True

    @property
    def log_betas(self) -> tuple[float, float]:
        """Logarithms of the decays, -1e4 for a decay of zero: ``exp(-1e4 * step)`` is zero, as ``0**step`` is."""
        beta1, beta2 = (math.log(beta) if beta > 0 else -1e4 for beta in self.betas)
        return beta1, beta2

    def update_(self, delta: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        beta1, beta2 = self.betas
        if self._update_fused_([delta], [grad], [state], lr, step):
            return
        mean = state["exp_avg"].lerp_(grad, 1 - beta1)
        mean_square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction1, root_correction2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
        if self.flavor == "tensorflow":
            delta.addcdiv_(mean, mean_square.sqrt().add_(self.eps), value=-lr * root_correction2 / correction1)
        else:
            delta.addcdiv_(mean, mean_square.sqrt().div_(root_correction2).add_(self.eps), value=-lr / correction1)

    def _update_fused_(
        self, deltas: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], lr: float, step: int
    ) -> bool:
        moments = (state[slot] for state in states for slot in self.slots)
        if not fused.usable([*deltas, *grads, *moments]):
            return False
        fused.adam_(deltas, grads, states, lr, step, self)
        return True


@dataclass(frozen=True)
class Adagrad(Rule):
    """Adagrad (Duchi, Hazan and Singer, 2011).

    With the gradient ``G``, a local step is ``s ← s + G²`` and ``Δ ← Δ - lr G / (√s + eps)``. TensorFlow has no
    ``eps``, ``Δ ← Δ - lr G / √s``, and nothing moves where ``s`` is zero.

    Args:
        eps: added to the root, ``>= 0``; not looked at in TensorFlow's flavor.
        initial_accumulator_value: what ``s`` starts at, ``>= 0``.
        flavor: ``"torch"`` or ``"tensorflow"``, see the module.
    """

    eps: float = 1e-10
    initial_accumulator_value: float = 0.0
    flavor: str = "torch"

    def __post_init__(self) -> None:
        _check_interval(self, "eps")
        _check_interval(self, "initial_accumulator_value")
        _check_flavor(self, self.flavor)

    @property
    def slots(self) -> dict[str, float]:
        return {"sum": self.initial_accumulator_value}

    def update_(self, delta: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        total = state["sum"].addcmul_(grad, grad)
        if self.flavor == "tensorflow":
            denominator = total.clamp_min(torch.finfo(total.dtype).tiny).sqrt_()
        else:
            denominator = total.sqrt().add_(self.eps)
        delta.addcdiv_(grad, denominator, value=-lr)


_BY_NAME: dict[str, Rule] = {
    "sgd": SGD(),
    "momentum": SGD(momentum=0.9),
    "nesterov": SGD(momentum=0.9, nesterov=True),
    "rmsprop": RMSprop(),
    "adam": Adam(),
    "adagrad": Adagrad(),
}


def available() -> tuple[str, ...]:
    """Names of the known rules."""
    return tuple(_BY_NAME)


def get(rule: str | Rule) -> Rule:
    """The rule called ``rule`` with its default hyper-parameters; a :class:`Rule` is passed through.

    Raises:
        TypeError: ``rule`` is neither a string nor a :class:`Rule`.
        ValueError: unknown name.
    """
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"rule must be a string or a locoprop_kernels.rules.Rule, got {type(rule).__name__}")
    if rule not in _BY_NAME:
        raise ValueError(f"rule must be one of {', '.join(_BY_NAME)}, or a Rule; got {rule!r}")
    return _BY_NAME[rule]


def is_elementwise(rule: Rule) -> bool:
    """Whether the rule is known to update every element by itself: the package's own are, a user's may not be."""
    return type(rule) in {type(known) for known in _BY_NAME.values()}
