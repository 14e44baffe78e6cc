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
def _difference_of(a0, change, parameter, CODE: tl.constexpr, SMALL: tl.constexpr, P: tl.constexpr):
    """``f(a0 + change) - f(a0)`` for the transfer function of that code, negative for the identity.

    ``SMALL`` asks for the form for small changes.
    """
    if CODE < 0:
        found = change
    elif SMALL:
        NEAR: tl.constexpr = P.near[CODE]
        found = NEAR(a0, change, parameter, P.ptx)
    else:
        F: tl.constexpr = P.transfers[CODE]
        found = F(a0 + change, parameter) - F(a0, parameter)
        if P.own:  # nothing changes in the padding, where it may not be finite
            found = tl.where(change == 0, 0.0, found)
    return found


@triton.jit
def _loss_of(a0, change, parameter, CODE: tl.constexpr, P: tl.constexpr):
    """Matching loss of each element, in float64."""
    a0, change = a0.to(tl.float64), change.to(tl.float64)
    if CODE < 0:
        loss = 0.5 * change * change
    else:
        DIVERGENCE: tl.constexpr = P.divergences[CODE]
        F: tl.constexpr = P.transfers[CODE]
        loss = DIVERGENCE(a0 + change, a0, parameter.to(tl.float64), F)
    return loss


@triton.jit
def _all_small(change, P: tl.constexpr):
    """Whether the forms for small changes are right, if any layer has one."""
    small = False
    if P.any_near:
        small = tl.max(tl.abs(change)) <= 0.5
    return small


@triton.jit
def _examples(row_ptr, t, count_ptr, P: tl.constexpr):
    """How many examples there are in local step ``t``."""
    batch = tl.load(row_ptr + c.BATCH)
    if P.sampled:
        batch = tl.load(count_ptr + t).to(tl.int64)
    return batch


@triton.jit
def change_of(row_ptr, product, rows, columns, t, count_ptr, P: tl.constexpr):
    """The change of the pre-activations, the product with Δ and δ: zero beyond the outputs and the examples."""
    change = product
    if tl.load(row_ptr + c.BIAS + c.GRAD) != 0:
        present = (columns < _examples(row_ptr, t, count_ptr, P))[None, :]
        delta = tl.load(address(row_ptr, c.BIAS + c.DELTA, tl.float32) + rows)  # zero-padded, as Δ and X are
        change += delta[:, None] * tl.where(present, 1.0, 0.0)
    return change


@triton.jit
def _transfer(row_ptr):
    """The place of the layer's transfer function among all, negative for the identity, and its parameter."""
    return tl.load(row_ptr + c.TRANSFER), bits_to_float(tl.load(row_ptr + c.PARAMETER))


@triton.jit
def _a0_pointer(row_ptr, t, P: tl.constexpr):
    """Where ``A0`` begins in local step ``t``."""
    a0_ptr = address(row_ptr, c.A0, P.preactivation)
    if P.sampled:
        a0_ptr += (t - 1) * stride(row_ptr, c.A0_STEP)
    return a0_ptr


@triton.jit
def _store_loss(loss, outputs, examples, trace_ptr):
    """The sum over the outputs and examples that there are."""
    tl.store(trace_ptr, tl.sum(tl.sum(tl.where(outputs[:, None] & examples[None, :], loss, 0.0), 1), 0))


@triton.jit
def difference(row_ptr, change, rows, columns, t, count_ptr, trace_ptr, P: tl.constexpr):
    """``E`` for a change of the pre-activations, zero where that is.

    Stores the sum of the matching loss at ``trace_ptr``, where that is asked for.
    """
    code, parameter = _transfer(row_ptr)
    offsets = rows.to(tl.int64)[:, None] * stride(row_ptr, c.E_STRIDE) + columns[None, :]
    a0 = tl.load(_a0_pointer(row_ptr, t, P) + offsets).to(tl.float32)
    if P.trace:
        loss = _loss_of(a0, change, parameter, -1, P)
        for i in tl.static_range(len(P.divergences)):
            if code == i:
                loss = _loss_of(a0, change, parameter, i, P)
        examples = columns < _examples(row_ptr, t, count_ptr, P)
        _store_loss(loss, rows < tl.load(row_ptr + c.OUTPUTS), examples, trace_ptr)
    found, small = change, _all_small(change, P)
    for i in tl.static_range(len(P.transfers)):
        if code == i:
            if P.near[i] is None:
                found = _difference_of(a0, change, parameter, i, False, P)
            else:
                if small:
                    found = _difference_of(a0, change, parameter, i, True, P)
                else:
                    found = _difference_of(a0, change, parameter, i, False, P)
    return found


@triton.jit
def _store_slices(change, place, parameter, scale, CODE: tl.constexpr, SMALL: tl.constexpr, P: tl.constexpr):
    """``E`` of a tile, slice by slice, for one transfer function.

    Returns its sums over the batch and, for float8 alone, the largest |E| of each row.
    """
    a0_ptr, e_ptr, offsets, outputs, examples, trace_ptr = place
    SLICES: tl.constexpr = P.slices
    WIDTH: tl.constexpr = P.block_b // SLICES
    slices = sliced(change, SLICES)
    # A thread has four neighbours, which it adds up by itself.
    FOURS: tl.constexpr = (WIDTH + 3) // 4
    sums = tl.zeros((change.shape[0], FOURS), tl.float32)
    largest = tl.zeros((change.shape[0],), tl.float32)
    for i in tl.static_range(SLICES):
        a0 = tl.load(a0_ptr + i * WIDTH + offsets).to(tl.float32)
        if P.trace:
            loss = _loss_of(a0, slices[i], parameter, CODE, P)
            _store_loss(loss, outputs, i * WIDTH + tl.arange(0, WIDTH) < examples, trace_ptr + i)
        found = _difference_of(a0, slices[i], parameter, CODE, SMALL, P)
        tl.store(e_ptr + i * WIDTH + offsets, as_operand(found * scale, P))
        sums += tl.sum(found.reshape(change.shape[0], FOURS, WIDTH // FOURS), 2)
        if P.operand == tl.float8e4nv:
            largest = tl.maximum(largest, tl.max(tl.abs(found), 1))
    return tl.sum(sums, 1), largest


@triton.jit
def _store_difference(row_ptr, change, place, scale, P: tl.constexpr):
    """``E`` of a tile for the layer's own transfer function: which one, and in which form, is asked once for a tile.

    Returns its sums over the batch and, for float8 alone, the largest |E| of each row.
    """
    code, parameter = _transfer(row_ptr)
    sums = tl.zeros((change.shape[0],), tl.float32)
    largest = tl.zeros((change.shape[0],), tl.float32)
    small = _all_small(change, P)
    for i in tl.static_range(len(P.transfers)):
        if code == i:
            if P.near[i] is None:
                sums, largest = _store_slices(change, place, parameter, scale, i, False, P)
            else:
                if small:
                    sums, largest = _store_slices(change, place, parameter, scale, i, True, P)
                else:
                    sums, largest = _store_slices(change, place, parameter, scale, i, False, P)
    if code < 0:
        sums, largest = _store_slices(change, place, parameter, scale, -1, False, P)
    return sums, largest


@triton.jit
def _epilogue(row_ptr, change, n_block, b_block, t, count_ptr, trace_ptr, scale, P: tl.constexpr):
    """Stores ``E`` of a tile and its sums over the batch, for a change of the pre-activations."""
    SLICES: tl.constexpr = P.slices
    WIDTH: tl.constexpr = P.block_b // SLICES
    local_rows = tl.arange(0, P.block_n)
    row_stride = stride(row_ptr, c.E_STRIDE)
    # Of tiles, so that all slices have the same offsets.
    first = (n_block * P.block_n).to(tl.int64) * row_stride + b_block * P.block_b
    offsets = local_rows[:, None] * row_stride.to(tl.int32) + tl.arange(0, WIDTH)[None, :]
    if P.form == "softmax":  # another kernel goes over whole rows
        change_ptrs = address(row_ptr, c.CHANGE, tl.float32) + first + offsets
        slices = sliced(change, SLICES)
        for i in tl.static_range(SLICES):
            tl.store(change_ptrs + i * WIDTH, slices[i])
    else:
        a0_ptr = _a0_pointer(row_ptr, t, P) + first
        e_ptr = address_for_fours(row_ptr, c.E, P.operand) + first
        rows = n_block * P.block_n + local_rows
        outputs = rows < tl.load(row_ptr + c.OUTPUTS)
        examples = _examples(row_ptr, t, count_ptr, P) - b_block * P.block_b
        tile = (a0_ptr, e_ptr, offsets, outputs, examples, trace_ptr)
        sums, largest = _store_difference(row_ptr, change, tile, scale, P)
        sums_ptr = address(row_ptr, c.ROW_SUMS, tl.float32) + b_block * stride(row_ptr, c.ROW_SUMS_STRIDE)
        tl.store(sums_ptr + rows, sums)
        if P.operand == tl.float8e4nv:
            keep_largest_difference(row_ptr, n_block, b_block, t, tl.max(largest, 0))


@triton.jit
def activation_tile(row_ptr, n_block, b_block, t, count_ptr, trace_ptr, trace_stride, P: tl.constexpr):
    """``E`` on rows of block ``n_block`` and examples of block ``b_block``, and its sums over these examples.

    ``count_ptr`` is where the layer's numbers of examples in each local step are.
    """
    rows = n_block * P.block_n + tl.arange(0, P.block_n)
    examples = b_block * P.block_b + tl.arange(0, P.block_b)
    inner = tl.arange(0, P.block_r)
    delta_stride, x_stride = stride(row_ptr, c.WEIGHT + c.STRIDE), stride(row_ptr, c.X_STRIDE)
    delta_ptr = address(row_ptr, c.WEIGHT + c.COPY, P.operand) + (n_block * P.block_n).to(tl.int64) * delta_stride
    delta_offsets = tl.arange(0, P.block_n)[:, None] * delta_stride.to(tl.int32) + inner[None, :]
    x_ptr = address(row_ptr, c.X, P.operand) + (b_block * P.block_b).to(tl.int64) * x_stride
    if P.sampled:
        x_ptr += (t - 1) * stride(row_ptr, c.X_STEP)
    x_offsets = tl.arange(0, P.block_b)[None, :] * x_stride.to(tl.int32) + inner[:, None]
    length = tl.load(row_ptr + c.REDUCED)
    multiplied = product(delta_ptr, delta_offsets, x_ptr, x_offsets, P.block_r, length, P)

    scale, e_scale = 1.0, 1.0
    if P.scaled:
        if length > 0:  # a frozen weight has no scales
            scale = increment_scale(row_ptr, n_block, t - 1, P)
            e_scale = scale
            if P.operand == tl.float8e4nv:
                scale *= inputs_scale(row_ptr, P)
                e_scale = difference_scale(row_ptr, n_block, t, P)
    place = n_block * tl.load(row_ptr + c.B_BLOCKS) + b_block
    trace_ptr += t * trace_stride + tl.load(row_ptr + c.TRACE_ACTIVATION) + place * P.slices
    change = change_of(row_ptr, multiplied * (1.0 / scale), rows, examples, t, count_ptr, P)
    _epilogue(row_ptr, change, n_block, b_block, t, count_ptr, trace_ptr, e_scale, P)
