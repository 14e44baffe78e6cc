"""A launch for each phase of a local step, over all layers. The end of a launch is the barrier.

Between the activation and the update phase there may be one of partial products: a layer of few update tiles and many
examples (a convolution, say) would keep most programs waiting.
"""

import triton
import triton.language as tl
from torch import Tensor

from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.device.activation import activation_tile
from locoprop_kernels.kernels.device.update import partial_tile, update_tile
from locoprop_kernels.kernels.spec import Spec, StepArguments


@triton.jit(do_not_specialize=["t", "iterations", "trace_stride"])
def _activation_kernel(table_ptr, tiles_ptr, t, iterations, counts_ptr, trace_ptr, trace_stride, P: tl.constexpr):
    tile_ptr = tiles_ptr + tl.program_id(0) * 3
    layer = tl.load(tile_ptr)
    count_ptr = counts_ptr + layer * (iterations + 1)
    row_ptr = table_ptr + layer * c.WIDTH
    activation_tile(row_ptr, tl.load(tile_ptr + 1), tl.load(tile_ptr + 2), t, count_ptr, trace_ptr, trace_stride, P)


@triton.jit(do_not_specialize=["t"])
def _partial_kernel(table_ptr, tiles_ptr, t, P: tl.constexpr):
    tile_ptr = tiles_ptr + tl.program_id(0) * 4
    row_ptr = table_ptr + tl.load(tile_ptr) * c.WIDTH
    partial_tile(row_ptr, tl.load(tile_ptr + 1), tl.load(tile_ptr + 2), tl.load(tile_ptr + 3), t, P)


@triton.jit(do_not_specialize=["t", "iterations", "trace_stride"])
def _update_kernel(
    table_ptr,
    tiles_ptr,
    rates_ptr,
    t,
    iterations,
    prox,
    bad_ptr,
    trace_ptr,
    trace_stride,
    P: tl.constexpr,
    U: tl.constexpr,
):
    tile_ptr = tiles_ptr + tl.program_id(0) * 3
    row_ptr = table_ptr + tl.load(tile_ptr) * c.WIDTH
    n_block, k_block = tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    when = (t, t == iterations - 1, tl.load(rates_ptr + t), prox)
    update_tile(row_ptr, n_block, k_block, when, bad_ptr, trace_ptr, trace_stride, P, U)


def launch_activation(step: StepArguments, tiles: Tensor, t: int, spec: Spec) -> None:
    """``E`` of all layers before local step ``t``; ``tiles`` ``[count, 3]``, one program each."""
    _activation_kernel[(len(tiles),)](
        step.table,
        tiles,
        t,
        step.iterations,
        step.counts,
        step.trace,
        step.trace_stride,
        P=spec.P,
        **spec.options,
    )


def launch_partial(step: StepArguments, tiles: Tensor, t: int, spec: Spec) -> None:
    """Products over splits of the batch; ``tiles`` ``[count, 4]``, one program each."""
    _partial_kernel[(len(tiles),)](step.table, tiles, t, P=spec.P, **spec.options)


def launch_update(step: StepArguments, tiles: Tensor, t: int, spec: Spec) -> None:
    """Local step ``t`` of all layers; ``tiles`` ``[count, 3]``, one program each."""
    _update_kernel[(len(tiles),)](
        step.table,
        tiles,
        step.rates,
        t,
        step.iterations,
        step.prox,
        step.bad,
        step.trace,
        step.trace_stride,
        P=spec.P,
        U=spec.U,
        **spec.options,
    )
