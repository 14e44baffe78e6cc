"""What belongs to the caller: tensors that the layer table has the addresses of, and copies of what comes in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from locoprop_kernels.gram import GramForm
from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.layout import LayerPlan, Layout, float_bits
from locoprop_kernels.patches import Rows, every, row_chunks
from locoprop_kernels.problem import LocalProblem, State
from locoprop_kernels.settings import Settings

__all__ = ["place_chunks", "sources"]

_FLOAT16_MAX = 65504
_BASES = {"weight": c.WEIGHT.value, "bias": c.BIAS.value}
_GRAD, _GRAD_SCALE, _VALUE = c.GRAD.value, c.GRAD_SCALE.value, c.VALUE.value
_OLD, _STEP, _MASK, _RATE = c.OLD.value, c.STEP.value, c.MASK.value, c.RATE.value


def sources(
    problem: LocalProblem, layer: LayerPlan, state: State, slots: tuple[str, ...], gram: GramForm | None
) -> list[tuple[int, Tensor | int]]:
    """What a problem fills into its rows of the layer table: tensors for their addresses, and numbers, by column.

    The columns are the same for all problems with the same plan. What is the caller's lives as long as the launches
    need it without being held: a device's allocator reuses memory in the order of the stream.

    Args:
        problem: the problem.
        layer: what the layout knows of it.
        state: the rule's state; what is not contiguous is replaced by a copy.
        slots: names of its tensors, in order.
        gram: its Gram form, which has the matrix that is multiplied; ``None`` for other forms.
    """
    found: list[tuple[int, Tensor | int]] = []
    if isinstance(problem.preactivation, Tensor) and not layer.a0_chunks:
        found.append((c.A0_SOURCE.value, problem.preactivation))
    x = problem.x if gram is None else gram.gram.tensor
    if layer.weight and isinstance(x, Tensor) and not layer.x_chunks:
        found.append((c.X.value if layer.x_in_place else c.X_SOURCE.value, x))
    if gram is not None:
        found.append((c.ROW_SUMS.value, gram.sum_x))
    grad_scale = float_bits(problem.grad_scale)
    for name, (value, grad) in problem.trained().items():
        base, own, mask = _BASES[name], state[name], problem.mask(name)
        if name == "weight" and grad.stride(-1) != 1:
            grad = grad.contiguous()
        found += (
            (base + _GRAD, grad),
            (base + _GRAD_SCALE, grad_scale),
            (base + _VALUE, value),
            (base + _RATE, float_bits(problem.rate(name))),
        )
        if mask is not None:
            found.append((base + _MASK, mask.contiguous()))
        for column, slot in enumerate(slots, base + _OLD):
            if not own[slot].is_contiguous():
                own = state[name] = {**own, slot: own[slot].contiguous()}
            found.append((column, own[slot]))
        if "step" in own:
            found.append((base + _STEP, own["step"]))
    return found


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
