"""The public function of the backend: all local iterations of all layers, as one transaction."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from locoprop_kernels import reference, rules
from locoprop_kernels.problem import LocalProblem, State, rule_state, shown
from locoprop_kernels.reference import Increment
from locoprop_kernels.regularisers import Regulariser
from locoprop_kernels.settings import Settings

__all__ = ["BACKENDS", "ProblemReport", "StepReport", "local_steps_"]

BACKENDS = ("auto", "triton", "reference")
_log = logging.getLogger("locoprop_kernels")
_logged_reasons: set[str] = set()


@dataclass(eq=False)
class ProblemReport:
    """One layer's part of a :class:`StepReport`.

    Attributes:
        name: the problem's name.
        delta_weight: increment ``Δ`` ``[N, K]`` of the weight; ``None`` after a commit, and for a frozen weight.
        delta_bias: increment ``δ`` ``[N]`` of the bias; likewise.
        driver: the form or kernel driver that ran.
        trace: with ``trace=True`` the local objective (matching loss plus proximal term, relative to its value at the
            start) before every local step and at the end: ``[T + 1]``, float64.
        rows: ``B``, how many rows the problem has.
    """

    delta_weight: Tensor | None
    delta_bias: Tensor | None
    driver: str
    trace: Tensor | None
    name: str = ""
    rows: int = 0


@dataclass(eq=False)
class StepReport:
    """What :func:`local_steps_` did.

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
    _apply: Callable[[Tensor], None] = field(repr=False)
    _committed: Tensor | None = field(default=None, repr=False)

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

    @torch.no_grad()
    def commit_(self, condition: Tensor | None = None) -> None:
        """Apply the increments and the new state, unless something in them is not finite, and drop them.

        A second call does nothing.

        Args:
            condition: a further bool tensor ``[]`` that must hold, on the problems' device.
        """
        if self._committed is not None:
            return
        self._committed = ok = self.finite if condition is None else self.finite & condition
        apply, self._apply = self._apply, _nothing
        if ok.device.type != "cpu" or ok:
            apply(ok)
        for problem in self.problems:  # a report may be kept, and should not keep the increments' memory with it
            problem.delta_weight = problem.delta_bias = None


def _nothing(ok: Tensor) -> None:
    """What is left to apply after a commit."""


def nothing_done(names: Sequence[str], reason: str) -> StepReport:
    """A report for problems that a step had nothing to do for."""
    problems = [ProblemReport(None, None, "none", None, name) for name in names]
    return StepReport("none", reason, problems, torch.tensor(True), _nothing, _committed=torch.tensor(True))


def _apply(pending: list[tuple[LocalProblem, State, Increment]], ok: Tensor) -> None:
    """Apply increments and new state where the bool ``ok`` is true; on a GPU the decision stays on the device."""
    on_host = ok.device.type == "cpu"
    for problem, before, increment in pending:
        for name, delta in increment.delta.items():
            parameter = getattr(problem, name)
            if on_host:
                parameter.add_(delta)
            else:
                parameter.copy_(torch.where(ok, parameter + delta, parameter))
            stored = problem.state.setdefault(name, {})
            old = before[name]
            for slot, new in increment.state[name].items():
                value = new if on_host else torch.where(ok, new, old[slot])
                if old[slot] is stored.get(slot):
                    old[slot].copy_(value)
                else:
                    stored[slot] = value


def _all_finite(pending: list[tuple[LocalProblem, State, Increment]]) -> Tensor:
    """Whether a commit would write finite numbers only; on the device, without waiting for it."""
    extremes: list[Tensor] = []
    for problem, _, increment in pending:
        for name, delta in increment.delta.items():
            parameter = getattr(problem, name)
            written = [(parameter + delta).to(parameter.dtype), *increment.state[name].values()]
            for value in written:
                if value.is_floating_point():
                    extremes += torch.aminmax(value)  # far faster on a CPU than isfinite or an infinity norm
    return torch.isfinite(torch.stack([extreme.double() for extreme in extremes])).all()


def triton_unavailable() -> str | None:
    """Why the Triton backend cannot run at all in this process, or ``None`` when it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton, on Linux)"
    return None


def _choose_backend(backend: str, problems: list[LocalProblem], settings: Settings) -> tuple[str, str]:
    """The backend to run and why; an explicit choice is taken or refused, never replaced."""
    if backend == "reference":
        return "reference", "asked for by name"
    reason = triton_unavailable()
    if reason is None and backend == "auto" and problems[0].weight.device.type != "cuda":
        reason = f"the tensors are on {problems[0].weight.device}"
    if reason is None:
        from locoprop_kernels import kernels

        reason = kernels.unsupported(problems, settings)
    if reason is None:
        return "triton", "asked for by name" if backend == "triton" else "the tensors are on a GPU"
    if backend == "triton":
        raise ValueError(f"backend 'triton' cannot run this step: {reason}; backend='reference' would work")
    if reason not in _logged_reasons:
        _logged_reasons.add(reason)
        _log.info("backend 'auto' takes the reference backend: %s", reason)
    return "reference", reason


@torch.no_grad()
def local_steps_(
    problems: Sequence[LocalProblem],
    rule: str | rules.Rule = "rmsprop",
    lr: Sequence[float] = (),
    prox: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
    commit: bool = True,
    trace: bool = False,
    regulariser: Regulariser | Callable[[Tensor, Tensor], Tensor] | None = None,
) -> StepReport:
    """Run ``T = len(lr)`` local iterations of every problem, and update weights, biases and state in place.

    All or nothing: if the call raises, or any new weight or state would be non-finite, everything is as before.

    Args:
        problems: the layers' local problems, all on one device.
        rule: name of an update rule, or an instance from :mod:`locoprop_kernels.rules`.
        lr: learning rate of each local iteration, all ``>= 0``.
        prox: proximal coefficient ``λ >= 0``; acts on weight and bias.
        reduction: ``"sum"`` over the batch, or ``"mean"``: all but the proximal term is divided by ``B``.
        backend: ``"auto"`` (the reason is logged once), ``"triton"`` or ``"reference"``.
        compute_dtype: dtype of the operands of the matrix products (float64, float32, bfloat16, float16); ``None``
            takes the parameters'. Sums, increments and state stay in float32 (float64 for float64 parameters).
        commit: ``False`` leaves everything as it was and puts the increments into the report.
        trace: also evaluate the local objectives, see :class:`ProblemReport`.
        regulariser: a regulariser beside the proximal term: a :class:`Regulariser`, or its gradient as a function.

    Returns:
        A :class:`StepReport`: backend, drivers, whether the step was committed, traces, and with ``commit=False`` the
        increments (``report.commit_()`` applies them later).

    Raises:
        TypeError, ValueError: before anything is changed; naming the argument, what was expected and what came.
    """
    settings = Settings.checked(rule, lr, prox, reduction, compute_dtype, trace, regulariser)
    report = pending_steps(problems, settings, backend, increments=not commit)
    if commit:
        report.commit_()
    return report


@torch.no_grad()
def pending_steps(
    problems: Sequence[LocalProblem],
    settings: Settings,
    backend: str,
    increments: bool,
    done: Callable[[int], None] | None = None,
) -> StepReport:
    """:func:`local_steps_` up to the commit, ``report.commit_()``; increments are in the report only if asked for.

    The reference solves one problem after the other, and calls ``done`` with the index of each that is solved: the
    caller may then let go of its rows and gradients.
    """
    problems = list(problems)
    if not problems:
        raise ValueError("problems must hold at least one LocalProblem, got none")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {shown(backend)}")
    states = _checked(problems, settings.rule)
    names = [problem.name or f"problem {i}" for i, problem in enumerate(problems)]
    rows = [problem.shape[0] for problem in problems]
    chosen, reason = _choose_backend(backend, problems, settings)
    if chosen == "triton":
        from locoprop_kernels import kernels

        found, finite, apply = kernels.local_loops(problems, settings, states, views=increments)
    else:
        found = []
        for i, (problem, state) in enumerate(zip(problems, states, strict=True)):
            found.append(reference.local_loop(problem, settings, state))
            if done is not None:
                done(i)
        pending = list(zip(problems, states, found, strict=True))
        finite, apply = _all_finite(pending), partial(_apply, pending)
    return StepReport(
        backend=chosen,
        reason=reason,
        problems=[
            ProblemReport(
                increment.delta.get("weight") if increments else None,
                increment.delta.get("bias") if increments else None,
                increment.driver,
                increment.trace,
                name,
                count,
            )
            for increment, name, count in zip(found, names, rows, strict=True)
        ],
        finite=finite,
        _apply=apply,
    )


def _checked(problems: list[LocalProblem], rule: rules.Rule) -> list[State]:
    """The rule's state in each problem, once everything about the problems has been checked."""
    states: list[State] = []
    owners: dict[int, str] = {}
    for i, problem in enumerate(problems):
        if not isinstance(problem, LocalProblem):
            raise TypeError(f"problem {i} must be a LocalProblem, got {type(problem).__name__}")
        label = problem.name or f"problem {i}"
        problem.validate(label)
        if problem.weight.device != problems[0].weight.device:
            raise ValueError(
                f"{label} must be on the device of problem 0, {problems[0].weight.device}, got {problem.weight.device}"
            )
        states.append({name: rule_state(problem, name, rule, label) for name in problem.trained()})
        for name, (parameter, _) in problem.trained().items():
            other = owners.setdefault(id(parameter), label)
            if other != label:
                raise ValueError(
                    f"{label}: its {name} is also that of {other}; one problem must hold all rows of a tensor"
                )
    return states
