"""Pruned weights stay where they are, however the model says that they are pruned."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

from locoprop_kernels import rules
from tests.helpers import mlp, moved, present, published, steps, weights

RULES = {"sgd": rules.SGD(), "rmsprop": rules.RMSprop(), "adam": rules.Adam()}


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def mask_like(parameter):
    return (torch.arange(parameter.numel()).reshape(parameter.shape) % 3 != 0).to(parameter.dtype)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("local_loss", ["matching", "squared"])
def test_masks_of_prune(rule, local_loss):
    model = mlp()
    prune.custom_from_mask(model[2], "weight", mask_like(model[2].weight))
    prune.custom_from_mask(model[0], "bias", torch.tensor([1.0, 0, 1, 0, 1]).double())
    opt = published(model, lr=1e-3, rule=RULES[rule], local_loss=local_loss)
    original, bias = model[2].weight_orig.detach().clone(), model[0].bias_orig.detach().clone()
    steps(model, opt, 4)
    mask = model[2].weight_mask.bool()
    assert torch.equal(model[2].weight_orig[~mask], original[~mask])
    assert (model[2].weight_orig[mask] != original[mask]).all()
    assert (model[0].bias_orig != bias).tolist() == [True, False, True, False, True]


def test_a_masked_layer_is_the_masked_problem():
    """The mask acts in every local step: the increment is that of a problem whose gradient is masked throughout."""
    layer = nn.Linear(6, 3).double()
    model = nn.Sequential(layer, nn.Tanh())
    mask = mask_like(layer.weight)
    with torch.no_grad():
        layer.weight *= mask
    opt = published(model, lr=1e-2, rule="sgd", local_iterations=3, masks={"0.weight": mask}, reduction="sum",
                   lr_decay=lambda t, T: 1.0)  # fmt: skip
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    x = torch.randn(5, 6, dtype=torch.float64)
    a0 = layer(x).detach()
    model(x).square().sum().backward()
    g0, b0 = 10.0 * present(layer.weight.grad), 10.0 * present(layer.bias.grad)
    opt.step()
    w, b = weight.clone(), bias.clone()
    for _ in range(3):
        e = torch.tanh(x @ w.T + b) - torch.tanh(a0)
        w, b = w - 1e-2 * mask * (g0 + e.T @ x), b - 1e-2 * (b0 + e.sum(0))
    torch.testing.assert_close(layer.weight.detach(), w)
    torch.testing.assert_close(layer.bias.detach(), b)


def test_a_masked_parametrization():
    model = mlp()
    parametrize.register_parametrization(model[0], "weight", Masked(mask_like(model[0].weight)))
    opt = published(model, lr=1e-3)
    assert "0  6 -> 5  tanh" in repr(opt)
    original = model[0].parametrizations.weight.original.detach().clone()
    steps(model, opt, 4)
    mask = mask_like(original).bool()
    now = model[0].parametrizations.weight.original
    assert torch.equal(now[~mask], original[~mask])
    assert (now[mask] != original[mask]).all()


def test_other_parametrizations_go_to_aux():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    model = nn.Sequential(normed, nn.Tanh(), nn.Linear(4, 3)).double()
    with pytest.raises(ValueError, match=r"0\.parametrizations\.weight\.original0"):
        published(model)
    opt = published(model, aux="adamw")
    before = weights(model)
    steps(model, opt, 4)
    assert all(moved(model, before))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(4, 1, dtype=torch.float64))

    def forward(self, weight):
        return weight * self.gate


class DropConnect(nn.Module):
    def forward(self, weight):
        return F.dropout(weight, 0.5, self.training)


class Drawn(nn.Module):
    def forward(self, weight):
        return weight * torch.randint(2, weight.shape) if self.training else weight


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("parametrization", [Gate, DropConnect, Drawn])
def test_what_is_a_mask_only_at_first_is_none(parametrization, training):
    model = mlp()
    parametrize.register_parametrization(model[2], "weight", parametrization())
    model.train(training)
    with pytest.raises(ValueError, match=r"2\.parametrizations\.weight\.original"):
        published(model)
    opt = published(model, aux="adamw")
    before = weights(model)
    steps(model.train(), opt, 4)
    assert all(moved(model, before))


def test_a_gate_that_is_not_trained_is_a_mask():
    model = mlp()
    gate = Gate()
    gate.gate.requires_grad_(False)[1] = 0
    parametrize.register_parametrization(model[2], "weight", gate)
    opt = published(model, lr=1e-3)
    before = model[2].parametrizations.weight.original.detach().clone()
    steps(model, opt, 2)
    now = model[2].parametrizations.weight.original
    assert (now != before).all(1).tolist() == [True, False, True, True]


def test_a_mask_that_becomes_none_is_noticed():
    model = mlp()
    parametrize.register_parametrization(model[0], "weight", Masked(torch.ones(5, 6, dtype=torch.float64)))
    prune.identity(model[2], "weight")
    opt = published(model, lr=1e-3)
    steps(model, opt, 2)
    for mask, what in ((model[0].parametrizations.weight[0].mask, "0"), (model[2].weight_mask, "2")):
        mask[1] = 0.25
        before = weights(model)
        with pytest.raises(
            ValueError, match=rf"mask of the weight of layer '{what}' must be of zeros.*\[0\.25, 1\.0\]"
        ):
            steps(model, opt, 1)
        assert not any(moved(model, before))
        mask[1] = 0
        steps(model, opt, 1)


def test_pruning_while_training_and_making_it_permanent():
    model = mlp()
    opt = published(model, lr=1e-3)
    steps(model, opt, 1)
    prune.l1_unstructured(model[2], "weight", amount=0.5)
    steps(model, opt, 2)
    assert int((model[2].weight == 0).sum()) == 10
    prune.remove(model[2], "weight")
    assert int((model[2].weight == 0).sum()) == 10
    steps(model, opt, 1)
    assert not (model[2].weight == 0).any()


def test_masks_by_name_are_looked_at_in_every_step():
    model = mlp()
    mask = torch.ones(4, 5, dtype=torch.bool)
    opt = published(model, lr=1e-3, masks={"2.weight": mask})
    mask[1] = False
    before = model[2].weight.detach().clone()
    steps(model, opt, 4)
    assert ((model[2].weight != before).all(1)).tolist() == [True, False, True, True]
    mask[1] = True
    steps(model, opt, 4)
    assert (model[2].weight != before).all()


def test_a_mask_holds_against_momentum_of_earlier_steps():
    model = mlp()
    mask = torch.ones(4, 5, dtype=torch.bool)
    opt = published(model, lr=1e-3, masks={"2.weight": mask})
    steps(model, opt, 4)
    mask[:] = False
    before = model[2].weight.detach().clone()
    steps(model, opt, 4)
    assert torch.equal(model[2].weight, before)


def test_masked_convolution_with_channels_last():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, groups=2).double()
    layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's overloads
    model = nn.Sequential(layer, nn.Tanh())
    mask = mask_like(layer.weight)
    opt = published(model, lr=1e-3, masks={"0.weight": mask})
    before = layer.weight.detach().clone()
    model(torch.randn(2, 4, 6, 6, dtype=torch.float64)).square().sum().backward()
    opt.step()
    assert torch.equal(layer.weight != before, mask.bool())


def test_bad_masks():
    with pytest.raises(ValueError, match=r"masks must name parameters.*got '7\.weight'"):
        published(mlp(), masks={"7.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"mask of '0\.weight' must have shape \[5, 6\], got \[6\]"):
        published(mlp(), masks={"0.weight": torch.ones(6)})
    with pytest.raises(TypeError, match=r"mask of '0\.weight' must be a torch\.Tensor, got int"):
        published(mlp(), masks={"0.weight": 1})
