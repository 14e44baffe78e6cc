"""Which rows of which passes a step takes, of layers called in any way that torch allows."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import locoprop_kernels as lk
from locoprop_torch import LocoProp
from locoprop_torch.optimizer import default_lr_decay
from tests.helpers import assert_same, backward, batch, mlp, moved, present, published, rows, weights


def test_leading_dimensions_are_rows():
    model, twin = mlp(), mlp()
    x, y = batch(12)
    for m, shape in ((model, (2, 3, 2)), (twin, (12,))):
        opt = published(m, lr=1e-3)
        F.mse_loss(m(x.reshape(*shape, 6)), y.reshape(*shape, 3)).backward()
        opt.step()
    assert_same(model, twin)


def test_one_example_without_batch_dimension():
    model = mlp()
    opt = published(model, lr=1e-3)
    before = weights(model)
    x, y = batch(1)
    F.mse_loss(model(x[0]), y[0]).backward()
    opt.step()
    assert all(moved(model, before))


def test_gradient_accumulation_is_the_whole_batch():
    model, twin = mlp(), mlp()
    x, y = batch(12)
    opt, whole = published(model, lr=1e-3), published(twin, lr=1e-3)
    backward(twin, whole, 12)
    whole.step()
    opt.zero_grad()
    for part in (slice(0, 4), slice(4, 12)):
        (F.mse_loss(model(x[part]), y[part]) * (part.stop - part.start) / 12).backward()
    opt.step()
    assert_same(model, twin)


class Recurrent(nn.Module):
    """One layer, called three times."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(6, 6)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        return x


def test_a_layer_called_several_times_concatenates_its_rows():
    torch.manual_seed(0)
    model = Recurrent().double()
    x, _ = batch(5)
    calls = []
    model.cell.register_forward_hook(lambda _, args, out: calls.append((args[0].detach(), out.detach())))
    opt = published(model, lr=1e-3, rule="sgd", local_iterations=3)
    weight, bias = model.cell.weight.detach().clone(), model.cell.bias.detach().clone()
    model(x).square().sum().backward()
    problem = lk.LocalProblem(
        x=torch.cat([c[0] for c in calls]), preactivation=torch.cat([c[1] for c in calls]), weight=weight, bias=bias,
        grad_weight=10 * present(model.cell.weight.grad), grad_bias=10 * present(model.cell.bias.grad),
        transfer="tanh",
    )  # fmt: skip
    opt.step()
    lk.local_steps_([problem], rule="sgd", lr=[1e-3 * default_lr_decay(t, 3) for t in range(3)])
    torch.testing.assert_close(model.cell.weight.detach(), weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.cell.bias.detach(), bias, rtol=0, atol=1e-12)


def stray_passes(model, opt, x, y):
    with torch.no_grad():
        model(x)
    model(2 * x)  # no backward pass
    backward(model, opt)
    model(3 * x)


def model_zero_grad_drops_earlier_rows(model, opt, x, y):
    F.mse_loss(model(3 * x), y).backward()
    model.zero_grad()
    F.mse_loss(model(x), y).backward()


def retained_graph_counts_rows_once(model, opt, x, y):
    loss = F.mse_loss(model(x), y) / 2
    loss.backward(retain_graph=True)
    loss.backward()


def non_reentrant_checkpoint(model, opt, x, y):
    F.mse_loss(checkpoint(model, x, use_reentrant=False), y).backward()


def reentrant_checkpoint(model, opt, x, y):
    F.mse_loss(checkpoint(model, x.clone().requires_grad_(), use_reentrant=True), y).backward()


def keyword_argument(model, opt, x, y):
    out = model[0](input=x)
    F.mse_loss(model[1:](out), y).backward()


@pytest.mark.parametrize(
    "passes",
    [
        stray_passes,
        model_zero_grad_drops_earlier_rows,
        retained_graph_counts_rows_once,
        non_reentrant_checkpoint,
        reentrant_checkpoint,
        keyword_argument,
    ],
)
def test_only_rows_of_the_backward_pass_count(passes):
    model, twin = mlp(), mlp()
    opt, plain = published(model, lr=1e-3), published(twin, lr=1e-3)
    backward(twin, plain)
    plain.step()
    passes(model, opt, *batch())
    assert rows(opt) == [8, 8, 8]
    opt.step()
    assert_same(model, twin)


def test_in_place_activation_functions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    twin = nn.Sequential(copy.deepcopy(model[0]), nn.ReLU(), copy.deepcopy(model[2]))
    for m in (model, twin):
        opt = published(m, lr=1e-3)
        backward(m, opt)
        opt.step()
    assert_same(model, twin)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [4, 64, None])
def test_in_place_activation_functions_where_weights_change_before_the_step(rows, autocast):
    """As in sharpness-aware minimisation, which takes the gradient at perturbed weights and then goes back."""

    def trained(inplace):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 5), nn.ReLU(inplace), nn.Linear(5, 4), nn.ELU(inplace=inplace), nn.Linear(4, 3)
        )
        opt = LocoProp(model, rows=rows)
        for seed in range(3):
            x, y = batch(40, seed, torch.float32)
            with torch.no_grad():
                torch._foreach_add_(list(model.parameters()), 0.1)
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                F.mse_loss(model(x).float(), y).backward()
            with torch.no_grad():
                torch._foreach_sub_(list(model.parameters()), 0.1)
            opt.step()
        return model

    # Under autocast what was overwritten comes back without the rounding of its first time.
    tolerance = {"rtol": 0, "atol": 2e-4 if autocast else 0}
    assert_same(trained(True), trained(False), **tolerance)


def test_overwritten_input_is_refused():
    model = nn.Sequential(nn.Linear(6, 3)).double()
    model[0].weight.requires_grad_(False)  # autograd does not guard the input then
    opt = published(model)
    x, y = batch()
    F.mse_loss(model(x), y).backward()
    x.mul_(2)
    with pytest.raises(ValueError, match="input of layer '0' was overwritten"):
        opt.step()


def test_autocast_and_loss_scaling():
    model, twin = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    x, y = batch(32, dtype=torch.float32)
    opt, plain = published(model, lr=1e-3), published(twin, lr=1e-3)
    before = weights(model)
    backward(twin, plain, 32)
    plain.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.mse_loss(model(x).float(), y)
    scaler.scale(loss).backward()
    scaler.step(opt)
    scaler.update()
    for p, q, b in zip(model.parameters(), twin.parameters(), before, strict=True):
        assert (p - q).norm() <= 0.1 * (q - b).norm()
