"""The local loop in plain PyTorch, in increment form: the reference for every kernel, and the fallback without one.

With ``W_t = W_0 + Δ_t``, ``b_t = b_0 + δ_t`` and ``A0 = X W_0ᵀ + b_0`` the textbook iteration of LocoProp (section 3 of
the paper) is exactly

    E_t = f(A0 + X Δ_tᵀ + δ_t) - f(A0)
    G_t = G_0 + E_tᵀ X + λ Δ_t               g_t = g_0 + Σ_batch E_t + λ δ_t

so the first step needs no product, no target is formed, and low precision rounds the *change* alone.
For the identity transfer ``E_tᵀ X = Δ_t (XᵀX) + δ_t (Σ x)ᵀ``: the batch collapses into the Gram matrix ``XᵀX``.
With ``reduction="mean"`` everything but the proximal term is divided by ``B``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from locoprop_kernels import cpu_kernels
from locoprop_kernels.checked import Checked
from locoprop_kernels.few_rows_loop import few_rows_loops, together
from locoprop_kernels.form import ChangeForm, Form
from locoprop_kernels.gram import GramForm, gram_is_cheaper
from locoprop_kernels.input_chunks import InputChunks, transposed
from locoprop_kernels.loop import Loop, beginning, count_steps, run
from locoprop_kernels.problem import LocalProblem, State, accumulation_dtype
from locoprop_kernels.products import Operand, product, rounded
from locoprop_kernels.sampling import set_size
from locoprop_kernels.scratch import give_back
from locoprop_kernels.settings import Settings
from locoprop_kernels.solution import Decision, Increment, apply
from locoprop_kernels.transfers import Transfer

if TYPE_CHECKING:
    from locoprop_kernels.cpu_kernels.run import Compiled

__all__ = ["Solved", "decide", "local_loop", "solve"]

_LARGE_GROUP = 2**22  # multiply-accumulates of a group's product, from which on groups are solved one by one on CPUs
# Rows of a local step, up to which loops that are compiled as a whole are faster than PyTorch's products: on all rows
# beside phases 1.0 to 2 times, on few 1.0 to 1.5 times; with 1024 of them they take two to three times as long.
_COMPILED_ROWS = {torch.float32: 256, torch.bfloat16: 128}
_YES = torch.tensor(True, device="cpu")


class _ProductForm(ChangeForm):
    """Any transfer function: two products per evaluation, over a chunk of the batch at a time.

    ``A0``, ``f(A0)`` and ``E`` are stored transposed, ``[N, B]``: then no product needs a transposed copy.
    """

    def __init__(self, problem: LocalProblem, operands: torch.dtype) -> None:
        assert isinstance(problem.transfer, Transfer)
        self.operands = operands
        self.transfer = problem.transfer
        (batch, _, outputs), groups = problem.shape, problem.weight.shape[:-2]
        dtype = accumulation_dtype(problem.weight.dtype)
        memory = problem.weight.new_empty(*groups, outputs, batch, dtype=dtype)
        self.preactivation = transposed(problem.preactivation, memory)
        self.activation = self._f_(self.preactivation.clone())
        self.chunks = InputChunks(problem, operands)

    def _f_(self, a: Tensor) -> Tensor:
        """``f`` of transposed pre-activations ``[N, b]``, which it may overwrite."""
        return self.transfer.apply_(a.mT, fast=self.operands.itemsize <= 2).mT

    def _preactivation(self, delta: dict[str, Tensor], x: Operand, rows: slice) -> Tensor:
        a0 = self.preactivation[..., rows]
        if "weight" not in delta:
            return a0 + delta["bias"].unsqueeze(-1)
        a = product(rounded(delta["weight"], self.operands), x.t(), a0.dtype).add_(a0)
        return a.add_(delta["bias"].unsqueeze(-1)) if "bias" in delta else a

    def change(self, delta: dict[str, Tensor], t: int) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for x, rows in self.chunks:
            difference = self._f_(self._preactivation(delta, x, rows)).sub_(self.activation[..., rows])
            part = {}
            if "weight" in delta:
                part["weight"] = product(rounded(difference, self.operands), x, difference.dtype)
            if "bias" in delta:
                part["bias"] = difference.sum(-1)
            total = {name: total[name].add_(value) if total else value for name, value in part.items()}
        return total

    def divergence(self, delta: dict[str, Tensor], t: int) -> Tensor:
        losses = []
        for x, rows in self.chunks:
            a, a0 = self._preactivation(delta, x, rows), self.preactivation[..., rows]
            losses.append(self.transfer.matching_loss(a.mT.double(), a0.mT.double()).sum())
        return torch.stack(losses).sum()


def decide(problem: LocalProblem, settings: Settings, compiled: bool = False) -> Decision:
    """Which form a problem is solved in, and by what; a function of its sizes and the settings.

    Args:
        problem: a validated problem.
        settings: the settings of the call.
        compiled: whether to take the kernels for CPUs where they can run.
    """
    assert isinstance(problem.transfer, Transfer)
    identity = problem.transfer.name == "identity" and problem.grad_weight is not None
    sets = settings.sets(problem)
    few = sets > 1
    # Few rows are cheaper than XᵀX of all.
    form = "gram" if not few and identity and gram_is_cheaper(problem.shape, settings.iterations) else "product"
    driver = form
    if compiled:
        most = _COMPILED_ROWS.get(settings.operands(problem), 0)
        short = form == "product" and set_size(problem.shape[0], sets, 0) <= most
        if short and cpu_kernels.can_run(problem, settings):
            driver = "numba"
        elif not few and cpu_kernels.can_run_phases(problem, settings, form):
            driver = "phases"
    return Decision(form, driver, rows=settings.rows if few else None)


def local_loop(
    problem: LocalProblem, old: State, settings: Settings, decision: Decision
) -> tuple[Increment, Tensor | None]:
    """Run all local iterations of one problem; reads it, and writes nothing that belongs to it.

    Args:
        problem: a validated problem.
        old: the rule's state before the loop.
        settings: the settings of the call.
        decision: which form to take.

    Returns:
        the increment, and the trace if it is asked for.
    """
    if problem.groups is not None and problem.weight.device.type == "cpu" and math.prod(problem.shape) >= _LARGE_GROUP:
        return _group_by_group(problem, old, settings, decision)
    if decision.rows is not None and settings.iterations + settings.trace > 1:
        return few_rows_loops([problem], [old], settings)[0]
    start, increment = beginning(problem, old, problem.scale(settings.reduction) * problem.grad_scale)
    form: Form | None = None
    if settings.iterations > 1 or settings.trace:
        kind = GramForm if decision.form == "gram" else _ProductForm
        form = kind(problem, settings.operands(problem, decision.form))
    (trace,) = run([Loop(problem, settings, form, start, increment)], settings)
    count_steps(increment, settings)
    return increment, trace


def _group_by_group(
    problem: LocalProblem, old: State, settings: Settings, decision: Decision
) -> tuple[Increment, Tensor | None]:
    """One group after the other: its rows stay in the caches, and plain products are faster than batched ones."""
    parts, traces = [], []
    for g in range(problem.groups or 0):
        state = {name: {slot: v[g] if v.dim() else v for slot, v in slots.items()} for name, slots in old.items()}
        part, trace = local_loop(problem.group(g), state, settings, decision)
        parts.append(part)
        if trace is not None:
            traces.append(trace)
    first = parts[0]
    stacked = Increment(
        {name: torch.stack([part.delta[name] for part in parts]) for name in first.delta},
        {
            name: {
                slot: torch.stack([part.state[name][slot] for part in parts]) if value.dim() else value
                for slot, value in slots.items()
            }
            for name, slots in first.state.items()
        },
    )
    for part in parts:
        give_back(*part.memory)
    return stacked, torch.stack(traces).sum(0) if traces else None


class Solved:
    """The solution of the reference backend, see :class:`locoprop_kernels.solution.Solution`.

    Args:
        problems: the problems.
        states: the rule's state in each of them before the loop.
        decisions: how each of them is solved.
    """

    def __init__(self, problems: list[LocalProblem], states: list[State], decisions: list[Decision]) -> None:
        self.problems, self.states, self.decisions = problems, states, decisions
        self.traces: list[Tensor | None] = [None] * len(problems)
        #: What PyTorch has found, by the number of the problem.
        self.increments: dict[int, Increment] = {}
        #: What compiled kernels have found, and, by the number of the problem, its place among theirs.
        self.compiled: Compiled | None = None
        self.places: dict[int, int] = {}
        # The problems whose increments somebody else may hold.
        self._lent: set[int] = set()

    def increment(self, index: int) -> Increment:
        """The increment of a problem."""
        if self.compiled is not None and index in self.places:
            return self.compiled.increment(self.places[index])
        self._lent.add(index)
        return self.increments[index]

    @property
    def finite(self) -> Tensor:
        """Whether a commit would write finite numbers only; on the device, without waiting for it."""
        increments = dict(self.increments)
        if self.compiled is not None and not self.compiled.finite:
            increments.update((index, self.compiled.found(place)) for index, place in self.places.items())
        pairs = [(self.problems[index], increment) for index, increment in increments.items()]
        if all(_is_small(problem, increment) for problem, increment in pairs):
            return _YES.clone()
        extremes: list[Tensor] = []
        for problem, increment in pairs:
            for name, delta in increment.delta.items():
                parameter = getattr(problem, name)
                written = [(parameter + delta).to(parameter.dtype), *increment.state[name].values()]
                for value in written:
                    if value.is_floating_point():
                        extremes += torch.aminmax(value)  # far faster on a CPU than isfinite or an infinity norm
        return torch.isfinite(torch.stack([extreme.double() for extreme in extremes])).all()

    def commit(self, ok: Tensor, moved: Collection[int] = ()) -> None:
        """Apply increments and new state where ``ok`` is true; on a GPU the decision stays on the device."""
        increments = dict(self.increments)
        if self.compiled is not None:
            left = self.compiled.commit([place for index, place in self.places.items() if index in moved])
            increments.update((index, left[place]) for index, place in self.places.items() if place in left)
        apply([(self.problems[index], self.states[index], found) for index, found in increments.items()], ok)
        for index, increment in self.increments.items():
            if self.decisions[index].rows is not None and index not in self._lent:
                give_back(*increment.memory)


def _is_small(problem: LocalProblem, increment: Increment) -> bool:
    """Whether the largest numbers alone say that all that a commit writes is finite; a NaN is not."""
    return increment.largest is not None and increment.largest < torch.finfo(problem.weight.dtype).max


def solve(
    checked: Checked, settings: Settings, done: Callable[[int], None] | None = None, compiled: bool = False
) -> Solved:
    """Run all local iterations of all problems; writes nothing that belongs to them.

    They are solved one after the other; small ones on few rows together, and all that compiled functions do.

    Args:
        checked: the problems.
        settings: the settings of the call.
        done: called with the index of each problem that is solved.
        compiled: whether to take the kernels for CPUs where they can run, see :mod:`locoprop_kernels.cpu_kernels`.
    """
    problems, states = checked.problems, checked.states
    solved = Solved(problems, states, _decisions(checked, settings, compiled))
    by_kernels = [i for i, decision in enumerate(solved.decisions) if decision.driver in ("numba", "phases")]
    if by_kernels:
        from locoprop_kernels.cpu_kernels.run import Compiled

        solved.compiled = Compiled(
            [problems[i] for i in by_kernels],
            [states[i] for i in by_kernels],
            settings,
            [solved.decisions[i] for i in by_kernels],
            checked.found,
            lambda place: _tell(done, [by_kernels[place]]),
        )
        solved.places = {index: place for place, index in enumerate(by_kernels)}
    others = [i for i in range(len(problems)) if i not in solved.places]
    for numbers in together([problems[i] for i in others], [states[i] for i in others], settings):
        part = [others[i] for i in numbers]
        if len(part) == 1:
            found = [local_loop(problems[part[0]], states[part[0]], settings, solved.decisions[part[0]])]
        else:
            found = few_rows_loops([problems[i] for i in part], [states[i] for i in part], settings)
        for index, (increment, trace) in zip(part, found, strict=True):
            solved.increments[index], solved.traces[index] = increment, trace
        _tell(done, part)
    return solved


def _decisions(checked: Checked, settings: Settings, compiled: bool) -> list[Decision]:
    """:func:`decide` for each problem; found once for problems that come again with such settings."""
    known: tuple[tuple[Any, ...], list[Decision]] | None = checked.found.get(Decision)
    asked = (compiled, *settings.decided_by)
    if known is None or known[0] != asked:
        known = asked, [decide(problem, settings, compiled) for problem in checked.problems]
        checked.found[Decision] = known
    return known[1]


def _tell(done: Callable[[int], None] | None, solved: list[int]) -> None:
    if done is not None:
        for index in solved:
            done(index)
