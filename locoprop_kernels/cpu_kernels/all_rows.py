"""Local loops on all rows of a batch: PyTorch multiplies, and everything between two products is one compiled pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from locoprop_kernels import routes
from locoprop_kernels.cpu_kernels.host import Table, Tasks
from locoprop_kernels.cpu_kernels.table import DIFFERENCE, PASS, UPDATE
from locoprop_kernels.gram import GramForm
from locoprop_kernels.input_chunks import InputChunks, transposed
from locoprop_kernels.problem import LocalProblem
from locoprop_kernels.products import held
from locoprop_kernels.scratch import give_back, take
from locoprop_kernels.settings import Settings

__all__ = ["solve_on_all_rows"]

# Elements that a thread takes at a time.
_ELEMENTS = 2**15


class _Batch(ABC):
    """What a form makes of the batch.

    Args:
        table: the table of the call.
        place: the number of the problem in it.
        problem: the problem.
        operands: dtype of the products' operands.
    """

    def __init__(self, table: Table, place: int, problem: LocalProblem, operands: torch.dtype) -> None:
        self._table, self._place = table, place
        batch, self._inputs, self._outputs = problem.shape
        self._held = held(operands, problem.weight.device)
        self._route = routes.route(self._held)
        self._memory: list[Tensor] = []
        views = table.views(place, "weight")
        #: The increment as the operand of a product.
        self.operand = views[""] if operands is torch.float32 else self._take(views[""].shape, self._held)
        self._sums = self._take((self._outputs,), torch.float32)
        self._pass = np.zeros(1, PASS)
        given = self._pass[0]
        given["rows"], given["sums"] = batch, self._sums.data_ptr()
        given["operand"] = 0 if operands is torch.float32 else self.operand.data_ptr()
        given["narrow_operand"] = self._held is torch.bfloat16

    @abstractmethod
    def change(self) -> Tensor:
        """The change of the weight's gradient since the start, at the increment: ``[N, K]``; and that of the bias."""

    def update(self, t: int, change: Tensor | None) -> float:
        """Local step ``t``; see :func:`locoprop_kernels.cpu_kernels.passes.update_outputs`."""
        given = self._pass[0]
        given["step"] = t
        if change is not None:
            given["product"], given["narrow_product"] = change.data_ptr(), change.dtype is torch.bfloat16
        return self._run(UPDATE, self._inputs)

    def release(self) -> None:
        """Let go of the memory."""
        give_back(*self._memory)

    def _take(self, shape: Any, dtype: torch.dtype) -> Tensor:
        self._memory.append(take(shape, dtype, self._table.blocks[self._place].device))
        return self._memory[-1]

    def _run(self, work: int, elements: int) -> float:
        """A pass over all outputs, of which each has so many elements."""
        size = max(1, _ELEMENTS // elements)
        tasks = Tasks.of([(self._place, self._outputs, elements, size)])
        return self._table.run(work, tasks, self._pass.ctypes.data)


class _Examples(_Batch):
    """Any transfer function: two products over a chunk of the batch at a time."""

    def __init__(self, table: Table, place: int, problem: LocalProblem, operands: torch.dtype) -> None:
        super().__init__(table, place, problem, operands)
        self._a0 = self._take((self._outputs, problem.shape[0]), torch.float32)
        transposed(problem.preactivation, self._a0)
        self._chunks = InputChunks(problem, operands)
        self._difference = self._take((self._outputs * self._chunks.size,), self._held)
        self._change = self._take((self._outputs, self._inputs), self._held)

    def change(self) -> Tensor:
        total: Tensor | None = None
        for x, rows in self._chunks:
            out = self._difference[: self._outputs * (rows.stop - rows.start)].view(self._outputs, -1)
            product = routes.multiply(self.operand, x.tensor.mT, self._route, out)
            given = self._pass[0]
            given["product"], given["narrow_product"] = product.data_ptr(), self._held is torch.bfloat16
            given["rows"], given["adds"] = rows.stop - rows.start, rows.start > 0
            given["a0"], given["a0_stride"] = self._a0[:, rows].data_ptr(), self._a0.stride(0)
            self._run(DIFFERENCE, rows.stop - rows.start)
            change = routes.multiply(product, x.tensor, self._route, self._change if total is None else None)
            total = change if total is None else total.float().add_(change)
        assert total is not None
        return total


class _Gram(_Batch):
    """Identity transfer: one product with ``XᵀX``, whatever the batch."""

    def __init__(self, table: Table, place: int, problem: LocalProblem, operands: torch.dtype) -> None:
        super().__init__(table, place, problem, operands)
        self._form = GramForm(problem, operands)
        self._memory += self._form.memory
        self._change = self._take((self._outputs, self._inputs), self._held)
        self._pass[0]["sum_x"] = self._form.sum_x.data_ptr()

    def change(self) -> Tensor:
        # The kernel adds what the bias changes.
        return routes.multiply(self.operand, self._form.gram.tensor, self._route, self._change).float()


def solve_on_all_rows(table: Table, place: int, problem: LocalProblem, settings: Settings, form: str) -> float:
    """Run all local steps of a problem.

    Args:
        table: the table of the call.
        place: the number of the problem in it.
        problem: the problem.
        settings: the settings of the call.
        form: ``"product"`` or ``"gram"``.

    Returns:
        a number that is no less than the absolute value of any that a commit would write; NaN if one of them is.

    Raises:
        MemoryError: a thread had none for its work.
    """
    batch = (_Gram if form == "gram" else _Examples)(table, place, problem, settings.operands(problem, form))
    total = batch.update(0, None)
    for t in range(1, settings.iterations):
        total = batch.update(t, batch.change())
    batch.release()
    return total
