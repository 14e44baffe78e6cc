"""Which backward passes the unit of ``activation_lr=PerExample(...)`` is measured in."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers import assert_same, batch, mlp
from tests.optimizer.test_unit import EXACT, after, optimizer, squares, step


class Checkpointed(nn.Module):
    """The layers of :func:`mlp` in two parts that are computed again in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.layers, self.reentrant = mlp(), reentrant

    def forward(self, x):
        x = checkpoint(self.layers[:2], x.requires_grad_(), use_reentrant=self.reentrant)
        return checkpoint(self.layers[2:], x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    plain, expected = after()
    model = Checkpointed(reentrant)
    opt = optimizer(model)
    for _ in range(3):
        step(model, opt, *batch())
    assert opt.output_gradient == {**expected.output_gradient, "layer": "layers.4"}
    assert_same(plain, model, **EXACT)


@pytest.mark.parametrize("rows", [None, 2, 32])
def test_backward_passes_that_do_not_count_are_not_measured(rows):
    plain, _ = after(count=1, rows=rows)
    model = mlp()
    opt = optimizer(model, rows=rows)
    x, y = batch()
    other = x.clone().requires_grad_()
    # An attack, an evaluation, and a gradient that is thrown away.
    torch.autograd.grad(1e3 * squares(model(other), y), other)
    (1e3 * squares(model(other), y)).backward(inputs=[other])
    with torch.no_grad():
        model(x)
    (1e3 * squares(model(x), y)).backward()
    step(model, opt, x, y)
    assert_same(plain, model, **EXACT)


def test_the_same_graph_again():
    """A discarded backward pass and a second one through the same graph, of another loss."""
    plain, expected = after(count=1)
    model = mlp()
    opt = optimizer(model)
    x, y = batch()
    output = model(x)
    (1e3 * squares(output, y)).backward(retain_graph=True)
    opt.zero_grad()
    squares(output, y).backward()
    opt.step()
    assert opt.output_gradient == expected.output_gradient
    assert_same(plain, model, **EXACT)


@pytest.mark.parametrize("target", ["dual", "primal"])
@pytest.mark.parametrize("rows", [None, 8])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["large first", "small first"])
def test_two_losses_of_one_forward_pass_are_their_sum(order, rows, target):
    x, y = batch()
    losses = [lambda output: squares(output, y), lambda output: 1e-4 * output.abs().sum()]

    def trained(separately):
        model = mlp()
        opt = optimizer(model, rows=rows, target=target)
        output = model(x)
        if separately:
            losses[order[0]](output).backward(retain_graph=True)
            losses[order[1]](output).backward()
        else:
            sum(loss(output) for loss in losses).backward()
        opt.step()
        return model, opt

    (model, opt), (other, expected) = trained(True), trained(False)
    torch.testing.assert_close(opt.output_gradient["size"], expected.output_gradient["size"], rtol=1e-12, atol=0)
    assert_same(model, other, **EXACT)
