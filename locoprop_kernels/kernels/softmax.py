"""Softmax layers: a pass over whole rows between the launches of the activation and of the update phase."""

import triton
import triton.language as tl
from torch import Tensor

from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.device.memory import address, as_operand, stride
from locoprop_kernels.kernels.device.products import difference_scale, keep_largest_difference
from locoprop_kernels.kernels.spec import Spec, StepArguments


@triton.jit
def _load_tile(row_ptr, n_block, examples, t, P: tl.constexpr):
    """Pre-activations at the start and now, ``[features, examples]``; -inf beyond the last feature."""
    features = n_block * P.block_n + tl.arange(0, P.block_n)
    offsets = features.to(tl.int64)[:, None] * stride(row_ptr, c.E_STRIDE) + examples[None, :]
    valid = (features < tl.load(row_ptr + c.OUTPUTS))[:, None]
    a0_ptr = address(row_ptr, c.A0, P.preactivation)
    if P.sampled:
        a0_ptr += (t - 1) * stride(row_ptr, c.A0_STEP)
    a0 = tl.load(a0_ptr + offsets).to(tl.float32)
    change = tl.load(address(row_ptr, c.CHANGE, tl.float32) + offsets)
    a = tl.where(valid, a0 + change, float("-inf"))
    return tl.where(valid, a0, float("-inf")), a, offsets


@triton.jit(do_not_specialize=["t", "iterations", "trace_stride"])
def _softmax_kernel(table_ptr, tiles_ptr, t, iterations, counts_ptr, trace_ptr, trace_stride, P: tl.constexpr):
    """``E = softmax(A) - softmax(A0)`` on the examples of a block, and its sums over them."""
    BLOCK_B: tl.constexpr = P.block_b
    tile_ptr = tiles_ptr + tl.program_id(0) * 2
    layer, block = tl.load(tile_ptr), tl.load(tile_ptr + 1)
    row_ptr = table_ptr + layer * c.WIDTH
    examples = block * BLOCK_B + tl.arange(0, BLOCK_B)
    n_blocks = tl.load(row_ptr + c.N_BLOCKS)
    largest0 = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    largest = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    for n_block in range(0, n_blocks):
        a0, a, _ = _load_tile(row_ptr, n_block, examples, t, P)
        largest0 = tl.maximum(largest0, tl.max(a0, 0))
        largest = tl.maximum(largest, tl.max(a, 0))
    total0 = tl.zeros((BLOCK_B,), tl.float32)
    total = tl.zeros((BLOCK_B,), tl.float32)
    for n_block in range(0, n_blocks):
        a0, a, _ = _load_tile(row_ptr, n_block, examples, t, P)
        total0 += tl.sum(tl.exp(a0 - largest0[None, :]), 0)
        total += tl.sum(tl.exp(a - largest[None, :]), 0)
    batch = tl.load(row_ptr + c.BATCH)
    if P.sampled:
        batch = tl.load(counts_ptr + layer * (iterations + 1) + t)
    present = examples < batch
    for n_block in range(0, n_blocks):
        a0, a, offsets = _load_tile(row_ptr, n_block, examples, t, P)
        y = tl.exp(a - largest[None, :]) / total[None, :]
        difference = tl.where(present[None, :], y - tl.exp(a0 - largest0[None, :]) / total0[None, :], 0.0)
        scale = 1.0
        if P.scaled:
            scale = difference_scale(row_ptr, n_block, t, P)
        tl.store(address(row_ptr, c.E, P.operand) + offsets, as_operand(difference * scale, P))
        sums_ptr = address(row_ptr, c.ROW_SUMS, tl.float32) + block * stride(row_ptr, c.ROW_SUMS_STRIDE)
        tl.store(sums_ptr + n_block * P.block_n + tl.arange(0, P.block_n), tl.sum(difference, 1))
        if P.operand == tl.float8e4nv:
            largest_difference = tl.max(tl.max(tl.abs(difference), 1), 0)
            keep_largest_difference(row_ptr, n_block, block, t, largest_difference)
    if P.trace:
        loss = _divergence(row_ptr, examples, n_blocks, largest0, largest, t, P)
        slot = tl.load(row_ptr + c.TRACE_ACTIVATION) + block
        tl.store(trace_ptr + t * trace_stride + slot, tl.sum(tl.where(present, loss, 0.0), 0))


@triton.jit
def _divergence(row_ptr, examples, n_blocks, largest0, largest, t, P: tl.constexpr):
    """``lse(a) - lse(a0) - (a - a0) · softmax(a0)`` of each example, in float64."""
    total0 = tl.zeros((examples.shape[0],), tl.float64)
    total = tl.zeros((examples.shape[0],), tl.float64)
    linear = tl.zeros((examples.shape[0],), tl.float64)
    for n_block in range(0, n_blocks):
        a0, _, offsets = _load_tile(row_ptr, n_block, examples, t, P)
        change = tl.load(address(row_ptr, c.CHANGE, tl.float32) + offsets).to(tl.float64)
        y0 = tl.exp((a0 - largest0[None, :]).to(tl.float64))
        total0 += tl.sum(y0, 0)
        # This is exp(a - largest), from the sum before it was rounded to float32.
        total += tl.sum(y0 * tl.exp(change + (largest0 - largest).to(tl.float64)[None, :]), 0)
        linear += tl.sum(tl.where(y0 > 0, y0 * change, 0.0), 0)
    difference = (largest.to(tl.float64) - largest0.to(tl.float64)) + tl.log(total) - tl.log(total0)
    return difference - linear / total0


def launch(step: StepArguments, tiles: Tensor, t: int, spec: Spec) -> None:
    """``E`` of all layers before local step ``t``; ``tiles`` ``[count, 2]``: layer and block of examples."""
    _softmax_kernel[(len(tiles),)](
        step.table, tiles, t, step.iterations, step.counts, step.trace, step.trace_stride, P=spec.P, **spec.wide
    )
