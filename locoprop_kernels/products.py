"""Matrix products with rounded operands, and how float16 and float8 keep their range.

Which of torch's routines multiplies on a CPU is decided in :mod:`locoprop_kernels.routes`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from locoprop_kernels import routes

__all__ = ["Operand", "added_product", "gram", "held", "product", "rounded"]

_PANEL = 256  # columns of XᵀX at a time on CPUs
# Of dtypes of a narrow range: operands are scaled so that the largest number lies below this power of two. Numbers of
# float8_e4m3fn end at 448, and what is large there leaves most room for what is small.
_TOP = {torch.float16: 0, torch.float8_e4m3fn: 8}


class Operand(NamedTuple):
    """A matrix, or a batch of them, rounded to the dtype of the products' operands and held as :func:`held` says.

    Its value is ``tensor * 2**exponent``; ``exponent`` is ``None`` for 0, else ``[.., 1, 1]``.
    """

    tensor: Tensor
    exponent: Tensor | None = None

    def t(self) -> Operand:
        """The transposed matrix (or matrices), without a copy."""
        return Operand(self.tensor.mT, self.exponent)


def held(operands: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that holds operands rounded to ``operands``.

    It is float32 on CPUs that multiply fastest in it: the same numbers, and what is multiplied again and again is
    converted once. Products of two bfloat16 numbers are exact there, so no result is less accurate. torch has no
    products of float8 numbers with one scale each; bfloat16 holds all of them.
    """
    if device.type == "cpu" and routes.route(operands) == "upcast":
        return torch.float32
    return torch.bfloat16 if operands == torch.float8_e4m3fn else operands


def rounded(matrix: Tensor, dtype: torch.dtype) -> Operand:
    """``matrix`` rounded to ``dtype``; no copy where it has that dtype, and is held in it, already.

    Increments can lie far below float16's normal range, and sums over a batch above it: such operands carry an exact
    power of two along, one for each matrix. So do operands in float8, whose range is narrower yet.
    """
    if matrix.dtype is dtype is torch.float32:
        return Operand(matrix)
    if dtype not in _TOP:
        return Operand(matrix.to(dtype).to(held(dtype, matrix.device)))
    largest = matrix.detach().abs().amax((-2, -1), keepdim=True) if matrix.numel() else matrix.new_zeros(())
    exponent = torch.frexp(largest.float()).exponent - _TOP[dtype]
    scaled = torch.ldexp(matrix.float(), -exponent)
    if dtype == torch.float8_e4m3fn:  # which has no infinity; versions of torch differ in what they make of one
        scaled = torch.where(scaled.isfinite(), scaled, torch.nan)
    return Operand(scaled.to(dtype).to(held(dtype, matrix.device)), exponent)


def product(left: Operand, right: Operand, result: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``left @ right`` of dtype ``result``, which is also what torch accumulates in where it can.

    Both are matrices, or batches of as many matrices each. The result is in ``out`` where there is such memory and the
    routine that multiplies can write to it, and else in a new tensor.
    """
    value = _mm(left.tensor, right.tensor, result, out)
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


def gram(x: Operand, result: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``Xᵀ X`` ``[.., K, K]`` of dtype ``result``: in ``out``, or in a new tensor.

    CPUs skip blocks below a large one's diagonal.
    """
    columns = x.tensor.shape[-1]
    if out is None:
        out = x.tensor.new_empty(*x.tensor.shape[:-2], columns, columns, dtype=result)
    if x.tensor.device.type != "cpu" or x.tensor.dim() > 2 or columns <= _PANEL:
        return _in(out, product(x.t(), x, result, out))
    left, right = x.tensor.t(), x.tensor
    if routes.route(x.tensor.dtype) == "onednn":  # which would copy both for each panel
        left = left.contiguous()
        right = left.t()
    for start in range(0, columns, _PANEL):
        stop = min(start + _PANEL, columns)
        panel = Operand(left[start:stop], x.exponent), Operand(right[:, start:], x.exponent)
        here = out[start:stop, start:]
        _in(here, product(*panel, result, here))
        out[stop:, start:stop] = out[start:stop, stop:].t()
    return out


def _in(out: Tensor, value: Tensor) -> Tensor:
    """``value`` in ``out``, where it may be already."""
    return out if value is out else out.copy_(value)


def _mm(left: Tensor, right: Tensor, result: torch.dtype, out: Tensor | None) -> Tensor:
    if left.is_cuda and left.itemsize == 2:
        multiply = torch.mm if left.dim() == 2 else torch.bmm
        return multiply(left, right, out_dtype=result)
    out = out if left.dtype is result else None
    if left.dim() > 2:
        return torch.bmm(left, right, out=out).to(result)
    by = routes.route(left.dtype) if left.device.type == "cpu" else "mm"
    return routes.multiply(left, right, by, out).to(result)
