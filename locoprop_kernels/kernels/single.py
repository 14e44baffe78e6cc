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

RECORD = tl.constexpr(8)
"""Numbers of a tile's record, see :func:`locoprop_kernels.schedule.Schedule.records`."""
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


@triton.jit
def _record(records_ptr, i):
    """Layer, n-block and column block of a tile; whom it waits for and signals, and how far a local step counts."""
    record_ptr = records_ptr + i * RECORD
    layer, n_block, column_block = tl.load(record_ptr), tl.load(record_ptr + 1), tl.load(record_ptr + 2)
    return layer, n_block, column_block, tl.load(record_ptr + 3), tl.load(record_ptr + 4), tl.load(record_ptr + 5)


@triton.jit(do_not_specialize=["iterations", "trace_stride"])
def _local_steps_kernel(
    table_ptr,
    activations_ptr,
    activation_offsets_ptr,
    updates_ptr,
    update_offsets_ptr,
    counters_ptr,
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
    activation_offsets_ptr += tl.program_id(0)
    update_offsets_ptr += tl.program_id(0)
    steps = iterations
    if P.trace:
        steps += 1  # the objective at the end
    for t in range(0, steps):
        if t > 0:  # E_0 = 0
            for i in range(tl.load(activation_offsets_ptr), tl.load(activation_offsets_ptr + 1)):
                layer, n_block, b_block, waits_for, own, level = _record(activations_ptr, i)
                _wait(counters_ptr + waits_for, t * level)
                row_ptr = table_ptr + layer * c.WIDTH
                count_ptr = counts_ptr + layer * (iterations + 1)
                activation_tile(row_ptr, n_block, b_block, t, count_ptr, trace_ptr, trace_stride, P)
                _signal(counters_ptr + own)
        if t < iterations:
            when = (t, t == iterations - 1, tl.load(rates_ptr + t), prox)
            for i in range(tl.load(update_offsets_ptr), tl.load(update_offsets_ptr + 1)):
                layer, n_block, k_block, waits_for, own, level = _record(updates_ptr, i)
                _wait(counters_ptr + waits_for, t * level)
                row_ptr = table_ptr + layer * c.WIDTH
                update_tile(row_ptr, n_block, k_block, when, bad_ptr, trace_ptr, trace_stride, P, U)
                _signal(counters_ptr + own)


def launch(step: StepArguments, lists: tuple[Tensor, ...], counters: Tensor, spec: Spec) -> None:
    """All local steps of all layers.

    Args:
        step: what the launches of a step have in common.
        lists: records of tiles and offsets of the activation phase, then of the update phase.
        counters: int32 ``[2 * n-blocks]``, zero.
        spec: compile-time arguments and options.
    """
    programs = len(lists[1]) - 1
    cooperative = {} if spec.P.interpreted else COOPERATIVE
    _local_steps_kernel[(programs,)](
        step.table,
        *lists,
        counters,
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
