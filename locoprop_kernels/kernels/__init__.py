"""Triton kernels. This package is the only one that imports Triton, and only when something is asked of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from locoprop_kernels.problem import LocalProblem
from locoprop_kernels.reference import Increment
from locoprop_kernels.rules import Rule

__all__ = ["local_loops", "unsupported"]


def unsupported(problems: Sequence[LocalProblem], rule: Rule, compute_dtype: torch.dtype | None) -> str | None:
    """Why the Triton backend cannot run these problems, or ``None`` when it can."""
    from locoprop_kernels.kernels import drivers

    return drivers.unsupported(problems, rule, compute_dtype)


def local_loops(
    problems: list[LocalProblem],
    rule: Rule,
    rates: list[float],
    prox: float,
    reduction: str,
    compute_dtype: torch.dtype | None,
    trace: bool,
) -> list[Increment]:
    """Run all local iterations of all problems; reads them, and writes nothing that belongs to them."""
    from locoprop_kernels.kernels import drivers

    placed, _ = drivers.run(problems, rule, rates, prox, reduction, compute_dtype, trace)
    return [group.increment(index) for group, index in placed]
