"""What a step reports about itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from locoprop_kernels.arguments import as_flag
from locoprop_kernels.problem import LocalProblem, State
from locoprop_kernels.solution import Decision, Solution, lying

__all__ = ["ProblemReport", "StepReport", "nothing_done"]


@dataclass(eq=False)
class ProblemReport:
    """One layer's part of a :class:`StepReport`.

    Attributes:
        name: the problem's name.
        rows: ``B``, how many rows the problem has.
        decision: how it was solved: form, driver, configuration; print it.
        trace: with ``trace=True`` the local objective (matching loss plus proximal term, relative to its value at the
            start) before every local step and at the end: ``[T + 1]``, float64.
    """

    name: str
    rows: int
    decision: Decision
    trace: Tensor | None = None
    _solution: Solution | None = field(default=None, repr=False)
    _index: int = field(default=0, repr=False)

    @property
    def driver(self) -> str:
        """The driver that ran, by name; see :class:`locoprop_kernels.solution.Decision`."""
        return self.decision.driver

    @property
    def delta_weight(self) -> Tensor | None:
        """Increment ``Δ`` ``[N, K]`` of the weight; ``None`` after a commit, and for a frozen weight."""
        return self._delta("weight")

    @property
    def delta_bias(self) -> Tensor | None:
        """Increment ``δ`` ``[N]`` of the bias; ``None`` after a commit, and for a frozen bias."""
        return self._delta("bias")

    def _delta(self, name: str) -> Tensor | None:
        return None if self._solution is None else self._solution.increment(self._index).delta.get(name)

    def __str__(self) -> str:
        return f"{self.name}: {self.rows} rows, {self.decision}"


@dataclass(eq=False)
class StepReport:
    """What :func:`locoprop_kernels.local_steps_` did; printed, it has a line for each problem.

    Attributes:
        backend: ``"reference"`` or ``"triton"``.
        reason: why that backend.
        problems: one :class:`ProblemReport` per problem, in order.
        finite: whether all new weights and states are finite: a bool tensor ``[]`` on the problems' device.
    """

    backend: str
    reason: str
    problems: list[ProblemReport]
    finite: Tensor
    _solution: Solution | None = field(default=None, repr=False)
    _committed: Tensor | None = field(default=None, repr=False)
    # Problems that are committed later, their state, and where both lay when they were solved.
    _lay: list[tuple[LocalProblem, State, list[Any]]] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, solution: Solution, backend: str, reason: str, names: Sequence[str], rows: Sequence[int]) -> StepReport:
        """The report of problems that are solved and not committed yet."""
        problems = [
            ProblemReport(name, count, solution.decisions[i], solution.traces[i], solution, i)
            for i, (name, count) in enumerate(zip(names, rows, strict=True))
        ]
        return cls(backend, reason, problems, solution.finite, solution)

    @property
    def driver(self) -> str:
        """The drivers that ran, joined with ``+`` where layers differ."""
        return "+".join(sorted({problem.driver for problem in self.problems}))

    @property
    def committed(self) -> bool:
        """Whether weights and states were updated (waits for the device)."""
        return self._committed is not None and bool(self._committed)

    @property
    def delta_weight(self) -> list[Tensor | None]:
        """The weights' increments, one per problem."""
        return [problem.delta_weight for problem in self.problems]

    @property
    def delta_bias(self) -> list[Tensor | None]:
        """The biases' increments, one per problem."""
        return [problem.delta_bias for problem in self.problems]

    @property
    def trace(self) -> list[Tensor | None]:
        """The local objectives, one ``[T + 1]`` tensor per problem; ``None`` unless asked for."""
        return [problem.trace for problem in self.problems]

    def postpone(self, problems: Sequence[LocalProblem], states: Sequence[State]) -> None:
        """Be ready for a commit before which parameters or state may be moved: remember where they lie.

        Args:
            problems: the problems that were solved.
            states: the rule's state in each of them before that.
        """
        self._lay = [(one, state, lying(one, state)) for one, state in zip(problems, states, strict=True)]

    def commit_(self, condition: Tensor | bool | None = None) -> None:
        """Apply the increments and the new state, unless something in them is not finite, and drop them.

        A second call does nothing.

        Args:
            condition: a further bool tensor ``[]`` that must hold, best on the problems' device; or a bool.

        Raises:
            TypeError, ValueError: it is something else; the report is as before.
        """
        if self._solution is None:
            return
        # A step of one call has no other condition than its own.
        own = condition is None or condition is self.finite
        ok = self.finite if own else self.finite & _as_condition(condition, self.finite.device)
        solution, self._solution = self._solution, None
        self._committed = ok
        if ok.device.type != "cpu" or ok:
            moved = {index for index, (one, state, lay) in enumerate(self._lay) if lying(one, state) != lay}
            solution.commit(ok, moved)
        self._lay = []
        for problem in self.problems:  # a report may be kept, and should not keep the increments' memory with it
            problem._solution = None

    def __str__(self) -> str:
        return "\n".join([f"{self.backend} backend ({self.reason})", *(f"  {problem}" for problem in self.problems)])


def _as_condition(condition: Any, device: torch.device) -> Tensor:
    """A condition of a commit as a bool tensor ``[]`` on a device."""
    if not isinstance(condition, Tensor):
        return torch.full((), as_flag("condition", condition), device=device)
    if condition.dtype is not torch.bool or condition.numel() != 1:
        got = f"{list(condition.shape)} of {condition.dtype}"
        raise ValueError(f"condition must be a bool or a bool tensor of one element, got {got}")
    return condition.to(device).reshape(())


def nothing_done(names: Sequence[str], reason: str) -> StepReport:
    """A report for problems that a step had nothing to do for."""
    done = torch.tensor(True, device="cpu")
    problems = [ProblemReport(name, 0, Decision("none", "none")) for name in names]
    return StepReport("none", reason, problems, done, _committed=done)
