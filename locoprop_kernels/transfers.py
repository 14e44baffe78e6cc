"""Transfer functions ``f`` and their matching losses.

The matching loss of a layer with transfer function ``f`` is the Bregman divergence of the potential ``F = ∫ f``
(LocoProp paper, section 3). Its gradient with respect to the pre-activation is the *activation difference*
``f(a) - y``, free of ``f'``: that is all that the local loop needs. The potentials are here for reports and tests.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from locoprop_kernels.arguments import is_finite, is_number, shown
from locoprop_kernels.constants import (
    DILOGARITHM_SERIES,
    QUADRATURE_NODES,
    QUADRATURE_WEIGHTS,
    SELU_ALPHA,
    SELU_SCALE,
)

__all__ = ["Transfer", "available", "get", "register_transfer"]


def _identity(a: Tensor) -> Tensor:
    return a


def _half_square(a: Tensor) -> Tensor:
    return a.square() / 2


def _log_cosh(a: Tensor) -> Tensor:
    return a.abs() + F.softplus(-2 * a.abs()) - math.log(2.0)


def _softplus(a: Tensor) -> Tensor:
    # torch's softplus turns linear above 20; this one is the same function without the step.
    return torch.clamp_min(a, 0) + torch.log1p(torch.exp(-a.abs()))


def _softplus_potential(a: Tensor) -> Tensor:
    """``-Li2(-exp(a))``, the integral of ``log(1 + exp(a))`` from minus infinity."""
    y = torch.log1p(torch.exp(-a.abs()))
    y2 = y.square()
    series = torch.zeros_like(a)
    for coefficient in reversed(DILOGARITHM_SERIES):
        series = (series + coefficient) * y2
    tail = y + y2 / 4 + series * y  # -Li2(-exp(-|a|))
    return torch.where(a > 0, a.square() / 2 + math.pi**2 / 6 - tail, tail)


def _fast_tanh_(a: Tensor) -> Tensor:
    # A quarter of the time of torch.tanh on a CPU, where that one is written for the last bit.
    return a.mul_(2).sigmoid_().mul_(2).sub_(1)


def _squared_relu(a: Tensor) -> Tensor:
    return torch.relu(a).square()


def _elu_potential(a: Tensor, alpha: float) -> Tensor:
    negative = torch.clamp_max(a, 0)
    return torch.relu(a).square() / 2 + alpha * (torch.expm1(negative) - negative)


def _celu_potential(a: Tensor, alpha: float) -> Tensor:
    negative = torch.clamp_max(a, 0)
    return torch.relu(a).square() / 2 + alpha * (alpha * torch.expm1(negative / alpha) - negative)


def _softsign_potential(a: Tensor) -> Tensor:
    return a.abs() - torch.log1p(a.abs())


def _clamp_potential(a: Tensor, least: float, most: float) -> Tensor:
    clamped = a.clamp(least, most)
    return clamped * a - clamped.square() / 2


def _gelu_potential(a: Tensor) -> Tensor:
    density = torch.exp(-a.square() / 2) / math.sqrt(2 * math.pi)
    return ((a.square() - 1) * torch.special.ndtr(a) + a * density) / 2


@dataclass(frozen=True)
class _Definition:
    function: Callable[..., Tensor]
    potential: Callable[..., Tensor] | None
    parameters: tuple[tuple[str, float], ...] = ()
    elementwise: bool = True
    in_place: Callable[..., Tensor] | None = None
    fast_in_place: Callable[..., Tensor] | None = None
    convex: bool = True
    triton_fn: Any = None
    registered: bool = False
    # What the parameters must be beside finite: a test, and words for it.
    condition: tuple[Callable[..., bool], str] | None = None


_DEFINITIONS: dict[str, _Definition] = {
    "identity": _Definition(_identity, _half_square),
    "tanh": _Definition(torch.tanh, _log_cosh, in_place=torch.tanh_, fast_in_place=_fast_tanh_),
    "sigmoid": _Definition(torch.sigmoid, _softplus, in_place=torch.sigmoid_),
    "relu": _Definition(torch.relu, lambda a: torch.relu(a).square() / 2, in_place=torch.relu_),
    "leaky_relu": _Definition(
        lambda a, slope: F.leaky_relu(a, slope),
        lambda a, slope: a * F.leaky_relu(a, slope) / 2,
        (("negative_slope", 0.01),),
    ),
    "squared_relu": _Definition(_squared_relu, lambda a: torch.relu(a).pow(3) / 3),
    "softplus": _Definition(
        lambda a, beta: _softplus(beta * a) / beta,
        lambda a, beta: _softplus_potential(beta * a) / beta**2,
        (("beta", 1.0),),
        condition=(bool, "beta must not be 0"),
    ),
    "elu": _Definition(lambda a, alpha: F.elu(a, alpha), _elu_potential, (("alpha", 1.0),)),
    "selu": _Definition(torch.selu, lambda a: SELU_SCALE * _elu_potential(a, SELU_ALPHA)),
    "celu": _Definition(
        lambda a, alpha: F.celu(a, alpha),
        _celu_potential,
        (("alpha", 1.0),),
        condition=(bool, "alpha must not be 0"),
    ),
    "softsign": _Definition(F.softsign, _softsign_potential),
    "hardtanh": _Definition(
        F.hardtanh,
        _clamp_potential,
        (("min_val", -1.0), ("max_val", 1.0)),
        condition=(operator.le, "min_val must be <= max_val"),
    ),
    "relu6": _Definition(F.relu6, lambda a: _clamp_potential(a, 0.0, 6.0)),
    "logsigmoid": _Definition(lambda a: -_softplus(-a), lambda a: _softplus_potential(-a)),
    "arctan": _Definition(torch.atan, lambda a: a * torch.atan(a) - torch.log1p(a.square()) / 2),
    "gelu": _Definition(F.gelu, _gelu_potential, convex=False),
    "gelu_tanh": _Definition(lambda a: F.gelu(a, approximate="tanh"), None, convex=False),
    "silu": _Definition(F.silu, lambda a: a * _softplus(a) - _softplus_potential(a), convex=False),
    "mish": _Definition(F.mish, None, convex=False),
    "softmax": _Definition(
        lambda a: torch.softmax(a, -1),
        lambda a: torch.logsumexp(a, -1),
        elementwise=False,
    ),
}


@dataclass(frozen=True)
class Transfer:
    """A transfer function by name, with its parameters; make one with :func:`get`.

    Attributes:
        name: name in the table of :func:`available`.
        parameters: values of the function's parameters (the slope of a leaky ReLU, say), in the table's order.
    """

    name: str
    parameters: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        definition = _definition(self.name)
        names = [name for name, _ in definition.parameters]
        if not isinstance(self.parameters, Sequence) or len(self.parameters) != len(names):
            wanted = ", ".join(names) or "none"
            raise ValueError(f"transfer {self.name!r} must have the parameters {wanted}; got {shown(self.parameters)}")
        for name, value in zip(names, self.parameters, strict=True):
            if not is_number(value):
                raise TypeError(f"{name} of transfer {self.name!r} must be a number, got {shown(value)}")
            if not is_finite(value):
                raise ValueError(f"{name} of transfer {self.name!r} must be finite, got {shown(value)}")
        values = tuple(map(float, self.parameters))
        if definition.condition is not None and not definition.condition[0](*values):
            raise ValueError(f"{definition.condition[1]} in transfer {self.name!r}, got {values}")
        object.__setattr__(self, "parameters", values)

    @property
    def elementwise(self) -> bool:
        """Whether an output element depends on its own input element alone (softmax acts on rows instead)."""
        return _DEFINITIONS[self.name].elementwise

    @property
    def convex(self) -> bool:
        """Whether the matching loss is known to be convex in the pre-activation: ``f`` never decreases.

        GELU, SiLU and Mish decrease for some negative inputs, where their matching loss bends down.
        """
        return _DEFINITIONS[self.name].convex

    @property
    def triton_fn(self) -> Any:
        """The Triton function that :func:`register_transfer` was given; ``None`` for the package's own functions."""
        return _DEFINITIONS[self.name].triton_fn

    def __call__(self, a: Tensor) -> Tensor:
        """``f(a)``: post-activation of the pre-activation ``a`` ``[..., N]``, same shape and dtype."""
        return _DEFINITIONS[self.name].function(a, *self.parameters)

    def apply_(self, a: Tensor, fast: bool = False) -> Tensor:
        """``f(a)``, in ``a`` itself where there is such a function; ``a`` is lost either way.

        Args:
            a: pre-activation.
            fast: an absolute error of 1e-6 will do, as beside products with 16-bit operands.
        """
        definition = _DEFINITIONS[self.name]
        function = (definition.fast_in_place if fast else None) or definition.in_place or definition.function
        return function(a, *self.parameters)

    def potential(self, a: Tensor) -> Tensor:
        """``F(a) = ∫ f``: the shape of ``a`` for an elementwise ``f``, ``[...]`` (no last dimension) otherwise.

        Raises:
            ValueError: the function has no potential in closed form (:meth:`matching_loss` works all the same).
        """
        potential = _DEFINITIONS[self.name].potential
        if potential is None:
            raise ValueError(f"transfer {self.name!r} has no potential in closed form")
        return potential(a, *self.parameters)

    def matching_loss(self, a: Tensor, reference: Tensor, target: Tensor | None = None) -> Tensor:
        """Matching loss of ``a`` relative to its value at ``reference``: ``∫_reference^a (f(z) - target) dz``.

        Its gradient with respect to ``a`` is the activation difference ``f(a) - target``.

        Args:
            a: pre-activation, ``[..., N]``.
            reference: pre-activation at which the loss counts as zero, ``[..., N]``.
            target: target of the post-activation, ``[..., N]``; it may lie outside the range of ``f``. ``None`` means
                ``f(reference)``: the loss is then the Bregman divergence of ``F``, never negative for a convex ``F``.

        Returns:
            Elementwise losses ``[..., N]``, or ``[...]`` where ``f`` is not elementwise.
        """
        if target is None:
            target = self(reference)
        if _DEFINITIONS[self.name].potential is None:
            return self._quadrature(a, reference, target)
        linear = (a - reference) * target
        return self.potential(a) - self.potential(reference) - (linear if self.elementwise else linear.sum(-1))

    def _quadrature(self, a: Tensor, reference: Tensor, target: Tensor) -> Tensor:
        """The matching loss without a potential: Gauss-Legendre along the segment from ``reference`` to ``a``."""
        difference = a - reference
        mean = torch.zeros_like(a)
        for node, weight in zip(QUADRATURE_NODES, QUADRATURE_WEIGHTS, strict=True):
            mean += weight * self(reference + node * difference)
        losses = difference * (mean - target)
        return losses if self.elementwise else losses.sum(-1)

    def __str__(self) -> str:
        names = (name for name, _ in _DEFINITIONS[self.name].parameters)
        arguments = ", ".join(f"{name}={value:g}" for name, value in zip(names, self.parameters, strict=True))
        return f"{self.name}({arguments})" if arguments else self.name


def register_transfer(
    name: str,
    torch_fn: Callable[[Tensor], Tensor],
    triton_fn: Any = None,
    potential: Callable[[Tensor], Tensor] | None = None,
    elementwise: bool = True,
) -> Transfer:
    """Make a transfer function of your own known under ``name``, to be used like those of the package.

    The local loop needs ``f`` alone. Where ``f`` decreases somewhere, its matching loss is not convex there.

    Args:
        name: not one of the package's. A name that was registered before is registered anew.
        torch_fn: ``f``, from pre-activations ``[..., N]`` to post-activations of the same shape and dtype.
        triton_fn: ``f(a, p)`` as a ``@triton.jit`` function of a float32 block ``a`` (``p`` is 0); it is inlined into
            the kernels. Without it the Triton backend refuses, and ``backend="auto"`` takes the reference backend.
        potential: ``F = ∫ f``, for traces; without it they integrate ``f`` numerically.
        elementwise: whether an output depends on its own input alone; otherwise ``f`` acts on rows, as softmax does.

    Returns:
        The transfer function.

    Raises:
        TypeError: ``name`` is not a string, or a function is not callable.
        ValueError: the name is taken by the package, or ``torch_fn`` changes shape or dtype, or is not elementwise.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    if not callable(torch_fn):
        raise TypeError(f"torch_fn must be callable, got {type(torch_fn).__name__}")
    if potential is not None and not callable(potential):
        raise TypeError(f"potential must be callable or None, got {type(potential).__name__}")
    if name in _DEFINITIONS and not _DEFINITIONS[name].registered:
        raise ValueError(f"name must not be one of the package's transfer functions, got {name!r}")
    a = torch.linspace(-2.0, 2.0, 6, dtype=torch.float64, device="cpu").reshape(2, 3)
    y = torch_fn(a.clone())
    if not isinstance(y, Tensor) or y.shape != a.shape or y.dtype != a.dtype:
        got = f"{list(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"torch_fn of transfer {name!r} must keep shape and dtype {list(a.shape)} of {a.dtype}, got {got}"
        )
    alone = torch.stack([torch_fn(value.reshape(1, 1)).reshape(()) for value in a.flatten()]).reshape(a.shape)
    if elementwise and not torch.allclose(alone, y, equal_nan=True):
        raise ValueError(f"torch_fn of transfer {name!r} is not elementwise: give elementwise=False if it acts on rows")
    definition = _Definition(
        torch_fn, potential, elementwise=elementwise, convex=False, triton_fn=triton_fn, registered=True
    )
    _DEFINITIONS[name] = definition
    return Transfer(name)


def available() -> tuple[str, ...]:
    """Names of the known transfer functions."""
    return tuple(_DEFINITIONS)


def get(transfer: str | Transfer, **parameters: float) -> Transfer:
    """The transfer function called ``transfer``; a :class:`Transfer` is passed through.

    Args:
        transfer: one of :func:`available`, or a ready :class:`Transfer`.
        parameters: parameters of the function by name, as in ``get("leaky_relu", negative_slope=0.2)``.

    Raises:
        TypeError: ``transfer`` is neither a string nor a :class:`Transfer`, or a parameter is no number.
        ValueError: unknown name or parameter, or a parameter that is out of range.
    """
    if isinstance(transfer, Transfer):
        return transfer
    defaults = dict(_definition(transfer).parameters)
    unknown = set(parameters) - set(defaults)
    if unknown:
        raise ValueError(f"transfer {transfer!r} takes the parameters {sorted(defaults)}, got {sorted(unknown)}")
    values = {**defaults, **parameters}.values()
    # A tensor of one number is one, as for torch's own functions.
    return Transfer(transfer, tuple(v.item() if isinstance(v, Tensor) and not v.dim() else v for v in values))


def _definition(name: Any) -> _Definition:
    """What is known of a transfer function.

    Raises:
        TypeError, ValueError: there is none of that name.
    """
    if not isinstance(name, str):
        raise TypeError(f"transfer must be a string or a Transfer, got {type(name).__name__}")
    if name not in _DEFINITIONS:
        raise ValueError(f"transfer must be one of {', '.join(_DEFINITIONS)}; got {name!r}")
    return _DEFINITIONS[name]
