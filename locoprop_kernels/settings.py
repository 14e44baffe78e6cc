"""What the local problems of one call have in common: checked where it is made, and handed on as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from locoprop_kernels import rules
from locoprop_kernels.arguments import as_flag, check_choice, is_finite, is_number, shown
from locoprop_kernels.chosen import ChosenRows
from locoprop_kernels.patches import Stacked
from locoprop_kernels.problem import COMPUTE_DTYPES, REDUCTIONS, LocalProblem
from locoprop_kernels.regularisers import Regulariser, as_regulariser
from locoprop_kernels.sampling import count_sets_of_parts, set_order

__all__ = ["Settings", "check_objective", "check_rows", "operands_of"]


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
        rows: rows of the batch in each local step; ``None`` for all.
        rows_seed: which rows these are, see :mod:`locoprop_kernels.sampling`.
    """

    rule: rules.Rule
    rates: tuple[float, ...]
    prox: float
    reduction: str
    compute_dtype: torch.dtype | None
    trace: bool
    regulariser: Regulariser | None
    rows: int | None = None
    rows_seed: int = 0

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
        rows: int | None = None,
        rows_seed: int = 0,
    ) -> Settings:
        """The settings of :func:`locoprop_kernels.local_steps_`, whose arguments these are.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        rates = _checked_rates(lr)
        check_objective(prox, reduction)
        regulariser = as_regulariser(regulariser)
        trace = as_flag("trace", trace)
        if trace and regulariser is not None and regulariser.value is None:
            raise ValueError("trace needs the value of the regulariser: give Regulariser(..., value=...)")
        if compute_dtype is not None and not any(compute_dtype is dtype for dtype in COMPUTE_DTYPES):
            raise ValueError(f"compute_dtype must be None or one of {COMPUTE_DTYPES}, got {shown(compute_dtype)}")
        check_rows(rows)
        _check_seed(rows_seed)
        rows = None if rows is None else int(rows)
        return cls(
            rules.get(rule), rates, float(prox), reduction, compute_dtype, trace, regulariser, rows, int(rows_seed)
        )

    def with_seed(self, rows_seed: int) -> Settings:
        """These settings with other rows in the local steps.

        Raises:
            ValueError: it is no integer ``>= 0``.
        """
        _check_seed(rows_seed)
        return replace(self, rows_seed=rows_seed)

    @property
    def iterations(self) -> int:
        """``T``."""
        return len(self.rates)

    @property
    def decided_by(self) -> tuple[Any, ...]:
        """All of the settings that decisions and plans depend on, but for the functions of a regulariser."""
        return (
            self.rule,
            self.regulariser is None,
            self.iterations,
            self.reduction,
            self.compute_dtype,
            self.trace,
            self.rows,
        )

    def sets(self, problem: LocalProblem) -> int:
        """Into how many sets a problem's batch falls, of which a local step takes one; 1 where it takes all rows.

        Where rows have been chosen already, the sets that they were chosen from.
        """
        if isinstance(problem.x, ChosenRows):
            return problem.x.sets
        parts = problem.x.parts if isinstance(problem.x, Stacked) else (problem.x,)
        return count_sets_of_parts((part.shape[-2] for part in parts), self.rows)

    def set_order(self, sets: int) -> tuple[int, ...]:
        """The set of each local step but the first, which needs none, and of the objective at the end."""
        return set_order(self.rows_seed, sets, self.iterations)

    def operands(self, problem: LocalProblem, form: str = "product") -> torch.dtype:
        """Dtype of the products' operands in a problem."""
        return operands_of(self.compute_dtype or problem.weight.dtype, self.sets(problem), form)


def operands_of(asked: torch.dtype, sets: int = 1, form: str = "product") -> torch.dtype:
    """Dtype of the operands where ``asked`` is asked for: bfloat16 in place of float8 where that gains nothing.

    This is so on few rows (``sets > 1``), where products hardly count beside the way through the weights, and in the
    Gram form, which is cheaper than products over the batch in float8. Either is more accurate in bfloat16.
    """
    return torch.bfloat16 if asked == torch.float8_e4m3fn and (sets > 1 or form == "gram") else asked


def _checked_rates(lr: Any) -> tuple[float, ...]:
    unordered = isinstance(lr, (str, bytes, Mapping, Set))
    if unordered or not hasattr(lr, "__iter__") or getattr(lr, "shape", None) == ():
        raise TypeError(f"lr must be a sequence of one learning rate per local iteration, got {shown(lr)}")
    rates = [rate.item() if isinstance(rate, Tensor) and not rate.dim() else rate for rate in lr]
    if not rates:
        raise ValueError("lr must have at least one entry (one per local iteration), got none")
    if not all(map(is_number, rates)):
        raise TypeError(f"lr must hold numbers, got {shown(rates)}")
    if not all(rate >= 0 and is_finite(rate) for rate in rates):
        raise ValueError(f"lr must hold finite numbers >= 0, got {shown(rates)}")
    return tuple(map(float, rates))


def _check_seed(rows_seed: Any) -> None:
    if type(rows_seed) is int and rows_seed >= 0:
        return
    if isinstance(rows_seed, bool) or not isinstance(rows_seed, Integral) or rows_seed < 0:
        raise ValueError(f"rows_seed must be an integer >= 0, got {shown(rows_seed)}")


def check_rows(rows: int | None) -> None:
    """Check the number of rows in each local step.

    Raises:
        ValueError: it is neither a positive integer nor ``None``.
    """
    if rows is None or (type(rows) is int and rows > 0):
        return
    if isinstance(rows, bool) or not isinstance(rows, Integral) or rows < 1:
        raise ValueError(f"rows must be a positive integer, or None for all rows of the batch; got {shown(rows)}")


def check_objective(prox: float, reduction: str) -> None:
    """Check the proximal coefficient and the reduction.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not is_number(prox):
        raise TypeError(f"prox must be a number, got {shown(prox)}")
    if not (is_finite(prox) and prox >= 0):
        raise ValueError(f"prox must be finite and >= 0, got {shown(prox)}")
    check_choice("reduction", reduction, REDUCTIONS)
