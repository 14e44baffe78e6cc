"""Matrix products with rounded operands: which of torch's routines runs them, and how float16 keeps its range."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Operand", "added_product", "gram", "product", "rounded"]

_PANEL = 384  # columns of XᵀX at a time on CPUs


class Operand(NamedTuple):
    """A matrix, or a batch of them, in the dtype of the products.

    Its value is ``tensor * 2**exponent``; ``exponent`` is ``None`` for 0.
    """

    tensor: Tensor
    exponent: Tensor | None = None

    def t(self) -> Operand:
        """The transposed matrix (or matrices), without a copy."""
        return Operand(self.tensor.mT, self.exponent)


def rounded(matrix: Tensor, dtype: torch.dtype) -> Operand:
    """``matrix`` rounded to ``dtype``; no copy where it has that dtype already.

    Increments can lie far below float16's normal range, and sums over a batch above it: such operands carry an exact
    power of two along.
    """
    if dtype == torch.float16:
        exponent = torch.frexp(matrix.detach().abs().amax().float()).exponent
        return Operand(torch.ldexp(matrix.float(), -exponent).to(dtype), exponent)
    return Operand(matrix.to(dtype))


def product(left: Operand, right: Operand, result: torch.dtype) -> Tensor:
    """``left @ right`` in a new tensor of dtype ``result``, which is also what torch accumulates in where it can.

    Both are matrices, or batches of as many matrices each.
    """
    value = _mm(left.tensor, right.tensor, result)
    if left.exponent is not None and right.exponent is not None:
        value = torch.ldexp(value, left.exponent + right.exponent)
    return value


def added_product(to: Tensor, left: Operand, right: Operand, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
    """``to + alpha * left @ right``: in ``out``, which may be ``to`` itself, or in a new tensor.

    For products so small that the sum costs as much as they do; all are matrices, or batches of as many.
    """
    if left.exponent is None and left.tensor.dtype is right.tensor.dtype is to.dtype:
        multiply = torch.addmm if to.dim() == 2 else torch.baddbmm
        return multiply(to, left.tensor, right.tensor, alpha=alpha, out=out)
    return torch.add(to, product(left, right, to.dtype), alpha=alpha, out=out)


def gram(x: Operand, result: torch.dtype) -> Tensor:
    """``Xᵀ X`` ``[.., K, K]`` in a new tensor of dtype ``result``. CPUs skip blocks below a large one's diagonal."""
    if x.tensor.device.type != "cpu" or x.tensor.dim() > 2 or x.tensor.shape[1] <= _PANEL:
        return product(x.t(), x, result)
    xt = x.t().tensor.contiguous()
    whole = xt.new_empty(len(xt), len(xt), dtype=result)
    for start in range(0, len(xt), _PANEL):
        stop = min(start + _PANEL, len(xt))
        panel = product(Operand(xt[start:stop], x.exponent), Operand(xt[start:].t(), x.exponent), result)
        whole[start:stop, start:] = panel
        whole[stop:, start:stop] = panel[:, stop - start :].t()
    return whole


def _mm(left: Tensor, right: Tensor, result: torch.dtype) -> Tensor:
    if left.is_cuda and left.itemsize == 2:
        multiply = torch.mm if left.dim() == 2 else torch.bmm
        return multiply(left, right, out_dtype=result)
    if left.device.type == "cpu" and left.dtype == torch.float16:  # few CPUs multiply it, and none torch's way fast
        left, right = left.float(), right.float()
    if left.dim() > 2:
        return torch.bmm(left, right).to(result)
    if left.device.type == "cpu" and left.dtype == torch.float32 and _onednn_linear is not None:
        # torch.mm takes MKL, which leaves AVX-512 unused on AMD: half the speed of oneDNN there, the same on Intel.
        if not (right.is_contiguous() or right.t().is_contiguous()):
            right = right.contiguous()  # oneDNN would take a routine a thousand times slower
        return _onednn_linear(left, right.t(), None, "none", [], "").to(result)
    return torch.mm(left, right).to(result)


def _find_onednn_linear() -> Callable[..., Tensor] | None:
    """The operator that torch.compile uses for linear layers on CPUs, or ``None`` in a build of torch without it."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_onednn_linear = _find_onednn_linear()
