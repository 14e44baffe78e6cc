"""The activation tile: ``E = f(A0 + Δ Xᵀ + δ) - f(A0)`` on a block of outputs and a block of examples."""

import triton
import triton.language as tl

from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.device.memory import address, address_for_fours, as_operand, bits_to_float, stride
from locoprop_kernels.kernels.device.products import (
    difference_scale,
    increment_scale,
    inputs_scale,
    keep_largest_difference,
    product,
    sliced,
)


@triton.jit
def _difference_of(a0, change, parameter, F: tl.constexpr, NEAR: tl.constexpr, P: tl.constexpr):
    """``F(a0 + change) - F(a0)``; by the form for small changes where there is one, and all of them are small."""
    if NEAR is None:
        found = F(a0 + change, parameter) - F(a0, parameter)
        if P.own:  # nothing changes in the padding, where it may not be finite
            found = tl.where(change == 0, 0.0, found)
    else:
        if tl.max(tl.max(tl.abs(change), 1), 0) <= 0.5:
            found = NEAR(a0, change, parameter, P.ptx)
        else:
            found = F(a0 + change, parameter) - F(a0, parameter)
    return found


@triton.jit
def _transfer_difference(a0, change, code, parameter, P: tl.constexpr):
    """``f(a0 + change) - f(a0)`` for the layer's own ``f``; the identity has no code."""
    found = change
    for i in tl.static_range(len(P.transfers)):
        if code == i:
            found = _difference_of(a0, change, parameter, P.transfers[i], P.near[i], P)
    return found


@triton.jit
def _divergence(a0, change, code, parameter, P: tl.constexpr):
    """Matching loss of each element, in float64."""
    a0, change = a0.to(tl.float64), change.to(tl.float64)
    a = a0 + change
    loss = 0.5 * change * change
    for i in tl.static_range(len(P.divergences)):
        if code == i:
            divergence: tl.constexpr = P.divergences[i]
            f: tl.constexpr = P.transfers[i]
            loss = divergence(a, a0, parameter.to(tl.float64), f)
    return loss


@triton.jit
def _present(row_ptr, rows, columns, t, count_ptr, P: tl.constexpr):
    """Which outputs there are, and which examples in local step ``t``."""
    batch = tl.load(row_ptr + c.BATCH)
    if P.sampled:
        batch = tl.load(count_ptr + t)
    return (rows < tl.load(row_ptr + c.OUTPUTS))[:, None], (columns < batch)[None, :]


@triton.jit
def change_of(row_ptr, product, rows, columns, t, count_ptr, P: tl.constexpr):
    """The change of the pre-activations, the product with Δ and δ: zero beyond the outputs and the examples."""
    change = product
    if tl.load(row_ptr + c.BIAS + c.GRAD) != 0:
        _, examples = _present(row_ptr, rows, columns, t, count_ptr, P)
        delta = tl.load(address(row_ptr, c.BIAS + c.DELTA, tl.float32) + rows)  # zero-padded, as Δ and X are
        change += delta[:, None] * tl.where(examples, 1.0, 0.0)
    return change


@triton.jit
def difference(row_ptr, change, rows, columns, t, count_ptr, trace_ptr, P: tl.constexpr):
    """``E`` for a change of the pre-activations, zero where that is.

    Stores the sum of the matching loss at ``trace_ptr``, where that is asked for.
    """
    code = tl.load(row_ptr + c.TRANSFER)
    parameter = bits_to_float(tl.load(row_ptr + c.PARAMETER))
    a0_ptr = address(row_ptr, c.A0, P.preactivation)
    if P.sampled:
        a0_ptr += (t - 1) * stride(row_ptr, c.A0_STEP)
    offsets = rows.to(tl.int64)[:, None] * stride(row_ptr, c.E_STRIDE) + columns[None, :]
    a0 = tl.load(a0_ptr + offsets).to(tl.float32)
    if P.trace:
        outputs, examples = _present(row_ptr, rows, columns, t, count_ptr, P)
        loss = tl.where(outputs & examples, _divergence(a0, change, code, parameter, P), 0.0)
        tl.store(trace_ptr, tl.sum(tl.sum(loss, 1), 0))
    return _transfer_difference(a0, change, code, parameter, P)


@triton.jit
def _epilogue(row_ptr, multiplied, rows, start, t, count_ptr, trace_ptr, scales, P: tl.constexpr):
    """``E`` of a slice of a tile; ``scales`` is ``(of the product, of E)``.

    Returns the sums of ``E`` over the batch and, for float8 alone, its largest number in each row.
    """
    columns = start + tl.arange(0, multiplied.shape[1])
    offsets = rows.to(tl.int64)[:, None] * stride(row_ptr, c.E_STRIDE) + columns[None, :]
    change = change_of(row_ptr, multiplied * (1.0 / scales[0]), rows, columns, t, count_ptr, P)
    found = change
    if P.form == "softmax":  # another kernel goes over whole rows
        tl.store(address(row_ptr, c.CHANGE, tl.float32) + offsets, change)
    else:
        found = difference(row_ptr, change, rows, columns, t, count_ptr, trace_ptr, P)
        tl.store(address_for_fours(row_ptr, c.E, P.operand) + offsets, as_operand(found * scales[1], P))
    largest = tl.zeros_like(rows).to(tl.float32)
    if P.operand == tl.float8e4nv:
        largest = tl.max(tl.abs(found), 1)
    return tl.sum(found, 1), largest


@triton.jit
def activation_tile(row_ptr, n_block, b_block, t, count_ptr, trace_ptr, trace_stride, P: tl.constexpr):
    """``E`` on rows of block ``n_block`` and examples of block ``b_block``, and its sums over these examples.

    ``count_ptr`` is where the layer's numbers of examples in each local step are.
    """
    SLICES: tl.constexpr = P.slices
    rows = n_block * P.block_n + tl.arange(0, P.block_n)
    examples = b_block * P.block_b + tl.arange(0, P.block_b)
    inner = tl.arange(0, P.block_r)
    delta_ptr = address(row_ptr, c.WEIGHT + c.COPY, P.operand)
    delta_ptrs = delta_ptr + rows.to(tl.int64)[:, None] * stride(row_ptr, c.WEIGHT + c.STRIDE) + inner[None, :]
    x_ptr = address(row_ptr, c.X, P.operand)
    if P.sampled:
        x_ptr += (t - 1) * stride(row_ptr, c.X_STEP)
    x_ptrs = x_ptr + examples.to(tl.int64)[None, :] * stride(row_ptr, c.X_STRIDE) + inner[:, None]
    accumulator = tl.zeros((rows.shape[0], examples.shape[0]), tl.float32)
    length = tl.load(row_ptr + c.REDUCED)
    multiplied = product(delta_ptrs, x_ptrs, P.block_r, P.block_r, length, accumulator, P)

    scale, e_scale = 1.0, 1.0
    if P.scaled:
        if length > 0:  # a frozen weight has no scales
            scale = increment_scale(row_ptr, n_block, t - 1, P)
            e_scale = scale
            if P.operand == tl.float8e4nv:
                scale *= inputs_scale(row_ptr, P)
                e_scale = difference_scale(row_ptr, n_block, t, P)
    b_blocks = tl.load(row_ptr + c.B_BLOCKS)
    trace_ptr += t * trace_stride + tl.load(row_ptr + c.TRACE_ACTIVATION) + n_block * b_blocks * SLICES
    sums = tl.zeros_like(rows).to(tl.float32)
    largest = tl.zeros_like(rows).to(tl.float32)
    slices = sliced(multiplied, SLICES)
    for i in tl.static_range(SLICES):
        start = b_block * P.block_b + i * (P.block_b // SLICES)
        slice_ptr = trace_ptr + (b_block * SLICES + i)
        part, most = _epilogue(row_ptr, slices[i], rows, start, t, count_ptr, slice_ptr, (scale, e_scale), P)
        sums += part
        largest = tl.maximum(largest, most)
    if P.form != "softmax":
        sums_ptr = address(row_ptr, c.ROW_SUMS, tl.float32) + b_block * stride(row_ptr, c.ROW_SUMS_STRIDE)
        tl.store(sums_ptr + rows, sums)
        if P.operand == tl.float8e4nv:
            keep_largest_difference(row_ptr, n_block, b_block, t, tl.max(largest, 0))
