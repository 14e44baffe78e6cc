"""``LocoProp(rows=...)``: local steps on a few rows of the batch."""

import copy

import pytest
import torch
from torch import nn

from tests.helpers import mlp, published, steps, weights

ROWS = 8


def trained(count=3, rows=None, **options):
    model = mlp()
    opt = published(model, lr=1e-3, rows=rows, **options)
    steps(model, opt, count)
    return model, opt


def test_all_rows_by_number_are_all_rows():
    expected, _ = trained()
    actual, _ = trained(rows=ROWS)
    assert all(map(torch.equal, weights(actual), weights(expected)))


def test_few_rows_come_near_and_each_step_has_its_own():
    expected, start = trained(count=1)[0], mlp()
    actual, opt = trained(count=1, rows=3)
    for few, exact, before in zip(weights(actual), weights(expected), weights(start), strict=True):
        assert not torch.equal(few, exact)
        assert (few - exact).norm() < 0.5 * (exact - before).norm()
    assert opt.rows_seed == 1
    assert {problem.decision.rows for problem in opt.last_reports[0].problems} == {3}


def test_resume_in_the_middle_gives_the_same_bits():
    model, opt = trained(count=2, rows=3)
    saved, kept = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    steps(model, opt, 2, start=2)
    again = mlp()
    again.load_state_dict(kept)
    resumed = published(again, lr=1e-3, rows=3)
    resumed.load_state_dict(saved)
    steps(again, resumed, 2, start=2)
    assert all(map(torch.equal, weights(again), weights(model)))
    another = published(copy.deepcopy(model), lr=1e-3, rows=3)
    assert another.rows_seed == 0 != resumed.rows_seed


def test_copies_go_on_with_the_same_rows():
    model, opt = trained(count=2, rows=3)
    twin, other = copy.deepcopy((model, opt))
    steps(model, opt, 1, start=2)
    steps(twin, other, 1, start=2)
    assert all(map(torch.equal, weights(twin), weights(model)))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("passes", [1, 2])
def test_convolutions_and_several_passes(groups, passes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=groups), nn.Tanh(), nn.Conv2d(4, 2, 2)).double()
    exact = copy.deepcopy(model)
    start = [p.clone() for p in weights(model)]
    x = torch.randn(4, 2, 6, 5, dtype=torch.float64)
    for one, rows in ((model, 40), (exact, None)):
        opt = published(one, lr=1e-3, rows=rows)
        for part in x.chunk(passes):
            one(part).square().sum().backward()
        opt.step()
    for few, all_rows, before in zip(weights(model), weights(exact), start, strict=True):
        assert not torch.equal(few, all_rows)
        assert (few - all_rows).norm() < 0.5 * (all_rows - before).norm()


@pytest.mark.parametrize("rows", [0, 2.5, True, "few"])
def test_bad_rows(rows):
    with pytest.raises(ValueError, match="rows must be a positive integer, or None"):
        published(mlp(), rows=rows)
