"""Parameter groups as users of torch write them, and what may stand for a number."""

import warnings

import numpy as np
import pytest
import torch

from locoprop_kernels import rules
from tests.helpers import (
    SGD,
    assert_same,
    backward,
    loss_of,
    mlp,
    moved,
    published,
    steps,
    sum_of_squares,
    train,
    transfers_of,
    weights,
)


def stepped(count=2, **options):
    model = mlp()
    groups = options.pop("groups", None)
    opt = published(model, **{"lr": 1e-2, "activation_lr": 3.0, **options}, **groups(model) if groups else {})
    for seed in range(count):
        opt.zero_grad()
        loss_of(model, seed=seed).backward()
        opt.step()
    return model


def no_decay_for_biases(model):
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    return {"param_groups": [{"params": biases, "weight_decay": 0.0}], "weight_decay": 0.3}


def test_no_weight_decay_for_biases():
    """The increment does not depend on the decay: in one step, weights shrink and biases do not."""
    actual, plain = stepped(1, groups=no_decay_for_biases), stepped(1)
    start = weights(mlp())
    for i, (p, q, w) in enumerate(zip(actual.parameters(), plain.parameters(), start, strict=True)):
        torch.testing.assert_close(p, q - 1e-2 * 0.3 * w if i % 2 == 0 else q)


@pytest.mark.parametrize("rates", [(1e-2, 1e-3), (1e-3, 1e-2), (0.0, 1e-2), (1e-2, 0.0)])
def test_biases_with_a_learning_rate_of_their_own(rates):
    weight_lr, bias_lr = rates
    model, twin = mlp(), mlp()

    def biases(m):
        return [p for name, p in m.named_parameters() if name.endswith("bias")]

    opt = published(model, **{**SGD, "lr": weight_lr, "local_iterations": 1},
                   param_groups=[{"params": biases(model), "lr": bias_lr}])  # fmt: skip
    ids = {id(p) for p in biases(twin)}
    plain = torch.optim.SGD([
        {"params": [p for p in twin.parameters() if id(p) not in ids], "lr": weight_lr},
        {"params": biases(twin), "lr": bias_lr},
    ])  # fmt: skip
    loss_of(model).backward()
    (3.0 * loss_of(twin)).backward()
    opt.step()
    plain.step()
    assert_same(model, twin)


def test_equal_rates_in_two_groups_are_one_group():
    def groups(model):
        return {"param_groups": [{"params": [p for n, p in model.named_parameters() if n.endswith("bias")]}]}

    assert_same(stepped(groups=groups), stepped(), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "value"), [("activation_lr", 1.0), ("local_iterations", 3), ("rule", "adam")])
def test_weight_and_bias_must_agree_in_the_rest(name, value):
    model = mlp()
    opt = published(model, param_groups=[{"params": [model[2].bias], name: value}])
    before = weights(model)
    loss_of(model).backward()
    with pytest.raises(ValueError, match=f"layer '2' must agree in.*differ in {name}"):
        opt.step()
    assert not any(moved(model, before))


def test_named_parameters():
    def named(model):
        return {"param_groups": [{"params": model[2].named_parameters(), "lr": 1e-3}]}

    def plain(model):
        return {"param_groups": [{"params": model[2].parameters(), "lr": 1e-3}]}

    assert_same(stepped(groups=named), stepped(groups=plain), rtol=0, atol=0)
    model = mlp()
    opt = published(model, **named(model))
    assert [group["param_names"] for group in opt.param_groups] == [
        ["0.weight", "0.bias", "4.weight", "4.bias"], ["weight", "bias"]
    ]  # fmt: skip
    opt.load_state_dict(opt.state_dict())


def test_numpy_scalars_and_tensors_as_numbers():
    options = {
        "lr": np.float32(0.25), "activation_lr": np.float64(3.0), "local_iterations": np.int64(4), "prox": np.int32(1),
        "weight_decay": np.float16(0.5),
    }  # fmt: skip
    plain = {"lr": 0.25, "activation_lr": 3.0, "local_iterations": 4, "prox": 1.0, "weight_decay": 0.5}
    assert_same(stepped(**options), stepped(**plain), rtol=0, atol=0)
    assert_same(stepped(**{**plain, "lr": torch.tensor(0.25)}), stepped(**plain), rtol=0, atol=0)
    model = mlp()
    opt = published(model, **options)
    assert {type(opt.param_groups[0][name]) for name in options} == {float, int}
    with pytest.raises(TypeError, match="lr must be a number, got True"):
        published(model, lr=True)
    with pytest.raises(TypeError, match="local_iterations must be an integer"):
        published(model, local_iterations=np.float32(3))


def test_lr_of_zero_is_allowed():
    model = mlp()
    opt = published(model, lr=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 1.0)
    before = weights(model)
    loss_of(model).backward()
    opt.step()
    assert not any(moved(model, before))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


@pytest.mark.parametrize("argument", ["lr", "activation_lr", "prox", "backend", "compute_dtype", "reduction", "aux"])
def test_errors_print_no_tensors(argument):
    with pytest.raises((TypeError, ValueError), match=r"Tensor of shape \[100\]") as caught:
        published(mlp(), **{argument: torch.zeros(100)})
    assert len(str(caught.value)) < 300


def test_sets_of_parameters_are_refused():
    model = mlp()
    with pytest.raises(TypeError, match="params must be in an order"):
        published(model, param_groups=[{"params": set(model[0].parameters())}])


@pytest.mark.parametrize(("saved", "other"), [
    ({"reduction": "sum"}, {}), ({"local_loss": "squared"}, {}), ({"transfers": {"4": "softmax"}}, {}),
    ({"lr_decay": lambda t, T: 1.0}, {}), ({"rule": "adam"}, {}),
])  # fmt: skip
def test_what_a_resume_must_agree_with(saved, other):
    opt, resumed = published(mlp(), **saved), published(mlp(), **other)
    loss_of(resumed.model).backward()
    resumed.step()
    before = {p: dict(slots) for p, slots in resumed.state.items()}
    with pytest.raises(ValueError, match=f"state_dict must be of an optimiser with {next(iter(saved))}"):
        resumed.load_state_dict(opt.state_dict())
    assert all(resumed.state[p][slot] is value for p, slots in before.items() for slot, value in slots.items())
    published(mlp(), **saved).load_state_dict(opt.state_dict())


def test_state_dicts_hold_plain_values():
    """So that ``torch.load(weights_only=True)`` takes them."""
    opt = published(mlp(), lr=np.float32(0.1))
    for group in opt.state_dict()["param_groups"]:
        assert {type(value) for value in group.values()} <= {str, int, float, list, bool}


def test_decoupled_weight_decay_is_adamws():
    model, twin = mlp(), mlp()
    actual = train(model, local_iterations=1, rule="adam", weight_decay=0.5, reduction="sum", activation_lr=1.0)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.5)
    for k in range(2):
        plain.zero_grad()
        sum_of_squares(twin, k).backward()
        plain.step()
    assert_same(actual, twin)


def test_parameter_groups_have_their_own_hyperparameters():
    own = {"activation_lr": 0.5, "prox": 0.2, "local_iterations": 3, "rule": "adam", "lr": 1e-3}
    model = mlp()
    group = {"params": model[2].parameters(), **own}
    actual = train(model, steps=1, param_groups=[group])
    whole, alone = train(mlp(), steps=1), train(mlp(), steps=1, **own)
    assert_same(actual, [*whole[:2], *alone[2:4], *whole[4:]])
    model = mlp()
    opt = published(model, param_groups=[{"params": model[2].parameters(), "transfer": "softplus"}])
    assert transfers_of(opt)["2"] == "softplus(beta=1)"
    opt.load_state_dict(opt.state_dict())
    assert str(opt.param_groups[1]["transfer"]) == "softplus(beta=1)"
    actual = train(model := mlp(), param_groups=[{"params": model[2].parameters(), "transfer": "softplus"}])
    assert_same(actual, train(mlp(), transfers={"2": "softplus"}))
    with pytest.raises(ValueError, match="weight_decay must be"):
        train(mlp(), weight_decay=-1.0)


def test_a_rule_may_be_set_by_its_name():
    models = []
    for rule in ("adagrad", rules.get("adagrad")):
        model = mlp()
        opt = published(model, rule="sgd", lr=1e-3)
        opt.param_groups[0]["rule"] = rule
        steps(model, opt)
        models.append(model)
    assert_same(*models, rtol=0, atol=0)


def test_settings_that_are_not_of_the_optimizers_are_refused_in_the_step():
    model = mlp()
    opt = published(model, lr=1e-3)
    before = weights(model)
    backward(model, opt)
    opt.local_loss = "least squares"
    with pytest.raises(ValueError, match="local_loss must be one of matching, squared; got 'least squares'"):
        opt.step()
    assert not any(moved(model, before))


def test_print_shows_no_entries_that_are_for_checkpoints_alone():
    model = mlp()
    opt = published(model, lr=1e-3)
    steps(model, opt)
    assert "rows_seed" not in str(opt)
    assert "output_gradient" not in str(opt)
