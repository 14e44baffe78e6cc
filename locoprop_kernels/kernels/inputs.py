"""What belongs to the caller: tensors that the layer table has the addresses of, and copies of what comes in chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from locoprop_kernels.gram import GramForm
from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.layout import LayerPlan, Layout, float_bits
from locoprop_kernels.patches import Rows, every, row_chunks
from locoprop_kernels.problem import LocalProblem, State
from locoprop_kernels.settings import Settings

__all__ = ["Sources", "place_chunks", "sources"]

_FLOAT16_MAX = 65504
_ROWS = c.A0_SOURCE.value, c.X.value, c.X_SOURCE.value, c.ROW_SUMS.value


class _Columns(NamedTuple):
    """Columns of a weight or a bias in the layer table.

    Attributes:
        always: those of the gradient, its scale, the parameter, and the factor of the learning rates.
        mask: that of the mask.
        old: the first of the rule's slots.
        step: that of the number of steps.
    """

    always: tuple[int, int, int, int]
    mask: int
    old: int
    step: int

    @classmethod
    def at(cls, base: int) -> _Columns:
        always = base + c.GRAD.value, base + c.GRAD_SCALE.value, base + c.VALUE.value, base + c.RATE.value
        return cls(always, base + c.MASK.value, base + c.OLD.value, base + c.STEP.value)


_COLUMNS = {"weight": _Columns.at(c.WEIGHT.value), "bias": _Columns.at(c.BIAS.value)}


class Sources(NamedTuple):
    """What a problem fills into its rows of the layer table.

    Attributes:
        columns: the columns; the same for all problems with the same plan.
        values: tensors for their addresses, and numbers.
    """

    columns: list[int]
    values: list[Tensor | int]


def sources(
    problem: LocalProblem, layer: LayerPlan, state: State, slots: tuple[str, ...], gram: GramForm | None
) -> Sources:
    """What a problem fills into its rows of the layer table.

    What is the caller's lives as long as the launches need it without being held: a device's allocator reuses memory
    in the order of the stream.

    Args:
        problem: the problem.
        layer: what the layout knows of it.
        state: the rule's state; what is not contiguous is replaced by a copy.
        slots: names of its tensors, in order.
        gram: its Gram form, which has the matrix that is multiplied; ``None`` for other forms.
    """
    columns: list[int] = []
    values: list[Tensor | int] = []
    a0_source, x_in_place, x_source, row_sums = _ROWS
    if isinstance(problem.preactivation, Tensor) and not layer.a0_chunks:
        columns.append(a0_source)
        values.append(problem.preactivation)
    x = problem.x if gram is None else gram.gram.tensor
    if layer.weight and isinstance(x, Tensor) and not layer.x_chunks:
        columns.append(x_in_place if layer.x_in_place else x_source)
        values.append(x)
    if gram is not None:
        columns.append(row_sums)
        values.append(gram.sum_x)
    grad_scale = float_bits(problem.grad_scale)
    for name, (value, grad) in problem.trained().items():
        places, own, mask = _COLUMNS[name], state[name], problem.mask(name)
        if name == "weight" and grad.stride(-1) != 1:
            grad = grad.contiguous()
        columns += places.always
        values += (grad, grad_scale, value, float_bits(problem.rate(name)))
        if mask is not None:
            columns.append(places.mask)
            values.append(mask.contiguous())
        for column, slot in enumerate(slots, places.old):
            if not own[slot].is_contiguous():
                own = state[name] = {**own, slot: own[slot].contiguous()}
            columns.append(column)
            values.append(own[slot])
        if "step" in own:
            columns.append(places.step)
            values.append(own["step"])
    return Sources(columns, values)


def place_chunks(problem: LocalProblem, index: int, layout: Layout, scratch: Tensor, settings: Settings) -> None:
    """Copy what comes in chunks, or is chosen for local steps, to where kernels will round it, pad it and read it."""
    layer, chunks, kind = layout.layers[index], layout.chunks[index], layout.kind
    if not chunks:
        return
    row = layout.template[layout.rows[index].start]
    sizes = {"x": (layer.batch, layer.inputs), "a0": (layer.outputs, layer.batch)}
    sources = {
        "x": (problem.x, kind.staged or kind.operand, int(row[c.X_STEP.value])),
        "a0": (problem.preactivation, kind.preactivation, int(row[c.A0_STEP.value])),
    }
    order = settings.set_order(layer.sets)[: kind.samples] if kind.samples else (0,)
    for name, place in chunks.items():
        rows, dtype, step = sources[name]
        for t, number in enumerate(order):
            target = place.view(scratch, dtype, layer.groups, *sizes[name], offset=t * step)
            target = target if name == "x" else target.mT
            chosen = every(rows, number, layer.sets) if kind.samples else rows
            target[..., chosen.shape[-2] :, :] = 0
            _copy_rows(chosen, target)


def _copy_rows(rows: Tensor | Rows, target: Tensor) -> None:
    """Copy ``rows`` to ``target``, ``[G, B, columns]`` of the scratch, so that they are never held as a tensor too."""
    start = 0
    for chunk in row_chunks(rows):
        stop = start + chunk.shape[-2]
        if target.dtype == torch.float16 and chunk.dtype != torch.float16:  # what has outgrown it saturates
            chunk = torch.where(chunk.isfinite(), chunk.clamp(-_FLOAT16_MAX, _FLOAT16_MAX), chunk)
        target[..., start:stop, :] = chunk
        start = stop
