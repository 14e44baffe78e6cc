"""Local steps on a few rows of the batch: which rows, and what the estimate is worth."""

from typing import Any

import pytest
import torch

import locoprop_kernels as lk
from locoprop_kernels.chosen import ChosenRows, fitted
from locoprop_kernels.patches import Patches, Stacked, every, row_chunks
from locoprop_kernels.sampling import count_sets, count_sets_of_parts, set_order, set_size
from tests.helpers import present
from tests.problems import copied, problem_for, random_layer

BATCH = 37


def problem(transfer="tanh", batch=BATCH, **options):
    return problem_for(*random_layer(3, batch, 6, 5), transfer, **options)


def increments(rows=None, seed=0, iterations=4, transfer="tanh", **options):
    """``Δ`` and ``δ`` after some local steps."""
    arguments: dict[str, Any] = {"prox": 0.1, "commit": False, **options}
    report = lk.local_steps_([problem(transfer)], "sgd", [0.05] * iterations, rows=rows, rows_seed=seed, **arguments)
    return present(report.delta_weight[0]), present(report.delta_bias[0])


@pytest.mark.parametrize("transfer", ["tanh", "identity", "softmax"])
@pytest.mark.parametrize("rows", [BATCH, BATCH + 1, 10**6])
def test_as_many_rows_as_there_are_is_all_of_them_to_the_bit(rows, transfer):
    assert all(map(torch.equal, increments(rows, transfer=transfer), increments(None, transfer=transfer)))


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 12, 36])
def test_sets_are_the_batch_cut_up(rows):
    sets = count_sets(BATCH, rows)
    members = [list(range(number, BATCH, sets)) for number in range(sets)]
    assert sorted(row for one in members for row in one) == list(range(BATCH))
    assert [len(one) for one in members] == [set_size(BATCH, sets, number) for number in range(sets)]
    assert max(map(len, members)) <= rows
    order = set_order(11, sets, 2 * sets)
    assert sorted(order[:sets]) == sorted(order[sets:]) == list(range(sets))


def test_the_order_depends_on_the_seed_and_nothing_else():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    # So many more are made anew: they are not those that were kept for the first.
    orders = [set_order(seed, 50, count)[:9] for seed, count in ((0, 9), (0, 90), (1, 9))]
    assert orders[0] == orders[1] != orders[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert set_order(0, 50, 4) == orders[0][:4]


@pytest.mark.parametrize("first", [1, 3, 4, 5, 12])
@pytest.mark.parametrize("seed", range(5))
def test_no_set_is_taken_twice_before_all_have_been(first, seed):
    for times in (1, 2, 4, 8):
        sets = first * times
        order = set_order(seed, sets, 2 * sets)
        assert sorted(order[:sets]) == sorted(order[sets:]) == list(range(sets))
        assert set_order(seed, sets, sets + 1) == order[: sets + 1]


@pytest.mark.parametrize("first", [1, 3, 4, 5, 12])
@pytest.mark.parametrize("seed", range(5))
def test_a_set_is_half_of_one_among_half_as_many(first, seed):
    for times in (1, 2, 4, 8):
        sets = first * times
        fewer, more = set_order(seed, sets, 20), set_order(seed, 2 * sets, 20)
        assert [number % sets for number in more] == list(fewer)


@pytest.mark.parametrize("sets", [8, 12])
def test_each_local_step_takes_each_set_as_often(sets):
    """Over many seeds; six deviations of a binomial count."""
    seeds = 2000
    counts = torch.zeros(3, sets)
    for seed in range(seeds):
        for t, number in enumerate(set_order(seed, sets, 3)):
            counts[t, number] += 1
    assert (counts - seeds / sets).abs().max() < 6 * (seeds / sets) ** 0.5


@pytest.mark.parametrize(
    ("sizes", "rows", "sets"),
    [
        ([37], 5, 8), ([0, 37], 5, 8), ([37, 3], 5, 8), ([37, 4], 5, 16), ([10] * 8, 10, 8), ([20, 21], 10, 8),
        ([3, 2], 1, 3), ([5, 5], 10, 1), ([5, 5], None, 1), ([], 4, 1),
    ],
)  # fmt: skip
def test_sets_of_a_batch_in_parts(sizes, rows, sets):
    assert count_sets_of_parts(sizes, rows) == sets


def chosen_from(one, rows, seed, iterations):
    """The problem with those rows alone that its local steps take."""
    sets = count_sets(one.shape[0], rows)
    numbers = set_order(seed, sets, iterations - 1)

    def chosen(whole):
        return ChosenRows(one.shape[0], sets, {number: every(whole, number, sets).clone() for number in numbers})

    return copied(one, x=chosen(one.x), preactivation=chosen(one.preactivation))


@pytest.mark.parametrize("transfer", ["tanh", "identity", "softmax"])
@pytest.mark.parametrize("rows", [1, 5, 12])
def test_chosen_rows_give_the_bits_of_all_rows(transfer, rows):
    whole = problem(transfer)
    kept = chosen_from(whole, rows, 4, 4)
    for one in (whole, kept):
        lk.local_steps_([one], "adam", [0.05] * 4, rows=rows, rows_seed=4)
    assert torch.equal(whole.weight, kept.weight)
    assert torch.equal(present(whole.bias), present(kept.bias))


def test_chosen_rows_win_over_the_settings():
    kept = chosen_from(problem(), 5, 4, 3)
    report = lk.local_steps_([kept], lr=[0.05] * 7, rows=10**6, rows_seed=9)
    assert report.committed
    assert kept.weight.isfinite().all()


def test_chosen_rows_have_sets_alone():
    whole = torch.arange(22.0).reshape(11, 2)
    rows = ChosenRows(11, 4, {number: whole[number::4] for number in (2, 3)})
    assert rows.shape == (11, 2)
    assert torch.equal(every(rows, 3, 4), whole[3::4])
    assert every(rows, 0, 4).shape == (3, 2)  # of another set, filled up
    with pytest.raises(ValueError, match="step must be 4"):
        every(rows, 0, 2)
    with pytest.raises(ValueError, match="only 2 of 4 sets"):
        list(row_chunks(rows))
    with pytest.raises(TypeError, match="no groups"):
        rows.group(0)
    with pytest.raises(ValueError, match="kept must hold rows"):
        ChosenRows(11, 4, {2: whole[:0]})
    grouped = ChosenRows(11, 4, {2: whole.expand(3, 11, 2)[:, 2::4]})
    assert torch.equal(every(grouped.group(1), 2, 4), whole[2::4])


@pytest.mark.parametrize(("there", "size"), [(5, 3), (3, 5), (4, 4), (1, 3)])
def test_rows_are_left_out_or_repeated_evenly(there, size):
    found = fitted(torch.arange(float(there))[:, None], size)[:, 0]
    counts = torch.stack([(found == row).sum() for row in range(there)])
    assert len(found) == size
    assert counts.max() - counts.min() <= 1
    assert torch.equal(found, found.sort().values)


def test_parts_of_a_batch_are_taken_exactly_on_average():
    parts = [random_layer(seed, size, 6, 5) for seed, size in enumerate((9, 20, 3))]
    weight, bias = parts[0][1:3]
    x, residual = torch.cat([part[0] for part in parts]), torch.cat([part[3] for part in parts])

    def delta(**options):
        one = problem_for(x, weight, bias, residual, "tanh")
        ends = [9, 29, 32]
        pieces = [slice(end - len(part[0]), end) for end, part in zip(ends, parts, strict=True)]
        one.x, one.preactivation = (Stacked([whole[p] for p in pieces]) for whole in (one.x, one.preactivation))
        return present(lk.local_steps_([one], "sgd", [0.05] * 2, commit=False, **options).delta_weight[0])

    sets, seed = count_sets_of_parts([9, 20, 3], 4), 0
    assert sets == 12
    found: dict[int, torch.Tensor] = {}
    while len(found) < sets:
        found.setdefault(set_order(seed, sets, 1)[0], delta(rows=4, rows_seed=seed))
        seed += 1
    torch.testing.assert_close(torch.stack(list(found.values())).mean(0), delta(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("transfer", ["tanh", "identity", "softmax", "silu"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_the_average_over_all_sets_is_the_exact_step(rows, reduction, transfer):
    sets = count_sets(BATCH, rows)
    found: dict[int, tuple[torch.Tensor, ...]] = {}
    seed = 0
    while len(found) < sets:
        number = set_order(seed, sets, 2)[0]
        if number not in found:
            found[number] = increments(rows, seed, 2, transfer, reduction=reduction)
        seed += 1
    assert any(not torch.allclose(one[0], found[0][0], rtol=1e-6) for one in found.values())
    for kind, exact in enumerate(increments(None, 0, 2, transfer, reduction=reduction)):
        average = torch.stack([one[kind] for one in found.values()]).mean(0)
        torch.testing.assert_close(average, exact, rtol=1e-12, atol=1e-15)


def test_the_trace_is_estimated_by_the_same_rows():
    exact = present(lk.local_steps_([problem()], "sgd", [0.05], trace=True, commit=False).trace[0])
    sets, seed = count_sets(BATCH, 5), 0
    found: dict[int, torch.Tensor] = {}
    while len(found) < sets:
        report = lk.local_steps_([problem()], "sgd", [0.05], rows=5, rows_seed=seed, trace=True, commit=False)
        trace = present(report.trace[0])
        assert trace[0] == 0
        found.setdefault(set_order(seed, sets, 1)[0], trace)
        seed += 1
    torch.testing.assert_close(torch.stack(list(found.values())).mean(0), exact, rtol=1e-12, atol=1e-15)


def test_problems_of_one_batch_take_the_same_rows():
    first, second = problem(), copied(problem())
    lk.local_steps_([first, problem(batch=9), second], "adam", [0.05] * 5, rows=4, rows_seed=3)
    assert torch.equal(first.weight, second.weight)


def test_the_report_says_how_many_rows():
    report = lk.local_steps_([problem(), problem(batch=3)], lr=[0.1] * 3, rows=4)
    assert [one.decision.rows for one in report.problems] == [4, None]
    assert "4 rows in a local step" in str(report)


def test_groups_take_rows_too():
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(2, *size, generator=generator).double() for size in ((21, 4), (3, 4), (3, 4)))
    together = lk.LocalProblem(x, x @ weight.mT, weight.clone(), grad_weight=grad, transfer="tanh")
    lk.local_steps_([together], lr=[0.1] * 3, rows=4, rows_seed=1)
    for g in range(2):
        alone = lk.LocalProblem(x[g], x[g] @ weight[g].mT, weight[g].clone(), grad_weight=grad[g], transfer="tanh")
        lk.local_steps_([alone], lr=[0.1] * 3, rows=4, rows_seed=1)
        torch.testing.assert_close(together.weight[g], alone.weight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_only_the_chosen_patches_are_formed(groups, channels_last):
    x = torch.arange(2 * 4 * 7 * 6.0).reshape(2, 4, 7, 6)
    patches = Patches(x, (3, 2), (2, 1), (1, 2), channels_last, groups)
    whole = torch.cat(list(row_chunks(patches)), -2)
    stacked = Stacked([patches, whole[..., :5, :].contiguous(), patches])
    all_rows = torch.cat([whole, whole[..., :5, :], whole], -2)
    for start, step in ((0, 1), (3, 7), (6, 100)):
        assert torch.equal(every(patches, start, step), whole[..., start::step, :])
        assert torch.equal(every(stacked, start, step), all_rows[..., start::step, :])


@pytest.mark.parametrize("rows", [0, -1, 1.5, True, "all"])
def test_bad_rows_are_refused_by_name(rows):
    one = problem()
    before = one.weight.clone()
    with pytest.raises(ValueError, match="rows must be a positive integer, or None"):
        lk.local_steps_([one], lr=[0.1] * 2, rows=rows)
    with pytest.raises(ValueError, match="rows_seed must be an integer >= 0"):
        lk.local_steps_([one], lr=[0.1] * 2, rows=4, rows_seed=-1)
    assert torch.equal(one.weight, before)
