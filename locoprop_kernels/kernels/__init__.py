"""Triton kernels. Only this package and the compile report import Triton, and only when something is asked of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from locoprop_kernels.checked import Checked
from locoprop_kernels.settings import Settings
from locoprop_kernels.solution import Solution

if TYPE_CHECKING:
    from locoprop_kernels.kernels.run import StepPlan

__all__ = ["planned", "solve"]


def planned(checked: Checked, settings: Settings) -> StepPlan | str:
    """How the Triton backend will run these problems, or why it cannot."""
    from locoprop_kernels.kernels import run

    return run.planned(checked, settings)


def solve(plan: StepPlan, checked: Checked, settings: Settings) -> Solution:
    """Run all local iterations of all problems; reads them, and writes nothing that belongs to them.

    Args:
        plan: what :func:`planned` has returned for these.
        checked: the problems and the rule's state in each.
        settings: the settings of the call.
    """
    from locoprop_kernels.kernels import run

    return run.solve(plan, checked, settings)
