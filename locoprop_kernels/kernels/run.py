"""From problems to launches: finds or makes the plans of a step, runs them, and holds what they found."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from locoprop_kernels.gram import GramForm
from locoprop_kernels.kernels import commit, phases, prepare, rows, single, softmax
from locoprop_kernels.kernels.decide import LayerShape, Machine, Task, decide, machine_of, shape_of, task_of
from locoprop_kernels.kernels.inputs import Inputs, place_chunks
from locoprop_kernels.kernels.layout import ALIGNMENT, Piece, Place
from locoprop_kernels.kernels.plan import Plan
from locoprop_kernels.kernels.spec import StepArguments
from locoprop_kernels.problem import LocalProblem, State
from locoprop_kernels.settings import Settings
from locoprop_kernels.solution import Decision, Increment

__all__ = ["Solved", "solve"]

_KEPT_STEPS = 32
"""Plans of so many kinds of steps are kept."""


class StepPlan(NamedTuple):
    """The decisions for the problems of a step, and a plan for each set of them that is launched together."""

    decisions: tuple[Decision, ...]
    plans: tuple[Plan, ...]


_steps: OrderedDict[tuple[tuple[LayerShape, ...], Task, Machine, torch.device], StepPlan] = OrderedDict()


def _step_plan(shapes: tuple[LayerShape, ...], task: Task, machine: Machine, device: torch.device) -> StepPlan:
    """The plan of a step, made where there is none yet."""
    key = (shapes, task, machine, device)
    known = _steps.get(key)
    if known is not None:
        _steps.move_to_end(key)
        return known
    decisions = decide(shapes, task, machine)
    sets: dict[int, list[int]] = {}
    for index, decision in enumerate(decisions):
        sets.setdefault(decision.together, []).append(index)
    plans = tuple(
        Plan(members, [shapes[i] for i in members], [decisions[i] for i in members], task, machine, device)
        for members in sets.values()
    )
    known = _steps[key] = StepPlan(decisions, plans)
    if len(_steps) > _KEPT_STEPS:
        free = (old for old, kept in _steps.items() if not any(plan.captured for plan in kept.plans))
        oldest = next(free, None)
        if oldest is not None:
            del _steps[oldest]
    return known


def allocate(size: int, device: torch.device, what: str) -> Tensor:
    """An uninitialised buffer of ``size`` bytes, aligned.

    Raises:
        torch.OutOfMemoryError: naming the size asked for.
    """
    try:
        buffer = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else MemoryError
        raise kind(f"out of memory for {what}: {size / 2**20:.1f} MiB on {device}; nothing was changed") from error
    skip = -buffer.data_ptr() % ALIGNMENT
    return buffer[skip : skip + size]


class _Launched:
    """Problems that are launched together, and what is left of them after it.

    Args:
        plan: their plan.
        problems: all problems of the step.
        states: the rule's state in each.
        settings: the settings of the call.
        bad: int32 ``[1]``, set where something is not finite.
    """

    def __init__(
        self, plan: Plan, problems: Sequence[LocalProblem], states: Sequence[State], settings: Settings, bad: Tensor
    ) -> None:
        self.plan = plan
        self.problems = [problems[i] for i in plan.members]
        self.states = [
            {name: {slot: value.contiguous() for slot, value in slots.items()} for name, slots in states[i].items()}
            for i in plan.members
        ]
        layout, device, iterations = plan.layout, plan.device, settings.iterations
        self.grams = (
            [GramForm(problem, layout.kind.operand) for problem in self.problems] if plan.form == "gram" else []
        )
        self.inputs = [
            Inputs(problem, layer, state, layout.kind.slots, self.grams[i] if self.grams else None)
            for i, (problem, layer, state) in enumerate(zip(self.problems, layout.layers, self.states, strict=True))
        ]
        self.results = allocate(layout.results_bytes, device, "the increments and the new state")
        self.scratch = allocate(layout.scratch_bytes, device, "the scratch of the local loop")
        cells = [one.cells for one in self.inputs]
        table, rates, counts = plan.table(self.results, self.scratch, cells, settings)
        trace = (
            torch.zeros(iterations + 1, layout.trace_slots, dtype=torch.float64, device=device)
            if settings.trace
            else torch.empty(1, dtype=torch.float64, device=device)
        )
        self.step = StepArguments(table, rates, iterations, settings.prox, counts, bad, trace, layout.trace_slots)
        self.settings = settings
        self.gram_losses: list[Tensor] | None = None

    def run(self) -> None:
        """All launches up to the commit."""
        plan, step, spec = self.plan, self.step, self.plan.spec
        if step.iterations > 1 or spec.P.trace:
            self._prepare()
        if plan.blocks is not None:
            rows.launch(step, plan.blocks, spec)
            return
        if plan.layout.kind.operand == torch.float16:
            phases.launch_update(step, plan.update_tiles, 0, spec)  # finds the scale of the first increment
        if plan.schedule is not None:
            lists = plan.work_lists
            counters = torch.zeros(2 * len(lists[-1]), dtype=torch.int32, device=plan.device)
            single.launch(step, lists, counters, spec)
        elif plan.form == "gram":
            self._run_gram()
        else:
            self._run_phases()

    def _prepare(self) -> None:
        plan, spec, table = self.plan, self.plan.spec, self.step.table
        for index, problem in enumerate(self.problems):
            place_chunks(problem, index, plan.layout, self.scratch, self.settings)
        prepare.launch(table, plan.tiles["prepare_x"], spec.copy_x)
        prepare.launch(table, plan.tiles["chunked_x"], spec.copy_chunks)
        prepare.launch(table, plan.tiles["prepare_a0"], spec.copy_a0)  # the Gram form has no such tiles

    def _run_phases(self) -> None:
        """A launch for each phase of a local step."""
        plan, step, spec = self.plan, self.step, self.plan.spec
        iterations = step.iterations
        for t in range(iterations + 1):
            if t > 0 and (t < iterations or spec.P.trace):  # E_0 = 0
                phases.launch_activation(step, plan.activation_tiles, t, spec)
                if plan.form == "softmax":
                    softmax.launch(step, plan.tiles["softmax"], t, spec)
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
        matrices = place.view(self.results, torch.float32, groups or 1, piece.rows, piece.columns)
        if groups is None:
            matrices = matrices[0]
        return matrices if name == "weight" else matrices[..., 0]

    def trace(self, index: int) -> Tensor | None:
        """Local objective of a problem before every local step and at the end."""
        if not self.plan.spec.P.trace:
            return None
        layout = self.plan.layout
        activation, update = (self.step.trace[:, lo:hi].sum(1) for lo, hi in layout.trace_ranges[index])
        if self.gram_losses is not None:
            activation = self.gram_losses[index]
        layer = layout.layers[index]
        return activation * (layer.scale * layer.sets) + update

    def commit(self, ok: Tensor) -> None:
        """Apply the results where the bool ``ok`` is true; state that a problem lacked is given to it."""
        with _on(self.plan.device):
            commit.launch(self.step, self.plan.update_tiles, ok.view(torch.uint8), self.plan.spec)
        for problem, state in zip(self.problems, self.states, strict=True):
            for name, slots in state.items():
                problem.state.setdefault(name, {}).update(slots)
                torch.autograd.graph.increment_version(getattr(problem, name))


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Launches go to ``device``."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Solved:
    """The solution of the Triton backend, see :class:`locoprop_kernels.solution.Solution`."""

    def __init__(self, decisions: tuple[Decision, ...], launched: list[_Launched], bad: Tensor) -> None:
        self.decisions, self._launched = decisions, launched
        self.finite = bad[0] == 0
        self._places = {member: (one, place) for one in launched for place, member in enumerate(one.plan.members)}
        placed = [self._places[index] for index in range(len(decisions))]
        self.traces = [one.trace(place) for one, place in placed]

    def increment(self, index: int) -> Increment:
        """The results of a problem, as views."""
        launched, place = self._places[index]
        return launched.increment(place)

    def commit(self, ok: Tensor) -> None:
        """Apply all results where the bool ``ok`` is true."""
        for launched in self._launched:
            launched.commit(ok)


def solve(problems: list[LocalProblem], states: list[State], settings: Settings) -> Solved:
    """Run all local iterations of all problems; reads them, and writes nothing that belongs to them.

    Args:
        problems: validated problems.
        states: the rule's state in each of them.
        settings: the settings of the call.
    """
    device = problems[0].weight.device
    with _on(device):
        shapes = tuple(shape_of(problem, settings) for problem in problems)
        step = _step_plan(shapes, task_of(settings), machine_of(device), device)
        bad = torch.zeros(1, dtype=torch.int32, device=device)
        launched = [_Launched(plan, problems, states, settings, bad) for plan in step.plans]
        for one in launched:
            one.run()
        return Solved(step.decisions, launched, bad)
