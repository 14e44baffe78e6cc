"""One program for each n-block, for all local steps: for few rows of the batch, which it holds on chip.

Rows of a weight are independent of each other, so nobody waits for anybody. A local step is one pass over the weights
of the n-block: as soon as a tile of Δ has had its update, its share of the next product ``Δ Xᵀ`` is added up, and ``E``
stays in registers. ``G_0``, Δ and state are read once in a local step, Δ and state are written once. The first pass
reads what is the caller's and leaves aligned, padded copies of ``G_0`` and state, which all others read.
"""

import triton
import triton.language as tl
from torch import Tensor

from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.device import parameter
from locoprop_kernels.kernels.device.activation import change_of, difference
from locoprop_kernels.kernels.device.memory import address, as_operand, bits_to_float, stride
from locoprop_kernels.kernels.device.products import dot, scale_of
from locoprop_kernels.kernels.device.update import bias_tile, check_bias, check_weight
from locoprop_kernels.kernels.spec import Spec, StepArguments


@triton.jit
def _x_pointer(row_ptr, column, index, P: tl.constexpr):
    """Where ``X``, or its transposed copy, begins; of set ``index``, where each local step has rows of its own."""
    x_ptr = address(row_ptr, column, P.operand)
    if P.sampled:
        x_ptr += index * stride(row_ptr, c.X_STEP)
    return x_ptr


@triton.jit
def _gradient_offsets(row_ptr, P: tl.constexpr):
    """Of a tile ``[rows, inputs]`` of ``X``, and how far it is from one column to the next."""
    rows, columns = tl.arange(0, P.block_b), tl.arange(0, P.block_k)
    if P.transposed:
        pitch = stride(row_ptr, c.XT_STRIDE).to(tl.int32)
        return rows[:, None] + columns[None, :] * pitch, pitch
    else:
        return rows[:, None] * stride(row_ptr, c.X_STRIDE).to(tl.int32) + columns[None, :], tl.full((), 1, tl.int32)


@triton.jit
def _weight_pass(row_ptr, n_block, e, factor, when, scale, own, trace_ptr, FIRST: tl.constexpr, P: tl.constexpr,
                 U: tl.constexpr):  # fmt: skip
    """Local step ``t`` of the n-block's weights, and their product with the rows of the next one.

    ``factor`` is that of ``Eᵀ X``, ``scale`` that of Δ; ``when`` is ``(t, following set, rate, prox)``.

    Returns ``scale · Δ Xᵀ`` ``[n, rows]`` and, for float16 alone, the largest |Δ|.
    """
    BLOCK_K: tl.constexpr = P.block_k
    t, following, rate, prox = when
    local_rows = tl.arange(0, P.block_n)
    inner, examples = tl.arange(0, BLOCK_K), tl.arange(0, P.block_b)
    rows = n_block * P.block_n + local_rows
    n, k = tl.load(row_ptr + c.OUTPUTS), tl.load(row_ptr + c.INPUTS)
    row_stride = stride(row_ptr, c.WEIGHT + c.STRIDE).to(tl.int32)
    loss_scale = bits_to_float(tl.load(row_ptr + c.SCALE))
    rate, count = parameter.rule_at(row_ptr + c.WEIGHT, t, rate, U)
    own_offsets = local_rows[:, None] * row_stride + inner[None, :]
    now_ptr = _x_pointer(row_ptr, c.XT if P.transposed else c.X, t - 1, P)
    now_offsets, pitch = _gradient_offsets(row_ptr, P)
    then_ptr = _x_pointer(row_ptr, c.X, following, P)
    then_offsets = examples[None, :] * stride(row_ptr, c.X_STRIDE).to(tl.int32) + inner[:, None]
    nothing = tl.zeros((rows.shape[0], inner.shape[0]), tl.float32)
    product = tl.zeros((rows.shape[0], examples.shape[0]), tl.float32)
    largest = 0.0
    # The caller's tensors are read an element at a time; to load them ahead would take too many registers.
    STAGES: tl.constexpr = 1 if FIRST else None
    for start_column in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        place = (rows, start_column + inner, n, k)
        offsets = own_offsets + start_column
        # Ahead of the product: behind it, the compiler would hold all that it multiplies in registers.
        before = parameter.load(row_ptr + c.WEIGHT, own, offsets, place, FIRST, U)
        change = nothing
        if not FIRST:  # E_0 = 0
            change = dot(e, tl.load(now_ptr + (now_offsets + start_column * pitch)), nothing, P) * factor
        moment = (rate, count, prox)
        delta, gradient = parameter.step(
            row_ptr + c.WEIGHT, own, offsets, before, change, place, moment, loss_scale, FIRST, U
        )
        if P.operand == tl.float16:
            largest = tl.maximum(largest, tl.max(tl.max(tl.abs(delta), 1), 0))
        if P.trace:
            tl.store(trace_ptr + start_column // BLOCK_K, parameter.objective(delta, gradient, prox))
        if P.operand != tl.float16 or not FIRST:  # whose scale is not known yet
            then = tl.load(then_ptr + (then_offsets + start_column))
            product = dot(as_operand(delta * scale, P), then, product, P)
    return product, largest


@triton.jit
def _product(row_ptr, scale, own, P: tl.constexpr):
    """``scale · Δ Xᵀ`` with the rows of local step 1, for float16: the largest |Δ| had to be found first."""
    inner, examples = tl.arange(0, P.block_k), tl.arange(0, P.block_b)
    local_rows = tl.arange(0, P.block_n)
    k, row_stride = tl.load(row_ptr + c.INPUTS), stride(row_ptr, c.WEIGHT + c.STRIDE).to(tl.int32)
    delta_ptrs = own[1] + (local_rows[:, None] * row_stride + inner[None, :])
    x_ptrs = address(row_ptr, c.X, P.operand)
    x_ptrs += examples[None, :] * stride(row_ptr, c.X_STRIDE).to(tl.int32) + inner[:, None]
    product = tl.zeros((local_rows.shape[0], examples.shape[0]), tl.float32)
    for start in range(0, k, P.block_k):
        left = as_operand(tl.load(delta_ptrs + start) * scale, P)
        product = dot(left, tl.load(x_ptrs + start), product, P)
    return product


@triton.jit
def _bias_pass(row_ptr, n_block, when, trace_ptr, P: tl.constexpr, U: tl.constexpr):
    """Local step ``t`` of the n-block's bias; ``when`` is ``(t, rate, prox)``."""
    if tl.load(row_ptr + c.BIAS + c.GRAD) != 0:
        loss_scale = bits_to_float(tl.load(row_ptr + c.SCALE))
        bias_tile(row_ptr, n_block, when, loss_scale, trace_ptr + tl.load(row_ptr + c.K_BLOCKS), P, U)


@triton.jit
def _first_pass(row_ptr, n_block, when, own, trace_ptr, P: tl.constexpr, U: tl.constexpr):
    """Local step 0, in which ``E_0 = 0``; ``when`` is ``(t, rate, prox)``.

    Returns ``Δ Xᵀ`` with the rows of the next one, and the scale of its operands.
    """
    rows, examples = tl.arange(0, P.block_n), tl.arange(0, P.block_b)
    trace_ptr += _update_slots(row_ptr, n_block)
    _bias_pass(row_ptr, n_block, when, trace_ptr, P, U)
    tl.debug_barrier()
    product = tl.zeros((rows.shape[0], examples.shape[0]), tl.float32)
    scale = 1.0
    if tl.load(row_ptr + c.WEIGHT + c.GRAD) != 0:
        moment = (0, 0, when[1], when[2])
        product, largest = _weight_pass(row_ptr, n_block, product, 1.0, moment, 1.0, own, trace_ptr, True, P, U)
        if P.operand == tl.float16:
            scale = scale_of(largest, P)
            tl.debug_barrier()
            product = _product(row_ptr, scale, own, P)
    return product * (1.0 / scale), scale


@triton.jit
def _later_pass(row_ptr, n_block, e, when, following, scale, own, trace_ptr, P: tl.constexpr,
                U: tl.constexpr):  # fmt: skip
    """Local step ``t`` and the product with the rows of set ``following``; arguments and results as above."""
    local_rows, examples = tl.arange(0, P.block_n), tl.arange(0, P.block_b)
    trace_ptr += _update_slots(row_ptr, n_block)
    # Loads settle which thread has which number of E. Without them the compiler computes E, and all that it comes
    # from, anew for every way in which the threads share out what follows, and runs out of registers.
    e_ptr = address(row_ptr, c.E, P.operand) + (n_block * P.block_n).to(tl.int64) * P.block_b
    e_ptrs = e_ptr + (local_rows[:, None] * P.block_b + examples[None, :])
    tl.store(e_ptrs, as_operand(e * scale, P))
    rows = n_block * P.block_n + local_rows
    tl.store(address(row_ptr, c.ROW_SUMS, tl.float32) + rows, tl.sum(e, 1))
    # What one thread has stored, another may load from here on: E, Δ, state.
    tl.debug_barrier()
    left = tl.load(e_ptrs)
    _bias_pass(row_ptr, n_block, when, trace_ptr, P, U)
    tl.debug_barrier()
    product = tl.zeros((local_rows.shape[0], examples.shape[0]), tl.float32)
    new_scale = scale
    if tl.load(row_ptr + c.WEIGHT + c.GRAD) != 0:
        factor = 1.0
        if P.sampled:
            factor = bits_to_float(tl.load(row_ptr + c.SETS))
        moment = (when[0], following, when[1], when[2])
        product, largest = _weight_pass(
            row_ptr, n_block, left, factor / scale, moment, scale, own, trace_ptr, False, P, U
        )
        if P.operand == tl.float16:
            new_scale = scale_of(largest, P)
    return product * (1.0 / scale), new_scale


@triton.jit
def _update_slots(row_ptr, n_block):
    """The n-block's first slot among the partial sums of an update."""
    return tl.load(row_ptr + c.TRACE_UPDATE) + n_block * (tl.load(row_ptr + c.K_BLOCKS) + 1)


@triton.jit
def _check(row_ptr, n_block, bad_ptr, P: tl.constexpr, U: tl.constexpr):
    """Set ``bad`` if a commit of the n-block would write a number that is not finite."""
    if tl.load(row_ptr + c.WEIGHT + c.GRAD) != 0:
        for start in range(0, tl.load(row_ptr + c.INPUTS), P.block_k):
            check_weight(row_ptr, n_block, start + tl.arange(0, P.block_k), bad_ptr, P, U)
    if tl.load(row_ptr + c.BIAS + c.GRAD) != 0:
        check_bias(row_ptr, n_block, bad_ptr, P, U)


@triton.jit(do_not_specialize=["iterations", "trace_stride"])
def _rows_kernel(
    table_ptr,
    blocks_ptr,
    rates_ptr,
    iterations,
    prox,
    counts_ptr,
    bad_ptr,
    trace_ptr,
    trace_stride,
    P: tl.constexpr,
    U: tl.constexpr,
):
    block_ptr = blocks_ptr + tl.program_id(0) * 2
    layer, n_block = tl.load(block_ptr), tl.load(block_ptr + 1)
    row_ptr, count_ptr = table_ptr + layer * c.WIDTH, counts_ptr + layer * (iterations + 1)
    first = (n_block * P.block_n).to(tl.int64) * stride(row_ptr, c.WEIGHT + c.STRIDE)
    own = parameter.own_pointers(row_ptr + c.WEIGHT, first, U)
    rows = n_block * P.block_n + tl.arange(0, P.block_n)
    examples = tl.arange(0, P.block_b)
    activation_ptr = trace_ptr + tl.load(row_ptr + c.TRACE_ACTIVATION) + n_block
    # The last local step multiplies for the objective at the end, and where that is not asked for in vain.
    last_set = iterations - 2
    if P.trace:
        last_set += 1
    when = (0, tl.load(rates_ptr), prox)
    product, scale = _first_pass(row_ptr, n_block, when, own, trace_ptr + trace_stride, P, U)
    for t in range(1, iterations):
        change = change_of(row_ptr, product, rows, examples, t, count_ptr, P)
        e = difference(row_ptr, change, rows, examples, t, count_ptr, activation_ptr + t * trace_stride, P)
        when = (t, tl.load(rates_ptr + t), prox)
        following, next_ptr = tl.minimum(t, last_set), trace_ptr + (t + 1) * trace_stride
        product, scale = _later_pass(row_ptr, n_block, e, when, following, scale, own, next_ptr, P, U)
    if P.trace:
        last_ptr = activation_ptr + iterations * trace_stride
        change = change_of(row_ptr, product, rows, examples, iterations, count_ptr, P)
        difference(row_ptr, change, rows, examples, iterations, count_ptr, last_ptr, P)
    tl.debug_barrier()
    _check(row_ptr, n_block, bad_ptr, P, U)


def launch(step: StepArguments, blocks: Tensor, spec: Spec) -> None:
    """All local steps of all layers; ``blocks`` ``[count, 2]``: layer and n-block of each program."""
    _rows_kernel[(len(blocks),)](
        step.table,
        blocks,
        step.rates,
        step.iterations,
        step.prox,
        step.counts,
        step.bad,
        step.trace,
        step.trace_stride,
        P=spec.P,
        U=spec.U,
        **spec.options,
    )
