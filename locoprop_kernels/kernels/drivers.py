"""From problems to launches: groups problems that one launch can take, makes or finds their plan, and runs it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locoprop_kernels.gram import GramForm, gram_is_cheaper
from locoprop_kernels.kernels import columns as c
from locoprop_kernels.kernels import commit, configs, functions, grouped, prepare, rowwise, single, updates
from locoprop_kernels.kernels.plan import ALIGNMENT, Cells, Key, Layer, Piece, Place, Plan, float_bits
from locoprop_kernels.patches import Rows, Stacked, row_chunks
from locoprop_kernels.problem import LocalProblem, State
from locoprop_kernels.reference import Increment
from locoprop_kernels.settings import Settings
from locoprop_kernels.transfers import Transfer

__all__ = ["Group", "run", "unsupported"]

_KEPT_PLANS = 32
# Larger convolutions go to the reference, which holds 16 MiB of patches at a time.
_MOST_UNFOLDED_BYTES = 2**30
_plans: OrderedDict[Key, Plan] = OrderedDict()


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return type(commit._commit_kernel).__name__ == "InterpretedFunction"


def target_of(device: torch.device) -> str:
    """Name of the device's architecture in the table of configurations."""
    if interpreted():
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def float32_precision() -> str:
    """``"tf32"`` or ``"ieee"``, from torch's own setting for float32 products."""
    if torch.version.hip:
        return "ieee"
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if setting == "none":
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if setting == "tf32" else "ieee"


def _precision(operand: torch.dtype) -> str:
    """Of the products' operands, as the table of configurations calls it."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(operand) or float32_precision()


def unsupported(problems: Sequence[LocalProblem], settings: Settings) -> str | None:
    """Why these problems cannot run here, or ``None``."""
    rule, regulariser = settings.rule, settings.regulariser
    device = problems[0].weight.device
    if device.type == "cpu" and not interpreted():
        return "the tensors are on the CPU (move them to a GPU, or set TRITON_INTERPRET=1 to debug)"
    if device.type not in ("cpu", "cuda"):
        return f"device type {device.type!r} is not supported (CUDA and HIP devices are)"
    if device.type == "cuda" and interpreted():
        return "TRITON_INTERPRET=1 is set, which runs kernels on CPU tensors"
    if updates.lookup(rule) is None:
        return f"{type(rule).__name__} has no Triton function (give it an attribute triton_function)"
    if regulariser is not None and regulariser.triton_fn is None:
        return "the regulariser has no Triton function (give Regulariser a triton_fn)"
    if regulariser is not None and settings.trace:
        return "trace=True is not supported with a regulariser of the user's own"
    for problem in problems:
        if (unfolded := _unfolded_bytes(problem.x)) > _MOST_UNFOLDED_BYTES:
            most, size = _MOST_UNFOLDED_BYTES >> 20, unfolded / 2**20
            return f"the kernels unfold patches whole, at most {most} MiB a layer; one takes {size:.0f} MiB"
        dtypes = {problem.weight.dtype, problem.x.dtype, problem.preactivation.dtype, settings.compute_dtype}
        if torch.float64 in dtypes:
            return "float64 is not supported (float32, bfloat16 and float16 are)"
        assert isinstance(problem.transfer, Transfer)
        if problem.transfer.name != "softmax" and functions.lookup(problem.transfer) is None:
            return f"the transfer function {str(problem.transfer)!r} has no Triton function"
    return None


def _unfolded_bytes(x: Tensor | Rows) -> int:
    """Of rows that are formed, and are larger than what they are formed from."""
    if isinstance(x, Tensor):
        return 0
    if isinstance(x, Stacked):
        return sum(map(_unfolded_bytes, x.parts))
    return math.prod(x.shape) * x.dtype.itemsize


def _copy_chunks(rows: Rows, target: Tensor) -> None:
    """Copy ``rows`` to ``target``, ``[G, B, columns]`` of the scratch, so that they are never held as a tensor too."""
    start = 0
    for chunk in row_chunks(rows):
        stop = start + chunk.shape[-2]
        if target.dtype == torch.float16 and chunk.dtype != torch.float16:  # what has outgrown it saturates
            chunk = torch.where(chunk.isfinite(), chunk.clamp(-65504, 65504), chunk)
        target[..., start:stop, :] = chunk
        start = stop


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


@dataclass(eq=False)
class Group:
    """Problems of one launch, and what is left of them after it."""

    problems: list[LocalProblem]
    plan: Plan
    iterations: int
    results: Tensor
    table: Tensor
    states: list[dict[str, dict[str, Tensor]]]
    keep_alive: list[Any]
    trace: Tensor | None
    driver: str
    losses: list[Tensor] | None = None  # of the Gram form, [T + 1] per problem

    def deltas(self, index: int) -> dict[str, Tensor]:
        """Increments of a problem, as views."""
        pieces = self.plan.pieces[index]
        return {name: self._view(index, name, piece, piece.delta) for name, piece in pieces.items()}

    def increment(self, index: int, views: bool) -> Increment:
        """The results of a problem, as views; none unless ``views``."""
        if not views:
            return Increment({}, {}, self.driver, self.objective(index))
        state = {}
        for name, piece in self.plan.pieces[index].items():
            slots = zip(self.plan.key.slots, piece.slots, strict=True)
            state[name] = {slot: self._view(index, name, piece, place) for slot, place in slots}
            if self.plan.key.counts_steps:
                state[name]["step"] = self.states[index][name]["step"] + self.iterations
        return Increment(self.deltas(index), state, self.driver, self.objective(index))

    def _view(self, index: int, name: str, piece: Piece, place: Place) -> Tensor:
        groups = self.problems[index].groups
        matrices = place.view(self.results, torch.float32, groups or 1, piece.rows, piece.columns)
        if groups is None:
            matrices = matrices[0]
        return matrices if name == "weight" else matrices[..., 0]

    def objective(self, index: int) -> Tensor | None:
        """Local objective of a problem before every local step and at the end."""
        if self.trace is None:
            return None
        activation, update = (self.trace[:, lo:hi].sum(1) for lo, hi in self.plan.trace_ranges[index])
        if self.losses is not None:
            activation = self.losses[index]
        return activation * self.plan.key.layers[index].scale + update


def _layer(
    problem: LocalProblem,
    x: Tensor | Rows,
    reduction: str,
    operand: torch.dtype,
    tf32: bool,
    config: configs.Config,
    splits: int,
) -> Layer:
    _, k, n = problem.shape
    transfer = problem.transfer
    assert isinstance(transfer, Transfer)
    function, divergence = None, None
    if transfer.name not in ("identity", "softmax"):
        found = functions.lookup(transfer)
        assert found is not None
        function, divergence = found
    batch, weight = x.shape[-2], problem.grad_weight is not None
    whole_tiles = batch % config.b == 0 and k % config.k == 0
    aligned = isinstance(x, Tensor) and x.dtype == operand and x.is_contiguous() and x.data_ptr() % 16 == 0
    return Layer(
        batch=batch,
        inputs=k,
        outputs=n,
        function=function,
        divergence=divergence,
        parameter=transfer.parameters[0] if transfer.parameters else 0.0,
        weight=weight,
        bias=problem.grad_bias is not None,
        x_in_place=whole_tiles and aligned and not tf32,
        scale=problem.scale(reduction),
        rows=problem.shape[0],
        splits=splits if weight else 1,
        groups=problem.groups or 1,
        x_chunks=weight and not isinstance(x, Tensor),
        a0_chunks=not isinstance(problem.preactivation, Tensor),
    )


def _form(problem: LocalProblem, operand: torch.dtype, iterations: int) -> str:
    """Which form of the local gradient a problem takes."""
    transfer = problem.transfer
    assert isinstance(transfer, Transfer)
    if transfer.name == "softmax":
        return "softmax"
    # XᵀX grows with the batch, which float16 has no range for.
    if operand != torch.float16 and gram_is_cheaper(problem, iterations):
        return "gram"
    return "product"


class _Inputs:
    """Fills what belongs to the caller into the cells of a problem, and keeps it alive."""

    def __init__(self, problem: LocalProblem) -> None:
        self.cells = Cells()
        self.alive: list[Tensor] = []
        self._grouped = problem.groups is not None

    def put(self, column: int, tensor: Tensor) -> tuple[int, ...]:
        """The address of ``tensor``; returns its strides within a group."""
        self.cells.values[column] = tensor.data_ptr()
        self.alive.append(tensor)
        strides = tensor.stride()
        if not self._grouped:
            return strides
        self.cells.steps[column] = strides[0] * tensor.element_size()
        return strides[1:]

    def put_matrix(self, column: int, matrix: Tensor) -> None:
        """The address and the two strides of ``matrix``, in columns side by side."""
        self.cells.values[column + 1], self.cells.values[column + 2] = self.put(column, matrix)


def _inputs(
    problem: LocalProblem, x: Tensor | Rows, layer: Layer, state: dict[str, dict[str, Tensor]], slots: Sequence[str]
) -> _Inputs:
    inputs = _Inputs(problem)
    values = inputs.cells.values
    if isinstance(problem.preactivation, Tensor):
        inputs.put_matrix(c.A0_SOURCE.value, problem.preactivation)
    if layer.weight and isinstance(x, Tensor):
        if layer.x_in_place:
            inputs.put(c.X.value, x)
        else:
            inputs.put_matrix(c.X_SOURCE.value, x)
    for name, (value, grad) in problem.trained().items():
        base = c.WEIGHT.value if name == "weight" else c.BIAS.value
        if name == "weight" and grad.stride(-1) != 1:
            grad = grad.contiguous()
        values[base + c.GRAD_ROW.value] = inputs.put(base + c.GRAD.value, grad)[0]
        row, *column = inputs.put(base + c.VALUE.value, value)
        values[base + c.VALUE_ROW.value], values[base + c.VALUE_COLUMN.value] = row, column[0] if column else 0
        for i, slot in enumerate(slots):
            inputs.put(base + c.OLD.value + i, state[name][slot])
        if "step" in state[name]:
            values[base + c.STEP.value] = state[name]["step"].data_ptr()
        mask = problem.mask(name)
        if mask is not None:
            inputs.put(base + c.MASK.value, mask.contiguous())
        values[base + c.RATE.value] = float_bits(problem.rate(name))
    return inputs


def _multiprocessors(device: torch.device) -> int:
    """Of the device; one in the interpreter, whose programs run one after another."""
    programs = configs.programs()
    if programs is not None:
        return programs
    if interpreted():
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _resident(key: Key) -> int:
    """How many programs of the single launch run at once; the interpreter's caller answers for their number."""
    if key.interpreted:
        return key.programs
    return int(torch.cuda.get_device_properties(key.device).multi_processor_count) * key.config.occupancy


def _plan(key: Key) -> Plan:
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = Plan(key, _resident(key))
        if len(_plans) > _KEPT_PLANS:
            oldest = next((old for old, kept in _plans.items() if not kept.captured), None)
            if oldest is not None:
                del _plans[oldest]
    else:
        _plans.move_to_end(key)
    return plan


def run(
    problems: list[LocalProblem], settings: Settings, states: list[State]
) -> tuple[list[tuple[Group, int]], Tensor]:
    """All local loops, from the rule's ``states``.

    Returns:
        for each problem its group and its place in it; and an int32 ``[1]``, nonzero if anything is not finite.
    """
    device = problems[0].weight.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        bad = torch.zeros(1, dtype=torch.int32, device=device)
        members: dict[Any, list[int]] = {}
        forms = [_form(problem, settings.operands(problem), settings.iterations) for problem in problems]
        grams = tuple(
            shape
            for problem, form in zip(problems, forms, strict=True)
            for shape in ([problem.shape] * (problem.groups or 1) if form == "gram" else [])
        )
        if grams and not interpreted():
            found = configs.candidates(target_of(device), _precision(settings.operands(problems[0])))
            slots = len(settings.rule.slots)
            if not configs.gram_pays(found, grams, settings.iterations, slots, _multiprocessors(device)):
                forms = ["product" if form == "gram" else form for form in forms]
        for index, (problem, form) in enumerate(zip(problems, forms, strict=True)):
            kind = (form, problem.weight.dtype, problem.x.dtype, problem.preactivation.dtype)
            members.setdefault(kind, []).append(index)
        placed: list[tuple[Group, int]] = [None] * len(problems)  # type: ignore[list-item]
        for (form, *_), indices in members.items():
            group = _run_group([problems[i] for i in indices], [states[i] for i in indices], form, settings, bad)
            for place, index in enumerate(indices):
                placed[index] = (group, place)
    return placed, bad


def _run_group(problems: list[LocalProblem], before: list[State], form: str, settings: Settings, bad: Tensor) -> Group:
    """The problems that one plan can take."""
    first, rule, trace = problems[0], settings.rule, settings.trace
    device, operand = first.weight.device, settings.operands(first)
    precision = _precision(operand)
    found = updates.lookup(rule)
    assert found is not None
    grams = [GramForm(problem, operand) for problem in problems] if form == "gram" else []
    xs: list[Tensor | Rows] = [gram.gram.tensor for gram in grams] or [problem.x for problem in problems]
    sizes: list[tuple[int, int, int]] = []
    first_rows = []
    for problem, x in zip(problems, xs, strict=True):
        first_rows.append(len(sizes))
        k = problem.shape[1] if problem.grad_weight is not None else 1
        sizes += [(x.shape[-2], k, problem.shape[2])] * (problem.groups or 1)
    masked = any(problem.mask(name) is not None for problem in problems for name in problem.trained())
    asked = configs.driver()
    if masked and operand == torch.float16:  # the single launch would spill registers
        asked = "grouped"
    config, programs, splits = configs.choose(
        configs.candidates(target_of(device), precision, masked),
        tuple(sizes),
        form,
        len(rule.slots),
        _multiprocessors(device),
        asked,
    )
    key = Key(
        layers=tuple(
            _layer(problem, x, settings.reduction, operand, precision == "tf32", config, splits[row])
            for problem, x, row in zip(problems, xs, first_rows, strict=True)
        ),
        device=device,
        parameter=first.weight.dtype,
        x=xs[0].dtype,
        preactivation=first.preactivation.dtype,
        operand=operand,
        precision=precision,
        rule=found[0],
        hyper=found[1],
        slots=tuple(rule.slots),
        form=form,
        counts_steps=rule.counts_steps,
        regulariser=None if settings.regulariser is None else settings.regulariser.triton_fn,
        masked=masked,
        trace=trace,
        transposed=precision == "tf32",
        interpreted=interpreted(),
        config=config,
        programs=programs,
    )
    plan = _plan(key)
    key = plan.key
    states = [
        {name: {slot: value.contiguous() for slot, value in slots.items()} for name, slots in state.items()}
        for state in before
    ]
    inputs = [
        _inputs(problem, x, layer, state, key.slots)
        for problem, x, layer, state in zip(problems, xs, key.layers, states, strict=True)
    ]
    for one, gram in zip(inputs, grams, strict=False):
        one.put(c.ROW_SUMS.value, gram.sum_x)
    results = allocate(plan.results_bytes, device, "the increments and the new state")
    scratch = allocate(plan.scratch_bytes, device, "the scratch of the local loop")
    table, rates_tensor = plan.table(results, scratch, [one.cells for one in inputs], settings.rates)
    iterations = settings.iterations
    partial = (
        torch.zeros(iterations + 1, plan.trace_slots, dtype=torch.float64, device=device)
        if trace
        else torch.empty(1, dtype=torch.float64, device=device)
    )
    constants = plan.constants
    if iterations > 1 or trace:
        for problem, chunks, layer in zip(problems, plan.chunks, key.layers, strict=True):
            _place_chunks(problem, chunks, layer, scratch, key)
        prepare.prepare_x(table, plan.prepare_x_tiles, constants["prepare_x"], key.transposed)
        prepare.prepare_x(table, plan.chunked_x_tiles, constants["chunked_x"], key.transposed)
        prepare.prepare_a0(table, plan.prepare_a0_tiles, constants["prepare_a0"])  # no tiles in the Gram form
    launches = _Launches(plan, table, rates_tensor, iterations, settings.prox, bad, partial, constants)
    if operand == torch.float16:
        launches.update(0)  # finds the scale of the first increment
    driver = "single" if key.programs else {"product": "grouped"}.get(form, form)
    group = Group(
        problems=problems,
        plan=plan,
        iterations=iterations,
        results=results,
        table=table,
        states=states,
        keep_alive=[inputs, scratch, grams],
        trace=partial if trace else None,
        driver=driver,
    )
    if key.programs:
        launches.single()
    elif form == "gram":
        group.losses = launches.gram(group, grams)
    else:
        launches.grouped(rowwise=form == "softmax")
    return group


def _place_chunks(problem: LocalProblem, chunks: dict[str, Place], layer: Layer, scratch: Tensor, key: Key) -> None:
    """Copy what comes in chunks to where kernels will round it, pad it and read it."""
    if "x" in chunks:
        assert isinstance(problem.x, Rows)
        target = chunks["x"].view(scratch, key.operand, layer.groups, layer.batch, layer.inputs)
        _copy_chunks(problem.x, target)
    if "a0" in chunks:
        assert isinstance(problem.preactivation, Rows)
        target = chunks["a0"].view(scratch, key.preactivation, layer.groups, layer.outputs, layer.batch)
        _copy_chunks(problem.preactivation, target.mT)


@dataclass(eq=False)
class _Launches:
    """The drivers: sequences of launches that run a plan's local loop."""

    plan: Plan
    table: Tensor
    rates: Tensor
    iterations: int
    prox: float
    bad: Tensor
    trace: Tensor
    constants: dict[str, dict[str, Any]]

    def single(self) -> None:
        plan = self.plan
        lists = plan.work_lists
        counters = torch.zeros(2 * len(lists[-1]), dtype=torch.int32, device=plan.key.device)
        single.launch(
            self.table,
            lists,
            counters,
            self.rates,
            self.iterations,
            self.prox,
            self.bad,
            self.trace,
            plan.trace_slots,
            self.constants["single"],
        )

    def grouped(self, rowwise: bool) -> None:
        for t in range(self.iterations + 1):
            if t > 0 and (t < self.iterations or self.plan.key.trace):  # E_0 = 0
                self.activation(t)
                if rowwise:
                    self.softmax(t)
            if t > 0 and t < self.iterations and len(self.plan.partial_tiles):
                grouped.launch_partial(self.table, self.plan.partial_tiles, t, self.constants["partial"])
            if t < self.iterations:
                self.update(t)

    def gram(self, group: Group, grams: list[GramForm]) -> list[Tensor] | None:
        """Returns the matching losses before every local step and at the end, if they are asked for."""
        losses: list[list[Tensor]] = [[torch.zeros((), dtype=torch.float64, device=self.table.device)] for _ in grams]
        for t in range(self.iterations):
            self.update(t)
            if self.plan.key.trace:
                for index, gram in enumerate(grams):
                    losses[index].append(gram.divergence(group.deltas(index)))
        return [torch.stack(values) for values in losses] if self.plan.key.trace else None

    def softmax(self, t: int) -> None:
        plan = self.plan
        rowwise.launch(self.table, plan.softmax_tiles, t, self.trace, plan.trace_slots, self.constants["softmax"])

    def activation(self, t: int) -> None:
        grouped.launch_activation(
            self.table,
            self.plan.activation_tiles,
            t,
            self.trace,
            self.plan.trace_slots,
            self.constants["activation"],
        )

    def update(self, t: int) -> None:
        grouped.launch_update(
            self.table,
            self.plan.update_tiles,
            self.rates,
            t,
            self.iterations,
            self.prox,
            self.bad,
            self.trace,
            self.plan.trace_slots,
            self.constants["update"],
        )


def commit_group(group: Group, ok: Tensor) -> None:
    """Apply a group's results where the bool ``ok`` is true; state that a problem lacked is given to it."""
    plan = group.plan
    device = plan.key.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        commit.launch(group.table, plan.update_tiles, ok.view(torch.uint8), group.iterations, plan.constants["commit"])
    for problem, state in zip(group.problems, group.states, strict=True):
        for name, slots in state.items():
            problem.state.setdefault(name, {}).update(slots)
            torch.autograd.graph.increment_version(getattr(problem, name))
