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

__all__ = ["Sources", "own_sources", "place_chunks", "sources"]

_FLOAT16_MAX = 65504
_A0_SOURCE, _ROW_SUMS = c.A0_SOURCE.value, c.ROW_SUMS.value
_X, _X_SOURCE = c.X.value, c.X_SOURCE.value


class _Columns(NamedTuple):
    """Columns of a weight or a bias in the layer table.

    Attributes:
        of_step: those of the gradient, its scale, and the factor of the learning rates.
        value: that of the parameter.
        mask: that of the mask.
        old: the first of the rule's slots.
        step: that of the number of steps.
    """

    of_step: tuple[int, int, int]
    value: int
    mask: int
    old: int
    step: int

    @classmethod
    def at(cls, base: int) -> _Columns:
        of_step = base + c.GRAD.value, base + c.GRAD_SCALE.value, base + c.RATE.value
        return cls(of_step, *(base + column.value for column in (c.VALUE, c.MASK, c.OLD, c.STEP)))


_COLUMNS = {"weight": _Columns.at(c.WEIGHT.value), "bias": _Columns.at(c.BIAS.value)}


class Sources(NamedTuple):
    """What a problem fills into its rows of the layer table.

    Attributes:
        columns: the columns; the same for all problems with the same plan.
        values: tensors for their addresses, and numbers.
    """

    columns: list[int]
    values: list[Tensor | int]


def own_sources(problem: LocalProblem, state: State, slots: tuple[str, ...]) -> Sources:
    """What a problem has of its own, so that it is the same tensors whenever the problem comes again.

    Args:
        problem: the problem.
        state: the rule's state; what is not contiguous is replaced by a copy.
        slots: names of its tensors, in order.
    """
    columns: list[int] = []
    values: list[Tensor | int] = []
    for name, (value, _) in problem.trained().items():
        places, own, mask = _COLUMNS[name], state[name], problem.mask(name)
        columns.append(places.value)
        values.append(value)
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


def sources(problem: LocalProblem, layer: LayerPlan, own: Sources, gram: GramForm | None) -> Sources:
    """What a problem fills into its rows of the layer table in a step.

    What is the caller's lives as long as the launches need it without being held: a device's allocator reuses memory
    in the order of the stream.

    Args:
        problem: the problem.
        layer: what the layout knows of it.
        own: what :func:`own_sources` has returned for it.
        gram: its Gram form, which has the matrix that is multiplied; ``None`` for other forms.
    """
    columns, values = list(own.columns), list(own.values)
    x, a0_source = problem.x, problem.preactivation
    if isinstance(a0_source, Tensor) and not layer.a0_chunks:
        columns.append(_A0_SOURCE)
        values.append(a0_source)
    if gram is not None:
        columns.append(_ROW_SUMS)
        values.append(gram.sum_x)
        x = gram.gram.tensor
    if layer.weight and isinstance(x, Tensor) and not layer.x_chunks:
        columns.append(_X if layer.x_in_place else _X_SOURCE)
        values.append(x)
    grad_scale = float_bits(problem.grad_scale)
    if (grad := problem.grad_weight) is not None:
        columns += _COLUMNS["weight"].of_step
        values += (grad if grad.stride(-1) == 1 else grad.contiguous(), grad_scale, float_bits(problem.rate_weight))
    if (grad := problem.grad_bias) is not None and problem.bias is not None:
        columns += _COLUMNS["bias"].of_step
        values += (grad, grad_scale, float_bits(problem.rate_bias))
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
