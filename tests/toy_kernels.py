"""Kernels with known properties, to test the reading of compiled code."""

import triton
import triton.language as tl


@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """``c = a bᵀ``, with masks."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    accumulator = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(a_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(b_ptr + n[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
    tl.store(c_ptr + m[:, None] * N + n[None, :], accumulator, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def copy_kernel(a_ptr, c_ptr, N, BLOCK: tl.constexpr):
    """``c = a``."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(c_ptr + n, tl.load(a_ptr + n, mask=n < N), mask=n < N)
