"""From problems to launches: finds or makes the plans of a step, runs them, and holds what they found."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from locoprop_kernels.checked import Checked
from locoprop_kernels.gram import GramForm
from locoprop_kernels.graphs import capturing
from locoprop_kernels.kernels import commit, configs, phases, prepare, rows, single, softmax, target
from locoprop_kernels.kernels.decide import (
    LayerShape,
    Machine,
    Task,
    decide,
    is_aligned,
    machine_of,
    shape_of,
    task_of,
)
from locoprop_kernels.kernels.device import rules as device_rules
from locoprop_kernels.kernels.inputs import Sources, own_sources, place_chunks, sources
from locoprop_kernels.kernels.layout import ALIGNMENT, Piece, Place
from locoprop_kernels.kernels.plan import Plan
from locoprop_kernels.kernels.spec import StepArguments
from locoprop_kernels.settings import Settings
from locoprop_kernels.solution import Decision, Increment, apply

__all__ = ["Solved", "StepPlan", "planned", "solve"]

_KEPT_STEPS = 32
"""Plans of so many kinds of steps are kept."""


class StepPlan(NamedTuple):
    """The decisions for the problems of a step, and a plan for each set of them that is launched together.

    Attributes:
        decisions: of each problem.
        plans: of each set.
        flags: how many int32 zeros a step begins with: the sets' counters, and one that says what is not finite.
    """

    decisions: tuple[Decision, ...]
    plans: tuple[Plan, ...]
    flags: int


_lock = threading.Lock()
# By the problems' descriptions, which of their inputs are aligned, and what the settings and the device ask for.
_steps: OrderedDict[tuple[Any, ...], StepPlan] = OrderedDict()


def planned(checked: Checked, settings: Settings) -> StepPlan | str:
    """The plan of a step, made where there is none yet; or why these problems cannot run."""
    problems = checked.problems
    device = problems[0].weight.device
    aligned = tuple([is_aligned(problem.x) for problem in problems])
    # Operands that are rounded are not multiplied in float32, and asking takes a while.
    rounded = settings.compute_dtype not in (None, torch.float32)
    precision = None if rounded else target.float32_precision()
    functions = device_rules.lookup(settings.rule), settings.regulariser and settings.regulariser.triton_fn
    key = (checked.kind, aligned, precision, configs.asked(), *functions, *settings.decided_by)
    with suppress(TypeError), _lock:  # a rule that is not frozen has no hash, and is not supported
        if key in _steps:
            _steps.move_to_end(key)
            return _steps[key]
    reason = target.unsupported(device, settings)
    if reason is not None:
        return reason
    if capturing(device):
        raise RuntimeError(
            "a step of new shapes or settings cannot be captured in a CUDA graph, because what all such steps share is "
            "uploaded in the first: make a step like it outside of the capture before"
        )
    task, machine = task_of(settings), machine_of(device)
    for problem in problems:
        reason = target.unsupported_problem(problem, settings)
        if reason is not None:
            return reason
    with _lock, _on(device):
        known = _steps[key] = _new_plan([shape_of(problem, settings) for problem in problems], task, machine, device)
        if len(_steps) > _KEPT_STEPS:
            free = (old for old, kept in _steps.items() if not any(plan.captured for plan in kept.plans))
            oldest = next(free, None)
            if oldest is not None:
                del _steps[oldest]
    return known


def _new_plan(shapes: Sequence[LayerShape], task: Task, machine: Machine, device: torch.device) -> StepPlan:
    """Decide how to solve problems of these shapes, and plan each set that is launched together."""
    decisions = decide(tuple(shapes), task, machine)
    sets: dict[int, list[int]] = {}
    for index, decision in enumerate(decisions):
        sets.setdefault(decision.together, []).append(index)
    plans = tuple(
        Plan(members, [shapes[i] for i in members], [decisions[i] for i in members], task, machine, device)
        for members in sets.values()
    )
    return StepPlan(decisions, plans, sum(plan.counters for plan in plans) + 1)


def allocate(size: int, device: torch.device) -> Tensor:
    """An uninitialised buffer of ``size`` bytes, aligned.

    Raises:
        torch.OutOfMemoryError: naming the size asked for.
    """
    try:
        buffer = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else MemoryError
        what = "the increments, the new state and the scratch of the local loop"
        raise kind(f"out of memory for {what}: {size / 2**20:.1f} MiB on {device}; nothing was changed") from error
    skip = -buffer.data_ptr() % ALIGNMENT
    return buffer[skip : skip + size]


class _Launched:
    """Problems that are launched together, and what is left of them after it.

    Args:
        plan: their plan.
        checked: all problems of the step.
        settings: the settings of the call.
        bad: int32 ``[]``, set where something is not finite.
        counters: int32 zeros, as many as the plan wants.
    """

    def __init__(self, plan: Plan, checked: Checked, settings: Settings, bad: Tensor, counters: Tensor) -> None:
        self.plan, self.settings, self.counters = plan, settings, counters
        self.problems = [checked.problems[i] for i in plan.members]
        # What is not contiguous is replaced by copies.
        self.states = [dict(checked.states[i]) for i in plan.members]
        layout, device, iterations = plan.layout, plan.device, settings.iterations
        self.grams: list[GramForm] = []
        if plan.form == "gram":
            self.grams = [GramForm(problem, layout.kind.operand) for problem in self.problems]
        grams: Sequence[GramForm | None] = self.grams or [None] * len(self.problems)
        self.buffer = allocate(layout.bytes, device)
        # Among them are copies that kernels read.
        self.sources = [
            sources(problem, layer, own, gram)
            for problem, layer, own, gram in zip(
                self.problems, layout.layers, self._own_sources(checked), grams, strict=True
            )
        ]
        with plan.lock:
            table, rates, counts = plan.table(self.buffer, self.sources, settings)
        if settings.trace:
            trace = torch.zeros(iterations + 1, layout.trace_slots, dtype=torch.float64, device=device)
        else:
            trace = plan.no_trace
        self.step = StepArguments(table, rates, iterations, settings.prox, counts, bad, trace, layout.trace_slots)
        self.gram_losses: list[Tensor] | None = None

    def _own_sources(self, checked: Checked) -> list[Sources]:
        """See :func:`own_sources`; found once for problems that come again, unless there are copies among them."""
        plan = self.plan
        found: list[Sources] | None = checked.found.get(plan)
        if found is None:
            pairs = zip(self.problems, self.states, strict=True)
            found = [own_sources(problem, state, plan.layout.kind.slots) for problem, state in pairs]
            before = [checked.states[i] for i in plan.members]
            if all(own[name] is old[name] for own, old in zip(self.states, before, strict=True) for name in own):
                checked.found[plan] = found
        return found

    def run(self) -> None:
        """All launches up to the commit."""
        plan, step, spec = self.plan, self.step, self.plan.spec
        if step.iterations > 1 or spec.P.trace:
            self._prepare()
        if plan.blocks is not None:
            rows.launch(step, plan.blocks, spec)
            return
        if spec.P.scaled:
            self._find_scales()
        if plan.schedule is not None:
            single.launch(step, plan.work_lists, self.counters, spec)
        elif plan.form == "gram":
            self._run_gram()
        else:
            self._run_phases()

    def _prepare(self) -> None:
        plan, spec, table = self.plan, self.plan.spec, self.step.table
        for index, problem in enumerate(self.problems):
            place_chunks(problem, index, plan.layout, self.buffer, self.settings)
        if plan.layout.kind.staged is not None:
            self.buffer[plan.layout.largest_x].zero_()
            prepare.launch_largest(table, plan.tiles["prepare_x"], spec.copy_x)
            prepare.launch_largest(table, plan.tiles["chunked_x"], spec.copy_chunks)
        prepare.launch(table, plan.tiles["prepare_x"], spec.copy_x)
        prepare.launch(table, plan.tiles["chunked_x"], spec.copy_chunks)
        prepare.launch(table, plan.tiles["prepare_a0"], spec.copy_a0)  # the Gram form has no such tiles

    def _find_scales(self) -> None:
        """The first local step ahead, and in float8 what it changes: scales are taken from what came before."""
        plan, step, spec = self.plan, self.step, self.plan.spec
        phases.launch_update(step, plan.update_tiles, 0, spec)
        if plan.layout.kind.operand == torch.float8_e4m3fn and (step.iterations > 1 or spec.P.trace):
            phases.launch_update(step, plan.update_tiles, 0, spec)
            self._run_activation(1)

    def _run_activation(self, t: int) -> None:
        """``E`` of all layers before local step ``t``."""
        phases.launch_activation(self.step, self.plan.activation_tiles, t, self.plan.spec)
        if self.plan.form == "softmax":
            softmax.launch(self.step, self.plan.tiles["softmax"], t, self.plan.spec)

    def _run_phases(self) -> None:
        """A launch for each phase of a local step."""
        plan, step, spec = self.plan, self.step, self.plan.spec
        iterations = step.iterations
        for t in range(iterations + 1):
            if t > 0 and (t < iterations or spec.P.trace):  # E_0 = 0
                self._run_activation(t)
            if 0 < t < iterations and spec.P.split:
                phases.launch_partial(step, plan.tiles["partial"], t, spec)
            if t < iterations:
                phases.launch_update(step, plan.update_tiles, t, spec)

    def _run_gram(self) -> None:
        """The update phase alone; the matching losses come from the Gram form itself."""
        zero = torch.zeros((), dtype=torch.float64, device=self.plan.device)
        losses = [[zero] for _ in self.grams]
        for t in range(self.step.iterations):
            phases.launch_update(self.step, self.plan.update_tiles, t, self.plan.spec)
            if self.plan.spec.P.trace:
                for index, gram in enumerate(self.grams):
                    losses[index].append(gram.divergence(self.deltas(index)))
        if self.plan.spec.P.trace:
            self.gram_losses = [torch.stack(values) for values in losses]

    def deltas(self, index: int) -> dict[str, Tensor]:
        """Increments of a problem, as views."""
        pieces = self.plan.layout.pieces[index]
        return {name: self._view(index, name, piece, piece.delta) for name, piece in pieces.items()}

    def increment(self, index: int) -> Increment:
        """The results of a problem, as views."""
        layout, state = self.plan.layout, {}
        for name, piece in layout.pieces[index].items():
            slots = zip(layout.kind.slots, piece.slots, strict=True)
            state[name] = {slot: self._view(index, name, piece, place) for slot, place in slots}
            if self.plan.spec.U.counts_steps:
                state[name]["step"] = self.states[index][name]["step"] + self.step.iterations
        return Increment(self.deltas(index), state)

    def _view(self, index: int, name: str, piece: Piece, place: Place) -> Tensor:
        groups = self.problems[index].groups
        matrices = place.view(self.buffer, torch.float32, groups or 1, piece.rows, piece.columns)
        if groups is None:
            matrices = matrices[0]
        return matrices if name == "weight" else matrices[..., 0]

    def trace(self, index: int) -> Tensor:
        """Local objective of a problem before every local step and at the end."""
        layout = self.plan.layout
        activation, update = (self.step.trace[:, lo:hi].sum(1) for lo, hi in layout.trace_ranges[index])
        if self.gram_losses is not None:
            activation = self.gram_losses[index]
        layer = layout.layers[index]
        return activation * (layer.scale * layer.sets) + update

    def commit(self, ok: Tensor, moved: Collection[int]) -> None:
        """Apply the results where the bool ``ok`` is true; state that a problem lacked is given to it."""
        if any(member in moved for member in self.plan.members):
            found = [self.increment(index) for index in range(len(self.problems))]
            apply(zip(self.problems, self.states, found, strict=True), ok)
            return
        with _on(self.plan.device):
            commit.launch(self.step, self.plan.update_tiles, ok.view(torch.uint8), self.plan.spec)
        for problem, state in zip(self.problems, self.states, strict=True):
            for name, slots in state.items():
                if problem.state.get(name) is not slots:
                    problem.state.setdefault(name, {}).update(slots)
        torch.autograd.graph.increment_version(
            [
                getattr(problem, name)
                for problem, state in zip(self.problems, self.states, strict=True)
                for name in state
            ]
        )


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Launches go to ``device``."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Solved:
    """The solution of the Triton backend, see :class:`locoprop_kernels.solution.Solution`."""

    def __init__(self, decisions: tuple[Decision, ...], launched: list[_Launched], bad: Tensor) -> None:
        self.decisions, self._launched = decisions, launched
        self.finite = bad == 0
        self.traces: list[Tensor | None] = [None] * len(decisions)
        for one in launched if launched[0].settings.trace else ():
            for place, member in enumerate(one.plan.members):
                self.traces[member] = one.trace(place)

    def increment(self, index: int) -> Increment:
        """The results of a problem, as views."""
        launched = next(one for one in self._launched if index in one.plan.members)
        return launched.increment(launched.plan.members.index(index))

    def commit(self, ok: Tensor, moved: Collection[int] = ()) -> None:
        """Apply all results where the bool ``ok`` is true; in PyTorch where problems have ``moved``."""
        for launched in self._launched:
            launched.commit(ok, moved)


def solve(step: StepPlan, checked: Checked, settings: Settings) -> Solved:
    """Run all local iterations of all problems; reads them, and writes nothing that belongs to them.

    Args:
        step: the plan of the step.
        checked: the problems.
        settings: the settings of the call.
    """
    device = step.plans[0].device
    with _on(device):
        flags = torch.zeros(step.flags, dtype=torch.int32, device=device)
        bad, first, launched = flags[-1], 0, []
        for plan in step.plans:
            launched.append(_Launched(plan, checked, settings, bad, flags[first : first + plan.counters]))
            first += plan.counters
        for one in launched:
            one.run()
        return Solved(step.decisions, launched, bad)
