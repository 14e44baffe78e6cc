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

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Schedule",
    "Tiles",
    "build",
    "count_tiles",
    "lower_bound",
    "most_expensive_first",
    "phase_bounds",
    "splits",
    "tile_costs",
    "validate",
]

Layer = tuple[int, int, int]
IntArray = NDArray[np.int32]
CostArray = NDArray[np.int64]

# Bytes out of and into L2: of an operand's element; of an activation's (A0 in, E out); of a weight's (G_0, Δ and two
# slots in; Δ, its 16-bit copy and the slots out). And how many of them an H100 moves in the time of a
# multiply-accumulate: 5.5 TB/s over 65 % of 798 TFLOP/s. Estimates; replace them by measurements when there are some.
_OPERAND_BYTES = 2
_ACTIVATION_BYTES = 6
_UPDATE_BYTES = 30
_PARTIAL_BYTES = 4
_BYTES_PER_MAC = 0.021
# In multiply-accumulates, at a 132nd of 65 % of 798 TFLOP/s: a wait of the single launch (1.5 µs), a launch with the
# wait for its first loads (2.8 µs), and what the host needs for a launch (20 µs). Estimates.
WAIT = 3_000_000
LAUNCH = 5_500_000
HOST_LAUNCH = 40_000_000
_LEAST_ROWS = 1024  # of a part of the batch: below, storing partial products costs more than computing them


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of the kernels: rows of the weight, rows of the batch (activation), columns of the weight (update)."""

    n: int
    b: int
    k: int

    def __post_init__(self) -> None:
        for name in ("n", "b", "k"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"tile size {name} must be a positive integer, got {size!r}")


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
        activation_costs: ``[count]``, int64, in multiply-accumulates.
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


def build(layers: Sequence[Layer], tiles: Tiles, programs: int) -> Schedule:
    """Work lists whose longest queue is as short as the longest-processing-time rule makes it.

    Both ways of filling the update queues are tried, from empty ones and on top of the activation queues, and the one
    with the shorter predicted local steps is taken. Lists of both phases visit n-blocks in the same order, so what a
    program waits for at the start of a phase was worked on at the start of the phase before.

    Args:
        layers: ``(B, K, N)`` of each layer.
        tiles: tile sizes.
        programs: number of programs, at most as many as can be resident at once.

    Returns:
        A deterministic schedule; two calls give equal tables.

    Raises:
        ValueError: a size is not a positive integer, or there is no layer.
    """
    _check_sizes(layers, programs)
    first_block = _first_block(layers, tiles)
    activation_tiles, update_tiles = _all_tiles(layers, tiles)
    activation_costs = tile_costs(activation_tiles, layers, tiles, "activation")
    update_costs = tile_costs(update_tiles, layers, tiles, "update")
    order = _block_order(activation_tiles, activation_costs, first_block)
    bound = _step_bound(activation_tiles, activation_costs, update_tiles, update_costs, first_block, programs)

    activation_ranks = order[_block(activation_tiles, first_block)]
    update_ranks = order[_block(update_tiles, first_block)]
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
                activations_per_block=_count_tiles(activation_tiles, first_block),
                updates_per_block=_count_tiles(update_tiles, first_block),
                activation_costs=activation_costs[activation_rows],
                update_costs=update_costs[update_rows],
                activation_queues=activation_queues,
                update_queues=queues - start,
                lower_bound=bound,
            )
        )
    return min(candidates, key=lambda schedule: schedule.makespan(3))


def most_expensive_first(layers: Sequence[Layer], tiles: Tiles) -> tuple[IntArray, IntArray]:
    """Tiles of both phases for launches of their own, whose queue is the hardware's: it takes them in order.

    Args:
        layers: ``(B, K, N)`` of each layer.
        tiles: tile sizes.

    Returns:
        ``activation_tiles`` and ``update_tiles`` as in a :class:`Schedule`.
    """
    activation, update = _all_tiles(layers, tiles)
    return (
        activation[np.argsort(-tile_costs(activation, layers, tiles, "activation"), kind="stable")],
        update[np.argsort(-tile_costs(update, layers, tiles, "update"), kind="stable")],
    )


def tile_costs(rows: IntArray, layers: Sequence[Layer], tiles: Tiles, phase: str) -> CostArray:
    """Predicted cost of tiles, in multiply-accumulates: the products, or the loads for them from L2 where those take
    longer, and then the epilogue.

    A ragged tile multiplies as long as a whole one (lanes are masked, not skipped), but its epilogue touches only what
    is there.

    Args:
        rows: ``[count, 3]``: layer, n-block, b-block or k-block.
        layers: ``(B, K, N)`` of each layer.
        tiles: tile sizes.
        phase: ``"activation"`` or ``"update"``.
    """
    product, epilogue, _ = _tile_work(rows, layers, tiles, phase)
    return np.rint(product + epilogue).astype(np.int64)


def _tile_work(
    rows: IntArray, layers: Sequence[Layer], tiles: Tiles, phase: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], CostArray]:
    """Cost of the products and of the epilogue of each tile, and how many elements it writes."""
    batch, inputs, outputs = np.asarray(layers, np.int64).reshape(-1, 3)[rows[:, 0]].T
    if phase == "activation":
        columns, reduction, width, moved = batch, inputs, tiles.b, _ACTIVATION_BYTES
    else:
        columns, reduction, width, moved = inputs, batch, tiles.k, _UPDATE_BYTES
    height = np.minimum(tiles.n, outputs - rows[:, 1].astype(np.int64) * tiles.n)
    written = height * np.minimum(width, columns - rows[:, 2].astype(np.int64) * width)
    step = max(tiles.n * width, _OPERAND_BYTES * (tiles.n + width) / _BYTES_PER_MAC)
    return step * reduction, moved / _BYTES_PER_MAC * written, written


def splits(layers: Sequence[Layer], tiles: Tiles, programs: int) -> tuple[int, ...]:
    """Into how many parts to cut the batch in the products of each layer's update tiles, in launches per phase.

    A layer of few tiles and many examples keeps most programs waiting; its products are then computed in parts, which
    the update adds up. Even shares of several sizes are tried; 1 where cutting does not pay.
    """
    counts = [_blocks(outputs, tiles.n) * _blocks(inputs, tiles.k) for _, inputs, outputs in layers]
    share = max(1, int(sum(count * layer[0] for count, layer in zip(counts, layers, strict=True)) / programs))
    candidates = [(1,) * len(layers)]
    for factor in range(1, 9):
        parts = [min(-(-factor * batch // share), batch // _LEAST_ROWS) for batch, _, _ in layers]
        candidates.append(tuple(max(1, part) for part in parts))
    return min(candidates, key=lambda found: _update_bound(layers, tiles, programs, found))


def phase_bounds(layers: Sequence[Layer], tiles: Tiles, programs: int) -> tuple[int, int]:
    """Least cost of an activation phase and of an update phase, where all programs wait for each other in between."""
    rows, _ = _all_tiles(layers, tiles)
    activation = lower_bound(tile_costs(rows, layers, tiles, "activation"), programs)
    return activation, _update_bound(layers, tiles, programs, splits(layers, tiles, programs))


def _update_bound(layers: Sequence[Layer], tiles: Tiles, programs: int, parts: tuple[int, ...]) -> int:
    rows = _all_tiles(layers, tiles)[1]
    product, epilogue, written = _tile_work(rows, layers, tiles, "update")
    cut = np.array(parts)[rows[:, 0]]
    whole = cut == 1
    partial = product / cut + _PARTIAL_BYTES / _BYTES_PER_MAC * written
    reduced = epilogue + _PARTIAL_BYTES / _BYTES_PER_MAC * written * cut
    update = lower_bound(np.rint(np.where(whole, product + epilogue, reduced)).astype(np.int64), programs)
    if whole.all():
        return update
    return update + lower_bound(np.rint(np.repeat(partial[~whole], cut[~whole])).astype(np.int64), programs) + LAUNCH


def count_tiles(layers: Sequence[Layer], tiles: Tiles) -> tuple[int, int]:
    """Number of activation tiles and of update tiles of a local step."""
    rows = [_blocks(outputs, tiles.n) for _, _, outputs in layers]
    return (
        sum(n * _blocks(batch, tiles.b) for n, (batch, _, _) in zip(rows, layers, strict=True)),
        sum(n * _blocks(inputs, tiles.k) for n, (_, inputs, _) in zip(rows, layers, strict=True)),
    )


def lower_bound(costs: CostArray, programs: int) -> int:
    """No assignment of the tiles to ``programs`` queues has a shorter longest queue.

    The average, and for each ``j``: of the ``j·programs + 1`` dearest tiles some queue holds ``j + 1``.
    """
    if not len(costs):
        return 0
    ranked = np.sort(costs)[::-1]
    total = np.concatenate([[0], np.cumsum(ranked)])
    last = np.arange(0, len(ranked), programs)  # j·programs, with j = 0, 1, ...
    crowded = total[last + 1] - total[last - last // programs]
    return max(-(-int(total[-1]) // programs), int(crowded.max()))


def _step_bound(
    activation_tiles: IntArray,
    activation_costs: CostArray,
    update_tiles: IntArray,
    update_costs: CostArray,
    first_block: IntArray,
    programs: int,
) -> int:
    """The queues' bound, and the time of an activation and an update tile of one n-block, which run in turn."""
    chain = _dearest(activation_tiles, activation_costs, first_block) + _dearest(
        update_tiles, update_costs, first_block
    )
    return max(lower_bound(np.concatenate([activation_costs, update_costs]), programs), int(chain.max()))


def validate(schedule: Schedule, layers: Sequence[Layer], tiles: Tiles, resident: int) -> None:
    """Prove by static checks alone that a launch with this schedule computes every tile and cannot hang.

    Args:
        schedule: the tables to be launched.
        layers: ``(B, K, N)`` of each layer.
        tiles: tile sizes that the kernel is launched with.
        resident: how many programs the device can hold at once.

    Raises:
        ValueError: saying what is wrong with which table.
    """
    _check_sizes(layers, schedule.programs)
    if schedule.programs > resident:
        raise ValueError(
            f"programs must all be resident, or one may wait for another that never starts: "
            f"{schedule.programs} programs, but only {resident} can be resident"
        )
    first_block = _first_block(layers, tiles)
    _check_array("first_block", schedule.first_block, first_block.shape)
    if not np.array_equal(schedule.first_block, first_block):
        raise ValueError(
            f"first_block must be {first_block.tolist()} for these layers, got {schedule.first_block.tolist()}"
        )
    expected = _all_tiles(layers, tiles)
    for phase, tile_set in zip(("activation", "update"), expected, strict=True):
        _check_offsets(schedule, phase)
        _check_tiles(schedule, phase, tile_set)
        _check_wait_counts(schedule, phase, _count_tiles(tile_set, first_block))
    _check_progress(schedule)
    _check_prediction(schedule, layers, tiles)


def _check_sizes(layers: Sequence[Layer], programs: int) -> None:
    if not len(layers):
        raise ValueError("layers must have at least one entry, got none")
    for index, layer in enumerate(layers):
        if len(layer) != 3 or not all(isinstance(size, (int, np.integer)) and size > 0 for size in layer):
            raise ValueError(f"layers[{index}] must be (B, K, N), three positive integers, got {layer!r}")
    if isinstance(programs, bool) or not isinstance(programs, int) or programs < 1:
        raise ValueError(f"programs must be a positive integer, got {programs!r}")


def _blocks(size: int, tile: int) -> int:
    return -(-size // tile)


def _first_block(layers: Sequence[Layer], tiles: Tiles) -> IntArray:
    counts = [_blocks(outputs, tiles.n) for _, _, outputs in layers]
    return np.cumsum([0, *counts]).astype(np.int32)


def _all_tiles(layers: Sequence[Layer], tiles: Tiles) -> tuple[IntArray, IntArray]:
    """Every activation tile and every update tile, in lexicographic order."""
    batch, inputs, outputs = np.array(layers, np.int64).reshape(-1, 3).T
    rows = -(-outputs // tiles.n)
    return _grids(rows, -(-batch // tiles.b)), _grids(rows, -(-inputs // tiles.k))


def _grids(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> IntArray:
    """Layer, row and column of every place of a grid per layer; no loop over layers, of which groups make many."""
    counts = rows * columns
    layer = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([layer, place // columns[layer], place % columns[layer]], 1).astype(np.int32)


def _block(rows: IntArray, first_block: IntArray) -> NDArray[np.int64]:
    """Index of each tile's n-block among all layers'."""
    return first_block[rows[:, 0]].astype(np.int64) + rows[:, 1]


def _count_tiles(rows: IntArray, first_block: IntArray) -> IntArray:
    return np.bincount(_block(rows, first_block), minlength=int(first_block[-1])).astype(np.int32)


def _dearest(rows: IntArray, costs: CostArray, first_block: IntArray) -> CostArray:
    """Cost of each n-block's dearest tile."""
    dearest = np.zeros(int(first_block[-1]), np.int64)
    np.maximum.at(dearest, _block(rows, first_block), costs)
    return dearest


def _block_order(rows: IntArray, costs: CostArray, first_block: IntArray) -> NDArray[np.int64]:
    """Rank of each n-block in the order that all lists follow: dearest activation tiles first, as they are assigned."""
    dearest = _dearest(rows, costs, first_block)
    ranks = np.empty(len(dearest), np.int64)
    ranks[np.argsort(-dearest, kind="stable")] = np.arange(len(dearest))
    return ranks


def _assign(costs: CostArray, ranks: NDArray[np.int64], queues: CostArray) -> tuple[NDArray[np.int64], CostArray]:
    """Longest processing time first: the dearest tile that is left goes to the shortest queue."""
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


def _queue_costs(costs: CostArray, offsets: IntArray) -> CostArray:
    total = np.concatenate([[0], np.cumsum(costs)])
    return total[offsets[1:]] - total[offsets[:-1]]


def _by_position(
    rows: IntArray, offsets: IntArray, costs: CostArray, first_block: IntArray
) -> list[tuple[NDArray[np.int64], NDArray[np.int64], CostArray]]:
    """First tiles of all programs, then second tiles, ...: (programs, n-blocks, costs)."""
    lengths = np.diff(offsets)
    blocks = _block(rows, first_block)
    positions = []
    for position in range(int(lengths.max(initial=0))):
        programs = np.flatnonzero(lengths > position)
        index = offsets[programs] + position
        positions.append((programs, blocks[index], costs[index]))
    return positions


def _check_array(name: str, array: object, shape: tuple[int, ...], dtype: type = np.int32) -> None:
    if isinstance(array, np.ndarray) and not array.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous: the kernel reads it row by row")
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        got = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name} must be an {np.dtype(dtype)} array of shape {list(shape)}, got {got}")


def _check_offsets(schedule: Schedule, phase: str) -> None:
    name, offsets = f"{phase}_offsets", getattr(schedule, f"{phase}_offsets")
    count = len(getattr(schedule, f"{phase}_tiles"))
    _check_array(name, offsets, (schedule.programs + 1,))
    if offsets[0] != 0 or offsets[-1] != count:
        raise ValueError(
            f"{name} must go from 0 to the {count} rows of {phase}_tiles, got {offsets[0]} to {offsets[-1]}"
        )
    falls = np.flatnonzero(np.diff(offsets) < 0)
    if len(falls):
        raise ValueError(f"{name} must not decrease, but does so after program {falls[0]}")


def _check_tiles(schedule: Schedule, phase: str, expected: IntArray) -> None:
    """Every tile of the phase exactly once, and no other."""
    name, rows = f"{phase}_tiles", getattr(schedule, f"{phase}_tiles")
    _check_array(name, rows, (len(rows), 3))
    present, counts = np.unique(rows, axis=0, return_counts=True) if len(rows) else (rows, np.zeros(0, int))
    # Distinct rows come out in lexicographic order, which is that of the expected ones.
    if len(present) == len(expected) == len(rows) and np.array_equal(present, expected):
        return
    doubled = present[counts > 1]
    wanted, found = set(map(tuple, expected.tolist())), set(map(tuple, present.tolist()))
    problems = {
        "out of range": sorted(found - wanted),
        "more than once": list(map(tuple, doubled.tolist())),
        "missing": sorted(wanted - found),
    }
    detail = "; ".join(f"{what}: {tiles[:3]} ({len(tiles)} in all)" for what, tiles in problems.items() if tiles)
    raise ValueError(f"{name} must hold every tile (layer, n-block, column block) exactly once; {detail}")


def _check_wait_counts(schedule: Schedule, phase: str, expected: IntArray) -> None:
    """What a wait expects of an n-block is what its tiles will signal, no more (a hang) and no less (a race)."""
    name, counts = f"{phase}s_per_block", getattr(schedule, f"{phase}s_per_block")
    _check_array(name, counts, expected.shape)
    wrong = np.flatnonzero(counts != expected)
    if len(wrong):
        block = wrong[0]
        raise ValueError(f"{name}[{block}] must be {expected[block]}, the tiles that signal it, got {counts[block]}")


def _check_progress(schedule: Schedule, steps: int = 3) -> None:
    """Run the lists with their counters, without the arithmetic: every program must get to the end.

    Programs wait only for earlier phases and go through the phases in order, so no order within the lists can close a
    cycle of waits. This runs the tables all the same, instead of trusting the argument. Counters only grow, so one
    interleaving stands for all: what is enabled stays enabled.
    """
    waits, signals, starts = _event_lists(schedule, steps)
    done = [0] * (2 * int(schedule.first_block[-1]))
    waiting: dict[int, list[int]] = {}
    position = list(starts[:-1])
    runnable = list(range(schedule.programs))
    while runnable:
        program = runnable.pop()
        at, end = position[program], starts[program + 1]
        while at < end:
            counter, level = waits[at]
            if done[counter] < level:
                waiting.setdefault(counter, []).append(program)
                break
            done[signals[at]] += 1
            sleepers = waiting.pop(signals[at], None)
            if sleepers:
                runnable.extend(sleepers)
            at += 1
        position[program] = at
    stuck = [program for program in range(schedule.programs) if position[program] < starts[program + 1]]
    if stuck:
        counter, level = waits[position[stuck[0]]]
        raise ValueError(
            f"programs must never wait for each other in a cycle, but {len(stuck)} do: program {stuck[0]} waits until "
            f"counter {counter} reaches {level}, which stays at {done[counter]}"
        )


def _event_lists(schedule: Schedule, steps: int) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """All tiles of all programs in order: (counter, level) waited for, counter signalled, and each program's start.

    Counter ``2 block`` counts the activation tiles of an n-block, ``2 block + 1`` its update tiles.
    """
    tables = []
    for phase, own, other in (("activation", 0, "updates_per_block"), ("update", 1, "activations_per_block")):
        blocks = _block(getattr(schedule, f"{phase}_tiles"), schedule.first_block)
        levels = getattr(schedule, other)[blocks].astype(np.int64)
        tables.append((2 * blocks + own, 2 * blocks + 1 - own, levels, getattr(schedule, f"{phase}_offsets").tolist()))
    waits: list[tuple[int, int]] = []
    signals: list[int] = []
    starts = [0]
    for program in range(schedule.programs):
        for step in range(steps):
            for own_counters, other_counters, levels, offsets in tables if step else tables[1:]:
                part = slice(offsets[program], offsets[program + 1])
                waits.extend(zip(other_counters[part].tolist(), (step * levels[part]).tolist(), strict=True))
                signals.extend(own_counters[part].tolist())
        starts.append(len(signals))
    return waits, signals, starts


def _check_prediction(schedule: Schedule, layers: Sequence[Layer], tiles: Tiles) -> None:
    for phase in ("activation", "update"):
        name, rows = f"{phase}_costs", getattr(schedule, f"{phase}_tiles")
        _check_array(name, getattr(schedule, name), (len(rows),), np.int64)
        if not np.array_equal(getattr(schedule, name), tile_costs(rows, layers, tiles, phase)):
            raise ValueError(f"{name} must be the costs of {phase}_tiles, row by row")
        queues = _queue_costs(getattr(schedule, name), getattr(schedule, f"{phase}_offsets"))
        name = f"{phase}_queues"
        _check_array(name, getattr(schedule, name), (schedule.programs,), np.int64)
        wrong = np.flatnonzero(getattr(schedule, name) != queues)
        if len(wrong):
            raise ValueError(
                f"{name}[{wrong[0]}] must be {queues[wrong[0]]}, what the program's list costs, "
                f"got {getattr(schedule, name)[wrong[0]]}"
            )
    bound = _step_bound(
        schedule.activation_tiles,
        schedule.activation_costs,
        schedule.update_tiles,
        schedule.update_costs,
        schedule.first_block,
        schedule.programs,
    )
    if schedule.lower_bound != bound:
        raise ValueError(f"lower_bound must be {bound}, got {schedule.lower_bound}")
