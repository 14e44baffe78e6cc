"""Which program of the single launch works on which tile: a pure function of sizes, and a proof of its result.

A local step has two phases. In the *activation* phase ``E = f(A0 + Δ Xᵀ + δ) - f(A0)`` is computed in tiles (n-block,
b-block); in the *update* phase ``Δ`` and the rule's state in tiles (n-block, k-block). Every program has one ordered
list of tiles per phase, the same in each local step, and local step 0 has no activation tiles because ``E_0 = 0``.

An n-block (``tiles.n`` rows of one layer's weight) never needs another one, so programs synchronise per n-block,
through two counters that only grow. In local step ``t >= 1``

* an activation tile waits until ``updates_done[block] >= t * updates_per_block[block]``,
* an update tile waits until ``activations_done[block] >= t * activations_per_block[block]``.

The first makes ``Δ`` complete before it is read and ``E`` free to be overwritten; the second does the same with the
roles exchanged. A program that has finished its tiles of a phase goes on with the next phase while others still work on
other n-blocks, so what counts is the longest *sum* of a program's two queues, not the longest of each.
"""

from locoprop_kernels.schedule.costs import lower_bound, most_expensive_first, phase_bounds, splits, tile_costs
from locoprop_kernels.schedule.row_blocks import output_cost, row_blocks, rows_bytes, rows_step
from locoprop_kernels.schedule.tiling import Tiles, count_tiles
from locoprop_kernels.schedule.validation import validate
from locoprop_kernels.schedule.work_lists import Schedule, build

__all__ = [
    "Schedule",
    "Tiles",
    "build",
    "count_tiles",
    "lower_bound",
    "most_expensive_first",
    "output_cost",
    "phase_bounds",
    "row_blocks",
    "rows_bytes",
    "rows_step",
    "splits",
    "tile_costs",
    "validate",
]
