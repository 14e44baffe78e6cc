"""Local loops on all rows of a batch: PyTorch multiplies, and everything between two products is one compiled phase."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from locoprop_kernels import routes
from locoprop_kernels.cpu_kernels.functions import KNOWN
from locoprop_kernels.cpu_kernels.host import Table, Tasks
from locoprop_kernels.cpu_kernels.table import DIFFERENCE, PHASE, PREPARE, UPDATE
from locoprop_kernels.gram import GramForm
from locoprop_kernels.input_chunks import InputChunks, transposed
from locoprop_kernels.problem import LocalProblem
from locoprop_kernels.products import held
from locoprop_kernels.settings import Settings

__all__ = ["Workspace", "solve_on_all_rows"]

# Elements that a thread takes at a time; and outputs, where it reads numbers of theirs that lie side by side.
_ELEMENTS = 2**15
_LINE = 16


class Workspace:
    """Memory that the problems of a call use one after the other.

    New memory of its own for each would be filled with zeros by the system, page by page.

    Args:
        device: of the problems.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[str, Tensor] = {}

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of any content, in the same memory as the last one of this name, if it fits there."""
        count = math.prod(shape)
        words = -(-count * dtype.itemsize // torch.float32.itemsize)
        if name not in self._memory or len(self._memory[name]) < words:
            self._memory[name] = torch.empty(words, dtype=torch.float32, device=self._device)
        return self._memory[name].view(dtype)[:count].view(tuple(shape))


class _Batch(ABC):
    """What a form makes of the batch.

    Args:
        table: the table of the call.
        place: the number of the problem in it.
        problem: the problem.
        operands: dtype of the products' operands.
        workspace: memory.
    """

    def __init__(
        self, table: Table, place: int, problem: LocalProblem, operands: torch.dtype, workspace: Workspace
    ) -> None:
        self._table, self._place, self._workspace = table, place, workspace
        self._batch, self._inputs, self._outputs = problem.shape
        self._held = held(operands, problem.weight.device)
        self._route = routes.route(self._held)
        delta = table.views(place, "weight")[""]
        # The increment as the operand of a product.
        self._operand = delta if operands is torch.float32 else workspace.get("operand", delta.shape, self._held)
        self._change = workspace.get("change", delta.shape, self._held)
        self._sums = workspace.get("sums", (self._outputs,), torch.float32)
        self._phase = np.zeros(1, PHASE)
        given = self._phase[0]
        given["rows"], given["sums"] = self._batch, self._sums.data_ptr()
        given["operand"] = 0 if operands is torch.float32 else self._operand.data_ptr()
        given["narrow_operand"] = self._held is torch.bfloat16

    @abstractmethod
    def change(self) -> Tensor:
        """The change of the weight's gradient since the start, at the increment: ``[N, K]``; and that of the bias."""

    def update(self, t: int, change: Tensor | None) -> float:
        """Local step ``t``; see :func:`locoprop_kernels.cpu_kernels.phases.update_outputs`."""
        given = self._phase[0]
        given["step"] = t
        if change is not None:
            given["product"], given["narrow_product"] = change.data_ptr(), change.dtype is torch.bfloat16
        return self._run(UPDATE, self._inputs)

    def _run(self, work: int, elements: int, least: int = 1) -> float:
        """A phase of all outputs, of which each has so many elements, and a task at least ``least``."""
        size = max(least, _ELEMENTS // elements)
        tasks = Tasks.of(((self._place, self._outputs, elements, size),))
        return self._table.run(work, tasks, self._phase.ctypes.data)


class _Examples(_Batch):
    """Any transfer function: two products over a chunk of the batch at a time."""

    def __init__(
        self, table: Table, place: int, problem: LocalProblem, operands: torch.dtype, workspace: Workspace
    ) -> None:
        super().__init__(table, place, problem, operands, workspace)
        shape = self._outputs, self._batch
        self._a0 = workspace.get("a0", shape, torch.float32)
        self._f0 = workspace.get("f0", shape, torch.float32) if table.function(place) in KNOWN else None
        given, source = self._phase[0], problem.preactivation
        if isinstance(source, Tensor) and source.dtype is torch.float32 and source.stride(1) == 1:
            given["source"], given["source_stride"] = source.data_ptr(), source.stride(0)
        else:
            transposed(source, self._a0)
        self._locate(slice(0, self._batch))
        if given["source"] or given["f0"]:
            self._run(PREPARE, self._batch, _LINE)
        self._chunks = InputChunks(problem, operands)
        self._difference = workspace.get("difference", (self._outputs * self._chunks.size,), self._held)

    def change(self) -> Tensor:
        for x, rows in self._chunks:
            out = self._difference[: self._outputs * (rows.stop - rows.start)].view(self._outputs, -1)
            product = routes.multiply(self._operand, x.tensor.mT, self._route, out)
            given = self._phase[0]
            given["product"], given["narrow_product"] = product.data_ptr(), self._held is torch.bfloat16
            given["adds"] = rows.start > 0
            self._locate(rows)
            self._run(DIFFERENCE, rows.stop - rows.start)
            change = routes.multiply(product, x.tensor, self._route, self._change)
            if rows.start == 0 and rows.stop == self._batch:
                return change
            # The sum over chunks, where there are several.
            total = self._workspace.get("total", change.shape, torch.float32)
            if rows.start:
                total.add_(change)
            else:
                total.copy_(change)
        return total

    def _locate(self, rows: slice) -> None:
        """Say where some rows of the batch are."""
        given = self._phase[0]
        given["rows"], given["a0_stride"] = rows.stop - rows.start, self._a0.stride(0)
        given["a0"] = self._a0[:, rows].data_ptr()
        given["f0"] = 0 if self._f0 is None else self._f0[:, rows].data_ptr()


class _Gram(_Batch):
    """Identity transfer: one product with ``XᵀX``, whatever the batch."""

    def __init__(
        self, table: Table, place: int, problem: LocalProblem, operands: torch.dtype, workspace: Workspace
    ) -> None:
        super().__init__(table, place, problem, operands, workspace)
        square = self._inputs, self._inputs
        self._form = GramForm(problem, operands, workspace.get("gram", square, torch.float32))
        self._phase[0]["sum_x"] = self._form.sum_x.data_ptr()

    def change(self) -> Tensor:
        # The kernel adds what the bias changes.
        return routes.multiply(self._operand, self._form.gram.tensor, self._route, self._change).float()


def solve_on_all_rows(
    table: Table, place: int, problem: LocalProblem, settings: Settings, form: str, workspace: Workspace
) -> float:
    """Run all local steps of a problem.

    Args:
        table: the table of the call.
        place: the number of the problem in it.
        problem: the problem.
        settings: the settings of the call.
        form: ``"product"`` or ``"gram"``.
        workspace: memory that problems may share.

    Returns:
        a number that is no less than the absolute value of any that a commit would write; NaN if one of them is.

    Raises:
        MemoryError: a thread had none for its work.
    """
    kind = _Gram if form == "gram" else _Examples
    batch = kind(table, place, problem, settings.operands(problem, form), workspace)
    total = batch.update(0, None)
    for t in range(1, settings.iterations):
        total = batch.update(t, batch.change())
    return total
