"""Bad arguments, bad models, and models that were changed behind the optimiser's back."""

import pytest
import torch
from torch import nn

from locoprop_torch import LocoProp
from tests.helpers import backward, mlp, moved, weights


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1e-3}, ValueError, "lr must be"),
        ({"lr": float("nan")}, ValueError, "lr must be"),
        ({"lr": float("inf")}, ValueError, "lr must be"),
        ({"lr": "fast"}, TypeError, "lr must be"),
        ({"activation_lr": 0.0}, ValueError, "activation_lr must be"),
        ({"activation_lr": float("inf")}, ValueError, "activation_lr must be"),
        ({"local_iterations": 0}, ValueError, "local_iterations must be"),
        ({"local_iterations": 2.5}, TypeError, "local_iterations must be"),
        ({"prox": -0.1}, ValueError, "prox must be"),
        ({"prox": float("nan")}, ValueError, "prox must be"),
        ({"rule": "lion"}, ValueError, "rule must be one of sgd, .*'lion'"),
        ({"rule": 3}, TypeError, "rule must be"),
        ({"local_loss": "hinge"}, ValueError, "local_loss must be one of matching, squared; got 'hinge'"),
        ({"reduction": "none"}, ValueError, "reduction must be"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
        ({"compute_dtype": torch.int8}, ValueError, "compute_dtype must be"),
        ({"lr_decay": 0.5}, TypeError, "lr_decay must be"),
        ({"aux": "adam"}, ValueError, "aux must be one of adamw"),
        ({"aux": 3}, TypeError, "aux must be"),
        ({"transfers": {"1": "tanh"}}, ValueError, "transfers must name captured layers"),
        ({"transfers": {"0": "tanhh"}}, ValueError, "transfer must be one of"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        LocoProp(mlp(), **arguments)


@pytest.mark.parametrize(
    ("name", "value"), [("lr", -1.0), ("activation_lr", 0.0), ("local_iterations", 0), ("prox", -1.0)]
)
def test_bad_values_in_a_parameter_group(name, value):
    model = mlp()
    opt = LocoProp(model)
    opt.param_groups[0][name] = value
    before = weights(model)
    backward(model, opt)
    with pytest.raises(ValueError, match=f"{name} must be"):
        opt.step()
    assert not any(moved(model, before))


def test_bad_models():
    with pytest.raises(TypeError, match="model must be"):
        LocoProp([nn.Linear(2, 2)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one supported layer"):
        LocoProp(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(ValueError, match="lazy"):
        LocoProp(nn.Sequential(nn.LazyLinear(4)))


def replaced_module(model):
    model[0] = nn.Linear(6, 5)


def replaced_parameter(model):
    model[0].weight = nn.Parameter(torch.zeros(5, 6))


def reshaped_parameter(model):
    model[0].weight.data = torch.zeros(7, 6)
    model[0].weight.grad = torch.zeros(7, 6)


def removed_bias(model):
    model[0].bias = None


def sparse_gradient(model):
    model[0].weight.grad = model[0].weight.grad.to_sparse()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced_module, "layer '0' is no longer the module"),
        (replaced_parameter, "weight of layer '0' is no longer"),
        (reshaped_parameter, "layer '0' changed shape"),
        (removed_bias, "bias of layer '0' is no longer"),
        (sparse_gradient, "layer '0': the gradient of its weight must be dense"),
    ],
)
def test_a_model_that_changed_is_refused(change, message):
    model = mlp()
    opt = LocoProp(model)
    backward(model, opt)
    change(model)
    rest = weights(model[2:])
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert not any(moved(model[2:], rest))
