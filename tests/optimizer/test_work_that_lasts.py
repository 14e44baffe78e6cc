"""A layer has the same local problem from step to step, and still everything that is changed in between counts."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from locoprop_kernels import rules, transfers
from locoprop_torch import LocoProp


def step(model, opt, x):
    opt.zero_grad()
    model(x).square().sum().backward()
    opt.step()


def made(rule="adam"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5))
    return model, LocoProp(model, rule=rule, activation_lr=0.5, local_iterations=3), torch.randn(9, 6)


def as_it_was(model, opt):
    """Nothing."""


def other_state(model, opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for slots in opt.state.values():
        slots["exp_avg"].mul_(0.5)


def other_tensors_in_state(model, opt):
    for slots in opt.state.values():
        slots.update({slot: torch.zeros_like(value) for slot, value in slots.items()})


def no_state(model, opt):
    opt.state.clear()


def frozen_bias(model, opt):
    model[2].bias.requires_grad_(False)


def other_transfer(model, opt):
    opt.param_groups[0]["transfer"] = transfers.get("sigmoid")


def other_prox(model, opt):
    opt.param_groups[0]["prox"] = 3.0


def other_strides(model, opt):
    model[2].weight.data = model[2].weight.data.t().contiguous().t()


def other_dtype(model, opt):
    model.bfloat16()


def pruned(model, opt):
    prune.l1_unstructured(model[0], "weight", amount=0.5)


def other_rule(model, opt):
    opt.param_groups[0]["rule"] = rules.get("sgd")
    opt.state.clear()


CHANGES = [
    as_it_was, other_state, other_tensors_in_state, no_state, frozen_bias, other_transfer, other_prox, other_strides, other_dtype, pruned,
    other_rule,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_changed_between_steps_counts(change):
    results = []
    for kept in (True, False):
        model, opt, x = made()
        for _ in range(2):
            step(model, opt, x)
        change(model, opt)
        for _ in range(2):
            if not kept:
                for layer in opt._layers.values():
                    layer.work = None
            step(model, opt, x.to(next(model.parameters()).dtype))
        state = [value for slots in opt.state.values() for value in slots.values()]
        results.append([*model.parameters(), *state])
    assert len(results[0]) == len(results[1])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        assert ours.stride() == expected.stride()
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_the_work_is_made_once(rule):
    model, opt, x = made(rule)
    step(model, opt, x)
    works = [layer.work for layer in opt._layers.values()]
    step(model, opt, x)
    assert all(layer.work is work for layer, work in zip(opt._layers.values(), works, strict=True))
    assert all(not work.problem.x.numel() and work.problem.grad_weight is None for work in works)


def test_a_weight_of_another_shape_is_refused():
    model, opt, x = made()
    step(model, opt, x)
    opt.zero_grad()
    model(x).square().sum().backward()
    model[0].weight.data = torch.zeros(5, 7)
    with pytest.raises(ValueError, match="changed shape"):
        opt.step()
