"""Local problems that the CPU kernels solve, and the commit of what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from locoprop_kernels.cpu_kernels.all_rows import Workspace, solve_on_all_rows
from locoprop_kernels.cpu_kernels.host import Own, Table
from locoprop_kernels.cpu_kernels.updates import Family, family_of
from locoprop_kernels.problem import LocalProblem, State
from locoprop_kernels.scratch import give_back
from locoprop_kernels.settings import Settings
from locoprop_kernels.solution import Decision, Increment

__all__ = ["Compiled"]

_LARGEST = float(np.finfo(np.float32).max)


class Compiled:
    """Problems that the kernels have solved.

    Args:
        problems: validated problems, of which ``decisions`` say how they are solved.
        olds: the rule's state in each before the loop.
        settings: the settings of the call.
        decisions: those of the problems; their drivers are ``"numba"`` or ``"phases"``.
        found: what has been found out about these problems, see :class:`locoprop_kernels.checked.Checked`.
        done: called with the number of each problem that is solved.

    Attributes:
        finite: whether it is certain that a commit would write finite numbers only.

    Raises:
        MemoryError: a thread had none for its work.
    """

    def __init__(
        self,
        problems: Sequence[LocalProblem],
        olds: Sequence[State],
        settings: Settings,
        decisions: Sequence[Decision],
        found: dict[Any, Any],
        done: Callable[[int], None],
    ) -> None:
        self._whole = whole = [decision.driver == "numba" for decision in decisions]
        self._table = Table(problems, *_owns(problems, olds, settings, found), settings, whole)
        self._problems, self._olds, self._iterations = problems, olds, settings.iterations
        # The problems whose increments somebody else may hold.
        self._lent: set[int] = set()
        # The sum of all absolute values, or more; NaN where one is not a number.
        total = self._table.local_steps() if any(whole) else 0.0
        workspace = Workspace(problems[0].weight.device)
        for place, decision in enumerate(decisions):
            if not whole[place]:
                self._table.lay_out(place)
                total += solve_on_all_rows(self._table, place, problems[place], settings, decision.form, workspace)
            done(place)
        self.finite = total < _LARGEST

    def increment(self, place: int) -> Increment:
        """What was found for the problem of a number; it may be held after the commit."""
        self._lent.add(place)
        return self.found(place)

    def found(self, place: int) -> Increment:
        """What was found for the problem of a number, for this object's own use: nobody holds it after the commit."""
        increment = Increment({}, {})
        for kind, old in self._olds[place].items():
            views = self._table.views(place, kind)
            increment.delta[kind] = views.pop("")
            steps = {"step": old["step"] + self._iterations} if "step" in old else {}
            increment.state[kind] = {**views, **steps}
        return increment

    def commit(self, moved: Sequence[int] = ()) -> dict[int, Increment]:
        """Apply increments and new state, and let go of their memory.

        Args:
            moved: the numbers of problems whose parameters or state are no longer at the addresses in the table.

        Returns:
            what is left to apply, by the number of the problem: where they have moved or are not contiguous.
        """
        table = self._table
        left = {place: self.increment(place) for place in (*table.scattered, *moved)}
        if left:
            table.parameters[[*left]] = 0
        written, steps = [], []
        for place, (problem, olds) in enumerate(zip(self._problems, self._olds, strict=True)):
            for kind, old in olds.items() if place not in left else ():
                stored = problem.state.setdefault(kind, {})
                if stored is not old:
                    stored.update(old)
                written += [getattr(problem, kind), *old.values()]
                if "step" in old:
                    steps.append(old["step"])
        table.commit()
        # PyTorch does not know what kernels write to: graphs that have saved a parameter must not be used any more.
        torch.autograd.graph.increment_version(written)
        if steps:
            torch._foreach_add_(steps, self._iterations)
        # Beside products on all rows it is not worth to hold on to it.
        kept = [place for place, whole in enumerate(self._whole) if whole and place not in self._lent]
        give_back(*[table.blocks[place] for place in kept])
        return left


def _owns(
    problems: Sequence[LocalProblem], olds: Sequence[State], settings: Settings, found: dict[Any, Any]
) -> tuple[Family, list[Own]]:
    """The rule's family, and what each problem has of its own; found once for problems that come again."""
    key = Own, tuple(map(id, problems))
    known: tuple[Family, list[Own]] | None = found.get(key)
    if known is None:
        family = family_of(settings.rule)
        assert family is not None
        known = family, [Own.of(problem, old, family) for problem, old in zip(problems, olds, strict=True)]
        found[key] = known
    return known
