"""``activation_lr=PerExample(...)``: what it is measured as, and when."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from locoprop_torch import GroupedLinear, LocoProp, PerExample
from tests.helpers import WithNorm, assert_same, batch, mlp, weights

EXACT = {"rtol": 1e-12, "atol": 1e-14}


def optimizer(model, scale=2.0, **options):
    return LocoProp(model, **{"lr": 1e-3, "activation_lr": PerExample(scale), "local_iterations": 3, **options})


def squares(output, y):
    """A sum over examples and outputs."""
    return (output - y).square().sum()


def step(model, opt, x, y, loss=squares):
    opt.zero_grad()
    loss(model(x), y).backward()
    opt.step()


def after(loss=squares, data=None, count=3, **options):
    """A model after some steps, and its optimiser."""
    model = mlp()
    opt = optimizer(model, **options)
    x, y = batch() if data is None else data
    for _ in range(count):
        step(model, opt, x, y, loss)
    return model, opt


def largest(gradient):
    """Root mean square of the rows' largest elements times their number, of ``∂L/∂A`` ``[B, N]``."""
    return (gradient.abs().amax(-1).square().mean().sqrt() * len(gradient)).item()


def seen(model, x, loss):
    """``∂L/∂A`` at the output of a model."""
    output = model(x)
    return torch.autograd.grad(loss(output), output)[0]


# --- the size


def test_size_is_that_of_the_output_gradient():
    model = mlp()
    opt = optimizer(model)
    x, y = batch(7)
    expected = largest(seen(model, x, lambda output: squares(output, y)))
    assert opt.output_gradient == {}
    step(model, opt, x, y)
    assert opt.output_gradient["layer"] == "4"
    # The size is summed in float32.
    assert opt.output_gradient["size"] == pytest.approx(3 * expected, rel=1e-6)
    assert opt.output_gradient["rate"] == 7 / opt.output_gradient["size"]
    assert f"1 per example is an activation_lr of {opt.output_gradient['rate']:g}" in repr(opt)


def test_step_is_that_of_the_number():
    model, opt = after(count=1)
    twin, _ = after(count=1, activation_lr=2.0 * opt.output_gradient["rate"])
    assert_same(model, twin)
    assert all(map(torch.equal, weights(model), weights(twin)))


@pytest.mark.parametrize("factor", [1 / 8, 2.0**-16, 2.0**10])
def test_factors_of_the_loss_do_not_matter(factor):
    """The mean over 8 examples and over more, the sum, and what multiplies them; powers of two leave the bits."""
    model, _ = after()
    scaled, _ = after(loss=lambda output, y: factor * squares(output, y))
    assert all(map(torch.equal, weights(model), weights(scaled)))


@pytest.mark.parametrize("loss", [F.mse_loss, lambda a, y: 0.37 * squares(a, y)], ids=["mean over outputs", "0.37"])
def test_averages_do_not_matter(loss):
    assert_same(after()[0], after(loss=loss)[0], rtol=1e-6, atol=1e-9)


def test_cross_entropy_as_mean_and_as_sum():
    y = torch.arange(8) % 3
    models = [
        after(loss=lambda a, _, r=r: F.cross_entropy(a, y, reduction=r), transfers={"4": "softmax"})[0]
        for r in ("mean", "sum")
    ]
    assert_same(*models)


@pytest.mark.parametrize("loss", [squares, F.mse_loss], ids=["sum", "mean"])
def test_repeated_examples_do_not_matter(loss):
    x, y = batch()
    # Every fourth row of the longer batch is a row of the shorter one: all rows, so that sets do not matter.
    once, _ = after(loss, rows=None)
    repeated, opt = after(loss, data=(x.repeat(4, 1), y.repeat(4, 1)), rows=None)
    assert_same(once, repeated, rtol=1e-6, atol=1e-9)
    assert opt.output_gradient["rate"] * opt.output_gradient["size"] == pytest.approx(32, rel=1e-12)


def test_a_smaller_batch_scales():
    """With a mean over examples its gradients are larger; ``γ`` is smaller by the same factor."""
    model = mlp()
    opt = optimizer(model)
    x, y = batch(8)
    step(model, opt, x, y)
    before = opt.output_gradient
    step(model, opt, x[:2], y[:2])
    assert opt.output_gradient == {**before, "rate": before["rate"] / 4}


def test_later_gradients_leave_the_size():
    _, opt = after(count=1)
    _, later = after(count=5)
    assert opt.output_gradient == later.output_gradient


# --- what numbers and groups mean


def test_numbers_are_what_they_were():
    model, opt = after(activation_lr=10.0)
    twin, _ = after(activation_lr=10.0, loss=lambda a, y: 4 * squares(a, y))
    assert opt.param_groups[0]["activation_lr"] == 10.0
    assert isinstance(opt.param_groups[0]["activation_lr"], float)
    assert not all(map(torch.equal, weights(model), weights(twin)))
    tensor, _ = after(activation_lr=torch.tensor(10.0))
    assert all(map(torch.equal, weights(model), weights(tensor)))


def test_groups_with_a_number_and_per_example():
    def trained(first, second):
        model = mlp()
        groups = [{"params": model[4].parameters(), "activation_lr": second}]
        opt = optimizer(model, activation_lr=first, param_groups=groups)
        step(model, opt, *batch())
        return model, opt

    mixed, opt = trained(PerExample(2.0), 0.5)
    rate = opt.output_gradient["rate"]
    assert all(map(torch.equal, weights(mixed), weights(trained(2.0 * rate, 0.5)[0])))
    mixed, _ = trained(0.5, PerExample(3.0))
    assert all(map(torch.equal, weights(mixed), weights(trained(0.5, 3.0 * rate)[0])))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "scale of PerExample must be finite and > 0, got 0"),
        (float("nan"), ValueError, "scale of PerExample must be finite and > 0, got nan"),
        ("x", TypeError, "scale of PerExample must be a number, got 'x'"),
        (True, TypeError, "scale of PerExample must be a number, got True"),
    ],
)
def test_scales_that_are_refused(value, error, message):
    with pytest.raises(error, match=message):
        PerExample(value)


@pytest.mark.parametrize("value", ["per example", "1.0 per example", None, PerExample])
def test_learning_rates_that_are_refused(value):
    message = r"activation_lr must be a number or locoprop_torch\.PerExample, got "
    with pytest.raises(TypeError, match=message):
        LocoProp(mlp(), activation_lr=value)
    model = mlp()
    opt = LocoProp(model)
    x, y = batch()
    squares(model(x), y).backward()
    before = weights(model)
    opt.param_groups[0]["activation_lr"] = value
    with pytest.raises(TypeError, match=message):
        opt.step()
    assert all(map(torch.equal, before, weights(model)))


# --- what is done to gradients before the step


def test_loss_scaling_that_is_undone():
    plain, _ = after(count=1)
    model = mlp()
    opt = optimizer(model)
    x, y = batch()
    (65536 * squares(model(x), y)).backward()
    for p in model.parameters():
        p.grad /= 65536
    opt.step()
    # Whether it was scaled is found from the norms of float64 gradients.
    assert_same(plain, model, **EXACT)


def test_clipping_does_not_change_the_unit():
    _, plain = after(count=1)
    model = mlp()
    opt = optimizer(model)
    x, y = batch()
    squares(model(x), y).backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    nn.utils.clip_grad_norm_(model.parameters(), float(norm) / 10)
    opt.step()
    assert opt.output_gradient == plain.output_gradient


def test_accumulated_microbatches_are_one_batch():
    whole, expected = after(count=1)
    model = mlp()
    opt = optimizer(model)
    x, y = batch()
    for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
        squares(model(x[part]), y[part]).backward()
    opt.step()
    assert opt.output_gradient["size"] == pytest.approx(expected.output_gradient["size"], rel=1e-6)
    assert opt.output_gradient["rate"] == pytest.approx(expected.output_gradient["rate"], rel=1e-6)
    assert_same(whole, model, rtol=1e-6, atol=1e-9)


# --- outputs of other shapes

OUTPUTS = {
    "convolution": (lambda: nn.Conv2d(2, 3, 3), (4, 2, 6, 5), lambda g: g.movedim(1, -1).flatten(0, -2)),
    "groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 4, 7), lambda g: g.movedim(1, -1).flatten(0, -2)),
    "unbatched convolution": (lambda: nn.Conv1d(2, 3, 3), (2, 7), lambda g: g.t()),
    "grouped": (lambda: GroupedLinear(2, 5, 4), (2, 9, 5), lambda g: g.movedim(0, 1).flatten(1)),
    "one example": (lambda: nn.Linear(5, 4), (5,), lambda g: g[None]),
    "tokens": (lambda: nn.Linear(5, 4), (2, 3, 5), lambda g: g.flatten(0, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_other_shapes(name):
    make, shape, as_rows = OUTPUTS[name]
    torch.manual_seed(0)
    model = nn.Sequential(make()).double()
    opt = optimizer(model)
    x = torch.randn(shape, dtype=torch.float64)
    y = torch.randn_like(model(x))
    rows = as_rows(seen(model, x, lambda output: squares(output, y)))
    step(model, opt, x, y)
    assert opt.output_gradient["size"] == pytest.approx(largest(rows), rel=1e-6)
    assert opt.output_gradient["rate"] == len(rows) / opt.output_gradient["size"]


class Pooled(nn.Module):
    """A layer with twelve rows for each row of the next."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.positions, self.head = nn.Conv1d(2, 5, 3, dtype=torch.float64), nn.Linear(5, 3, dtype=torch.float64)

    def forward(self, x):
        return self.head(torch.tanh(self.positions(x)).mean(-1))


def test_layers_with_more_rows_than_the_output():
    """Each of the positions that are averaged sees a part of the gradient, and has ``γ`` so much larger."""
    x, y = torch.randn(6, 2, 14, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)

    def trained(rate, inner):
        model = Pooled()
        opt = optimizer(model, activation_lr=rate, param_groups=[{"params": model.positions.parameters(), **inner}])
        for _ in range(2):
            step(model, opt, x, y, F.mse_loss)
        return model, opt

    model, opt = trained(PerExample(2.0), {})
    gamma = 2.0 * opt.output_gradient["rate"]
    assert_same(model, trained(gamma, {"activation_lr": 12 * gamma})[0], **EXACT)


def test_positions_that_are_averaged_are_as_one():
    """The first layer moves alike, whether it sees an example once or at twelve equal positions."""
    x, y = torch.randn(6, 2, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    once, repeated = Pooled(), Pooled()
    for model, inputs in ((once, x), (repeated, x.repeat(1, 1, 12))):
        model.positions.stride = (3,)
        opt = optimizer(model, rows=None)
        for _ in range(3):
            step(model, opt, inputs, y, F.mse_loss)
    assert_same(once, repeated, **EXACT)


# --- which backward pass, which layer


@pytest.mark.parametrize("first", [0.0, float("nan"), float("inf")])
def test_a_gradient_of_no_size_leaves_it_unmeasured(first):
    model = mlp()
    opt = optimizer(model)
    start = weights(model)
    x, y = batch()
    skipped = pytest.warns(RuntimeWarning, match="LocoProp skipped a step")
    with skipped if first else contextlib.nullcontext():
        step(model, opt, x, y, lambda a, y: first * squares(a, y))
        assert opt.skipped_steps == (first != 0)
    assert opt.output_gradient == {}
    assert_same(model, start)
    step(model, opt, *batch())
    assert opt.output_gradient["layer"] == "4"
    if first:
        # Nothing else has been changed by the step that was skipped.
        assert_same(model, after(count=1)[0], **EXACT)


def test_a_step_without_rows():
    """``γ`` is the scale until something was measured; afterwards a step without rows takes the latest unit."""
    model, twin = mlp(), mlp()
    opt, number = optimizer(model), optimizer(twin, activation_lr=2.0)
    for m, o in ((model, opt), (twin, number)):
        for p in m.parameters():
            p.grad = torch.ones_like(p)
        o.step()
    assert opt.output_gradient == {}
    assert all(map(torch.equal, weights(model), weights(twin)))
    step(model, opt, *batch())
    found = opt.output_gradient
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert opt.output_gradient == found


def test_a_frozen_output_layer():
    """The last layer that is trained is measured."""
    model = mlp()
    model[4].requires_grad_(False)
    opt = optimizer(model, aux=None)
    x, y = batch()
    hidden = model[2](model[1](model[0](x))).detach().requires_grad_()
    squares(model[4](model[3](hidden)), y).backward()
    step(model, opt, x, y)
    assert opt.output_gradient["layer"] == "2"
    assert opt.output_gradient["size"] == pytest.approx(2 * largest(hidden.grad), rel=1e-6)


def test_a_step_that_is_refused_leaves_it_unmeasured():
    plain, _ = after(count=1)
    model = mlp()
    opt = optimizer(model, rows=None)
    x, y = batch()
    inner = model[0].weight.data
    (1e3 * squares(model(x), y)).backward()
    # What the first layer's rows do not fit any more: the output's were measured already.
    model[2].weight.data, kept = model[2].weight.data[:, :-1], model[2].weight.data
    with pytest.raises(ValueError, match="changed shape"):
        opt.step()
    assert opt.output_gradient == {}
    model[2].weight.data = kept
    assert model[0].weight.data is inner or torch.equal(model[0].weight.data, inner)
    step(model, opt, x, y)
    assert_same(plain, model, **EXACT)


def test_with_aux():
    model = WithNorm().double()
    opt = optimizer(model, aux="adamw")
    x, y = batch()
    expected = largest(seen(model, x, lambda output: squares(output, y)))
    step(model, opt, x, y)
    assert opt.output_gradient["layer"] == "head"
    assert opt.output_gradient["size"] == pytest.approx(2 * expected, rel=1e-6)
