"""A layer has the same local problem from step to step, and still everything that is changed in between counts."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from locoprop_kernels import rules, transfers
from locoprop_torch import LocoProp, PerExample, repeated


def step(model, opt, x):
    opt.zero_grad()
    model(x).square().sum().backward()
    opt.step()


def made(rule="adam", rows=64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5))
    opt = LocoProp(model, rule=rule, activation_lr=0.5, local_iterations=3, rows=rows)
    return model, opt, torch.randn(9, 6)


def forget(opt):
    """Have the optimiser make the next step anew."""
    opt._preparation = repeated.Preparation()
    for layer in opt._layers.values():
        layer.work = None


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


def other_local_loss(model, opt):
    opt.local_loss = "squared"


def other_rows(model, opt):
    opt.rows = 3


def other_numbers(model, opt):
    opt.param_groups[0].update(lr=0.01, activation_lr=0.2, local_iterations=4, weight_decay=0.1)


def per_example(model, opt):
    opt.param_groups[0]["activation_lr"] = PerExample(2.0)


def other_group(model, opt):
    bias = opt.param_groups[0]["params"].pop()
    opt.param_groups.append({**opt.param_groups[0], "params": [bias], "lr": 0.02})


def other_memory(model, opt):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def layer_in_no_use(model, opt):
    model[0].requires_grad_(False)


def other_rule(model, opt):
    opt.param_groups[0]["rule"] = rules.get("sgd")
    opt.state.clear()


def other_dictionary(model, opt):
    opt.param_groups[0] = {**opt.param_groups[0], "prox": 3.0, "local_iterations": 2}


def loaded_and_changed(model, opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.param_groups[0].update(prox=3.0, local_iterations=2)


CHANGES = [
    as_it_was,
    other_state,
    other_tensors_in_state,
    no_state,
    frozen_bias,
    other_transfer,
    other_prox,
    other_strides,
    other_dtype,
    pruned,
    other_local_loss,
    other_rows,
    other_numbers,
    per_example,
    other_group,
    other_memory,
    layer_in_no_use,
    other_rule,
    other_dictionary,
    loaded_and_changed,
]


# Without state, nothing but the groups tells one step from the other after these.
WITHOUT_STATE = [("sgd", change) for change in (other_dictionary, loaded_and_changed, other_prox, other_numbers)]


@pytest.mark.parametrize(("rule", "change"), [*[("adam", change) for change in CHANGES], *WITHOUT_STATE])
def test_what_is_changed_between_steps_counts(rule, change):
    results = []
    for kept in (True, False):
        model, opt, x = made(rule)
        for _ in range(3):
            step(model, opt, x)
        change(model, opt)
        for _ in range(3):
            if not kept:
                forget(opt)
            step(model, opt, x.to(next(model.parameters()).dtype))
        state = [value for slots in opt.state.values() for value in slots.values()]
        results.append([*model.parameters(), *state])
    assert len(results[0]) == len(results[1])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        assert ours.stride() == expected.stride()
        assert torch.equal(ours, expected)


def no_gradient(model, x):
    model[2].weight.grad = None


def other_gradient(model, x):
    model[2].weight.grad = 2 * model[2].weight.grad


def other_strides_of_gradient(model, x):
    model[2].weight.grad = model[2].weight.grad.t().contiguous().t()


def another_pass(model, x):
    model(x[:4]).sum().backward()


def fewer_rows(model, x):
    model.zero_grad()
    model(x[:5]).square().sum().backward()


def no_rows_of_a_layer(model, x):
    model.zero_grad()
    hidden = model[0](x)
    (hidden.sum() + model[2].weight.square().sum()).backward()


def three_dimensions(model, x):
    model.zero_grad()
    model(x[:6].view(2, 3, 6)).square().sum().backward()


IN_A_STEP = [
    no_gradient, other_gradient, other_strides_of_gradient, another_pass, fewer_rows, no_rows_of_a_layer,
    three_dimensions,
]  # fmt: skip


# Two local steps take rows: of three sets of three rows, or of both sets of five and four.
@pytest.mark.parametrize("rows", [None, 3, 5])
@pytest.mark.parametrize("change", IN_A_STEP, ids=lambda change: change.__name__)
def test_what_is_changed_in_a_step_counts(change, rows):
    results = []
    for kept in (True, False):
        model, opt, x = made(rows=rows)
        for number in range(6):
            opt.zero_grad()
            model(x).square().sum().backward()
            if number == 3:
                change(model, x)
            if not kept:
                forget(opt)
            opt.step()
        state = [value for slots in opt.state.values() for value in slots.values()]
        results.append([*model.parameters(), *state])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("rows", [None, 3, 5])
def test_steps_are_repeated(rows, monkeypatch):
    made_anew = []
    calls_of = repeated.calls_of

    def counted(*given):
        made_anew.append(1)
        return calls_of(*given)

    monkeypatch.setattr(repeated, "calls_of", counted)
    model, opt, x = made(rows=rows)
    for lr in (0.1, 0.2, 0.3, 0.4):
        opt.param_groups[0]["lr"] = lr
        step(model, opt, x)
    assert len(made_anew) == 2
    for size in (7, 8, 7, 8):
        step(model, opt, x[:size])
    assert len(made_anew) == 6


def test_a_layer_that_is_trained_later_counts():
    model, opt, x = made()
    model[0].requires_grad_(False)
    for _ in range(4):
        step(model, opt, x)
    before = model[0].weight.detach().clone()
    assert opt.last_reports[-1].problems[0].decision.form == "none"
    model[0].requires_grad_(True)
    step(model, opt, x)
    assert len(opt.last_reports) == 1
    assert not torch.equal(model[0].weight, before)


def test_a_repeated_step_is_refused_like_any_other():
    model, opt, x = made()
    for _ in range(3):
        step(model, opt, x)
    before = copy.deepcopy(model.state_dict())
    opt.param_groups[0]["lr"] = -1.0
    opt.zero_grad()
    model(x).square().sum().backward()
    with pytest.raises(ValueError, match="lr must be finite and >= 0"):
        opt.step()
    opt.param_groups[0]["lr"] = 0.1
    model[2].weight.grad[0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        opt.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    opt.zero_grad()
    x = x.clone()
    model(x).square().sum().backward()
    x.mul_(2)
    opt.rows = None
    with pytest.raises(ValueError, match="overwritten in place"):
        opt.step()


def test_gradients_and_rows_are_let_go_of():
    model, opt, x = made()
    for _ in range(3):
        step(model, opt, x)
    x = x.clone()
    opt.zero_grad()
    model(x).square().sum().backward()
    opt.step()
    held = [weakref.ref(parameter.grad) for parameter in model.parameters()] + [weakref.ref(x)]
    opt.zero_grad()
    del x
    assert not any(tensor() is not None for tensor in held)


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
