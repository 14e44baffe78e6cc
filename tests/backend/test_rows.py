"""Local steps on a few rows of the batch: which rows, and what the estimate is worth."""

from typing import Any

import pytest
import torch

import locoprop_kernels as lk
from locoprop_kernels.patches import Patches, Stacked, every, row_chunks
from locoprop_kernels.sampling import count_sets, set_order, set_size
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
    orders = [set_order.__wrapped__(seed, 50, 9) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert set_order(0, 50, 4) == orders[0][:4]


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
