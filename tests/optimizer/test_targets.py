"""Dual targets, primal targets, and those of the user."""

import pytest
import torch
from torch import nn

from tests.helpers import assert_same, batch, mlp, published, train, weights


def test_dual_target_written_by_hand():
    functions = {"0": torch.tanh, "2": torch.relu, "4": lambda a: a}
    target = {name: lambda a, g, f=f: f(a) - 3.0 * g for name, f in functions.items()}
    assert_same(train(mlp(second=nn.ReLU), target=target), train(mlp(second=nn.ReLU)))


def test_targets_of_several_passes():
    results = []
    for target in ("dual", lambda a, g: torch.tanh(a) - 10.0 * g):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh()).double()
        opt = published(model, lr=1e-2, target=target)
        opt.zero_grad()
        for size in (5, 2, 7):
            (model(torch.randn(size, 2, 4, dtype=torch.float64)) ** 2).sum().backward()
        opt.step()
        results.append(list(model.parameters()))
    assert_same(*results)


@pytest.mark.parametrize("inplace", [False, True])
def test_primal_target(inplace):
    model, twin = mlp(second=nn.ReLU), mlp(second=nn.ReLU)
    model[3].inplace = inplace
    gradients: dict[str, torch.Tensor] = {}

    def by_hand(name, f):
        return lambda a, g: f(a) - 3.0 * gradients[name]

    for name, module in (("0", twin[1]), ("2", twin[3]), ("4", twin[4])):
        module.register_full_backward_hook(lambda _, __, g, name=name: gradients.__setitem__(name, g[0]))
    functions = {"0": torch.tanh, "2": torch.relu, "4": lambda a: a}
    expected = train(twin, target={name: by_hand(name, f) for name, f in functions.items()})
    assert_same(train(model, target="primal"), expected)


@pytest.mark.parametrize("following", [nn.Identity(), nn.Dropout(0.0), nn.Hardtanh(), nn.Unflatten(1, (2, 2))], ids=str)
def test_primal_target_of_an_activation_in_place_and_what_follows_it(following):
    def trained(inplace):
        torch.manual_seed(0)
        layers = [nn.Linear(6, 4), nn.ReLU(inplace), following, nn.Flatten(), nn.Linear(4, 3)]
        return train(nn.Sequential(*layers).double(), transfers={"0": "relu"}, target="primal")

    assert_same(trained(True), trained(False))


def test_primal_target_needs_an_activation_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return torch.tanh(self.fc(x))

    with pytest.raises(ValueError, match=r"'primal' of layer 'fc'.*module"):
        train(Model().double(), target="primal")


def test_bad_targets():
    with pytest.raises(ValueError, match="target must be one of dual, primal"):
        train(mlp(second=nn.ReLU), target="trial")
    with pytest.raises(ValueError, match=r"target must name captured layers.*got \['7'\]"):
        train(mlp(second=nn.ReLU), target={"7": "primal"})
    with pytest.raises(ValueError, match=r"target of layer '0' must have the shape .*\[7, 5\], got \[7\]"):
        train(mlp(second=nn.ReLU), target={"0": lambda a, g: a[:, 0]})
    with pytest.raises(TypeError, match="target of layer '0' must return a tensor, got int"):
        train(mlp(second=nn.ReLU), target=lambda a, g: 0)


def test_target_propagation():
    """A local step towards the targets of an inverse network, on the matching loss between them and ``f(A)``."""
    torch.manual_seed(0)
    model, inverse = mlp(second=nn.ReLU), nn.Linear(3, 4).double()
    x, y = batch(7)
    targets = {"2": lambda a, g: inverse(y).relu(), "4": lambda a, g: y, "0": lambda a, g: torch.tanh(a)}
    opt = published(model, lr=0.1, rule="sgd", local_iterations=1, target=targets, reduction="sum")
    before = weights(model)
    h = torch.tanh(model[0](x))
    a = model[2](h)
    opt.zero_grad()
    model(x).sum().backward()
    opt.step()
    expected = before[2] - 0.1 * (a.relu() - inverse(y).relu()).T @ h
    torch.testing.assert_close(model[2].weight, expected)
    assert torch.equal(model[0].weight, before[0])
