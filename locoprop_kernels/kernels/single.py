"""Single launch: one persistent kernel for all layers and all local steps.

Programs work through the lists of :mod:`locoprop_kernels.schedule`, and wait for each other per n-block through two
counters in global memory. All programs must be resident at once.
"""

import triton
import triton.language as tl
from torch import Tensor

from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.device.activation import activation_tile
from locoprop_kernels.kernels.device.update import update_tile
from locoprop_kernels.kernels.spec import Spec, StepArguments

COOPERATIVE = {"launch_cooperative_grid": True}
"""Option of the launch: refuse rather than start programs that cannot all be resident."""


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
    counts_ptr,
    bad_ptr,
    trace_ptr,
    trace_stride,
    P: tl.constexpr,
    U: tl.constexpr,
):
    program = tl.program_id(0)
    activations_done_ptr = counters_ptr
    updates_done_ptr = counters_ptr + blocks
    first_activation = tl.load(activation_offsets_ptr + program)
    end_activation = tl.load(activation_offsets_ptr + program + 1)
    first_update = tl.load(update_offsets_ptr + program)
    end_update = tl.load(update_offsets_ptr + program + 1)
    steps = iterations
    if P.trace:
        steps += 1  # the objective at the end
    for t in range(0, steps):
        if t > 0:  # E_0 = 0
            for i in range(first_activation, end_activation):
                layer = tl.load(activation_tiles_ptr + 3 * i)
                row_ptr = table_ptr + layer * c.WIDTH
                n_block = tl.load(activation_tiles_ptr + 3 * i + 1)
                b_block = tl.load(activation_tiles_ptr + 3 * i + 2)
                block = tl.load(row_ptr + c.FIRST_BLOCK) + n_block
                _wait(updates_done_ptr + block, t * tl.load(updates_per_block_ptr + block))
                count_ptr = counts_ptr + layer * (iterations + 1)
                activation_tile(row_ptr, n_block, b_block, t, count_ptr, trace_ptr, trace_stride, P)
                _signal(activations_done_ptr + block)
        if t < iterations:
            when = (t, t == iterations - 1, tl.load(rates_ptr + t), prox)
            for i in range(first_update, end_update):
                row_ptr = table_ptr + tl.load(update_tiles_ptr + 3 * i) * c.WIDTH
                n_block = tl.load(update_tiles_ptr + 3 * i + 1)
                k_block = tl.load(update_tiles_ptr + 3 * i + 2)
                block = tl.load(row_ptr + c.FIRST_BLOCK) + n_block
                _wait(activations_done_ptr + block, t * tl.load(activations_per_block_ptr + block))
                update_tile(row_ptr, n_block, k_block, when, bad_ptr, trace_ptr, trace_stride, P, U)
                _signal(updates_done_ptr + block)


def launch(step: StepArguments, lists: tuple[Tensor, ...], counters: Tensor, spec: Spec) -> None:
    """All local steps of all layers.

    Args:
        step: what the launches of a step have in common.
        lists: tiles and offsets of the activation phase, of the update phase, and the tiles per n-block of each.
        counters: int32 ``[2 * n-blocks]``, zero.
        spec: compile-time arguments and options.
    """
    programs = len(lists[1]) - 1
    cooperative = {} if spec.P.interpreted else COOPERATIVE
    _local_steps_kernel[(programs,)](
        step.table,
        *lists,
        counters,
        len(counters) // 2,
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
        **cooperative,
    )
