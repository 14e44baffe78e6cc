"""Proof by static checks that a launch with given work lists computes every tile and cannot hang."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from locoprop_kernels.devices import H100, DeviceModel
from locoprop_kernels.schedule.costs import CostArray, step_bound, tile_costs
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
from locoprop_kernels.schedule.work_lists import Schedule

__all__ = ["check_progress", "validate"]


def validate(
    schedule: Schedule, layers: Sequence[Layer], tiles: Tiles, resident: int, device: DeviceModel = H100
) -> None:
    """Prove by static checks alone that a launch with this schedule computes every tile and cannot hang.

    Args:
        schedule: the tables to be launched.
        layers: ``(B, K, N)`` of each layer.
        tiles: tile sizes that the kernel is launched with.
        resident: how many programs the device can hold at once.
        device: whose rates the schedule was built with.

    Raises:
        ValueError: saying what is wrong with which table.
    """
    check_sizes(layers, schedule.programs)
    if schedule.programs > resident:
        raise ValueError(
            f"programs must all be resident, or one may wait for another that never starts: "
            f"{schedule.programs} programs, but only {resident} can be resident"
        )
    first_block = first_blocks(layers, tiles)
    _check_array("first_block", schedule.first_block, first_block.shape)
    if not np.array_equal(schedule.first_block, first_block):
        raise ValueError(
            f"first_block must be {first_block.tolist()} for these layers, got {schedule.first_block.tolist()}"
        )
    expected = all_tiles(layers, tiles)
    for phase, tile_set in zip(("activation", "update"), expected, strict=True):
        _check_offsets(schedule, phase)
        _check_tiles(schedule, phase, tile_set)
        _check_wait_counts(schedule, phase, tiles_per_block(tile_set, first_block))
    check_progress(schedule)
    _check_prediction(schedule, layers, tiles, device)


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


def check_progress(schedule: Schedule, steps: int = 3) -> None:
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
        blocks = block_of(getattr(schedule, f"{phase}_tiles"), schedule.first_block)
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


def _check_prediction(schedule: Schedule, layers: Sequence[Layer], tiles: Tiles, device: DeviceModel) -> None:
    """The costs that the schedule was chosen by are those of its tables."""
    for phase in ("activation", "update"):
        name, rows = f"{phase}_costs", getattr(schedule, f"{phase}_tiles")
        _check_array(name, getattr(schedule, name), (len(rows),), np.int64)
        if not np.array_equal(
            getattr(schedule, name), tile_costs(rows, layers, tiles, phase, device, schedule.programs)
        ):
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
    bound = step_bound(
        schedule.activation_tiles,
        schedule.activation_costs,
        schedule.update_tiles,
        schedule.update_costs,
        schedule.first_block,
        schedule.programs,
    )
    if schedule.lower_bound != bound:
        raise ValueError(f"lower_bound must be {bound}, got {schedule.lower_bound}")


def _queue_costs(costs: CostArray, offsets: IntArray) -> CostArray:
    total = np.concatenate([[0], np.cumsum(costs)])
    return total[offsets[1:]] - total[offsets[:-1]]
