"""Layers that share their parameters are one local problem."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import locoprop_kernels as lk
from tests.helpers import present, published


class Tied(nn.Module):
    def __init__(self, functions=(torch.tanh, torch.tanh), share_bias=True):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight = self.first.weight
        if share_bias:
            self.second.bias = self.first.bias
        self.functions = functions

    def forward(self, x):
        f, g = self.functions
        return self.head(g(self.second(f(self.first(x)))))


def test_tied_layers_are_one_problem():
    torch.manual_seed(0)
    model = Tied().double()
    opt = published(model, lr=1e-3, activation_lr=3.0, reduction="sum")
    assert "also second" in repr(opt)
    x = torch.randn(5, 4, dtype=torch.float64)
    opt.zero_grad()
    h = model.first(x)
    inputs = torch.cat([x, torch.tanh(h)]).detach()
    model(x).square().sum().backward()
    problem = lk.LocalProblem(
        inputs,
        F.linear(inputs, model.first.weight, model.first.bias).detach(),
        model.first.weight.detach().clone(),
        model.first.bias.detach().clone(),
        3.0 * present(model.first.weight.grad),
        3.0 * present(model.first.bias.grad),
        "tanh",
    )
    lk.local_steps_([problem], lr=[1e-3 * max(1 - t / 10, 0.25) for t in range(10)], reduction="sum")
    opt.step()
    torch.testing.assert_close(model.first.weight.detach(), problem.weight)
    assert model.second.weight is model.first.weight


def test_copies_of_tied_grouped_and_primal_layers():
    torch.manual_seed(0)
    model = nn.Sequential(Tied(), nn.Unflatten(1, (1, 2)), nn.Conv1d(1, 2, 2), nn.Tanh())
    pair = model, published(model, lr=1e-2, target={"2": "primal"})
    twin = copy.deepcopy(pair)
    x = torch.randn(5, 4)
    for module, opt in (pair, twin):
        opt.zero_grad()
        module(x).square().sum().backward()
        opt.step()
    assert repr(pair[1]) == repr(twin[1])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin[0].parameters(), strict=True))


def test_tied_layers_must_agree():
    with pytest.raises(ValueError, match=r"first, second share their weight.*identity, tanh|tanh.*identity"):
        published(Tied((torch.tanh, torch.erf)))
    published(Tied((torch.tanh, torch.erf)), transfers={"second": "tanh"})
    with pytest.raises(ValueError, match="must share their bias"):
        published(Tied(share_bias=False))


def test_embedding_tied_with_the_head():
    torch.manual_seed(0)
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Linear(4, 4), nn.Tanh(), head)
    twin = copy.deepcopy(model)
    tokens = torch.randint(7, (3, 5))
    opt = published(model, lr=0.1, activation_lr=1.0, local_iterations=1, rule="sgd", reduction="sum")
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    for m, o in ((model, opt), (twin, plain)):
        o.zero_grad()
        F.cross_entropy(m(tokens).flatten(0, 1), tokens.flatten()).backward()
        o.step()
    assert model[0].weight is model[3].weight
    torch.testing.assert_close(model[0].weight, twin[0].weight)
