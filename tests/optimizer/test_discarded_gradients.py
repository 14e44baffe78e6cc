"""Rows go where their gradient goes, whoever discards it and however."""

import pytest
import torch
from torch import nn

from tests.helpers import assert_same, loss_of, mlp, present, published, rows, step_of


def optimizers_zeros(model, opt):
    opt.zero_grad(set_to_none=False)


def models_none(model, opt):
    model.zero_grad()


def models_zeros(model, opt):
    model.zero_grad(set_to_none=False)


def zeroed_one_by_one(model, opt):
    for p in model.parameters():
        p.grad.zero_()


def replaced_by_zeros(model, opt):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def multiplied_away(model, opt):
    torch._foreach_mul_([p.grad for p in model.parameters()], 0.0)


def skipped_by_the_scaler(model, opt):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for p in model.parameters():
        p.grad[0] = float("inf")
    scaler.scale(torch.ones(()))
    scaler.step(opt)
    scaler.update()
    for p in model.parameters():
        p.grad.zero_()


DISCARDS = [
    optimizers_zeros, models_none, models_zeros, zeroed_one_by_one, replaced_by_zeros, multiplied_away,
    skipped_by_the_scaler,
]  # fmt: skip


@pytest.mark.parametrize("discard", DISCARDS)
def test_rows_of_a_discarded_gradient_are_dropped(discard):
    model = mlp()
    opt = published(model, lr=1e-3)
    loss_of(model, rows=30, seed=7).backward()
    discard(model, opt)
    loss_of(model).backward()
    assert rows(opt) == [8, 8, 8]
    opt.step()
    assert_same(model, step_of())


def test_a_clipped_gradient_keeps_its_rows():
    model = mlp()
    opt = published(model, lr=1e-3)
    loss_of(model, seed=1).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    loss_of(model, seed=2).backward()
    assert rows(opt) == [16, 16, 16]


def test_a_gradient_of_zeros_that_nobody_has_touched_keeps_its_rows():
    torch.manual_seed(0)
    first, last = nn.Linear(6, 5), nn.Linear(5, 3)
    model = nn.Sequential(first, nn.ReLU(), last).double()
    nn.init.zeros_(last.weight)  # so that no gradient reaches the first layer
    opt = published(model, lr=1e-3)
    loss_of(model, seed=1).backward()
    assert not present(first.weight.grad).any()
    loss_of(model, seed=2).backward()
    assert rows(opt) == [16, 16]


def test_one_layer_discarded_alone():
    model = mlp()
    opt = published(model, lr=1e-3)
    loss_of(model, seed=1).backward()
    model[0].zero_grad(set_to_none=False)
    loss_of(model, seed=2).backward()
    assert rows(opt) == [8, 16, 16]


def test_a_bias_discarded_alone_keeps_the_rows_of_the_weight():
    model = mlp()
    opt = published(model, lr=1e-3)
    loss_of(model, seed=1).backward()
    model[0].bias.grad = None
    loss_of(model, seed=2).backward()
    assert rows(opt) == [16, 16, 16]
