"""A step is a transaction: one that would leave something that is not finite changes nothing."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from locoprop_torch import LocoProp
from tests.helpers import WithNorm, assert_same, backward, batch, loss_of, mlp, moved, present, published, weights


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


def discarded_by_the_optimizer(model, opt):
    opt.zero_grad()


def discarded_by_hand(model, opt):
    for parameter in model.parameters():
        parameter.grad = None


class Failing:
    """What raises while ``on``: a regulariser in the second layer, and a hook before the step of ``aux``."""

    def __init__(self):
        self.on = False

    def regulariser(self, weight, start):
        if self.on and weight.shape == (3, 5):
            raise RuntimeError("out of memory")
        return weight - start

    def before_aux(self, *_):
        if self.on:
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("discard", [discarded_by_the_optimizer, discarded_by_hand])
@pytest.mark.parametrize("before", [0, 3], ids=["first step", "repeated step"])
@pytest.mark.parametrize("raising", ["aux", "regulariser"])
def test_the_rows_of_a_step_that_raised_are_not_missing_in_the_next(raising, before, discard):
    """Local loops let go of rows as they go; without them a layer would silently make one step of the rule."""

    def trained(fails):
        model, failing = WithNorm(), Failing()
        aux = torch.optim.SGD(model.norm.parameters(), lr=0.1)
        if raising == "aux":
            aux.register_step_pre_hook(failing.before_aux)
        opt = LocoProp(model, rows=3, aux=aux, regulariser=failing.regulariser if raising == "regulariser" else None)
        for seed in range(before):
            backward(model, opt, rows=30, seed=seed)
            opt.step()
        if fails:
            failing.on = True
            backward(model, opt, rows=30, seed=10)
            state, numbers = snapshot(model, opt), (opt.rows_seed, opt.output_gradient)
            with pytest.raises(RuntimeError, match="out of memory"):
                opt.step()
            failing.on = False
            with pytest.raises(ValueError, match=r"the rows of layer 'inner' were used by a step that raised: call"):
                opt.step()
            assert_unchanged(model, opt, state)
            assert (opt.rows_seed, opt.output_gradient) == numbers
        discard(model, opt)
        loss_of(model, rows=30, seed=11).backward()
        opt.step()
        opt.step()  # on the gradient alone
        return model

    assert_same(trained(True), trained(False), rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_weight_decay_leaves_what_is_masked(rule):
    model = mlp()
    keep = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters()}
    opt = LocoProp(model, rule=rule, masks=keep, weight_decay=10.0)
    before = weights(model)
    backward(model, opt)
    opt.step()
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(parameter == old, ~keep[name])
