"""The two device functions that every driver calls: activation tile and update tile.

All scratch is zero-padded to whole tiles, so the loops of products need no masks; only what belongs to the caller
(gradients, weights, stored state) is read and written under a mask. ``X`` is read along its rows by the activation
tile; the update tile reads it along the batch, from a transposed copy where the matrix unit wants that.
"""

import triton
import triton.language as tl

from locoprop_kernels.kernels import columns as c


@triton.jit
def address(row_ptr, column, dtype: tl.constexpr):
    """An address of ours, aligned for vector loads."""
    return tl.multiple_of(tl.load(row_ptr + column).to(tl.pointer_type(dtype)), 16)  # lost if put before the cast


@triton.jit
def callers_address(row_ptr, column, dtype: tl.constexpr):
    """An address of the caller's, aligned to its elements alone."""
    return tl.load(row_ptr + column).to(tl.pointer_type(dtype))


@triton.jit
def stride(row_ptr, column):
    """A stride of ours: a multiple of a tile."""
    return tl.multiple_of(tl.load(row_ptr + column), 16)


@triton.jit
def bits_to_float(bits):
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def is_finite(value):
    return tl.abs(value) < float("inf")


@triton.jit
def _round_bits(value, BITS: tl.constexpr):
    """Round float32 to nearest even in all but its last ``BITS`` bits."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + (1 << (BITS - 1)) - 1 + ((bits >> BITS) & 1)) & -(1 << BITS)
    return tl.where(is_finite(value), rounded.to(tl.float32, bitcast=True), value)


@triton.jit
def to_dtype(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round float32 to ``DTYPE``, to nearest; the interpreter would truncate to bfloat16."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        value = _round_bits(value, 16)
    return value.to(DTYPE)


@triton.jit
def as_operand(value, OPERAND: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round float32 to the operands' dtype; to nearest for TF32 too, which the matrix unit would truncate."""
    if PRECISION == "tf32":
        value = _round_bits(value, 13)
    elif OPERAND == tl.float16:  # scaled by a guess: what outgrew it saturates, what is not finite stays so
        bounded = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
        value = tl.where(is_finite(value), bounded, value)
    return to_dtype(value, OPERAND, INTERPRETED)


@triton.jit
def _dot(left, right, accumulator, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # it takes bfloat16 for integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, accumulator, input_precision=PRECISION)


@triton.jit
def _product(left_ptrs, right_ptrs, left_step, right_step, length, accumulator, BLOCK_R: tl.constexpr,
             PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Accumulate over ``length`` columns of ``left`` and rows of ``right``."""
    for _ in range(0, length, BLOCK_R):
        accumulator = _dot(tl.load(left_ptrs), tl.load(right_ptrs), accumulator, PRECISION, INTERPRETED)
        left_ptrs += left_step
        right_ptrs += right_step
    return accumulator


@triton.jit
def _halves(tile):
    """Left and right half: an epilogue on part of a tile needs part of the registers."""
    return tl.split(tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def _halved(tiles):
    halves = ()
    for i in tl.static_range(len(tiles)):
        halves = halves + _halves(tiles[i])
    return halves


@triton.jit
def _parts(tile, PARTS: tl.constexpr):
    """``tile`` cut into ``PARTS`` (1, 2, 4 or 8) groups of columns, in order."""
    parts = (tile,)
    if PARTS > 1:
        parts = _halved(parts)
    if PARTS > 2:
        parts = _halved(parts)
    if PARTS > 4:
        parts = _halved(parts)
    return parts


@triton.jit
def increment_scale(row_ptr, n_block, t, BLOCKS: tl.constexpr):
    """Power of two by which the update of local step ``t`` scales Δ, to about 2⁻⁶: float16 has no range for less.

    It is taken from the largest |Δ| before the update (at the first from Δ_1 itself, which a first pass has left
    there), so there is headroom of 2²¹ for growth in one local step. ``E`` is scaled alike.
    """
    n_blocks = tl.load(row_ptr + c.N_BLOCKS)
    k_blocks = tl.load(row_ptr + c.K_BLOCKS)
    amax_ptr = address(row_ptr, c.AMAX, tl.float32) + ((tl.maximum(t, 1) % 3) * n_blocks + n_block) * k_blocks
    amax = tl.zeros((BLOCKS,), tl.float32)
    for start in range(0, k_blocks, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        amax = tl.maximum(amax, tl.load(amax_ptr + blocks, blocks < k_blocks, 0.0))
    largest = tl.max(amax, 0)
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    exponent = tl.where(largest == 0, 0, tl.minimum(tl.maximum(-6 - exponent, -100), 100))
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _transfer_difference(a0, change, code, parameter, TRANSFERS: tl.constexpr):
    """``f(a0 + change) - f(a0)`` for the layer's own ``f``; the identity has no code."""
    difference = change
    for i in tl.static_range(len(TRANSFERS)):
        if code == i:
            f: tl.constexpr = TRANSFERS[i]
            difference = f(a0 + change, parameter) - f(a0, parameter)
    return difference


@triton.jit
def _divergence(a0, change, code, parameter, TRANSFERS: tl.constexpr, DIVERGENCES: tl.constexpr):
    a0, change = a0.to(tl.float64), change.to(tl.float64)
    a = a0 + change
    loss = 0.5 * change * change
    for i in tl.static_range(len(DIVERGENCES)):
        if code == i:
            divergence: tl.constexpr = DIVERGENCES[i]
            f: tl.constexpr = TRANSFERS[i]
            loss = divergence(a, a0, parameter.to(tl.float64), f)
    return loss


@triton.jit
def _activation_epilogue(row_ptr, product, rows, start, part, trace_ptr, scale, TRANSFERS: tl.constexpr,
                         DIVERGENCES: tl.constexpr, OPERAND: tl.constexpr, PREACTIVATION: tl.constexpr,
                         PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, TRACE: tl.constexpr,
                         ROWWISE: tl.constexpr):  # fmt: skip
    """``E`` of part of a tile; returns its sums over the batch."""
    columns = start + tl.arange(0, product.shape[1])
    code = tl.load(row_ptr + c.TRANSFER)
    parameter = bits_to_float(tl.load(row_ptr + c.PARAMETER))
    offsets = rows.to(tl.int64)[:, None] * stride(row_ptr, c.E_STRIDE) + columns[None, :]
    valid = (rows < tl.load(row_ptr + c.OUTPUTS))[:, None] & (columns < tl.load(row_ptr + c.BATCH))[None, :]

    change = product * (1.0 / scale)
    if tl.load(row_ptr + c.BIAS + c.GRAD) != 0:
        change += tl.load(address(row_ptr, c.BIAS + c.DELTA, tl.float32) + rows)[:, None]
    difference = change
    if ROWWISE:  # another kernel goes over whole rows
        tl.store(address(row_ptr, c.CHANGE, tl.float32) + offsets, change)
    else:
        a0 = tl.load(address(row_ptr, c.A0, PREACTIVATION) + offsets).to(tl.float32)
        difference = _transfer_difference(a0, change, code, parameter, TRANSFERS)
        difference = tl.where(valid, difference, 0.0)
        tl.store(
            address(row_ptr, c.E, OPERAND) + offsets, as_operand(difference * scale, OPERAND, PRECISION, INTERPRETED)
        )
        if TRACE:
            loss = tl.where(valid, _divergence(a0, change, code, parameter, TRANSFERS, DIVERGENCES), 0.0)
            tl.store(trace_ptr + part, tl.sum(tl.sum(loss, 1), 0))
    return tl.sum(difference, 1)


@triton.jit
def activation_tile(row_ptr, n_block, b_block, t, trace_ptr, trace_stride, TRANSFERS: tl.constexpr,
                    DIVERGENCES: tl.constexpr, OPERAND: tl.constexpr, PREACTIVATION: tl.constexpr,
                    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, TRACE: tl.constexpr, ROWWISE: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr,
                    PARTS: tl.constexpr):  # fmt: skip
    """``E = f(A0 + Δ Xᵀ + δ) - f(A0)`` on rows of block ``n_block`` and examples of block ``b_block``."""
    rows = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    examples = b_block * BLOCK_B + tl.arange(0, BLOCK_B)
    inner = tl.arange(0, BLOCK_R)
    delta_ptrs = (address(row_ptr, c.WEIGHT + c.COPY, OPERAND)
                  + rows.to(tl.int64)[:, None] * stride(row_ptr, c.WEIGHT + c.STRIDE) + inner[None, :])  # fmt: skip
    x_ptrs = (address(row_ptr, c.X, OPERAND) + examples.to(tl.int64)[None, :] * stride(row_ptr, c.X_STRIDE)
              + inner[:, None])  # fmt: skip
    product = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    length = tl.load(row_ptr + c.REDUCED)
    product = _product(delta_ptrs, x_ptrs, BLOCK_R, BLOCK_R, length, product, BLOCK_R, PRECISION, INTERPRETED)

    scale = 1.0
    if OPERAND == tl.float16:
        if length > 0:  # a frozen weight has no scales
            scale = increment_scale(row_ptr, n_block, t - 1, BLOCK_R)
    b_blocks = tl.load(row_ptr + c.B_BLOCKS)
    trace_ptr += t * trace_stride + tl.load(row_ptr + c.TRACE_ACTIVATION) + n_block * b_blocks * PARTS
    sums = tl.zeros_like(rows).to(tl.float32)
    parts = _parts(product, PARTS)
    for i in tl.static_range(PARTS):
        sums += _activation_epilogue(
            row_ptr, parts[i], rows, b_block * BLOCK_B + i * (BLOCK_B // PARTS), b_block * PARTS + i, trace_ptr, scale,
            TRANSFERS, DIVERGENCES, OPERAND, PREACTIVATION, PRECISION, INTERPRETED, TRACE, ROWWISE)  # fmt: skip
    if not ROWWISE:
        sums_ptr = address(row_ptr, c.ROW_SUMS, tl.float32) + b_block * stride(row_ptr, c.ROW_SUMS_STRIDE)
        tl.store(sums_ptr + rows, sums)


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
        tl.store(bad_ptr + tl.zeros_like(new_offsets), 1, valid & (is_finite(value) == 0))


@triton.jit
def _value(parameter_ptr, long_rows, columns, valid, PARAMETER: tl.constexpr):
    """The parameter at the start of the step, in float32."""
    offsets = (long_rows * tl.load(parameter_ptr + c.VALUE_ROW)
               + columns.to(tl.int64)[None, :] * tl.load(parameter_ptr + c.VALUE_COLUMN))  # fmt: skip
    return tl.load(callers_address(parameter_ptr, c.VALUE, PARAMETER) + offsets, valid, 0.0).to(tl.float32)


@triton.jit
def _moving(parameter_ptr, offsets, valid):
    """Where the parameter's mask is not 0; everywhere if it has none."""
    mask_ptr = callers_address(parameter_ptr, c.MASK, tl.uint8)
    masked = tl.load(parameter_ptr + c.MASK) != 0
    return tl.load(mask_ptr + offsets, valid & masked, 1) != 0


@triton.jit
def _step(parameter_ptr, change, rows, columns, n, width, row_stride, t, last, rate, prox, loss_scale, bad_ptr,
          RULE: tl.constexpr, HYPER: tl.constexpr, SLOTS: tl.constexpr, COUNTS_STEPS: tl.constexpr,
          REGULARISER: tl.constexpr, MASKED: tl.constexpr, PARAMETER: tl.constexpr,
          INTERPRETED: tl.constexpr):  # fmt: skip
    """One step of the update rule on a tile of a weight or bias, whose gradient has changed by ``change``.

    Returns the new increment and the gradient at the start, both zero outside the parameter and where its mask is 0.
    """
    valid = (rows < n)[:, None] & (columns < width)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    new_offsets = long_rows * row_stride + columns[None, :]
    old_offsets = long_rows * width + columns[None, :]
    grad_offsets = long_rows * tl.load(parameter_ptr + c.GRAD_ROW) + columns[None, :]

    start = tl.load(callers_address(parameter_ptr, c.GRAD, PARAMETER) + grad_offsets, valid, 0.0).to(tl.float32)
    grad = (start + change) * loss_scale
    delta_ptrs = address(parameter_ptr, c.DELTA, tl.float32) + new_offsets
    delta = tl.zeros_like(grad)
    if t > 0:
        delta = tl.load(delta_ptrs)
        grad += prox * delta
    if REGULARISER is not None:
        value = _value(parameter_ptr, long_rows, columns, valid, PARAMETER)
        grad += REGULARISER(value + delta, value)
    if MASKED:
        moving = _moving(parameter_ptr, old_offsets, valid)
        start = tl.where(moving, start, 0.0)
        grad = tl.where(moving, grad, 0.0)

    s0, s1, s2 = grad, grad, grad
    if SLOTS > 0:
        s0 = _slot(parameter_ptr, 0, old_offsets, new_offsets, valid, t)
    if SLOTS > 1:
        s1 = _slot(parameter_ptr, 1, old_offsets, new_offsets, valid, t)
    if SLOTS > 2:
        s2 = _slot(parameter_ptr, 2, old_offsets, new_offsets, valid, t)
    step = t + 1.0
    if COUNTS_STEPS:
        step += tl.load(callers_address(parameter_ptr, c.STEP, tl.int64)).to(tl.float32)
    rate *= bits_to_float(tl.load(parameter_ptr + c.RATE))
    delta, s0, s1, s2 = RULE(delta, grad, s0, s1, s2, rate, step, HYPER)

    delta = tl.where(valid, delta, 0.0)
    if MASKED:  # momentum may have moved what has no gradient; read again, to save registers
        delta = tl.where(_moving(parameter_ptr, old_offsets, valid), delta, 0.0)
    tl.store(delta_ptrs, delta)
    if SLOTS > 0:
        _keep_slot(parameter_ptr, 0, s0, new_offsets, valid, last, bad_ptr)
    if SLOTS > 1:
        _keep_slot(parameter_ptr, 1, s1, new_offsets, valid, last, bad_ptr)
    if SLOTS > 2:
        _keep_slot(parameter_ptr, 2, s2, new_offsets, valid, last, bad_ptr)
    if last:  # whether a commit would write a number that is not finite
        value = _value(parameter_ptr, long_rows, columns, valid, PARAMETER)
        value = to_dtype(value + delta, PARAMETER, INTERPRETED).to(tl.float32)
        tl.store(bad_ptr + tl.zeros_like(new_offsets), 1, valid & (is_finite(value) == 0))
    return delta, start * loss_scale


@triton.jit
def _objective(delta, start, prox):
    """Sum of ``Δ · G_0 + λ/2 Δ²``."""
    delta = delta.to(tl.float64)
    return tl.sum(tl.sum(delta * start.to(tl.float64) + (0.5 * prox) * delta * delta, 1), 0)


@triton.jit
def _sum_x(row_ptr, columns, k):
    """``Σx`` of the Gram driver."""
    return tl.load(address(row_ptr, c.ROW_SUMS, tl.float32) + columns, columns < k, 0.0)


@triton.jit
def _old_bias(row_ptr, rows, t):
    """``δ`` before local step ``t`` in the Gram driver, where other tiles read it while one writes the next."""
    size = tl.load(row_ptr + c.BIAS + c.COPY_SIZE)
    return tl.load(address(row_ptr, c.BIAS + c.COPY, tl.float32) + (t % 2) * size + rows)


@triton.jit
def _gram_bias_change(row_ptr, rows, t, OPERAND: tl.constexpr, BLOCK_R: tl.constexpr):
    """``Δ Σx + B δ``."""
    inner = tl.arange(0, BLOCK_R)
    copy_ptr = address(row_ptr, c.WEIGHT + c.COPY, OPERAND) + (t % 2) * stride(row_ptr, c.WEIGHT + c.COPY_SIZE)
    copy_ptrs = copy_ptr + rows.to(tl.int64)[:, None] * stride(row_ptr, c.WEIGHT + c.STRIDE) + inner[None, :]
    change = _old_bias(row_ptr, rows, t) * tl.load(row_ptr + c.ROWS).to(tl.float32)
    k = tl.load(row_ptr + c.INPUTS)
    for start in range(0, k, BLOCK_R):
        sum_x = _sum_x(row_ptr, start + inner, k)
        change += tl.sum(tl.load(copy_ptrs + start).to(tl.float32) * sum_x[None, :], 1)
    return change


@triton.jit
def _weight_epilogue(row_ptr, product, rows, start, part, t, last, rate, prox, loss_scale, old_scale, new_scale,
                     splits, bad_ptr, trace_ptr, RULE: tl.constexpr, HYPER: tl.constexpr, SLOTS: tl.constexpr,
                     COUNTS_STEPS: tl.constexpr, REGULARISER: tl.constexpr, MASKED: tl.constexpr,
                     OPERAND: tl.constexpr, PARAMETER: tl.constexpr, PRECISION: tl.constexpr,
                     INTERPRETED: tl.constexpr, TRACE: tl.constexpr, GRAM: tl.constexpr,
                     SPLIT: tl.constexpr):  # fmt: skip
    """Update of part of a weight tile; returns its largest |Δ|."""
    columns = start + tl.arange(0, product.shape[1])
    n, k = tl.load(row_ptr + c.OUTPUTS), tl.load(row_ptr + c.INPUTS)
    row_stride = stride(row_ptr, c.WEIGHT + c.STRIDE)
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    if SPLIT:
        if splits > 1:
            partials_ptrs = address(row_ptr, c.PARTIALS, tl.float32) + offsets
            for _ in range(0, splits):
                product += tl.load(partials_ptrs)
                partials_ptrs += stride(row_ptr, c.WEIGHT + c.COPY_SIZE)
    change = product * (1.0 / old_scale)
    if GRAM:
        if (t > 0) & (tl.load(row_ptr + c.BIAS + c.GRAD) != 0):
            change += _old_bias(row_ptr, rows, t)[:, None] * _sum_x(row_ptr, columns, k)[None, :]
    delta, gradient = _step(row_ptr + c.WEIGHT, change, rows, columns, n, k, row_stride, t, last,
                         rate, prox, loss_scale, bad_ptr, RULE, HYPER, SLOTS, COUNTS_STEPS, REGULARISER, MASKED,
                         PARAMETER, INTERPRETED)  # fmt: skip
    copy_ptr = address(row_ptr, c.WEIGHT + c.COPY, OPERAND)
    if GRAM:
        copy_ptr += ((t + 1) % 2) * stride(row_ptr, c.WEIGHT + c.COPY_SIZE)
    tl.store(copy_ptr + offsets, as_operand(delta * new_scale, OPERAND, PRECISION, INTERPRETED))
    if TRACE:
        tl.store(trace_ptr + part, _objective(delta, gradient, prox))
    amax = 0.0
    if OPERAND == tl.float16:
        amax = tl.max(tl.max(tl.abs(delta), 1), 0)
    return amax


@triton.jit
def _bias_tile(row_ptr, rows, t, last, rate, prox, loss_scale, bad_ptr, trace_ptr, RULE: tl.constexpr,
               HYPER: tl.constexpr, SLOTS: tl.constexpr, COUNTS_STEPS: tl.constexpr, REGULARISER: tl.constexpr,
               MASKED: tl.constexpr, PARAMETER: tl.constexpr, INTERPRETED: tl.constexpr, TRACE: tl.constexpr,
               GRAM: tl.constexpr, OPERAND: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    change = tl.zeros_like(rows).to(tl.float32)
    if t > 0:
        if GRAM:
            change += _gram_bias_change(row_ptr, rows, t, OPERAND, BLOCK_R)
        else:
            count = tl.load(row_ptr + c.ROW_SUM_COUNT)
            sums_ptrs = address(row_ptr, c.ROW_SUMS, tl.float32) + rows[None, :]
            for start in range(0, count, 16):
                blocks = start + tl.arange(0, 16)[:, None]
                offsets = blocks * stride(row_ptr, c.ROW_SUMS_STRIDE)
                change += tl.sum(tl.load(sums_ptrs + offsets, blocks < count, 0.0), 0)
    n = tl.load(row_ptr + c.OUTPUTS)
    delta, gradient = _step(row_ptr + c.BIAS, change[:, None], rows, tl.arange(0, 1), n, 1, 1, t, last, rate, prox,
                         loss_scale, bad_ptr, RULE, HYPER, SLOTS, COUNTS_STEPS, REGULARISER, MASKED,
                         PARAMETER, INTERPRETED)  # fmt: skip
    if GRAM:
        copy_ptr = address(row_ptr, c.BIAS + c.COPY, tl.float32) + ((t + 1) % 2) * tl.load(
            row_ptr + c.BIAS + c.COPY_SIZE
        )
        tl.store(copy_ptr + rows[:, None], delta)
    if TRACE:
        tl.store(trace_ptr, _objective(delta, gradient, prox))


@triton.jit
def _gradient_product(row_ptr, rows, columns, start, length, t, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
                      INTERPRETED: tl.constexpr, TRANSPOSED: tl.constexpr, GRAM: tl.constexpr,
                      BLOCK_R: tl.constexpr):  # fmt: skip
    """``Eᵀ X`` over ``length`` examples from ``start`` on; in the Gram driver ``Δ XᵀX``."""
    inner = start + tl.arange(0, BLOCK_R)
    if GRAM:
        e_ptr = address(row_ptr, c.WEIGHT + c.COPY, OPERAND) + (t % 2) * stride(row_ptr, c.WEIGHT + c.COPY_SIZE)
        e_stride = stride(row_ptr, c.WEIGHT + c.STRIDE)
    else:
        e_ptr, e_stride = address(row_ptr, c.E, OPERAND), stride(row_ptr, c.E_STRIDE)
    e_ptrs = e_ptr + rows.to(tl.int64)[:, None] * e_stride + inner[None, :]
    if TRANSPOSED:
        x_ptrs = (address(row_ptr, c.XT, OPERAND)
                  + columns.to(tl.int64)[None, :] * stride(row_ptr, c.XT_STRIDE) + inner[:, None])  # fmt: skip
        x_step = tl.full((), BLOCK_R, tl.int64)
    else:
        x_ptrs = (address(row_ptr, c.X, OPERAND)
                  + inner.to(tl.int64)[:, None] * stride(row_ptr, c.X_STRIDE) + columns[None, :])  # fmt: skip
        x_step = stride(row_ptr, c.X_STRIDE) * BLOCK_R
    product = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    return _product(e_ptrs, x_ptrs, BLOCK_R, x_step, length, product, BLOCK_R, PRECISION, INTERPRETED)


@triton.jit
def partial_tile(row_ptr, n_block, k_block, split, t, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
                 INTERPRETED: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                 BLOCK_R: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """The product of an update tile over one part of the batch: for layers of few tiles and many examples."""
    rows = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    most = stride(row_ptr, c.SPLIT_ROWS)
    start = split * most
    length = tl.minimum(tl.load(row_ptr + c.BATCH) - start, most)
    product = _gradient_product(row_ptr, rows, columns, start, length, t, OPERAND, PRECISION, INTERPRETED, TRANSPOSED,
                                False, BLOCK_R)  # fmt: skip
    partial_ptr = address(row_ptr, c.PARTIALS, tl.float32) + split * stride(row_ptr, c.WEIGHT + c.COPY_SIZE)
    offsets = rows.to(tl.int64)[:, None] * stride(row_ptr, c.WEIGHT + c.STRIDE)
    parts = _parts(product, PARTS)
    for i in tl.static_range(PARTS):
        part_columns = k_block * BLOCK_K + i * (BLOCK_K // PARTS) + tl.arange(0, BLOCK_K // PARTS)
        tl.store(partial_ptr + offsets + part_columns[None, :], parts[i])


@triton.jit
def update_tile(row_ptr, n_block, k_block, t, last, rate, prox, bad_ptr, trace_ptr, trace_stride, RULE: tl.constexpr,
                HYPER: tl.constexpr, SLOTS: tl.constexpr, COUNTS_STEPS: tl.constexpr, REGULARISER: tl.constexpr,
                MASKED: tl.constexpr, OPERAND: tl.constexpr, PARAMETER: tl.constexpr, PRECISION: tl.constexpr,
                INTERPRETED: tl.constexpr, TRACE: tl.constexpr, TRANSPOSED: tl.constexpr, GRAM: tl.constexpr,
                SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
                PARTS: tl.constexpr):  # fmt: skip
    """``G = (G_0 + Eᵀ X) · scale + λ Δ`` and a step of the rule, on rows of ``n_block`` and columns of ``k_block``."""
    rows = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    batch = tl.load(row_ptr + c.BATCH)
    loss_scale = bits_to_float(tl.load(row_ptr + c.SCALE))
    k_blocks = tl.load(row_ptr + c.K_BLOCKS)
    trace_ptr += (t + 1) * trace_stride + tl.load(row_ptr + c.TRACE_UPDATE) + n_block * (k_blocks * PARTS + 1)

    if tl.load(row_ptr + c.WEIGHT + c.GRAD) != 0:
        length = tl.where(t > 0, batch, 0)  # E_0 = 0
        splits = 1
        if SPLIT:
            splits = tl.where(t > 0, tl.load(row_ptr + c.SPLITS), 1)
            length = tl.where(splits > 1, 0, length)  # partial tiles have multiplied
        product = _gradient_product(row_ptr, rows, columns, 0, length, t, OPERAND, PRECISION, INTERPRETED, TRANSPOSED,
                                    GRAM, BLOCK_R)  # fmt: skip

        old_scale, new_scale = 1.0, 1.0
        if OPERAND == tl.float16:
            old_scale = increment_scale(row_ptr, n_block, t - 1, BLOCK_R)
            new_scale = increment_scale(row_ptr, n_block, t, BLOCK_R)
        amax = 0.0
        parts = _parts(product, PARTS)
        for i in tl.static_range(PARTS):
            part_amax = _weight_epilogue(
                row_ptr, parts[i], rows, k_block * BLOCK_K + i * (BLOCK_K // PARTS), k_block * PARTS + i, t, last,
                rate, prox, loss_scale, old_scale, new_scale, splits, bad_ptr, trace_ptr, RULE, HYPER, SLOTS,
                COUNTS_STEPS, REGULARISER, MASKED, OPERAND, PARAMETER, PRECISION, INTERPRETED, TRACE, GRAM,
                SPLIT)  # fmt: skip
            amax = tl.maximum(amax, part_amax)
        if OPERAND == tl.float16:
            n_blocks = tl.load(row_ptr + c.N_BLOCKS)
            block = (((t + 1) % 3) * n_blocks + n_block) * k_blocks + k_block
            tl.store(address(row_ptr, c.AMAX, tl.float32) + block, amax)

    if (k_block == 0) & (tl.load(row_ptr + c.BIAS + c.GRAD) != 0):
        bias_ptr = trace_ptr + k_blocks * PARTS
        _bias_tile(row_ptr, rows, t, last, rate, prox, loss_scale, bad_ptr, bias_ptr, RULE, HYPER, SLOTS,
                   COUNTS_STEPS, REGULARISER, MASKED, PARAMETER, INTERPRETED, TRACE, GRAM, OPERAND,
                   BLOCK_R)  # fmt: skip
