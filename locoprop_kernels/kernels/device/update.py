"""The update tile: ``G = (G_0 + Eᵀ X) · scale + λ Δ`` and a step of the rule, on a block of rows and one of columns.

Only what belongs to the caller (gradients, weights, masks, stored state) is read under a mask. ``X`` is read along the
batch, from a transposed copy where the matrix unit wants that. Values that go together are handed on as tuples: *when*
is ``(t, last, rate, prox)``, the local step; *place* is ``(rows, columns, n, width, row_stride)``, part of a parameter.
"""

import triton
import triton.language as tl

from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.device import gram
from locoprop_kernels.kernels.device.memory import (
    address,
    as_operand,
    bits_to_float,
    callers_address,
    is_finite,
    stride,
    to_dtype,
)
from locoprop_kernels.kernels.device.products import increment_scale, product, sliced


@triton.jit
def note_infinite(value, valid, bad_ptr):
    """Set ``bad`` if a number of ``value`` is not finite."""
    tl.store(bad_ptr + tl.zeros_like(value).to(tl.int32), 1, valid & (is_finite(value) == 0))


@triton.jit
def _slot(parameter_ptr, i: tl.constexpr, old_offsets, new_offsets, valid, t):
    """A state slot: the stored one at the first local step, the working copy afterwards."""
    if t == 0:
        value = tl.load(callers_address(parameter_ptr, c.OLD + i, tl.float32) + old_offsets, valid, 0.0)
    else:
        value = tl.load(address(parameter_ptr, c.NEW + i, tl.float32) + new_offsets)
    return value


@triton.jit
def _keep_slot(parameter_ptr, i: tl.constexpr, value, new_offsets, valid, last, bad_ptr):
    tl.store(address(parameter_ptr, c.NEW + i, tl.float32) + new_offsets, value)
    if last:
        note_infinite(value, valid, bad_ptr)


@triton.jit
def _value(parameter_ptr, long_rows, columns, valid, U: tl.constexpr):
    """The parameter at the start of the step, in float32."""
    offsets = long_rows * tl.load(parameter_ptr + c.VALUE_ROW)
    offsets += columns.to(tl.int64)[None, :] * tl.load(parameter_ptr + c.VALUE_COLUMN)
    return tl.load(callers_address(parameter_ptr, c.VALUE, U.parameter) + offsets, valid, 0.0).to(tl.float32)


@triton.jit
def _moving(parameter_ptr, offsets, valid):
    """Where the parameter's mask is not 0; everywhere if it has none."""
    mask_ptr = callers_address(parameter_ptr, c.MASK, tl.uint8)
    masked = tl.load(parameter_ptr + c.MASK) != 0
    return tl.load(mask_ptr + offsets, valid & masked, 1) != 0


@triton.jit
def note_result(parameter_ptr, delta, place, bad_ptr, P: tl.constexpr, U: tl.constexpr):
    """Set ``bad`` if a commit of ``delta`` would write a number that is not finite."""
    rows, columns, n, width, _ = place
    valid = (rows < n)[:, None] & (columns < width)[None, :]
    value = _value(parameter_ptr, rows.to(tl.int64)[:, None], columns, valid, U)
    note_infinite(to_dtype(value + delta, U.parameter, P.interpreted).to(tl.float32), valid, bad_ptr)


@triton.jit
def gradient_at_start(parameter_ptr, place, U: tl.constexpr):
    """``G_0`` of part of a parameter, in float32: the caller's, zero outside the parameter."""
    rows, columns, n, width, _ = place
    valid = (rows < n)[:, None] & (columns < width)[None, :]
    offsets = rows.to(tl.int64)[:, None] * tl.load(parameter_ptr + c.GRAD_ROW) + columns[None, :]
    grad = tl.load(callers_address(parameter_ptr, c.GRAD, U.parameter) + offsets, valid, 0.0).to(tl.float32)
    return grad * bits_to_float(tl.load(parameter_ptr + c.GRAD_SCALE))


@triton.jit
def regularised(parameter_ptr, grad, start, delta, place, U: tl.constexpr):
    """``grad`` with the regulariser's gradient, and ``G_0``, both zero where the parameter's mask is 0."""
    rows, columns, n, width, _ = place
    valid = (rows < n)[:, None] & (columns < width)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    if U.regulariser is not None:
        value = _value(parameter_ptr, long_rows, columns, valid, U)
        grad += U.regulariser(value + delta, value)
    if U.masked:
        moving = _moving(parameter_ptr, long_rows * width + columns[None, :], valid)
        start = tl.where(moving, start, 0.0)
        grad = tl.where(moving, grad, 0.0)
    return grad, start


@triton.jit
def rule_at(parameter_ptr, t, rate, U: tl.constexpr):
    """What the rule is told of local step ``t``: the parameter's own learning rate, and its number of steps so far."""
    step = t + 1.0
    if U.counts_steps:
        step += tl.load(callers_address(parameter_ptr, c.STEP, tl.int64)).to(tl.float32)
    return rate * bits_to_float(tl.load(parameter_ptr + c.RATE)), step


@triton.jit
def apply_rule(parameter_ptr, delta, grad, slots, place, rate, step, U: tl.constexpr):
    """The new increment and slots of part of a parameter; the increment is zero outside it and where its mask is 0."""
    rows, columns, n, width, _ = place
    valid = (rows < n)[:, None] & (columns < width)[None, :]
    HYPER: tl.constexpr = U.hyper
    delta, s0, s1, s2 = U.rule(delta, grad, slots[0], slots[1], slots[2], rate, step, HYPER)
    delta = tl.where(valid, delta, 0.0)
    if U.masked:  # momentum may have moved what has no gradient; the mask is read again to save registers
        offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
        delta = tl.where(_moving(parameter_ptr, offsets, valid), delta, 0.0)
    return delta, s0, s1, s2


@triton.jit
def _step(parameter_ptr, change, place, when, loss_scale, bad_ptr, P: tl.constexpr, U: tl.constexpr):
    """One step of the update rule on part of a weight or bias, whose gradient has changed by ``change``.

    Returns the new increment and the gradient at the start, both zero outside the parameter and where its mask is 0.
    """
    rows, columns, n, width, row_stride = place
    t, last, rate, prox = when
    valid = (rows < n)[:, None] & (columns < width)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    new_offsets = long_rows * row_stride + columns[None, :]
    old_offsets = long_rows * width + columns[None, :]

    start = gradient_at_start(parameter_ptr, place, U)
    # Ahead of the branch: behind it, Triton 3.7's pass for tensor memory fails on sm_100.
    grad = (start + change) * loss_scale
    delta_ptrs = address(parameter_ptr, c.DELTA, tl.float32) + new_offsets
    delta = tl.zeros_like(start)
    if t > 0:
        delta = tl.load(delta_ptrs)
        grad += prox * delta
    grad, start = regularised(parameter_ptr, grad, start, delta, place, U)

    s0, s1, s2 = grad, grad, grad
    if U.slots > 0:
        s0 = _slot(parameter_ptr, 0, old_offsets, new_offsets, valid, t)
    if U.slots > 1:
        s1 = _slot(parameter_ptr, 1, old_offsets, new_offsets, valid, t)
    if U.slots > 2:
        s2 = _slot(parameter_ptr, 2, old_offsets, new_offsets, valid, t)
    rate, step = rule_at(parameter_ptr, t, rate, U)
    delta, s0, s1, s2 = apply_rule(parameter_ptr, delta, grad, (s0, s1, s2), place, rate, step, U)

    tl.store(delta_ptrs, delta)
    if U.slots > 0:
        _keep_slot(parameter_ptr, 0, s0, new_offsets, valid, last, bad_ptr)
    if U.slots > 1:
        _keep_slot(parameter_ptr, 1, s1, new_offsets, valid, last, bad_ptr)
    if U.slots > 2:
        _keep_slot(parameter_ptr, 2, s2, new_offsets, valid, last, bad_ptr)
    if last:  # whether a commit would write a number that is not finite
        note_result(parameter_ptr, delta, place, bad_ptr, P, U)
    return delta, start * loss_scale


@triton.jit
def objective(delta, start, prox):
    """Sum of ``Δ · G_0 + λ/2 Δ²``."""
    delta = delta.to(tl.float64)
    return tl.sum(tl.sum(delta * start.to(tl.float64) + (0.5 * prox) * delta * delta, 1), 0)


@triton.jit
def _weight_slice(row_ptr, multiplied, rows, start, when, scales, bad_ptr, trace_ptr, P: tl.constexpr,
                  U: tl.constexpr):  # fmt: skip
    """Update of a slice of a weight tile; ``scales`` is ``(of the loss, of the old Δ, of the new Δ, splits)``.

    Returns the largest |Δ|, for float16 alone.
    """
    t, prox = when[0], when[3]
    loss_scale, old_scale, new_scale, splits = scales
    columns = start + tl.arange(0, multiplied.shape[1])
    n, k = tl.load(row_ptr + c.OUTPUTS), tl.load(row_ptr + c.INPUTS)
    row_stride = stride(row_ptr, c.WEIGHT + c.STRIDE)
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    if P.split:
        if splits > 1:
            partials_ptrs = address(row_ptr, c.PARTIALS, tl.float32) + offsets
            for _ in range(0, splits):
                multiplied += tl.load(partials_ptrs)
                partials_ptrs += stride(row_ptr, c.WEIGHT + c.COPY_SIZE)
    change = multiplied * (1.0 / old_scale)
    if P.sampled:
        change *= bits_to_float(tl.load(row_ptr + c.SETS))
    if P.form == "gram":
        if (t > 0) & (tl.load(row_ptr + c.BIAS + c.GRAD) != 0):
            change += gram.old_bias(row_ptr, rows, t)[:, None] * gram.sum_x(row_ptr, columns, k)[None, :]
    place = (rows, columns, n, k, row_stride)
    delta, gradient = _step(row_ptr + c.WEIGHT, change, place, when, loss_scale, bad_ptr, P, U)
    copy_ptr = address(row_ptr, c.WEIGHT + c.COPY, P.operand)
    if P.form == "gram":
        copy_ptr += ((t + 1) % 2) * stride(row_ptr, c.WEIGHT + c.COPY_SIZE)
    tl.store(copy_ptr + offsets, as_operand(delta * new_scale, P))
    if P.trace:
        tl.store(trace_ptr, objective(delta, gradient, prox))
    amax = 0.0
    if P.operand == tl.float16:
        amax = tl.max(tl.max(tl.abs(delta), 1), 0)
    return amax


@triton.jit
def bias_tile(row_ptr, rows, when, loss_scale, bad_ptr, trace_ptr, P: tl.constexpr, U: tl.constexpr):
    """Update of the bias of a block of rows, a matrix of one column."""
    t = when[0]
    change = tl.zeros_like(rows).to(tl.float32)
    if t > 0:
        if P.form == "gram":
            change += gram.bias_change(row_ptr, rows, t, P)
        else:
            count = tl.load(row_ptr + c.ROW_SUM_COUNT)
            sums_ptrs = address(row_ptr, c.ROW_SUMS, tl.float32) + rows[None, :]
            for start in range(0, count, 16):
                blocks = start + tl.arange(0, 16)[:, None]
                offsets = blocks * stride(row_ptr, c.ROW_SUMS_STRIDE)
                change += tl.sum(tl.load(sums_ptrs + offsets, blocks < count, 0.0), 0)
            if P.sampled:
                change *= bits_to_float(tl.load(row_ptr + c.SETS))
    place = (rows, tl.arange(0, 1), tl.load(row_ptr + c.OUTPUTS), 1, 1)
    delta, gradient = _step(row_ptr + c.BIAS, change[:, None], place, when, loss_scale, bad_ptr, P, U)
    if P.form == "gram":
        gram.keep_bias(row_ptr, rows, t, delta)
    if P.trace:
        tl.store(trace_ptr, objective(delta, gradient, when[3]))


@triton.jit
def _gradient_product(row_ptr, rows, columns, start, length, t, P: tl.constexpr):
    """``Eᵀ X`` over ``length`` examples from ``start`` on; in the Gram form ``Δ XᵀX``."""
    inner = start + tl.arange(0, P.block_r)
    if P.form == "gram":
        e_ptr = address(row_ptr, c.WEIGHT + c.COPY, P.operand) + (t % 2) * stride(row_ptr, c.WEIGHT + c.COPY_SIZE)
        e_stride = stride(row_ptr, c.WEIGHT + c.STRIDE)
    else:
        e_ptr, e_stride = address(row_ptr, c.E, P.operand), stride(row_ptr, c.E_STRIDE)
    e_ptrs = e_ptr + rows.to(tl.int64)[:, None] * e_stride + inner[None, :]
    x_ptr = address(row_ptr, c.XT if P.transposed else c.X, P.operand)
    if P.sampled:
        x_ptr += (t - 1) * stride(row_ptr, c.X_STEP)
    if P.transposed:
        x_ptrs = x_ptr + columns.to(tl.int64)[None, :] * stride(row_ptr, c.XT_STRIDE) + inner[:, None]
        x_step = tl.full((), P.block_r, tl.int64)
    else:
        x_ptrs = x_ptr + inner.to(tl.int64)[:, None] * stride(row_ptr, c.X_STRIDE) + columns[None, :]
        x_step = stride(row_ptr, c.X_STRIDE) * P.block_r
    accumulator = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    return product(e_ptrs, x_ptrs, P.block_r, x_step, length, accumulator, P)


@triton.jit
def partial_tile(row_ptr, n_block, k_block, split, t, P: tl.constexpr):
    """The product of an update tile over one split of the batch: for layers of few tiles and many examples."""
    SLICES: tl.constexpr = P.slices
    WIDTH: tl.constexpr = P.block_k // SLICES
    rows = n_block * P.block_n + tl.arange(0, P.block_n)
    columns = k_block * P.block_k + tl.arange(0, P.block_k)
    most = stride(row_ptr, c.SPLIT_ROWS)
    start = split * most
    length = tl.minimum(tl.load(row_ptr + c.BATCH) - start, most)
    multiplied = _gradient_product(row_ptr, rows, columns, start, length, t, P)
    partial_ptr = address(row_ptr, c.PARTIALS, tl.float32) + split * stride(row_ptr, c.WEIGHT + c.COPY_SIZE)
    offsets = rows.to(tl.int64)[:, None] * stride(row_ptr, c.WEIGHT + c.STRIDE)
    slices = sliced(multiplied, SLICES)
    for i in tl.static_range(SLICES):
        slice_columns = k_block * P.block_k + i * WIDTH + tl.arange(0, WIDTH)
        tl.store(partial_ptr + offsets + slice_columns[None, :], slices[i])


@triton.jit
def _weight_tile(row_ptr, block, sizes, when, loss_scale, bad_ptr, trace_ptr, P: tl.constexpr, U: tl.constexpr):
    """Update of the weight; writes the partial sums of the objective from ``trace_ptr`` on.

    ``block`` is ``(n_block, k_block, rows, columns)``, ``sizes`` is ``(batch, k_blocks)``.
    """
    SLICES: tl.constexpr = P.slices
    t = when[0]
    n_block, k_block, rows, columns = block
    batch, k_blocks = sizes
    length = tl.where(t > 0, batch, 0)  # E_0 = 0
    splits = 1
    if P.split:
        splits = tl.where(t > 0, tl.load(row_ptr + c.SPLITS), 1)
        length = tl.where(splits > 1, 0, length)  # partial tiles have multiplied
    multiplied = _gradient_product(row_ptr, rows, columns, 0, length, t, P)

    old_scale, new_scale = 1.0, 1.0
    if P.operand == tl.float16:
        old_scale = increment_scale(row_ptr, n_block, t - 1, P)
        new_scale = increment_scale(row_ptr, n_block, t, P)
    scales = (loss_scale, old_scale, new_scale, splits)
    amax = 0.0
    slices = sliced(multiplied, SLICES)
    for i in tl.static_range(SLICES):
        start = k_block * P.block_k + i * (P.block_k // SLICES)
        slice_ptr = trace_ptr + (k_block * SLICES + i)
        amax = tl.maximum(amax, _weight_slice(row_ptr, slices[i], rows, start, when, scales, bad_ptr, slice_ptr, P, U))
    if P.operand == tl.float16:
        n_blocks = tl.load(row_ptr + c.N_BLOCKS)
        place = (((t + 1) % 3) * n_blocks + n_block) * k_blocks + k_block
        tl.store(address(row_ptr, c.AMAX, tl.float32) + place, amax)


@triton.jit
def update_tile(row_ptr, n_block, k_block, when, bad_ptr, trace_ptr, trace_stride, P: tl.constexpr, U: tl.constexpr):
    """A step of the rule on rows of ``n_block`` and columns of ``k_block``, and with the first columns on the bias."""
    SLICES: tl.constexpr = P.slices
    t = when[0]
    rows = n_block * P.block_n + tl.arange(0, P.block_n)
    columns = k_block * P.block_k + tl.arange(0, P.block_k)
    batch = tl.load(row_ptr + c.BATCH)
    loss_scale = bits_to_float(tl.load(row_ptr + c.SCALE))
    k_blocks = tl.load(row_ptr + c.K_BLOCKS)
    trace_ptr += (t + 1) * trace_stride + tl.load(row_ptr + c.TRACE_UPDATE) + n_block * (k_blocks * SLICES + 1)
    if tl.load(row_ptr + c.WEIGHT + c.GRAD) != 0:
        block = (n_block, k_block, rows, columns)
        _weight_tile(row_ptr, block, (batch, k_blocks), when, loss_scale, bad_ptr, trace_ptr, P, U)
    if (k_block == 0) & (tl.load(row_ptr + c.BIAS + c.GRAD) != 0):
        bias_tile(row_ptr, rows, when, loss_scale, bad_ptr, trace_ptr + k_blocks * SLICES, P, U)
