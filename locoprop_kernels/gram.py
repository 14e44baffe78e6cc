"""The Gram form of a local problem: for the identity transfer, the batch collapses into the matrix ``XᵀX``.

``E_tᵀ X = Δ_t (XᵀX) + δ_t (Σ x)ᵀ``: formed once a step, after which a local step costs the same whatever the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from locoprop_kernels.form import ChangeForm
from locoprop_kernels.patches import row_chunks
from locoprop_kernels.problem import LocalProblem, accumulation_dtype
from locoprop_kernels.products import gram, product, rounded

__all__ = ["GramForm", "gram_is_cheaper"]


class GramForm(ChangeForm):
    """Identity transfer: one product with ``XᵀX``, whatever the batch.

    Args:
        problem: a validated problem.
        operands: dtype of the products' operands.
        out: memory for ``XᵀX`` ``[.., K, K]`` in the dtype of sums; ``None`` for new memory.
    """

    def __init__(self, problem: LocalProblem, operands: torch.dtype, out: Tensor | None = None) -> None:
        self.operands = operands
        *groups, self.rows, k = problem.x.shape
        accumulate = accumulation_dtype(problem.weight.dtype)
        total = problem.weight.new_empty(*groups, k, k, dtype=accumulate) if out is None else out
        self.sum_x = problem.weight.new_zeros(*groups, k, dtype=accumulate)
        for number, chunk in enumerate(row_chunks(problem.x)):
            found = gram(rounded(chunk, operands), accumulate, None if number else total)
            if number:
                total += found
            self.sum_x += chunk.sum(-2, dtype=accumulate)
        self.gram = rounded(total, operands)

    def change(self, delta: dict[str, Tensor], t: int = 0) -> dict[str, Tensor]:
        weight = product(rounded(delta["weight"], self.operands), self.gram, self.sum_x.dtype)
        if "bias" not in delta:
            return {"weight": weight}
        bias = torch.matmul(delta["weight"], self.sum_x.unsqueeze(-1)).squeeze(-1)
        bias.add_(delta["bias"], alpha=self.rows)
        return {"weight": _add_outer_(weight, delta["bias"], self.sum_x), "bias": bias}

    def divergence(self, delta: dict[str, Tensor], t: int = 0) -> Tensor:
        change = self.change(delta)
        products = [(d.double() * change[name]).sum() for name, d in delta.items()]
        return torch.stack(products).sum() / 2


def _add_outer_(matrix: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """Add outer products to a matrix or a batch of them, in place."""
    if matrix.dim() == 2:
        return matrix.addr_(column, row)
    return matrix.addcmul_(column.unsqueeze(-1), row.unsqueeze(-2))


def gram_is_cheaper(shape: tuple[int, int, int], iterations: int) -> bool:
    """Whether an identity layer of ``(B, K, N)`` needs fewer operations in this form for ``iterations`` local steps."""
    b, k, n = shape
    products = iterations - 1  # the first local step needs none
    return k * k * (b + n * products) < 2 * b * k * n * products
