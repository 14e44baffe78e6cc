"""The update tile: ``G = (G_0 + Eᵀ X) · scale + λ Δ`` and a step of the rule, on a block of rows and one of columns.

``X`` is read along the batch, from a transposed copy where the matrix unit wants that. Values that go together are
handed on as tuples: *when* is ``(t, rate, prox)``, the local step; *place* is part of a parameter.
"""

import triton
import triton.language as tl

from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.device import gram, parameter
from locoprop_kernels.kernels.device.memory import address, address_for_fours, as_operand, bits_to_float, stride
from locoprop_kernels.kernels.device.products import difference_scale, increment_scale, inputs_scale, product, sliced


@triton.jit
def _block(row_ptr, n_block, P: tl.constexpr):
    """A block of rows: their numbers, elements before them, and their offsets behind; of matrices with strides as Δ."""
    row_stride = stride(row_ptr, c.WEIGHT + c.STRIDE)
    local_rows = tl.arange(0, P.block_n)
    first = (n_block * P.block_n).to(tl.int64) * row_stride
    return n_block * P.block_n + local_rows, first, local_rows[:, None] * row_stride.to(tl.int32)


@triton.jit
def _increment_scale(row_ptr, n_block, t, P: tl.constexpr):
    """By which the update of local step ``t`` scales Δ, where operands are scaled."""
    scale = 1.0
    if P.scaled:
        scale = increment_scale(row_ptr, n_block, t, P)
    return scale


@triton.jit
def _weight_slice(row_ptr, block, column, change, when, scales, own, trace_ptr, FIRST: tl.constexpr, P: tl.constexpr,
                  U: tl.constexpr):  # fmt: skip
    """Update of a slice of a weight tile, from ``column`` on, whose gradient has changed by ``change``.

    ``scales`` are those of the loss and of the new Δ. Returns the largest |Δ|, where operands are scaled.
    """
    t, rate, prox = when
    rows, first, row_offsets = block
    columns = column + tl.arange(0, change.shape[1])
    offsets = row_offsets + columns[None, :]
    place = (rows, columns, tl.load(row_ptr + c.OUTPUTS), tl.load(row_ptr + c.INPUTS))
    rate, count = parameter.rule_at(row_ptr + c.WEIGHT, t, rate, U)
    moment = (rate, count, prox)
    before = parameter.load(row_ptr + c.WEIGHT, own, offsets, place, FIRST, U)
    delta, gradient = parameter.step(
        row_ptr + c.WEIGHT, own, offsets, before, change, place, moment, scales[0], FIRST, U
    )
    copy_ptr = address_for_fours(row_ptr, c.WEIGHT + c.COPY, P.operand) + first
    if P.form == "gram":
        copy_ptr += ((t + 1) % 2) * stride(row_ptr, c.WEIGHT + c.COPY_SIZE)
    tl.store(copy_ptr + offsets, as_operand(delta * scales[1], P))
    if P.trace:
        tl.store(trace_ptr, parameter.objective(delta, gradient, prox))
    largest = 0.0
    if P.scaled:
        largest = tl.max(tl.abs(delta))
    return largest


@triton.jit
def _change(row_ptr, block, column, multiplied, t, factor, splits, P: tl.constexpr):
    """By how much the gradient has changed, from a slice of the product."""
    rows, first, row_offsets = block
    columns = column + tl.arange(0, multiplied.shape[1])
    if P.split:
        if splits > 1:
            partials_ptrs = address(row_ptr, c.PARTIALS, tl.float32) + first + (row_offsets + columns[None, :])
            for _ in range(0, splits):
                multiplied += tl.load(partials_ptrs)
                partials_ptrs += stride(row_ptr, c.WEIGHT + c.COPY_SIZE)
    change = multiplied * factor
    if P.form == "gram":
        if tl.load(row_ptr + c.BIAS + c.GRAD) != 0:
            total = gram.sum_x(row_ptr, columns, tl.load(row_ptr + c.INPUTS))
            change += gram.old_bias(row_ptr, rows, t)[:, None] * total[None, :]
    return change


@triton.jit
def _bias_part(row_ptr, n_block, P: tl.constexpr, U: tl.constexpr):
    """A block of rows of the bias: pointers to what is ours, offsets behind them, and its place."""
    rows = tl.arange(0, P.block_n)
    own = parameter.own_pointers(row_ptr + c.BIAS, n_block * P.block_n, U)
    place = (n_block * P.block_n + rows, tl.arange(0, 1), tl.load(row_ptr + c.OUTPUTS), 1)
    return own, rows[:, None], place


@triton.jit
def _bias_step(row_ptr, n_block, change, when, loss_scale, trace_ptr, FIRST: tl.constexpr, P: tl.constexpr,
               U: tl.constexpr):  # fmt: skip
    t, rate, prox = when
    bias_ptr = row_ptr + c.BIAS
    own, offsets, place = _bias_part(row_ptr, n_block, P, U)
    rate, count = parameter.rule_at(bias_ptr, t, rate, U)
    moment = (rate, count, prox)
    before = parameter.load(bias_ptr, own, offsets, place, FIRST, U)
    delta, gradient = parameter.step(
        bias_ptr, own, offsets, before, change[:, None], place, moment, loss_scale, FIRST, U
    )
    if P.form == "gram":
        gram.keep_bias(row_ptr, place[0], t, delta)
    if P.trace:
        tl.store(trace_ptr, parameter.objective(delta, gradient, prox))


@triton.jit
def bias_tile(row_ptr, n_block, when, loss_scale, trace_ptr, P: tl.constexpr, U: tl.constexpr):
    """Update of the bias of a block of rows, a matrix of one column."""
    t = when[0]
    rows = n_block * P.block_n + tl.arange(0, P.block_n)
    change = tl.zeros_like(rows).to(tl.float32)
    if t == 0:  # E_0 = 0
        _bias_step(row_ptr, n_block, change, when, loss_scale, trace_ptr, True, P, U)
    else:
        if P.form == "gram":
            change += gram.bias_change(row_ptr, rows, t, P)
        else:
            blocks = tl.load(row_ptr + c.ROW_SUM_COUNT)
            sums_ptrs = address(row_ptr, c.ROW_SUMS, tl.float32) + rows
            sums_stride = stride(row_ptr, c.ROW_SUMS_STRIDE)
            for start in range(0, blocks, 16):
                for i in tl.static_range(16):  # under way together
                    change += tl.load(sums_ptrs + (start + i) * sums_stride, start + i < blocks, 0.0)
            if P.sampled:
                change *= bits_to_float(tl.load(row_ptr + c.SETS))
        _bias_step(row_ptr, n_block, change, when, loss_scale, trace_ptr, False, P, U)


@triton.jit
def check_bias(row_ptr, n_block, bad_ptr, P: tl.constexpr, U: tl.constexpr):
    """Set ``bad`` if a commit of a block of rows of the bias would write a number that is not finite."""
    own, offsets, place = _bias_part(row_ptr, n_block, P, U)
    parameter.check(row_ptr + c.BIAS, own, offsets, place, bad_ptr, P, U)


@triton.jit
def check_weight(row_ptr, n_block, columns, bad_ptr, P: tl.constexpr, U: tl.constexpr):
    """Set ``bad`` if a commit of a part of the weight would write a number that is not finite."""
    rows, first, row_offsets = _block(row_ptr, n_block, P)
    own = parameter.own_pointers(row_ptr + c.WEIGHT, first, U)
    place = (rows, columns, tl.load(row_ptr + c.OUTPUTS), tl.load(row_ptr + c.INPUTS))
    parameter.check(row_ptr + c.WEIGHT, own, row_offsets + columns[None, :], place, bad_ptr, P, U)


@triton.jit
def _gradient_product(row_ptr, n_block, k_block, start, length, t, P: tl.constexpr):
    """``Eᵀ X`` over ``length`` examples from ``start`` on; in the Gram form ``Δ XᵀX``."""
    inner, columns = tl.arange(0, P.block_r), tl.arange(0, P.block_k)
    first_column = k_block * P.block_k
    if P.form == "gram":
        e_ptr = address(row_ptr, c.WEIGHT + c.COPY, P.operand) + (t % 2) * stride(row_ptr, c.WEIGHT + c.COPY_SIZE)
        e_stride = stride(row_ptr, c.WEIGHT + c.STRIDE)
    else:
        e_ptr, e_stride = address(row_ptr, c.E, P.operand), stride(row_ptr, c.E_STRIDE)
    e_ptr += (n_block * P.block_n).to(tl.int64) * e_stride + start
    e_offsets = tl.arange(0, P.block_n)[:, None] * e_stride.to(tl.int32) + inner[None, :]
    x_ptr = address(row_ptr, c.XT if P.transposed else c.X, P.operand)
    if P.sampled:
        x_ptr += (t - 1) * stride(row_ptr, c.X_STEP)
    if P.transposed:
        x_stride = stride(row_ptr, c.XT_STRIDE)
        x_ptr += first_column.to(tl.int64) * x_stride + start
        x_offsets = columns[None, :] * x_stride.to(tl.int32) + inner[:, None]
        x_step = tl.full((), P.block_r, tl.int64)
    else:
        x_stride = stride(row_ptr, c.X_STRIDE)
        x_ptr += start * x_stride + first_column
        x_offsets = inner[:, None] * x_stride.to(tl.int32) + columns[None, :]
        x_step = x_stride * P.block_r
    return product(e_ptr, e_offsets, x_ptr, x_offsets, x_step, length, P)


@triton.jit
def partial_tile(row_ptr, n_block, k_block, split, t, P: tl.constexpr):
    """The product of an update tile over one split of the batch: for layers of few tiles and many examples."""
    SLICES: tl.constexpr = P.slices
    WIDTH: tl.constexpr = P.block_k // SLICES
    most = stride(row_ptr, c.SPLIT_ROWS)
    start = split * most
    length = tl.minimum(tl.load(row_ptr + c.BATCH) - start, most)
    multiplied = _gradient_product(row_ptr, n_block, k_block, start, length, t, P)
    _, first, row_offsets = _block(row_ptr, n_block, P)
    partial_ptr = address(row_ptr, c.PARTIALS, tl.float32) + split * stride(row_ptr, c.WEIGHT + c.COPY_SIZE) + first
    slices = sliced(multiplied, SLICES)
    for i in tl.static_range(SLICES):
        slice_columns = k_block * P.block_k + i * WIDTH + tl.arange(0, WIDTH)
        tl.store(partial_ptr + (row_offsets + slice_columns[None, :]), slices[i])


@triton.jit
def _first_weight_tile(row_ptr, n_block, k_block, when, loss_scale, trace_ptr, P: tl.constexpr, U: tl.constexpr):
    """Update of the weight at the first local step, where ``E_0 = 0``: from what is the caller's, without a product."""
    SLICES: tl.constexpr = P.slices
    WIDTH: tl.constexpr = P.block_k // SLICES
    block = _block(row_ptr, n_block, P)
    own = parameter.own_pointers(row_ptr + c.WEIGHT, block[1], U)
    scales = (loss_scale, _increment_scale(row_ptr, n_block, when[0], P))
    largest = 0.0
    for i in range(0, SLICES):
        change = tl.zeros((block[0].shape[0], WIDTH), tl.float32)
        column = k_block * P.block_k + i * WIDTH
        found = _weight_slice(row_ptr, block, column, change, when, scales, own, trace_ptr + i, True, P, U)
        largest = tl.maximum(largest, found)
    return largest


@triton.jit
def _later_weight_tile(row_ptr, n_block, k_block, when, loss_scale, trace_ptr, P: tl.constexpr, U: tl.constexpr):
    """Update of the weight at the other local steps."""
    SLICES: tl.constexpr = P.slices
    t = when[0]
    splits = 1
    length = tl.load(row_ptr + c.BATCH)
    if P.split:
        splits = tl.load(row_ptr + c.SPLITS)
        length = tl.where(splits > 1, 0, length)  # partial tiles have multiplied
    multiplied = _gradient_product(row_ptr, n_block, k_block, 0, length, t, P)
    # What the epilogue needs is loaded behind the product, which has no registers to spare.
    block = _block(row_ptr, n_block, P)
    own = parameter.own_pointers(row_ptr + c.WEIGHT, block[1], U)
    scales = (loss_scale, _increment_scale(row_ptr, n_block, t, P))
    factor = 1.0
    if P.scaled:
        factor = 1.0 / (difference_scale(row_ptr, n_block, t, P) * inputs_scale(row_ptr, P))
    if P.sampled:
        factor *= bits_to_float(tl.load(row_ptr + c.SETS))
    largest = 0.0
    slices = sliced(multiplied, SLICES)
    for i in tl.static_range(SLICES):
        column = k_block * P.block_k + i * (P.block_k // SLICES)
        change = _change(row_ptr, block, column, slices[i], t, factor, splits, P)
        found = _weight_slice(row_ptr, block, column, change, when, scales, own, trace_ptr + i, False, P, U)
        largest = tl.maximum(largest, found)
    return largest


@triton.jit
def _weight_tile(row_ptr, n_block, k_block, when, loss_scale, trace_ptr, P: tl.constexpr, U: tl.constexpr):
    """Update of the weight; writes the partial sums of the objective from ``trace_ptr`` on."""
    t = when[0]
    if t == 0:
        largest = _first_weight_tile(row_ptr, n_block, k_block, when, loss_scale, trace_ptr, P, U)
    else:
        largest = _later_weight_tile(row_ptr, n_block, k_block, when, loss_scale, trace_ptr, P, U)
    if P.scaled:
        place = ((t + 1) % 3) * tl.load(row_ptr + c.N_BLOCKS) + n_block
        place = place * tl.load(row_ptr + c.K_BLOCKS) + k_block
        tl.store(address(row_ptr, c.AMAX, tl.float32) + place, largest)


@triton.jit
def update_tile(row_ptr, n_block, k_block, when, bad_ptr, trace_ptr, trace_stride, P: tl.constexpr, U: tl.constexpr):
    """A step of the rule on rows of ``n_block`` and columns of ``k_block``, and with the first columns on the bias."""
    SLICES: tl.constexpr = P.slices
    WIDTH: tl.constexpr = P.block_k // SLICES
    t, last, rate, prox = when
    loss_scale = bits_to_float(tl.load(row_ptr + c.SCALE))
    k_blocks = tl.load(row_ptr + c.K_BLOCKS)
    trace_ptr += (t + 1) * trace_stride + tl.load(row_ptr + c.TRACE_UPDATE) + n_block * (k_blocks * SLICES + 1)
    moment = (t, rate, prox)
    has_weight = tl.load(row_ptr + c.WEIGHT + c.GRAD) != 0
    if has_weight:
        _weight_tile(row_ptr, n_block, k_block, moment, loss_scale, trace_ptr + k_block * SLICES, P, U)
    has_bias = (k_block == 0) & (tl.load(row_ptr + c.BIAS + c.GRAD) != 0)
    if has_bias:
        bias_tile(row_ptr, n_block, moment, loss_scale, trace_ptr + k_blocks * SLICES, P, U)
    if last:
        tl.debug_barrier()
        if has_weight:
            for column in range(k_block * P.block_k, (k_block + 1) * P.block_k, WIDTH):
                check_weight(row_ptr, n_block, column + tl.arange(0, WIDTH), bad_ptr, P, U)
        if has_bias:
            check_bias(row_ptr, n_block, bad_ptr, P, U)
