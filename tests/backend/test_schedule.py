"""The work lists of the single launch: every table is valid and short, every mutated table is rejected."""

import dataclasses
import itertools
import time
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from locoprop_kernels.schedule import (
    Schedule,
    Tiles,
    build,
    count_tiles,
    lower_bound,
    most_expensive_first,
    phase_bounds,
    splits,
    tile_costs,
    validate,
)

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
AUTOENCODER = [(1000, k, n) for k, n in itertools.pairwise(WIDTHS)]
PHASES = ("activation", "update")

sizes = st.integers(1, 90)
networks = st.lists(st.tuples(sizes, sizes, sizes), min_size=1, max_size=5)
tile_sizes = st.builds(Tiles, *[st.sampled_from([1, 8, 16, 32, 64]) for _ in "nbk"]).filter(
    lambda tiles: tiles.n * tiles.b >= 64 and tiles.n * tiles.k >= 64
)


@settings(deadline=None, max_examples=150)
@given(networks, tile_sizes, st.integers(1, 40))
def test_any_network_gets_a_valid_short_schedule(layers, tiles, programs):
    schedule = build(layers, tiles, programs)
    validate(schedule, layers, tiles, resident=programs)

    assert schedule.lower_bound <= schedule.makespan()
    longest_queue = (schedule.activation_queues + schedule.update_queues).max()
    assert longest_queue <= schedule.makespan()
    # Waiting for an n-block can be no worse than waiting for everybody.
    assert schedule.makespan() <= schedule.activation_queues.max() + schedule.update_queues.max()
    assert schedule.makespan(4) <= 4 * (schedule.activation_queues.max() + schedule.update_queues.max())
    assert schedule.total_makespan(1) == schedule.update_queues.max()
    assert 0 < schedule.efficiency <= 1

    # Graham 1969: filling the shortest queue ends at most this far above the average.
    activation, update = schedule.activation_costs, schedule.update_costs
    assert programs * schedule.activation_queues.max() <= activation.sum() + (programs - 1) * activation.max()
    total, longest_tiles = activation.sum() + update.sum(), activation.max() + update.max()
    assert (schedule.activation_queues + schedule.update_queues).sum() == total
    assert programs * longest_queue <= total + (programs - 1) * longest_tiles


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 4))
def test_lower_bound_is_below_the_optimum(costs, programs):
    def best(queues, remaining):
        if not remaining:
            return max(queues)
        return min(
            best((*queues[:i], queues[i] + remaining[0], *queues[i + 1 :]), remaining[1:]) for i in range(len(queues))
        )

    optimum = best((0,) * programs, tuple(costs))
    assert max(costs) <= lower_bound(np.array(costs, np.int64), programs) <= optimum


@settings(deadline=None, max_examples=60)
@given(networks, tile_sizes)
def test_launches_per_phase_take_every_tile_the_most_expensive_first(layers, tiles):
    schedule = build(layers, tiles, 1)
    for phase, found in zip(PHASES, most_expensive_first(layers, tiles), strict=True):
        assert found.dtype == np.int32
        costs = tile_costs(found, layers, tiles, phase)
        assert (np.diff(costs) <= 0).all()
        assert sorted(found.tolist()) == sorted(getattr(schedule, f"{phase}_tiles").tolist())


def test_build_is_deterministic_and_int32():
    first, second = (build(AUTOENCODER, Tiles(128, 64, 64), 132) for _ in range(2))
    for field in dataclasses.fields(Schedule):
        value = getattr(first, field.name)
        assert np.array_equal(value, getattr(second, field.name))
        if isinstance(value, np.ndarray):
            wanted = np.int64 if field.name.endswith(("costs", "queues")) else np.int32
            assert value.dtype == wanted, field.name
            assert value.flags.c_contiguous, field.name


def test_both_phases_visit_blocks_in_the_same_order():
    schedule = build(AUTOENCODER, Tiles(128, 64, 64), 132)
    orders = []
    for phase in PHASES:
        rows, offsets = getattr(schedule, f"{phase}_tiles"), getattr(schedule, f"{phase}_offsets")
        edges = set()
        for program in range(schedule.programs):
            blocks = [tuple(row[:2]) for row in rows[offsets[program] : offsets[program + 1]].tolist()]
            edges |= {(a, b) for a, b in itertools.pairwise(blocks) if a != b}
        orders.append(edges)
    assert not any((b, a) in orders[1] for a, b in orders[0])


def test_the_papers_autoencoder():
    """Longest queue over average: eight or nine tiles for a program, each with a latency; fixed teams lose 30 %."""
    schedule = build(AUTOENCODER, Tiles(n=128, b=64, k=64), 132)
    validate(schedule, AUTOENCODER, Tiles(n=128, b=64, k=64), 132)
    assert schedule.activation_queues.max() / schedule.activation_queues.mean() < 1.11
    assert schedule.update_queues.max() / schedule.update_queues.mean() < 1.07
    assert schedule.efficiency > 0.95
    # Ten local steps cost no more than ten times one: waits are hidden.
    assert schedule.makespan(10) <= 10 * schedule.makespan() * 1.001
    assert schedule.total_makespan(10) == pytest.approx(
        9 * schedule.makespan() + schedule.update_queues.max(), rel=0.02
    )


def test_records_say_whom_to_wait_for_and_whom_to_signal():
    """Activation tiles wait for the update tiles of their n-block and the other way round; counters only grow."""
    schedule = build(AUTOENCODER, Tiles(128, 64, 64), 132)
    blocks = int(schedule.first_block[-1])
    records = dict(zip(PHASES, schedule.records(), strict=True))
    signals = np.zeros(2 * blocks, np.int64)
    for phase, found in records.items():
        assert found.dtype == np.int32
        assert found.shape == (len(getattr(schedule, f"{phase}_tiles")), 8)
        assert np.array_equal(found[:, :3], getattr(schedule, f"{phase}_tiles"))
        np.add.at(signals, found[:, 4], 1)
    for phase, found in records.items():
        block = schedule.first_block[found[:, 0]] + found[:, 1]
        own = block + (blocks if phase == "update" else 0)
        assert np.array_equal(found[:, 4], own)
        assert np.array_equal(found[:, 3], (own + blocks) % (2 * blocks))
        # A local step signals as often as who waits for it counts.
        assert np.array_equal(found[:, 5], signals[found[:, 3]])
        assert not found[:, 6:].any()


def test_large_networks_are_fast():
    layers = [(4096, 4096, 4096)] * 100
    start = time.process_time()
    schedule = build(layers, Tiles(128, 64, 64), 132)
    elapsed = time.process_time() - start
    assert len(schedule.activation_tiles) == 100 * 32 * 64
    assert schedule.efficiency > 0.999
    assert elapsed < 5, f"took {elapsed:.1f} s"  # 0.6 s; time of this process, so others may be busy


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 200_000), st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=5))
def test_parts_of_the_batch_are_long_and_never_predicted_to_cost_more(layers):
    tiles, programs = Tiles(128, 128, 128), 132
    parts = splits(layers, tiles, programs)
    assert all(part == 1 or batch // part >= 1024 for part, (batch, _, _) in zip(parts, layers, strict=True))
    schedule = build(layers, tiles, programs)
    activation, update = phase_bounds(layers, tiles, programs)
    assert activation == lower_bound(schedule.activation_costs, programs)
    assert update <= lower_bound(schedule.update_costs, programs)
    assert count_tiles(layers, tiles) == (len(schedule.activation_tiles), len(schedule.update_tiles))


def test_a_layer_of_few_tiles_and_many_examples_is_cut():
    """A convolution with 27 inputs and 32 outputs is one update tile, whatever its 131,072 rows."""
    tiles = Tiles(64, 128, 64)
    assert splits([(1000, 784, 1000)], tiles, 132) == (1,)
    assert splits([(65_536, 4096, 4096)], tiles, 132) == (1,)
    (parts,) = splits([(131_072, 27, 32)], tiles, 132)
    assert parts >= 64
    _, update = phase_bounds([(131_072, 27, 32)], tiles, 132)
    assert update < lower_bound(build([(131_072, 27, 32)], tiles, 132).update_costs, 132) / 20
    # Beside layers that occupy all programs only the long chain is cut.
    wide = [(8192, 4096, 4096)] * 4
    assert splits([*wide, (131_072, 27, 32)], tiles, 132)[:4] == (1, 1, 1, 1)


def with_rows(schedule, phase, rows, offsets=None):
    """The schedule with another table, and costs and queues that fit it as well as they can."""
    changes = {f"{phase}_tiles": np.ascontiguousarray(rows)}
    if offsets is not None:
        changes[f"{phase}_offsets"] = offsets.astype(np.int32)
    return dataclasses.replace(schedule, **changes)


def drop(schedule, phase, rng):
    rows, offsets = getattr(schedule, f"{phase}_tiles"), getattr(schedule, f"{phase}_offsets")
    row = rng.integers(len(rows))
    return with_rows(schedule, phase, np.delete(rows, row, axis=0), offsets - (offsets > row))


def double(schedule, phase, rng):
    rows, offsets = getattr(schedule, f"{phase}_tiles"), getattr(schedule, f"{phase}_offsets")
    row = rng.integers(len(rows))
    return with_rows(schedule, phase, np.insert(rows, row, rows[row], axis=0), offsets + (offsets > row))


def replace_by_another(schedule, phase, rng):
    rows = getattr(schedule, f"{phase}_tiles").copy()
    if len(rows) < 2:
        return None
    here, there = rng.choice(len(rows), 2, replace=False)
    rows[here] = rows[there]
    return with_rows(schedule, phase, rows)


def alter(schedule, phase, rng):
    rows = getattr(schedule, f"{phase}_tiles").copy()
    rows[rng.integers(len(rows)), rng.integers(3)] += rng.choice([-1, 1, 1000, -(2**31) + 5])
    return with_rows(schedule, phase, rows)


def move_to_neighbour(schedule, phase, rng):
    """Correct work on another program than was planned: what the schedule predicts is not true of it."""
    offsets = getattr(schedule, f"{phase}_offsets").copy()
    inner = [p for p in range(1, schedule.programs) if offsets[p - 1] < offsets[p]]
    if not inner:
        return None
    offsets[rng.choice(inner)] -= 1
    return dataclasses.replace(schedule, **{f"{phase}_offsets": offsets})


def bad_offset(schedule, phase, rng):
    offsets = getattr(schedule, f"{phase}_offsets").copy()
    offsets[rng.integers(len(offsets))] += rng.choice([-1, 1, len(getattr(schedule, f"{phase}_tiles")) + 1])
    return dataclasses.replace(schedule, **{f"{phase}_offsets": offsets})


def bad_count(schedule, phase, rng):
    counts = getattr(schedule, f"{phase}s_per_block").copy()
    counts[rng.integers(len(counts))] += rng.choice([-2, -1, 1, 7])
    return dataclasses.replace(schedule, **{f"{phase}s_per_block": counts})


def bad_first_block(schedule, phase, rng):
    first = schedule.first_block.copy()
    first[rng.integers(len(first))] += rng.choice([-1, 1])
    return dataclasses.replace(schedule, first_block=first)


def missing_list(schedule, phase, rng):
    if schedule.programs < 2:
        return None
    offsets = getattr(schedule, f"{phase}_offsets")
    return dataclasses.replace(schedule, **{f"{phase}_offsets": np.delete(offsets, rng.integers(len(offsets)))})


def false_prediction(schedule, phase, rng):
    name = rng.choice(["costs", "queues", "lower_bound"])
    if name == "lower_bound":
        return dataclasses.replace(schedule, lower_bound=schedule.lower_bound + int(rng.choice([-1, 1])))
    values = getattr(schedule, f"{phase}_{name}").copy()
    values[rng.integers(len(values))] += rng.choice([-1, 1])
    return dataclasses.replace(schedule, **{f"{phase}_{name}": values})


def wrong_type(schedule, phase, rng):
    name = rng.choice([f"{phase}_tiles", f"{phase}_offsets", f"{phase}s_per_block", "first_block"])
    return dataclasses.replace(schedule, **{name: getattr(schedule, name).astype(np.int64)})


def other_phase(schedule, phase, rng):
    """A row of the other phase's table in place of one's own, where that is not the same tile."""
    other = PHASES[phase == PHASES[0]]
    rows, foreign = getattr(schedule, f"{phase}_tiles").copy(), getattr(schedule, f"{other}_tiles")
    here, there = rng.integers(len(rows)), rng.integers(len(foreign))
    if np.array_equal(rows[here], foreign[there]):
        return None
    rows[here] = foreign[there]
    return with_rows(schedule, phase, rows)


# Each with what the error must name, so that one check cannot hide that another one is missing.
MUTATIONS = {
    drop: "_tiles must hold every tile .* missing",
    double: "_tiles must hold every tile .* more than once",
    replace_by_another: "_tiles must hold every tile .* more than once.* missing",
    alter: "_tiles must hold every tile .* missing",
    other_phase: "_tiles must hold every tile .* missing",
    move_to_neighbour: "_queues.* must be",
    bad_offset: "_offsets must|_queues.* must be",
    missing_list: "_offsets must be",
    bad_count: "s_per_block.* must be",
    bad_first_block: "first_block must be",
    false_prediction: "(_costs|_queues|lower_bound).* must be",
    wrong_type: "must be an int32 array",
}


def random_network(rng):
    layers = [tuple(map(int, rng.integers(1, 90, 3))) for _ in range(rng.integers(1, 6))]
    tiles = Tiles(*map(int, rng.choice([8, 16, 32, 64], 3)))
    return layers, tiles, int(rng.integers(1, 24))


def test_mutated_tables_are_all_rejected():
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"{seed = }")
    rng = np.random.default_rng(seed)
    rejected = dict.fromkeys((mutation.__name__ for mutation in MUTATIONS), 0)
    for _ in range(120):
        layers, tiles, programs = random_network(rng)
        schedule = build(layers, tiles, programs)
        validate(schedule, layers, tiles, resident=programs)
        for mutation, message in MUTATIONS.items():
            for phase in PHASES * 3:
                mutant = mutation(schedule, phase, rng)
                if mutant is None:
                    continue
                with pytest.raises(ValueError, match=message):
                    validate(mutant, layers, tiles, resident=programs)
                rejected[mutation.__name__] += 1
    print(rejected)
    assert sum(rejected.values()) >= 5000
    assert min(rejected.values()) >= 200


def test_too_many_programs_and_other_sizes_are_rejected():
    rng = np.random.default_rng(0)
    for _ in range(200):
        layers, tiles, programs = random_network(rng)
        schedule = build(layers, tiles, programs)
        with pytest.raises(ValueError, match="resident"):
            validate(schedule, layers, tiles, resident=programs - 1)
        other = [*layers, (8, 8, 8)]
        with pytest.raises(ValueError, match="first_block"):
            validate(schedule, other, tiles, resident=programs)
        with pytest.raises(ValueError, match="must"):
            validate(schedule, layers, dataclasses.replace(tiles, b=2 * tiles.b, k=2 * tiles.k, n=2), programs)


def test_order_within_a_phase_cannot_hang():
    """No false alarm: any order of a program's own tiles in a phase is sound, and costs the same queues."""
    rng = np.random.default_rng(1)
    for _ in range(40):
        layers, tiles, programs = random_network(rng)
        schedule = build(layers, tiles, programs)
        changes: dict[str, Any] = {}
        for phase in PHASES:
            rows, costs = getattr(schedule, f"{phase}_tiles"), getattr(schedule, f"{phase}_costs")
            offsets = getattr(schedule, f"{phase}_offsets")
            order = np.concatenate([rng.permutation(np.arange(a, b)) for a, b in itertools.pairwise(offsets)]).astype(
                int
            )
            changes |= {f"{phase}_tiles": rows[order], f"{phase}_costs": costs[order]}
        validate(dataclasses.replace(schedule, **changes), layers, tiles, resident=programs)


def test_a_hang_is_found_by_running_the_lists():
    """The check behind the argument: with the count checks out of the way, an unmeetable wait is still found."""
    from locoprop_kernels.schedule.validation import check_progress

    schedule = build(AUTOENCODER, Tiles(128, 64, 64), 132)
    check_progress(schedule)
    for name in ("activations_per_block", "updates_per_block"):
        counts = getattr(schedule, name).copy()
        counts[3] += 1
        with pytest.raises(ValueError, match="wait for each other in a cycle"):
            check_progress(dataclasses.replace(schedule, **{name: counts}))


@pytest.mark.parametrize(
    ("layers", "programs", "message"),
    [
        ([], 1, "at least one"),
        ([(4, 0, 4)], 1, "positive integers"),
        ([(4, 4)], 1, "positive integers"),
        ([(4, 4, 4)], 0, "programs must be"),
        ([(4, 4, 4)], 1.5, "programs must be"),
    ],
)
def test_bad_sizes(layers, programs, message):
    with pytest.raises(ValueError, match=message):
        build(layers, Tiles(16, 16, 16), programs)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_bad_tiles(size):
    with pytest.raises(ValueError, match="tile size b"):
        Tiles(16, size, 16)
