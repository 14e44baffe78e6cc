"""Primal targets and those of the user take gradients that ``GradScaler`` has scaled and nobody else unscales."""

import pytest
import torch
from torch import nn

from tests.helpers import assert_same, batch, mlp, published


def own(a, gradient):
    return torch.tanh(a) - 3.0 * gradient


TARGETS = {"dual": "dual", "primal": "primal", "own": own, "mixed": {"0": own, "2": "primal"}}


def stepped(target, scale=None, after_backward=None, microbatches=1):
    model = mlp(dtype=torch.float32)
    opt = published(model, lr=1e-3, activation_lr=3.0, target=target)
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    for seed in range(microbatches):
        x, y = batch(seed=seed, dtype=torch.float32)
        scaler.scale((model(x) - y).square().mean()).backward()
    if after_backward is not None:
        after_backward(scaler, opt, model)
    scaler.step(opt)
    return model


def unscale(scaler, opt, model):
    scaler.unscale_(opt)


def unscale_by_hand(scaler, opt, model):
    for p in model.parameters():
        p.grad = p.grad / 1024


def clip(scaler, opt, model):
    if scaler.is_enabled():
        scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("after_backward", [None, unscale])
def test_the_loss_scale_has_no_effect(target, after_backward, microbatches):
    expected = stepped(target, microbatches=microbatches)
    assert_same(stepped(target, 1024.0, after_backward, microbatches), expected, rtol=1e-5, atol=1e-7)


def test_scaling_by_hand_has_no_effect():
    model = mlp(dtype=torch.float32)
    opt = published(model, lr=1e-3, activation_lr=3.0, target="primal")
    x, y = batch(seed=0, dtype=torch.float32)
    (1024 * (model(x) - y).square().mean()).backward()
    unscale_by_hand(None, opt, model)
    opt.step()
    assert_same(model, stepped("primal"), rtol=1e-5, atol=1e-7)


def test_clipping_acts_the_same_with_and_without_a_scale():
    clipped = stepped("primal", None, clip)
    assert_same(stepped("primal", 1024.0, clip), clipped, rtol=1e-5, atol=1e-7)
    assert not torch.equal(clipped[0].weight, stepped("primal")[0].weight)


def test_what_is_no_multiplication_is_refused():
    def shift(scaler, opt, model):
        model[2].weight.grad += 1.0

    with pytest.raises(ValueError, match="layer '2' were changed otherwise than by multiplication"):
        stepped("primal", 1024.0, shift)
    stepped("dual", 1024.0, shift)


def test_zeroed_elements_are_no_multiplication_but_allowed():
    def mask(scaler, opt, model):
        scaler.unscale_(opt)
        model[2].weight.grad[0] = 0.0

    assert_same(stepped("primal", 1024.0, mask), stepped("primal"), rtol=1e-5, atol=1e-7)
