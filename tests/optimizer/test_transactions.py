"""A step is a transaction: one that would leave something that is not finite changes nothing."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import WithNorm, backward, batch, mlp, moved, present, published, weights


def snapshot(model, opt):
    return weights(model), copy.deepcopy(opt.state_dict()["state"])


def assert_unchanged(model, opt, before):
    now = snapshot(model, opt)
    assert all(torch.equal(a, b) for a, b in zip(now[0], before[0], strict=True))
    assert now[1].keys() == before[1].keys()
    for parameter, slots in now[1].items():
        assert all(torch.equal(value, before[1][parameter][slot]) for slot, value in slots.items())


def with_nan_input(model, x, y):
    x[0, 0] = float("nan")
    F.mse_loss(model(x), y).backward()


def with_infinite_gradient(model, x, y):
    F.mse_loss(model(x), y).backward()
    model[2].bias.grad[1] = float("inf")


@pytest.mark.parametrize("spoil", [with_nan_input, with_infinite_gradient])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "rmsprop", "adam", "adagrad"])
@pytest.mark.parametrize("iterations", [1, 4])
def test_non_finite_steps_change_nothing(spoil, rule, iterations):
    model = mlp()
    opt = published(model, lr=1e-3, rule=rule, local_iterations=iterations)
    backward(model, opt)
    opt.step()
    before = snapshot(model, opt)
    for count in (1, 2):
        opt.zero_grad()
        spoil(model, *batch())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.step()
        assert [w.filename for w in caught] == ([__file__] if count == 1 else [])
        assert opt.skipped_steps == count
        assert not opt.last_reports[0].committed
        assert_unchanged(model, opt, before)
    backward(model, opt)
    opt.step()
    assert opt.last_reports[0].committed
    assert all(moved(model, before[0]))


def test_divergence_of_a_local_loop_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    opt = published(model, lr=1e4, rule="sgd", local_iterations=60, local_loss="squared", lr_decay=lambda t, T: 1.0)
    backward(model, opt)
    before = snapshot(model, opt)
    with pytest.warns(RuntimeWarning, match="not finite"):
        opt.step()
    assert_unchanged(model, opt, before)


def test_aux_is_part_of_the_transaction():
    model = WithNorm()
    opt = published(model, aux=torch.optim.AdamW(model.norm.parameters(), lr=0.1))
    for spoiled in (model.head.weight, model.norm.weight):
        backward(model, opt)
        present(spoiled.grad)[0] = float("nan")
        before = weights(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.step()
        assert not any(moved(model, before))
    assert opt.skipped_steps == 2


def test_a_non_finite_loss_of_a_closure_is_not_trusted():
    model = mlp()
    opt = published(model)
    before = weights(model)
    with pytest.warns(RuntimeWarning, match="loss"):
        opt.step(lambda: backward(model, opt) + float("inf"))
    assert not any(moved(model, before))


def test_all_groups_commit_or_none():
    model = nn.Sequential(nn.Linear(6, 5))
    opt = published(model, lr=1e-3)
    head = nn.Linear(5, 3)
    model.append(head)
    opt.add_param_group({"params": head.parameters()})
    backward(model, opt)
    present(head.weight.grad)[0, 0] = float("nan")
    before = snapshot(model, opt)
    with pytest.warns(RuntimeWarning):
        opt.step()
    assert_unchanged(model, opt, before)
