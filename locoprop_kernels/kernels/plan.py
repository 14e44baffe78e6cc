"""Everything about a step that does not change from one to the next: layout, lists of tiles, compile-time arguments.

A step then allocates a buffer, fills addresses into a copy of the table and launches. Filled tables are kept too, by
content: PyTorch's allocator gives a training loop the same addresses again and again, so that in the steady state
nothing is copied to the device at all. A table is never written twice, which is what makes its asynchronous copy safe
and its address fit for a CUDA graph. The same is true of learning rates and counts of examples.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from locoprop_kernels.graphs import capturing
from locoprop_kernels.kernels.decide import SCALED, LayerShape, Machine, Task
from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.device import functions
from locoprop_kernels.kernels.device import rules as device_rules
from locoprop_kernels.kernels.inputs import Sources
from locoprop_kernels.kernels.layout import COPY_BLOCK, Kind, LayerPlan, Layout
from locoprop_kernels.kernels.spec import NOWHERE, Copy, Products, Spec, Update
from locoprop_kernels.kernels.uploads import Upload, Uploader
from locoprop_kernels.schedule import Schedule, build, most_expensive_first, row_blocks, validate
from locoprop_kernels.settings import Settings
from locoprop_kernels.solution import Decision

__all__ = ["Plan"]

_KEPT_UPLOADS = 32
_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
}


class Plan:
    """What all steps share that launch problems of the same shapes together.

    Attributes:
        members: which problems of the step these are.
        form: of all of them.
        driver: likewise.
        layout: where everything lies.
        spec: compile-time arguments and options of the kernels.
        schedule: the work lists of the single launch; ``None`` for a launch for each phase.
        activation_tiles: ``[count, 3]``, on the device.
        update_tiles: likewise.
        tiles: the other lists of tiles by name, likewise.
        blocks: ``[count, 2]``: layer and n-block of each program of the rows driver, likewise.
        counters: how many numbers programs of the single launch wait for each other by.
        no_trace: in place of the partial sums of the objectives.
        captured: whether a CUDA graph reads the tables, which must live as long as the process then.

    Args:
        members: which problems of the step these are.
        shapes: the shape of each.
        decisions: how to solve each; alike but for the splits.
        task: what the settings ask for.
        machine: what it runs on.
        device: where the tables go.

    Raises:
        ValueError: the decision asks for more programs than are resident.
    """

    def __init__(
        self,
        members: Sequence[int],
        shapes: Sequence[LayerShape],
        decisions: Sequence[Decision],
        task: Task,
        machine: Machine,
        device: torch.device,
    ) -> None:
        first, decision = shapes[0], decisions[0]
        config = decision.config
        operand = first.operand(task.compute_dtype, decision.form)
        precision = machine.precision(operand)
        # The matrix units take both operands along the reduction alone.
        transposed = precision in ("tf32", "fp8")
        self.members, self.form, self.driver = tuple(members), decision.form, decision.driver
        self.device = device
        layers = tuple(_layer(shape, own, operand, transposed) for shape, own in zip(shapes, decisions, strict=True))
        slots = tuple(task.update.hyper.slots)
        # The first local step needs no rows, and the objective at the end does.
        samples = 0 if decision.rows is None else task.iterations - 1 + task.trace
        self.layout = Layout(
            layers,
            Kind(
                decision.form,
                config,
                operand,
                first.preactivation,
                slots,
                transposed,
                samples,
                decision.driver,
                first.x if precision == "fp8" else None,
            ),
        )
        model = machine.model_for(operand)
        sizes = [size for shape in shapes for size in [shape.tiled(decision.form)] * shape.groups]
        self.schedule: Schedule | None = None
        if decision.programs:
            self.schedule = build(sizes, config.tiles, decision.programs, model)
            validate(self.schedule, sizes, config.tiles, machine.available * config.occupancy, model)
            activation, update = self.schedule.activation_tiles, self.schedule.update_tiles
        else:
            activation, update = most_expensive_first(sizes, config.tiles, model)
        self.activation_tiles, self.update_tiles = self._upload(activation), self._upload(update)
        self.blocks = self._upload(row_blocks(sizes, config.tiles)) if decision.driver == "rows" else None
        self.tiles = {name: self._upload(tiles) for name, tiles in self.layout.tiles.items()}
        self.counters = 2 * len(self.schedule.updates_per_block) if self.schedule else 0
        self.no_trace = torch.empty(1, dtype=torch.float64, device=device)
        self._no_counts = torch.empty(1, dtype=torch.int32, device=device)
        self.spec = _spec(self.layout, shapes, task, precision, machine)
        #: For :meth:`table`: threads with models of one kind share a plan.
        self.lock = threading.Lock()
        self.captured = self._connected = False
        self._uploader = Uploader(device)
        self._uploads: OrderedDict[tuple[Any, ...], Upload] = OrderedDict()
        self._kept_for_graphs: list[Upload] = []

    def _upload(self, values: NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    @cached_property
    def work_lists(self) -> tuple[Tensor, ...]:
        """Records and offsets of the tiles of both phases, as the single launch takes them."""
        assert self.schedule is not None
        activations, updates = self.schedule.records()
        return (
            self._upload(activations),
            self._upload(self.schedule.activation_offsets),
            self._upload(updates),
            self._upload(self.schedule.update_offsets),
        )

    def table(self, buffer: Tensor, sources: Sequence[Sources], settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
        """The layer table with all addresses, the learning rates, and the counts of examples, on the device.

        Args:
            buffer: what the layout has the offsets of.
            sources: of each layer, what its problem fills into the table, see :meth:`Layout.connect`.
            settings: the settings of the call.
        """
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        values = [buffer.data_ptr()]
        for own in sources:
            values += [source if type(source) is int else source.data_ptr() for source in own.values]  # type: ignore[union-attr]
        if not self._connected:
            self.layout.connect(sources)
            self._connected = True
        table = self._uploaded(("table", stream, *values), self.layout.table, values)
        if not self.spec.P.sampled:
            return table, self._uploaded(("rates", stream, settings.rates), self._numbers, settings), self._no_counts
        content = ("rates and counts", stream, settings.rates, settings.rows_seed)
        numbers = self._uploaded(content, self._numbers, settings)
        return table, numbers, numbers[settings.iterations :].view(torch.int32)

    def _numbers(self, settings: Settings) -> NDArray[np.float32]:
        """The learning rates, and behind them the counts of examples as they are, integers."""
        counts = self.layout.counts(settings).reshape(-1)
        return np.concatenate([np.array(settings.rates, np.float32), counts.view(np.float32)])

    def _uploaded(self, content: tuple[Any, ...], make: Callable[[Any], NDArray[Any]], argument: Any) -> Tensor:
        """On the device, what ``make`` returns for ``argument``; what was uploaded before is there already.

        What is uploaded in the capture of a CUDA graph is there when the graph runs, and for nobody else.
        """
        captured = capturing(self.device)
        if self.captured and not captured:
            self._uploader.refill()
        known = self._uploads.get(content)
        if known is None:
            known = self._uploader.upload(make(argument), captured)
            if not captured:
                self._uploads[content] = known
                if len(self._uploads) > _KEPT_UPLOADS:
                    self._uploads.popitem(last=False)
        else:
            self._uploads.move_to_end(content)
        if captured:
            self.captured = True
            self._kept_for_graphs.append(known)
        return known.found


def _layer(shape: LayerShape, decision: Decision, operand: torch.dtype, transposed: bool) -> LayerPlan:
    """What the layout needs to know about a problem."""
    config = decision.config
    function, divergence = functions.lookup(shape.transfer) or (None, None)
    gram = decision.form == "gram"
    sets = shape.sets
    batch, _, _ = shape.tiled(decision.form)
    whole_tiles = batch % config.b == 0 and shape.inputs % config.k == 0
    # The Gram matrix is a tensor of ours, in the operands' dtype.
    readable = gram or (shape.x_aligned and shape.x == operand and sets == 1)
    return LayerPlan(
        batch=batch,
        inputs=shape.inputs,
        outputs=shape.outputs,
        rows=shape.batch,
        function=function,
        divergence=divergence,
        parameter=shape.transfer.parameters[0] if shape.transfer.parameters else 0.0,
        weight=shape.weight,
        bias=shape.bias,
        x_in_place=whole_tiles and readable and not transposed,
        scale=shape.scale,
        splits=decision.splits,
        groups=shape.groups,
        x_chunks=(shape.x_chunks or (shape.weight and sets > 1)) and not gram,
        a0_chunks=shape.a0_chunks or sets > 1,
        sets=sets,
    )


def _spec(layout: Layout, shapes: Sequence[LayerShape], task: Task, precision: str, machine: Machine) -> Spec:
    """Compile-time arguments of the kernels."""
    kind, shape, interpreted = layout.kind, shapes[0], machine.interpreted
    config, operand = kind.config, _TRITON_DTYPES[kind.operand]
    preactivation = _TRITON_DTYPES[kind.preactivation]
    short = kind.operand.itemsize < 4
    ptx = short and machine.target.startswith("sm_")
    exact = "ieee" if short else precision
    products = Products(
        config.n,
        config.b,
        config.k,
        config.r,
        interpreted,
        slices=config.slices,
        operand=operand,
        precision=exact,
        scaled=precision in SCALED,
        preactivation=preactivation,
        form=kind.form,
        split=len(layout.tiles["partial"]) > 0,
        transposed=kind.transposed,
        sampled=kind.samples > 0,
        trace=task.trace,
        transfers=tuple(function for function, _ in layout.functions),
        divergences=tuple(divergence for _, divergence in layout.functions) if task.trace else (),
        own=any(one.own_function is not None for one in shapes),
        near=tuple(functions.NEAR.get(function) if short else None for function, _ in layout.functions),
        ptx=ptx,
    )
    parameter = _TRITON_DTYPES[shape.parameter]
    xt = c.XT.value if kind.transposed else NOWHERE
    x_columns = (c.X_SOURCE.value, c.INPUTS.value, c.WEIGHT_STRIDE.value, c.X.value, xt, c.XT_STRIDE.value)
    a0_columns = (c.A0_SOURCE.value, c.OUTPUTS.value, c.ROW_SUMS_STRIDE.value, NOWHERE, c.A0.value, c.E_STRIDE.value)
    update = replace(
        task.update,
        parameter=parameter,
        masked=any(one.masked for one in shapes),
        ptx=ptx and task.update.rule in device_rules.FUNCTIONS.values(),
    )
    options: dict[str, Any] = {} if interpreted else config.options
    x = operand if kind.form == "gram" else _TRITON_DTYPES[shape.x]
    chunks = x if kind.staged else operand
    return Spec(
        P=products,
        U=update,
        tiles=Products(config.n, 0, config.k, 0, interpreted),
        stored=Update(task.update.slots, task.update.counts_steps, parameter=parameter),
        copy_x=Copy(*x_columns, c.X_STEP.value, x, operand, exact, interpreted, COPY_BLOCK),
        copy_chunks=Copy(*x_columns, c.X_STEP.value, chunks, operand, exact, interpreted, COPY_BLOCK),
        copy_a0=Copy(*a0_columns, c.A0_STEP.value, preactivation, preactivation, "ieee", interpreted, COPY_BLOCK),
        options=options,
        wide={**options, "num_warps": 8} if options else {},
    )
