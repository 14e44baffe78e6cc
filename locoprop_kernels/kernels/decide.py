"""The one decision of how to solve the problems of a step: forms, configurations and launches.

:func:`decide` is a pure function of sizes, settings and machine. Nothing that follows asks again; reports show what it
said. The costs that it compares are in :mod:`locoprop_kernels.kernels.choose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from locoprop_kernels import devices
from locoprop_kernels.devices import DeviceModel
from locoprop_kernels.gram import gram_is_cheaper
from locoprop_kernels.kernels import choose, configs, target
from locoprop_kernels.kernels.spec import Update
from locoprop_kernels.patches import Rows
from locoprop_kernels.problem import LocalProblem
from locoprop_kernels.sampling import set_size
from locoprop_kernels.settings import Settings, operands_of
from locoprop_kernels.solution import Decision
from locoprop_kernels.transfers import Transfer

__all__ = ["SCALED", "LayerShape", "Machine", "Task", "decide", "is_aligned", "machine_of", "shape_of", "task_of"]

SCALED = ("fp16", "fp8")
"""Precisions whose operands carry scales."""


class LayerShape(NamedTuple):
    """What a decision and a plan need to know about a problem.

    Attributes:
        batch: ``B``.
        inputs: ``K``.
        outputs: ``N``, of a group.
        groups: 1 where there are none.
        transfer: the transfer function.
        own_function: its Triton function where the user has registered it, who may do so again with another.
        weight: whether the weight is trained.
        bias: whether the bias is trained.
        masked: whether either has a mask.
        scale: factor of the matching loss.
        parameter: dtype of the parameters.
        x: dtype of ``X``.
        preactivation: dtype of ``A0``.
        x_aligned: whether kernels may read ``X`` where it is, if its tiles are whole.
        x_chunks: whether ``X`` comes in chunks, which are copied to where kernels read it.
        a0_chunks: the same of ``A0``.
        sets: into how many sets the batch falls, of which a local step takes one.
    """

    batch: int
    inputs: int
    outputs: int
    groups: int
    transfer: Transfer
    own_function: Any
    weight: bool
    bias: bool
    masked: bool
    scale: float
    parameter: torch.dtype
    x: torch.dtype
    preactivation: torch.dtype
    x_aligned: bool
    x_chunks: bool
    a0_chunks: bool
    sets: int = 1

    def operand(self, compute_dtype: torch.dtype | None, form: str = "product") -> torch.dtype:
        """Dtype of the products' operands."""
        return operands_of(compute_dtype or self.parameter, self.sets, form)

    def tiled(self, form: str) -> tuple[int, int, int]:
        """``(B, K, N)`` as it is cut into tiles: the rows of a local step, or ``XᵀX`` in their place."""
        batch = self.inputs if form == "gram" else set_size(self.batch, self.sets, 0)
        return batch, self.inputs if self.weight else 1, self.outputs


class Task(NamedTuple):
    """What a decision and a plan need to know about the settings.

    Attributes:
        iterations: ``T``.
        compute_dtype: dtype of the products' operands; ``None`` for the parameters'.
        trace: whether to evaluate the local objectives.
        update: how kernels update a parameter.
        rows: rows of the batch in a local step; ``None`` for all.
    """

    iterations: int
    compute_dtype: torch.dtype | None
    trace: bool
    update: Update
    rows: int | None = None


class Machine(NamedTuple):
    """What a decision needs to know about the machine.

    Attributes:
        target: backend and architecture: ``"sm_90"``, ``"gfx942"``, or ``"interpreter"``.
        model: what is assumed of the device, with as many multiprocessors as are to be used.
        available: how many multiprocessors the device has; the interpreter's caller answers for their number.
        float32: precision of float32 products, ``"tf32"`` or ``"ieee"``.
        asked: what to take instead of the defaults.
    """

    target: str
    model: DeviceModel
    available: int
    float32: str
    asked: configs.Asked = configs.Asked()

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs the kernels."""
        return self.target == "interpreter"

    def precision(self, operand: torch.dtype) -> str:
        """Precision of products, as the table of configurations calls it, by the dtype of their operands."""
        return configs.PRECISIONS.get(operand) or self.float32

    def model_for(self, operand: torch.dtype) -> DeviceModel:
        """What is assumed of the device for products with such operands."""
        return self.model.in_float8() if self.precision(operand) == "fp8" else self.model

    def candidates(self, operand: torch.dtype, lean: bool = False) -> tuple[configs.Config, ...]:
        """The configurations to choose from; ``lean`` as of :func:`configs.candidates`."""
        if self.asked.config is not None:
            return (self.asked.config,)
        return configs.candidates(self.target, self.precision(operand), lean)

    def for_rows(self, operand: torch.dtype, sizes: Sequence[tuple[int, int, int]]) -> tuple[configs.Config, ...]:
        """The configurations of the rows driver that hold all rows ``B`` of a local step."""
        if self.asked.driver not in (None, "rows"):
            return ()
        if self.asked.config is None:
            found = configs.for_rows(self.target, self.precision(operand))
        else:  # which is for the tile kernels, unless one says otherwise
            found = (self.asked.config,) if self.asked.driver == "rows" else ()
        most = max(batch for batch, _, _ in sizes)
        return tuple(config for config in found if config.b >= most)


def is_aligned(x: Tensor | Rows) -> bool:
    """Whether kernels may read ``X`` where it is, if its tiles are whole."""
    return isinstance(x, Tensor) and x.data_ptr() % 16 == 0 and x.is_contiguous()


def shape_of(problem: LocalProblem, settings: Settings) -> LayerShape:
    """The shape of a validated problem."""
    b, k, n = problem.shape
    x, transfer = problem.x, problem.transfer
    assert isinstance(transfer, Transfer)
    weight, bias = problem.grad_weight is not None, problem.grad_bias is not None
    return LayerShape(
        batch=b,
        inputs=k,
        outputs=n,
        groups=problem.groups or 1,
        transfer=transfer,
        own_function=transfer.triton_fn,
        weight=weight,
        bias=bias,
        masked=(weight and problem.mask_weight is not None) or (bias and problem.mask_bias is not None),
        scale=problem.scale(settings.reduction),
        parameter=problem.weight.dtype,
        x=x.dtype,
        preactivation=problem.preactivation.dtype,
        x_aligned=is_aligned(x),
        x_chunks=weight and not isinstance(x, Tensor),
        a0_chunks=not isinstance(problem.preactivation, Tensor),
        sets=settings.sets(problem),
    )


def task_of(settings: Settings) -> Task:
    """The task that settings set."""
    return Task(settings.iterations, settings.compute_dtype, settings.trace, Update.of(settings), settings.rows)


def machine_of(device: torch.device) -> Machine:
    """The machine as it is now: torch's setting of float32 products and :func:`configs.use` may change it."""
    asked, name = configs.asked(), target.target_of(device)
    own = 1 if name == "interpreter" else target.multiprocessors(device)
    count = asked.programs or own
    available = count if name == "interpreter" else own
    return Machine(name, devices.lookup(name, count), available, target.float32_precision(), asked)


def decide(shapes: tuple[LayerShape, ...], task: Task, machine: Machine) -> tuple[Decision, ...]:
    """How to solve each of the problems of a step; a pure function.

    Problems of one form and of the same dtypes are launched together, and have the same number ``together``.
    """
    forms = _forms(shapes, task, machine)
    kinds: dict[Any, list[int]] = {}
    for index, (shape, form) in enumerate(zip(shapes, forms, strict=True)):
        kinds.setdefault((form, shape.sets > 1, shape.parameter, shape.x, shape.preactivation), []).append(index)
    decisions: dict[int, Decision] = {}
    for together, ((form, *_), members) in enumerate(kinds.items()):
        own = [shapes[index] for index in members]
        for index, decision in zip(members, _launches(own, form, together, task, machine), strict=True):
            decisions[index] = decision
    return tuple(decisions[index] for index in range(len(shapes)))


def _forms(shapes: Sequence[LayerShape], task: Task, machine: Machine) -> list[str]:
    """Which formula each problem takes."""
    forms = [_form(shape, task) for shape in shapes]
    grams = tuple(
        (shape.batch, shape.inputs, shape.outputs)
        for shape, form in zip(shapes, forms, strict=True)
        if form == "gram"
        for _ in range(shape.groups)
    )
    if grams and not machine.interpreted:
        found = machine.candidates(shapes[0].operand(task.compute_dtype, "gram"))
        slots = task.update.slots
        if not choose.gram_pays(found, grams, task.iterations, slots, machine.model):
            return ["product" if form == "gram" else form for form in forms]
    return forms


def _form(shape: LayerShape, task: Task) -> str:
    if shape.transfer.name == "softmax":
        return "softmax"
    sizes = (shape.batch, shape.inputs, shape.outputs)
    identity = shape.transfer.name == "identity"
    # XᵀX grows with the batch, which float16 has no range for; and few rows are cheaper than XᵀX of all.
    possible = identity and shape.weight and shape.sets == 1 and shape.operand(task.compute_dtype) != torch.float16
    return "gram" if possible and gram_is_cheaper(sizes, task.iterations) else "product"


def _launches(shapes: Sequence[LayerShape], form: str, together: int, task: Task, machine: Machine) -> list[Decision]:
    """Decisions for problems that are launched together."""
    operand = shapes[0].operand(task.compute_dtype, form)
    lean = shapes[0].sets > 1 or any(shape.masked for shape in shapes)
    sizes: list[tuple[int, int, int]] = []
    first_rows = []
    for shape in shapes:
        first_rows.append(len(sizes))
        sizes += [shape.tiled(form)] * shape.groups
    has_rows = form == "product" and machine.precision(operand) != "fp8"
    for_rows = machine.for_rows(operand, sizes) if has_rows else ()
    driver = None if machine.asked.driver == "rows" else machine.asked.driver
    if lean and machine.precision(operand) in SCALED:  # the single launch would spill registers
        driver = "grouped"
    found = () if for_rows and machine.asked.driver == "rows" else machine.candidates(operand, lean)
    slots, model = task.update.slots, machine.model_for(operand)
    config, programs, splits, name = choose.choose(found, tuple(sizes), form, slots, model, driver, for_rows)
    rows = task.rows if shapes[0].sets > 1 else None
    if form != "product":
        name = form
    return [
        Decision(form, name, config, programs, splits[row] if shape.weight else 1, rows, together)
        for shape, row in zip(shapes, first_rows, strict=True)
    ]
