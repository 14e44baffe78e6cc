"""Which forward passes count: those whose backward pass has added to the parameters' gradients."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from locoprop_torch import LocoProp, shares
from tests.helpers import SGD, assert_same, batch, loss_of, mlp, moved, present, published, rows, step_of, weights


def attack(model, opt):
    x, _ = batch()
    x.requires_grad_()
    for _ in range(10):
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
        x = (x + 0.1 * gradient.sign()).detach().requires_grad_()


def attack_through_inputs_argument(model, opt):
    x, _ = batch()
    x.requires_grad_()
    model(x).square().sum().backward(inputs=[x])


def functional_gradient(model, opt):
    torch.func.grad(lambda x: model(x).square().sum())(batch()[0])


def vectorised(model, opt):
    torch.vmap(torch.func.grad(lambda x: model(x).square().sum()))(batch()[0])


def functional_call_with_other_parameters(model, opt):
    other = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    torch.func.functional_call(model, other, batch()[0]).square().sum().backward()


def gradients_of_parameters_that_nobody_keeps(model, opt):
    torch.autograd.grad(loss_of(model), list(model.parameters()))


def hessian_vector_product(model, opt):
    gradients = torch.autograd.grad(loss_of(model), list(model.parameters()), create_graph=True)
    torch.autograd.grad(torch.stack([g.square().sum() for g in gradients]).sum(), list(model.parameters()))


def backward_that_raises(model, opt):
    def fail(gradient):
        raise RuntimeError("on purpose")

    x, _ = batch()
    h = model[0](x)
    h.register_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model[1:](h).sum().backward()
    opt.zero_grad()


@pytest.mark.parametrize("before", [
    attack, attack_through_inputs_argument, functional_gradient, vectorised, functional_call_with_other_parameters,
    gradients_of_parameters_that_nobody_keeps, hessian_vector_product, backward_that_raises,
])  # fmt: skip
def test_backward_passes_that_add_to_no_gradient_do_not_count(before):
    model = mlp()
    opt = published(model, lr=1e-3)
    before(model, opt)
    assert rows(opt) == [0, 0, 0]
    loss_of(model).backward()
    assert rows(opt) == [8, 8, 8]
    opt.step()
    assert_same(model, step_of())


def test_saliency_calls_keep_nothing():
    model = mlp()
    opt = published(model)
    alive: list[weakref.ref] = []
    for layer in model:
        layer.register_forward_hook(
            lambda _, args, out: alive.extend(weakref.ref(tensor.untyped_storage()) for tensor in (*args, out))
        )
    for _ in range(5):
        x = batch(seed=1)[0].requires_grad_()
        torch.autograd.grad(model(x).sum(), x)
        del x
    gc.collect()
    assert len(alive) == 5 * 2 * len(model)
    assert not any(reference() is not None for reference in alive)
    assert rows(opt) == [0, 0, 0]


def test_gradient_penalty_has_the_same_rows_in_every_layer():
    """The last layer's output has no part in the penalty, its weight has."""
    model = mlp()
    opt = published(model, lr=1e-3)
    x = batch(64)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    opt.zero_grad()
    (gradient.square().sum() + loss_of(model, rows=1)).backward()
    assert rows(opt) == [65, 65, 65]


def test_gradient_penalty_on_the_batch_itself():
    model = mlp()
    opt = published(model, lr=1e-3)
    x, y = batch()
    out = model(x.requires_grad_())
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    ((out - y).square().mean() + gradient.square().sum()).backward()
    assert rows(opt) == [8, 8, 8]


def test_a_differentiable_gradient_that_is_thrown_away():
    model = mlp()
    opt = published(model, lr=1e-3)
    x = batch(64)[0].requires_grad_()
    torch.autograd.grad(model(x).sum(), x, create_graph=True)
    gc.collect()
    loss_of(model).backward()
    assert rows(opt) == [8, 8, 8]


def test_backward_into_one_layer_alone():
    model = mlp()
    opt = published(model, lr=1e-3)
    loss_of(model).backward(inputs=[model[2].weight])
    assert rows(opt) == [0, 8, 0]
    before = weights(model)
    opt.step()
    assert moved(model, before) == [False, False, True, False, False, False]


def test_accumulation_with_an_attack_in_between():
    model, twin = mlp(), mlp()
    opt, plain = published(model, lr=1e-3), published(twin, lr=1e-3)
    for m, o in ((model, opt), (twin, plain)):
        loss_of(m, seed=1).backward()
        if m is model:
            attack(model, opt)
        loss_of(m, seed=2).backward()
        o.step()
    assert_same(model, twin)


def test_vectorised_forward_pass_is_a_step_of_the_rule():
    """Its rows are hidden in a batched tensor; its gradient is not."""
    model = nn.Sequential(nn.Linear(6, 3)).double()
    opt = published(model, **SGD)
    before = weights(model)
    torch.vmap(model)(batch()[0]).square().sum().backward()
    expected = [w - 1e-2 * 3.0 * present(p.grad) for w, p in zip(before, model.parameters(), strict=True)]
    opt.step()
    assert opt.last_reports[0].problems[0].driver == "rule"
    for p, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), want)


def test_second_backward_pass_after_a_step():
    """Its rows were used; its gradient is a step of the rule, as with every optimiser."""
    model = nn.Sequential(nn.Linear(6, 3)).double()
    opt = published(model, **SGD)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    opt.step()
    opt.zero_grad()
    loss.backward()
    opt.step()
    assert opt.last_reports[0].problems[0].driver == "rule"


def test_zero_grad_between_two_backward_passes_of_one_graph():
    model = mlp()
    opt = published(model, lr=1e-3)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    opt.zero_grad()
    loss.backward()
    assert rows(opt) == [8, 8, 8]
    opt.step()
    assert_same(model, step_of())


def test_zero_grad_after_the_forward_pass():
    model = mlp()
    opt = published(model, lr=1e-3)
    loss = loss_of(model)
    opt.zero_grad()
    loss.backward()
    opt.step()
    assert_same(model, step_of())


def test_other_parameters_in_the_place_of_the_layers_have_their_own_rows():
    """Student and teacher are one module, called with two sets of parameters in one backward pass."""
    model, twin = mlp(), mlp()
    opt, plain = published(model, lr=1e-3), published(twin, lr=1e-3)
    teacher: dict[str, torch.Tensor] = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    x, y = batch(50, seed=7)
    (loss_of(model) + F.mse_loss(torch.func.functional_call(model, teacher, (x,)), y)).backward()
    loss_of(twin).backward()
    assert rows(opt) == [8, 8, 8]
    opt.step()
    plain.step()
    assert_same(model, twin)


@pytest.mark.parametrize("few", [None, 4, 64])
def test_a_discarded_gradient_lets_go_of_its_rows_with_its_graph(few):
    """The loss, which whoever sums losses up keeps, is not to keep activations that autograd has freed."""
    model = mlp()
    opt = LocoProp(model, rows=few)
    losses = []
    for retained in (False, True):
        losses.append(loss_of(model, rows=40))
        losses[-1].backward(retain_graph=retained)
        passes = [captured for layer in opt._layers.values() for captured in layer.passes]
        opt.zero_grad()
        assert [captured.released for captured in passes] == [not retained] * 3
    losses[-1].backward()
    assert [layer.sizes() for layer in opt._layers.values()] == [[40]] * 3


@pytest.mark.parametrize("unused", [False, True], ids=["one backward pass", "with calls that are dropped"])
def test_many_calls_before_a_backward_pass_cost_the_same_each(monkeypatch, unused):
    looks, waits = [], shares._waits

    def counted(captured):
        looks.append(0)
        return waits(captured)

    monkeypatch.setattr(shares, "_waits", counted)
    model = nn.Sequential(nn.Linear(6, 3)).double()
    opt = LocoProp(model)
    kept = [model(torch.randn(1, 6, dtype=torch.float64)).sum()]
    for _ in range(300):
        output = model(torch.randn(1, 6, dtype=torch.float64)).sum()
        if not unused:
            kept.append(output)
    assert len(looks) < 1000
    torch.stack(kept).sum().backward()
    assert [len(layer.sizes()) for layer in opt._layers.values()] == [len(kept)]
    opt.step()
