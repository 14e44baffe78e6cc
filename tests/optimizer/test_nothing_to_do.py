"""Where torch's optimisers do nothing, or step on whatever gradient there is, so does ``LocoProp``."""

import logging

import pytest
import torch
from torch import nn

from locoprop_kernels import rules
from tests.helpers import SGD, WithNorm, assert_same, loss_of, mlp, moved, published, weights


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.head = nn.ModuleList(nn.Linear(6, 4) for _ in range(3)), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.zeros(len(x), 4, dtype=x.dtype)
        for i, expert in enumerate(self.experts):
            chosen = torch.arange(len(x)) % 2 == i  # the third gets no token
            h[chosen] = torch.tanh(expert(x[chosen]))
        return self.head(h)


def test_an_expert_without_a_token():
    model = Experts().double()
    opt = published(model, lr=1e-3)
    before = weights(model)
    for seed in range(2):
        opt.zero_grad()
        loss_of(model, seed=seed).backward()
        opt.step()
    drivers = {p.name: (p.driver, p.rows) for report in opt.last_reports for p in report.problems}
    assert drivers["experts.2"] == ("rule", 0)
    assert drivers["experts.1"] == ("gram", 4)
    assert moved(model, before) == [True, True, True, True, False, False, True, True]


def test_only_aux_trains():
    model = WithNorm().double()
    opt = published(model, aux="adamw")
    model.inner.requires_grad_(False)
    model.head.requires_grad_(False)
    before = weights(model)
    loss_of(model).backward()
    opt.step()
    assert moved(model, before) == [False, False, True, True, False, False]
    assert [problem.driver for problem in opt.last_reports[0].problems] == ["none", "none"]


def test_everything_frozen_at_construction():
    model = WithNorm().double()
    for layer in (model.inner, model.head):
        layer.requires_grad_(False)
    opt = published(model, aux=torch.optim.SGD(model.norm.parameters(), lr=0.1))
    loss_of(model).backward()
    opt.step()


def nothing(model, opt):
    pass


def forward_alone(model, opt):
    loss_of(model)


def zero_grad_before_the_step(model, opt):
    loss_of(model).backward()
    opt.zero_grad()


@pytest.mark.parametrize("before", [nothing, forward_alone, zero_grad_before_the_step])
def test_a_step_without_gradients(before):
    model = mlp()
    opt = published(model)
    values = weights(model)
    before(model, opt)
    assert opt.step() is None
    assert not any(moved(model, values))
    assert opt.skipped_steps == 0
    report = opt.last_reports[0]
    assert (report.backend, report.reason) == ("none", "no gradient")
    assert [problem.name for problem in report.problems] == ["0", "2", "4"]


def test_a_closure_without_backward():
    model = mlp()
    opt = published(model)
    assert torch.is_tensor(opt.step(lambda: loss_of(model)))
    assert opt.step(lambda: None) is None


def test_empty_batches():
    model = mlp()
    opt = published(model)
    before = weights(model)
    model(torch.zeros(0, 6, dtype=torch.float64)).sum().backward()
    opt.step()
    assert not any(moved(model, before))
    assert all(problem.driver == "rule" for problem in opt.last_reports[0].problems)


def test_empty_images():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU())
    opt = published(model)
    model(torch.zeros(0, 2, 5, 5)).sum().backward()
    opt.step()


def test_a_gradient_without_rows_is_one_step_of_the_rule(caplog):
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "unused": nn.Linear(6, 3)}).double()
    opt = published(model, **SGD)
    unused = [p.detach().clone() for p in model["unused"].parameters()]
    with caplog.at_level(logging.WARNING, "locoprop_torch"):
        for _ in range(2):
            opt.zero_grad()
            (loss_of(model["used"]) + sum(p.square().sum() for p in model.parameters())).backward()
            opt.step()
    for p, start in zip(model["unused"].parameters(), unused, strict=True):
        torch.testing.assert_close(p.detach(), start * (1 - 1e-2 * 3.0 * 2) ** 2)
    told = [record.message for record in caplog.records if "gradient" in record.message]
    assert len(told) == 1
    assert "'unused' has a gradient but no captured rows" in told[0]
    with_rows, without = opt.last_reports
    assert [(p.name, p.driver, p.rows) for p in with_rows.problems] == [("used", "gram", 8)]
    assert [(p.name, p.driver, p.rows) for p in without.problems] == [("unused", "rule", 0)]
    assert without.committed


@pytest.mark.parametrize("rule", [rules.Adam(), rules.RMSprop(), rules.SGD(0.9), rules.Adagrad()], ids=str)
def test_gradients_that_the_user_sets_are_steps_of_the_rule(rule):
    from locoprop_kernels.testing import torch_optimizer

    model, twin = mlp(), mlp()
    opt = published(model, lr=1e-2, activation_lr=1.0, rule=rule)
    plain = torch_optimizer(rule, list(twin.parameters()), lr=1e-2)
    for seed in range(3):
        for m in (model, twin):
            for p, g in zip(
                m.parameters(), torch.autograd.grad(loss_of(m, seed=seed), list(m.parameters())), strict=True
            ):
                p.grad = g
        opt.step()
        plain.step()
    assert_same(model, twin, rtol=1e-9, atol=1e-12)


def test_a_second_step_on_the_same_gradient():
    """torch takes it again; so do we, as far as the gradient goes."""
    model = mlp()
    opt = published(model, lr=1e-3)
    loss_of(model).backward()
    opt.step()
    before = weights(model)
    opt.step()
    assert all(moved(model, before))
    assert {problem.driver for problem in opt.last_reports[0].problems} == {"rule"}


def test_a_layer_that_is_frozen_for_a_while():
    model = mlp()
    opt = published(model, lr=1e-3)
    for frozen in (False, True, False):
        model[2].requires_grad_(not frozen)
        before = weights(model)
        opt.zero_grad()
        loss_of(model).backward()
        opt.step()
        assert moved(model, before) == [True, True, not frozen, not frozen, True, True]
