"""Work lists of the single launch, and what they are predicted to take."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from locoprop_kernels.devices import H100, DeviceModel
from locoprop_kernels.schedule.costs import CostArray, most_expensive_tiles, step_bound, tile_costs
from locoprop_kernels.schedule.tiling import (
    IntArray,
    Layer,
    Tiles,
    all_tiles,
    block_of,
    check_sizes,
    first_blocks,
    tiles_per_block,
)

__all__ = ["Schedule", "build"]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Work lists of all programs, as int32 arrays that a kernel can read, and the costs they were chosen by.

    Program ``p`` runs rows ``offsets[p]:offsets[p + 1]`` of each phase's table, in order.

    Attributes:
        programs: number of programs; all must be resident at once.
        activation_tiles: ``[count, 3]``: layer, n-block within the layer, b-block.
        activation_offsets: ``[programs + 1]``.
        update_tiles: ``[count, 3]``: layer, n-block within the layer, k-block.
        update_offsets: ``[programs + 1]``.
        first_block: ``[layers + 1]``: number of n-blocks before each layer, the index into the counters.
        activations_per_block: ``[n-blocks]``: activation tiles of an n-block per local step, for the waits.
        updates_per_block: ``[n-blocks]``: update tiles of an n-block per local step, for the waits.
        activation_costs: ``[count]``, int64, in picoseconds.
        update_costs: ``[count]``, int64, likewise.
        activation_queues: ``[programs]``, int64: cost of each program's activation tiles.
        update_queues: ``[programs]``, int64: cost of each program's update tiles.
        lower_bound: no schedule of these tiles on ``programs`` programs finishes a local step in less.
    """

    programs: int
    activation_tiles: IntArray
    activation_offsets: IntArray
    update_tiles: IntArray
    update_offsets: IntArray
    first_block: IntArray
    activations_per_block: IntArray
    updates_per_block: IntArray
    activation_costs: CostArray
    update_costs: CostArray
    activation_queues: CostArray
    update_queues: CostArray
    lower_bound: int

    def makespan(self, iterations: int = 1) -> int:
        """Predicted cost of ``iterations`` full local steps (activation and update phase), waits counted."""
        return self._predict([("activation", "update")] * iterations)

    def total_makespan(self, iterations: int) -> int:
        """Predicted cost of a launch of ``T = iterations`` local steps, of which the first has no activation tiles."""
        return self._predict([("update",), *[("activation", "update")] * (iterations - 1)])

    @property
    def efficiency(self) -> float:
        """Lower bound over predicted cost of a local step: 1 is perfect."""
        return self.lower_bound / self.makespan()

    def records(self) -> tuple[IntArray, IntArray]:
        """The tiles of both phases with all that a program needs to wait and to signal, so that one read finds it.

        Returns:
            Of each phase int32 ``[count, 8]``: layer, n-block and column block; the counter to wait for, the one to
            signal, and how far a local step counts the first; two zeros, so that a record lies in one sector of memory.
            The counters of activation tiles come first, one for each n-block, then those of update tiles.
        """
        blocks = int(self.first_block[-1])
        found = []
        for rows, other, own_first, other_first in (
            (self.activation_tiles, self.updates_per_block, 0, blocks),
            (self.update_tiles, self.activations_per_block, blocks, 0),
        ):
            block = block_of(rows, self.first_block)
            waits = np.stack([other_first + block, own_first + block, other[block]], 1)
            found.append(np.concatenate([rows, waits, np.zeros((len(rows), 2))], 1).astype(np.int32))
        return found[0], found[1]

    def _predict(self, steps: Sequence[tuple[str, ...]]) -> int:
        phases = {
            "activation": _by_position(
                self.activation_tiles, self.activation_offsets, self.activation_costs, self.first_block
            ),
            "update": _by_position(self.update_tiles, self.update_offsets, self.update_costs, self.first_block),
        }
        clock = np.zeros(self.programs, np.int64)
        ready = np.zeros(int(self.first_block[-1]), np.int64)
        for step in steps:
            for phase in step:
                done = np.zeros_like(ready)
                for programs, blocks, costs in phases[phase]:
                    finished = np.maximum(clock[programs], ready[blocks]) + costs
                    clock[programs] = finished
                    np.maximum.at(done, blocks, finished)
                ready = done
        return int(clock.max())


def build(layers: Sequence[Layer], tiles: Tiles, programs: int, device: DeviceModel = H100) -> Schedule:
    """Work lists whose longest queue is as short as the longest-processing-time rule makes it.

    Both ways of filling the update queues are tried, from empty ones and on top of the activation queues, and the one
    with the shorter predicted local steps is taken. Lists of both phases visit n-blocks in the same order, so what a
    program waits for at the start of a phase was worked on at the start of the phase before.

    Args:
        layers: ``(B, K, N)`` of each layer.
        tiles: tile sizes.
        programs: number of programs, at most as many as can be resident at once.
        device: whose rates to assume.

    Returns:
        A deterministic schedule; two calls give equal tables.

    Raises:
        ValueError: a size is not a positive integer, or there is no layer.
    """
    check_sizes(layers, programs)
    first_block = first_blocks(layers, tiles)
    activation_tiles, update_tiles = all_tiles(layers, tiles)
    activation_costs = tile_costs(activation_tiles, layers, tiles, "activation", device, programs)
    update_costs = tile_costs(update_tiles, layers, tiles, "update", device, programs)
    order = _block_order(activation_tiles, activation_costs, first_block)
    bound = step_bound(activation_tiles, activation_costs, update_tiles, update_costs, first_block, programs)

    activation_ranks = order[block_of(activation_tiles, first_block)]
    update_ranks = order[block_of(update_tiles, first_block)]
    empty = np.zeros(programs, np.int64)
    activation_owner, activation_queues = _assign(activation_costs, activation_ranks, empty)
    activation_rows, activation_offsets = _lists(activation_owner, activation_ranks, programs)

    candidates = []
    for start in (empty, activation_queues):
        owner, queues = _assign(update_costs, update_ranks, start)
        update_rows, update_offsets = _lists(owner, update_ranks, programs)
        candidates.append(
            Schedule(
                programs=programs,
                activation_tiles=activation_tiles[activation_rows],
                activation_offsets=activation_offsets,
                update_tiles=update_tiles[update_rows],
                update_offsets=update_offsets,
                first_block=first_block,
                activations_per_block=tiles_per_block(activation_tiles, first_block),
                updates_per_block=tiles_per_block(update_tiles, first_block),
                activation_costs=activation_costs[activation_rows],
                update_costs=update_costs[update_rows],
                activation_queues=activation_queues,
                update_queues=queues - start,
                lower_bound=bound,
            )
        )
    return min(candidates, key=lambda schedule: schedule.makespan(3))


def _block_order(rows: IntArray, costs: CostArray, first_block: IntArray) -> NDArray[np.int64]:
    """Rank of each n-block in the order that all lists follow, which is that of the assignment.

    N-blocks with the most expensive activation tiles come first.
    """
    highest = most_expensive_tiles(rows, costs, first_block)
    ranks = np.empty(len(highest), np.int64)
    ranks[np.argsort(-highest, kind="stable")] = np.arange(len(highest))
    return ranks


def _assign(costs: CostArray, ranks: NDArray[np.int64], queues: CostArray) -> tuple[NDArray[np.int64], CostArray]:
    """Longest processing time first: the most expensive tile that is left goes to the shortest queue."""
    heap = [(length, program) for program, length in enumerate(queues.tolist())]
    heapq.heapify(heap)
    order = np.lexsort((ranks, -costs))
    owner = []
    for cost in costs[order].tolist():
        length, program = heap[0]
        heapq.heapreplace(heap, (length + cost, program))
        owner.append(program)
    owners = np.empty(len(costs), np.int64)
    owners[order] = owner
    lengths = np.empty_like(queues)
    for length, program in heap:
        lengths[program] = length
    return owners, lengths


def _lists(owner: NDArray[np.int64], ranks: NDArray[np.int64], programs: int) -> tuple[NDArray[np.int64], IntArray]:
    """Rows in the order of the programs' lists, and where each program's list starts."""
    rows = np.lexsort((ranks, owner))
    return rows, np.searchsorted(owner[rows], np.arange(programs + 1)).astype(np.int32)


def _by_position(
    rows: IntArray, offsets: IntArray, costs: CostArray, first_block: IntArray
) -> list[tuple[NDArray[np.int64], NDArray[np.int64], CostArray]]:
    """First tiles of all programs, then second tiles, ...: (programs, n-blocks, costs)."""
    lengths = np.diff(offsets)
    of_tiles = block_of(rows, first_block)
    positions = []
    for position in range(int(lengths.max(initial=0))):
        programs = np.flatnonzero(lengths > position)
        index = offsets[programs] + position
        positions.append((programs, of_tiles[index], costs[index]))
    return positions
