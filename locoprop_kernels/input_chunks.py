"""The inputs of a layer as operands of products: a chunk of the batch at a time, on a CPU one that its caches hold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from locoprop_kernels.patches import CHUNK_BYTES, KEPT_BYTES, Rows, Stacked, row_chunks
from locoprop_kernels.problem import LocalProblem
from locoprop_kernels.products import Operand, held, rounded

__all__ = ["InputChunks", "cached_rows", "transposed"]

_CACHED_BYTES = 4 * 2**20  # of E at a time on CPUs: among 1 to 16 MiB the best, or close to it, at all measured shapes


class InputChunks:
    """``X`` in chunks of consecutive rows, rounded to the operands' dtype.

    Inputs that are not held as one tensor are formed once if they fit in ``KEPT_BYTES``, else each time.

    Args:
        problem: a validated problem.
        operands: dtype of the products' operands.

    Attributes:
        size: the most rows of a chunk.
    """

    def __init__(self, problem: LocalProblem, operands: torch.dtype) -> None:
        self._x, self._operands = problem.x, operands
        (batch, inputs, _), groups = problem.shape, problem.groups or 1
        self.size = min(cached_rows(problem), batch)
        self._bytes = min(CHUNK_BYTES, self.size * groups * inputs * problem.x.dtype.itemsize)
        self._held = isinstance(problem.x, Tensor) or (
            isinstance(problem.x, Stacked) and all(isinstance(part, Tensor) for part in problem.x.parts)
        )
        itemsize = held(operands, problem.weight.device).itemsize
        kept = self._held or groups * batch * inputs * itemsize <= KEPT_BYTES
        self._kept: list[Operand] = list(self._formed()) if kept else []

    def _formed(self) -> Iterator[Operand]:
        for chunk in row_chunks(self._x, self._bytes):
            # What is formed here is laid out as its copy was fastest, and products take either layout.
            x = rounded(chunk.contiguous() if self._held else chunk, self._operands)
            for part in x.tensor.split(self.size, dim=-2):
                yield Operand(part, x.exponent)

    def __iter__(self) -> Iterator[tuple[Operand, slice]]:
        """Each chunk, and which rows it is."""
        start = 0
        for x in self._kept or self._formed():
            stop = start + x.tensor.shape[-2]
            yield x, slice(start, stop)
            start = stop


def cached_rows(problem: LocalProblem) -> int:
    """How many rows of the batch to work on at a time: on a CPU what its caches hold, else all."""
    batch, _, outputs = problem.shape
    if problem.weight.device.type != "cpu":
        return max(1, batch)
    return max(1024 // (problem.groups or 1), _CACHED_BYTES // (4 * outputs * (problem.groups or 1)), 1)


def transposed(preactivation: Tensor | Rows, out: Tensor) -> Tensor:
    """``A0`` as ``[.., N, B]``, in ``out``, which is contiguous."""
    start = 0
    for chunk in row_chunks(preactivation):
        out[..., start : start + chunk.shape[-2]] = chunk.mT
        start += chunk.shape[-2]
    return out
