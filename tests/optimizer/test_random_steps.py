"""Random training loops, in which users change things between steps and in them: repeated steps make no difference.

Each program runs twice: once as it is, so that steps that are like the one before are made of the same calls, and once
with an optimiser that is made to forget what it knows before each step.
"""

import copy
import random

import pytest
import torch
from torch import nn

from locoprop_kernels import rules, transfers
from locoprop_torch import LocoProp, PerExample, repeated

PROGRAMS, STEPS = 48, 12
RULES = ("sgd", "momentum", "rmsprop", "adam", "adagrad")


def made(choose):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5, bias=choose([True, False])), nn.ReLU())
    model.append(nn.Linear(5, 4))
    groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": [model[2].weight], "lr": 0.02}]
    return model, LocoProp(
        model,
        rule=choose(RULES),
        local_iterations=choose([1, 2, 3, 5]),
        activation_lr=choose([0.5, PerExample(2.0)]),
        rows=choose([None, 2, 3, 5, 64]),
        backend=choose(["auto", "reference"]),
        param_groups=choose([(), groups]),
    )


def between_steps(model, opt, choose):
    """Change something that a user may change between two steps."""
    layer, groups = model[choose([0, 2, 4])], opt.param_groups
    group, number = choose(groups), choose([0.001, 0.01, 0.05])
    slots = [slots for slots in opt.state.values() if slots]

    def in_all_groups(name, value):
        for each in groups:
            each[name] = value

    def other_rule():
        in_all_groups("rule", rules.get(choose(RULES)))
        opt.state.clear()

    def other_tensors_in_state():
        for some in slots:
            some.update({slot: torch.zeros_like(value) for slot, value in some.items()})

    def smaller_state():
        for some in slots:
            for value in some.values():
                value.copy_(value * 0.5)

    def other_memory():
        layer.weight.data = layer.weight.data.clone()

    changes = [
        lambda: group.update(lr=number),
        lambda: group.update(weight_decay=number),
        lambda: in_all_groups("activation_lr", choose([0.3, PerExample(3.0)])),
        lambda: in_all_groups("local_iterations", choose([1, 2, 4])),
        lambda: in_all_groups("transfer", transfers.get(choose(["sigmoid", "tanh", "identity"]))),
        lambda: layer.weight.requires_grad_(False),
        lambda: model.requires_grad_(True),
        lambda: opt.state.clear(),
        lambda: opt.state.pop(layer.weight, None),
        lambda: opt.load_state_dict(copy.deepcopy(opt.state_dict())),
        lambda: setattr(opt, "rows", choose([None, 2, 3, 5])),
        lambda: setattr(opt, "local_loss", choose(["matching", "squared"])),
        lambda: setattr(opt, "reduction", choose(["mean", "sum"])),
        lambda: setattr(opt, "trace", not opt.trace),
        other_rule,
        other_tensors_in_state,
        smaller_state,
        other_memory,
    ]
    choose(changes)()


def in_step(model, x, choose):
    """Do something that a user may do between a backward pass and the step."""
    weight, size = model[choose([0, 2, 4])].weight, choose([1, 4, 5, 9])

    def other_strides():
        if weight.grad is not None:
            weight.grad = weight.grad.t().contiguous().t()

    def other_batch(batch):
        model.zero_grad(set_to_none=choose([True, False]))
        model(batch).square().sum().backward()

    changes = [
        lambda: setattr(weight, "grad", None),
        lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
        lambda: model(x[:size]),
        lambda: model(x[:size]).sum().backward(),
        lambda: other_batch(x[:size]),
        lambda: other_batch(x[:8].view(2, 4, 6)),
        lambda: model.zero_grad(),
        other_strides,
    ]
    choose(changes)()


def run(seed, forgets):
    """The parameters, the state, and what the steps have reported of a random program."""
    chance = random.Random(seed)
    model, opt = made(chance.choice)
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    reports = []
    for _ in range(STEPS):
        if chance.random() < 0.25:
            between_steps(model, opt, chance.choice)
        opt.zero_grad()
        loss = model(x).square().sum()
        if loss.requires_grad:
            loss.backward()
            if chance.random() < 0.2:
                in_step(model, x, chance.choice)
        if forgets:
            opt._preparation = repeated.Preparation()
            for layer in opt._layers.values():
                layer.work = None
        opt.step()
        reports.append([str(report) for report in opt.last_reports])
    state = [value for p in model.parameters() for value in opt.state.get(p, {}).values()]
    return [*(p.detach() for p in model.parameters()), *state], reports


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_repeated_steps_make_no_difference(seed):
    tensors, reports = run(seed, forgets=False)
    expected, expected_reports = run(seed, forgets=True)
    assert reports == expected_reports
    assert len(tensors) == len(expected)
    for ours, theirs in zip(tensors, expected, strict=True):
        assert ours.stride() == theirs.stride()
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_many_of_these_steps_are_repeated(monkeypatch):
    found = []
    again = repeated._RepeatedStep.again

    def noted(*given):
        step = again(*given)
        found.append(step is not None)
        return step

    monkeypatch.setattr(repeated._RepeatedStep, "again", noted)
    for seed in range(8):
        run(seed, forgets=False)
    assert sum(found) > 2 * STEPS
    assert not all(found)
