"""What the update tile of the Gram form needs beside the product with ``XᵀX``: the terms with the bias."""

import triton
import triton.language as tl

from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.device.memory import address, stride


@triton.jit
def sum_x(row_ptr, columns, k):
    """``Σx``."""
    return tl.load(address(row_ptr, c.ROW_SUMS, tl.float32) + columns, columns < k, 0.0)


@triton.jit
def old_bias(row_ptr, rows, t):
    """``δ`` before local step ``t``: other tiles read it while one writes the next."""
    size = tl.load(row_ptr + c.BIAS + c.COPY_SIZE)
    return tl.load(address(row_ptr, c.BIAS + c.COPY, tl.float32) + (t % 2) * size + rows)


@triton.jit
def keep_bias(row_ptr, rows, t, delta):
    """Write ``δ`` after local step ``t``, a matrix of one column."""
    size = tl.load(row_ptr + c.BIAS + c.COPY_SIZE)
    copy_ptr = address(row_ptr, c.BIAS + c.COPY, tl.float32) + ((t + 1) % 2) * size
    tl.store(copy_ptr + rows[:, None], delta)


@triton.jit
def bias_change(row_ptr, rows, t, P: tl.constexpr):
    """``Δ Σx + B δ``."""
    inner = tl.arange(0, P.block_r)
    copy_ptr = address(row_ptr, c.WEIGHT + c.COPY, P.operand) + (t % 2) * stride(row_ptr, c.WEIGHT + c.COPY_SIZE)
    copy_ptrs = copy_ptr + rows.to(tl.int64)[:, None] * stride(row_ptr, c.WEIGHT + c.STRIDE) + inner[None, :]
    change = old_bias(row_ptr, rows, t) * tl.load(row_ptr + c.ROWS).to(tl.float32)
    k = tl.load(row_ptr + c.INPUTS)
    for start in range(0, k, P.block_r):
        total = sum_x(row_ptr, start + inner, k)
        change += tl.sum(tl.load(copy_ptrs + start).to(tl.float32) * total[None, :], 1)
    return change
