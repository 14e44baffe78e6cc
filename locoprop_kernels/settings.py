"""What the local problems of one call have in common: checked where it is made, and handed on as one value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locoprop_kernels import rules
from locoprop_kernels.problem import COMPUTE_DTYPES, REDUCTIONS, LocalProblem, is_number, shown
from locoprop_kernels.regularisers import Regulariser, as_regulariser

__all__ = ["Settings", "check_objective"]


@dataclass(frozen=True)
class Settings:
    """The settings of a call of the backend; make them with :meth:`checked`.

    Attributes:
        rule: the update rule.
        rates: learning rate of each local iteration.
        prox: proximal coefficient ``λ``.
        reduction: ``"mean"`` or ``"sum"``.
        compute_dtype: dtype of the products' operands; ``None`` for the parameters'.
        trace: whether to evaluate the local objectives.
        regulariser: a regulariser beside the proximal term.
    """

    rule: rules.Rule
    rates: tuple[float, ...]
    prox: float
    reduction: str
    compute_dtype: torch.dtype | None
    trace: bool
    regulariser: Regulariser | None

    @classmethod
    def checked(
        cls,
        rule: str | rules.Rule,
        lr: Sequence[float],
        prox: float,
        reduction: str,
        compute_dtype: torch.dtype | None,
        trace: bool,
        regulariser: Regulariser | Callable[[Tensor, Tensor], Tensor] | None,
    ) -> Settings:
        """The settings of :func:`locoprop_kernels.local_steps_`, whose arguments these are.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        rates = _checked_rates(lr)
        check_objective(prox, reduction)
        regulariser = as_regulariser(regulariser)
        if trace and regulariser is not None and regulariser.value is None:
            raise ValueError("trace needs the value of the regulariser: give Regulariser(..., value=...)")
        if compute_dtype is not None and compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(f"compute_dtype must be None or one of {COMPUTE_DTYPES}, got {shown(compute_dtype)}")
        return cls(rules.get(rule), rates, float(prox), reduction, compute_dtype, bool(trace), regulariser)

    @property
    def iterations(self) -> int:
        """``T``."""
        return len(self.rates)

    def operands(self, problem: LocalProblem) -> torch.dtype:
        """Dtype of the products' operands in a problem."""
        return self.compute_dtype or problem.weight.dtype


def _checked_rates(lr: Any) -> tuple[float, ...]:
    if is_number(lr) or not hasattr(lr, "__iter__"):
        raise TypeError(f"lr must be a sequence of one learning rate per local iteration, got {shown(lr)}")
    rates = tuple(float(rate) for rate in lr)
    if not rates:
        raise ValueError("lr must have at least one entry (one per local iteration), got none")
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise ValueError(f"lr must hold finite numbers >= 0, got {shown(list(rates))}")
    return rates


def check_objective(prox: float, reduction: str) -> None:
    """Check the proximal coefficient and the reduction.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not is_number(prox):
        raise TypeError(f"prox must be a number, got {shown(prox)}")
    if not (math.isfinite(prox) and prox >= 0):
        raise ValueError(f"prox must be finite and >= 0, got {shown(prox)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {shown(reduction)}")
