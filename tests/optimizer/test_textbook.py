"""A step is the textbook form of LocoProp, and with one local iteration it is back-propagation."""

import pytest
import torch
import torch.nn.functional as F

from locoprop_kernels import rules, transfers
from locoprop_kernels.testing import TextbookLayer
from locoprop_torch.optimizer import default_lr_decay
from tests.helpers import assert_same, backward, batch, mlp, present, published


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("local_loss", ["matching", "squared"])
@pytest.mark.parametrize("prox", [0.0, 0.2])
def test_step_is_the_textbook_form(reduction, local_loss, prox):
    model = mlp()
    rule = rules.RMSprop(momentum=0.9)
    opt = published(
        model, lr=1e-3, activation_lr=3.0, local_iterations=4, rule=rule, local_loss=local_loss, prox=prox,
        reduction=reduction,
    )  # fmt: skip
    layers, names = [model[i] for i in (0, 2, 4)], ["tanh", "sigmoid", "identity"]
    textbook = [
        TextbookLayer(layer.weight, layer.bias, name if local_loss == "matching" else "identity", rule)
        for layer, name in zip(layers, names, strict=True)
    ]
    rates = [1e-3 * default_lr_decay(t, 4) for t in range(4)]
    for step in range(3):
        x, y = batch(seed=step)
        inputs, outputs = [], []
        value = x
        for i, module in enumerate(model):
            inputs.append(value)
            value = module(value)
            if i % 2 == 0:
                value.retain_grad()
                outputs.append(value)
        F.mse_loss(value, y).backward()
        targets = [transfers.get(t.transfer)(a.detach()) - 3.0 * a.grad for t, a in zip(textbook, outputs, strict=True)]
        backward(model, opt, seed=step)
        opt.step()
        for i, (layer, t) in enumerate(zip(layers, textbook, strict=True)):
            t.step(inputs[2 * i].detach(), targets[i], rates, prox, reduction)
            torch.testing.assert_close(layer.weight.detach(), t.weight, rtol=0, atol=1e-10)
            torch.testing.assert_close(layer.bias.detach(), t.bias, rtol=0, atol=1e-10)


def test_one_iteration_recovers_back_propagation():
    model, twin = mlp(), mlp()
    opt = published(model, lr=0.01, activation_lr=1.0, local_iterations=1, rule=rules.Adam(), reduction="sum")
    adam = torch.optim.Adam(twin.parameters(), lr=0.01)
    for step in range(5):
        backward(model, opt, seed=step)
        opt.step()
        backward(twin, adam, seed=step)
        adam.step()
    assert_same(model, twin)


def test_loss_falls():
    model = mlp()
    opt = published(model, lr=1e-3, rule=rules.RMSprop(momentum=0.9))
    losses = []
    for _ in range(60):
        losses.append(backward(model, opt, 64).item())
        opt.step()
    assert losses[-1] < 0.8 * losses[0]


def test_trace_shows_every_layers_local_objective():
    model = mlp()
    opt = published(model, lr=1e-4, rule="sgd", local_iterations=5, trace=True)
    backward(model, opt)
    opt.step()
    traces = [present(trace) for trace in opt.last_reports[0].trace]
    assert [len(trace) for trace in traces] == [6, 6, 6]
    assert all((trace.diff() < 0).all() for trace in traces)
