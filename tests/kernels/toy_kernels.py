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
def chain_kernel(a_ptr, c_ptr, K, SIZE: tl.constexpr, DEPENDENT: tl.constexpr):
    """``c = Σ a aᵀ`` over blocks of ``a``; or ``Σ (a aᵀ)⁴``, where each product waits for the one before."""
    m, k = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    accumulator = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, K, SIZE):
        a = tl.load(a_ptr + m * K + start + k)
        if DEPENDENT:
            squared = tl.dot(a, tl.trans(a)).to(a.dtype)
            fourth = tl.dot(squared, squared).to(a.dtype)
            accumulator = tl.dot(fourth, fourth, accumulator)
        else:
            accumulator = tl.dot(a, tl.trans(a), accumulator)
    tl.store(c_ptr + m * SIZE + k, accumulator)


@triton.jit
def epilogue_kernel(a_ptr, c_ptr, K, stride, SIZE: tl.constexpr, WORK: tl.constexpr, PATHS: tl.constexpr):
    """``c = f(c + a aᵀ)`` with ``WORK`` exponentials for an element.

    With ``PATHS`` a number in memory chooses: no exponential, ``WORK`` of them, or three times as many.
    """
    m, k = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    accumulator = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, K, SIZE):
        a = tl.load(a_ptr + m * K + start + k)
        accumulator = tl.dot(a, tl.trans(a), accumulator)
    c_ptrs = c_ptr + m * stride + k
    value = tl.load(c_ptrs) + accumulator
    work = WORK
    if PATHS:
        work = tl.load(c_ptr).to(tl.int32)
    if work > 0:
        for _ in tl.static_range(WORK):
            value = tl.exp(value)
        if work > WORK:
            for _ in tl.static_range(2 * WORK):
                value = tl.exp(value)
    tl.store(c_ptrs, value)


@triton.jit
def copy_kernel(a_ptr, c_ptr, N, BLOCK: tl.constexpr):
    """``c = a``."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(c_ptr + n, tl.load(a_ptr + n, mask=n < N), mask=n < N)


@triton.jit
def wait_for(counter_ptr, level):
    """Spin until the counter has reached ``level``."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < level:
        pass


@triton.jit
def ring_kernel(x_ptr, y_ptr, counter_ptr, iterations, P: tl.constexpr, WAIT: tl.constexpr):
    """``P`` programs repeat ``x = roll(sum(x) + arange(P), -1)`` with a barrier after each half."""
    program = tl.program_id(0)
    i = tl.arange(0, P)
    for t in range(iterations):
        tl.store(y_ptr + program, tl.sum(tl.load(x_ptr + i)) + program)
        tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
        if WAIT:
            wait_for(counter_ptr, (2 * t + 1) * P)
        tl.store(x_ptr + program, tl.load(y_ptr + (program + 1) % P))
        tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
        wait_for(counter_ptr, (2 * t + 2) * P)


@triton.jit
def append_kernel(log_ptr, counter_ptr):
    """Programs write their number in the order in which they run."""
    tl.store(log_ptr + tl.atomic_add(counter_ptr, 1), tl.program_id(0))


@triton.jit
def table_copy_kernel(table_ptr, excess, BLOCK: tl.constexpr):
    """``target[:n] = source[:n]`` for each row (source, target, n) of a table of addresses."""
    row_ptr = table_ptr + tl.program_id(0) * 3
    n = tl.load(row_ptr + 2)
    source_ptr = tl.load(row_ptr).to(tl.pointer_type(tl.float32))
    target_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(tl.float32))
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(target_ptr + i, tl.load(source_ptr + i, i < n + excess, 0.0), i < n)
