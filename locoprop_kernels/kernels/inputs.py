"""What belongs to the caller: its addresses and strides for the layer table, and copies of what comes in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from locoprop_kernels.gram import GramForm
from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.layout import Cells, LayerPlan, Layout, float_bits
from locoprop_kernels.patches import Rows, every, row_chunks
from locoprop_kernels.problem import LocalProblem, State
from locoprop_kernels.settings import Settings

__all__ = ["Inputs", "place_chunks"]

_FLOAT16_MAX = 65504
_BASES = {"weight": c.WEIGHT.value, "bias": c.BIAS.value}
_GRAD, _GRAD_ROW, _VALUE = c.GRAD.value, c.GRAD_ROW.value, c.VALUE.value
_OLD, _STEP, _MASK, _RATE = c.OLD.value, c.STEP.value, c.MASK.value, c.RATE.value


class Inputs:
    """The cells of a problem in the layer table, and copies that they hold the addresses of.

    What is the caller's lives as long as the launches need it without being held: a device's allocator reuses memory in
    the order of the stream.

    Args:
        problem: the problem.
        layer: what the layout knows of it.
        state: the rule's state, contiguous.
        slots: names of its tensors, in order.
        gram: its Gram form, which has the matrix that is multiplied; ``None`` for other forms.
    """

    def __init__(
        self, problem: LocalProblem, layer: LayerPlan, state: State, slots: tuple[str, ...], gram: GramForm | None
    ) -> None:
        self.cells = Cells()
        self.alive: list[Tensor] = []
        self._grouped = problem.groups is not None
        if isinstance(problem.preactivation, Tensor) and not layer.a0_chunks:
            self._put_matrix(c.A0_SOURCE.value, problem.preactivation)
        x = problem.x if gram is None else gram.gram.tensor
        if layer.weight and isinstance(x, Tensor) and not layer.x_chunks:
            if layer.x_in_place:
                self._put(c.X.value, x)
            else:
                self._put_matrix(c.X_SOURCE.value, x)
        if gram is not None:
            self._put(c.ROW_SUMS.value, gram.sum_x)
        for name, (value, grad) in problem.trained().items():
            self._put_parameter(problem, name, value, grad)
            self._put_state(_BASES[name], state[name], slots)

    def _put(self, column: int, tensor: Tensor) -> tuple[int, ...]:
        """The address of ``tensor``; returns its strides within a group."""
        self.cells.values[column] = tensor.data_ptr()
        strides = tensor.stride()
        if not self._grouped:
            return strides
        self.cells.steps[column] = strides[0] * tensor.element_size()
        return strides[1:]

    def _put_matrix(self, column: int, matrix: Tensor) -> None:
        """The address and the two strides of ``matrix``, in columns side by side."""
        self.cells.values[column + 1], self.cells.values[column + 2] = self._put(column, matrix)

    def _put_parameter(self, problem: LocalProblem, name: str, value: Tensor, grad: Tensor) -> None:
        """A parameter, its gradient, its mask and its factor of the learning rates."""
        base, values = _BASES[name], self.cells.values
        if name == "weight" and grad.stride(-1) != 1:
            grad = grad.contiguous()
            self.alive.append(grad)
        values[base + _GRAD_ROW] = self._put(base + _GRAD, grad)[0]
        row, *column = self._put(base + _VALUE, value)
        values[base + c.VALUE_ROW.value], values[base + c.VALUE_COLUMN.value] = row, column[0] if column else 0
        mask = problem.mask(name)
        if mask is not None:
            mask = mask.contiguous()
            self.alive.append(mask)
            self._put(base + _MASK, mask)
        values[base + _RATE] = float_bits(problem.rate(name))

    def _put_state(self, base: int, state: dict[str, Tensor], slots: tuple[str, ...]) -> None:
        for column, slot in enumerate(slots, base + _OLD):
            if self._grouped:
                self._put(column, state[slot])
            else:
                self.cells.values[column] = state[slot].data_ptr()
        if "step" in state:
            self.cells.values[base + _STEP] = state["step"].data_ptr()


def place_chunks(problem: LocalProblem, index: int, layout: Layout, scratch: Tensor, settings: Settings) -> None:
    """Copy what comes in chunks, or is chosen for local steps, to where kernels will round it, pad it and read it."""
    layer, chunks, kind = layout.layers[index], layout.chunks[index], layout.kind
    if not chunks:
        return
    row = layout.template[layout.rows[index].start]
    sizes = {"x": (layer.batch, layer.inputs), "a0": (layer.outputs, layer.batch)}
    sources = {
        "x": (problem.x, kind.operand, int(row[c.X_STEP.value])),
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
