"""Triton kernels. Only this package and the compile report import Triton, and only when something is asked of them."""

from __future__ import annotations

from collections.abc import Sequence

from locoprop_kernels.problem import LocalProblem, State
from locoprop_kernels.settings import Settings
from locoprop_kernels.solution import Solution

__all__ = ["solve", "unsupported"]


def unsupported(problems: Sequence[LocalProblem], settings: Settings) -> str | None:
    """Why the Triton backend cannot run these problems, or ``None`` when it can."""
    from locoprop_kernels.kernels import target

    return target.unsupported(problems, settings)


def solve(problems: list[LocalProblem], states: list[State], settings: Settings) -> Solution:
    """Run all local iterations of all problems; reads them, and writes nothing that belongs to them.

    Args:
        problems: validated problems.
        states: the rule's state in each of them.
        settings: the settings of the call.
    """
    from locoprop_kernels.kernels import run

    return run.solve(problems, states, settings)
