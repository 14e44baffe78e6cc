"""Single launch: one persistent kernel for all layers and all local steps.

Programs work through the lists of :mod:`locoprop_kernels.schedule`, and wait for each other per n-block through two
counters in global memory. All programs must be resident at once.
"""

from typing import Any

import triton
import triton.language as tl

from locoprop_kernels.kernels import columns as c
from locoprop_kernels.kernels.tiles import activation_tile, update_tile


@triton.jit
def _wait(counter_ptr, level):
    """Until the counter has reached ``level``; what was written before it did is then visible to the whole program."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < level:
        pass
    tl.debug_barrier()


@triton.jit
def _signal(counter_ptr):
    """Count a tile as done, after the writes of all threads."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit(do_not_specialize=["blocks", "iterations", "trace_stride"])
def _local_steps_kernel(
    table_ptr,
    activation_tiles_ptr,
    activation_offsets_ptr,
    update_tiles_ptr,
    update_offsets_ptr,
    activations_per_block_ptr,
    updates_per_block_ptr,
    counters_ptr,
    blocks,
    rates_ptr,
    iterations,
    prox,
    bad_ptr,
    trace_ptr,
    trace_stride,
    TRANSFERS: tl.constexpr,
    DIVERGENCES: tl.constexpr,
    SOURCES: tl.constexpr,
    RULE: tl.constexpr,
    HYPER: tl.constexpr,
    SLOTS: tl.constexpr,
    COUNTS_STEPS: tl.constexpr,
    REGULARISER: tl.constexpr,
    MASKED: tl.constexpr,
    OPERAND: tl.constexpr,
    PREACTIVATION: tl.constexpr,
    PARAMETER: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TRACE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
):
    program = tl.program_id(0)
    activations_done_ptr = counters_ptr
    updates_done_ptr = counters_ptr + blocks
    first_activation = tl.load(activation_offsets_ptr + program)
    end_activation = tl.load(activation_offsets_ptr + program + 1)
    first_update = tl.load(update_offsets_ptr + program)
    end_update = tl.load(update_offsets_ptr + program + 1)
    steps = iterations
    if TRACE:
        steps += 1  # the objective at the end
    for t in range(0, steps):
        if t > 0:  # E_0 = 0
            for i in range(first_activation, end_activation):
                row_ptr = table_ptr + tl.load(activation_tiles_ptr + 3 * i) * c.WIDTH
                n_block = tl.load(activation_tiles_ptr + 3 * i + 1)
                b_block = tl.load(activation_tiles_ptr + 3 * i + 2)
                block = tl.load(row_ptr + c.FIRST_BLOCK) + n_block
                _wait(updates_done_ptr + block, t * tl.load(updates_per_block_ptr + block))
                activation_tile(row_ptr, n_block, b_block, t, trace_ptr, trace_stride, TRANSFERS, DIVERGENCES, OPERAND,
                                PREACTIVATION, PRECISION, INTERPRETED, TRACE, False, BLOCK_N, BLOCK_B, BLOCK_R,
                                PARTS)  # fmt: skip
                _signal(activations_done_ptr + block)
        if t < iterations:
            rate = tl.load(rates_ptr + t)
            for i in range(first_update, end_update):
                row_ptr = table_ptr + tl.load(update_tiles_ptr + 3 * i) * c.WIDTH
                n_block = tl.load(update_tiles_ptr + 3 * i + 1)
                k_block = tl.load(update_tiles_ptr + 3 * i + 2)
                block = tl.load(row_ptr + c.FIRST_BLOCK) + n_block
                _wait(activations_done_ptr + block, t * tl.load(activations_per_block_ptr + block))
                update_tile(row_ptr, n_block, k_block, t, t == iterations - 1, rate, prox, bad_ptr, trace_ptr,
                            trace_stride, RULE, HYPER, SLOTS, COUNTS_STEPS, REGULARISER, MASKED, OPERAND,
                            PARAMETER, PRECISION, INTERPRETED, TRACE, TRANSPOSED, False, False, BLOCK_N, BLOCK_K,
                            BLOCK_R, PARTS)  # fmt: skip
                _signal(updates_done_ptr + block)


def launch(
    table: Any,
    lists: tuple[Any, ...],
    counters: Any,
    rates: Any,
    iterations: int,
    prox: float,
    bad: Any,
    trace: Any,
    trace_stride: int,
    constants: dict[str, Any],
) -> None:
    """All local steps of all layers.

    Args:
        table: the layer table.
        lists: tiles and offsets of the activation phase, of the update phase, and the tiles per n-block of each.
        counters: int32 ``[2 * n-blocks]``, zero.
        rates: learning rates, float32 ``[iterations]``.
        iterations: local iterations.
        prox: proximal coefficient.
        bad: int32 ``[1]``, set where something is not finite.
        trace: partial sums of the objective, float64 ``[iterations + 1, trace_stride]``.
        trace_stride: partial sums of one local step.
        constants: compile-time arguments and launch options.
    """
    programs = len(lists[1]) - 1
    _local_steps_kernel[(programs,)](
        table,
        *lists,
        counters,
        len(counters) // 2,
        rates,
        iterations,
        prox,
        bad,
        trace,
        trace_stride,
        **constants,
    )
