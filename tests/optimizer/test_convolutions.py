"""Convolutions and grouped layers: against the textbook form on unfolded inputs, and against layers apart."""

import copy
import functools
import random
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from locoprop_kernels import patches, rules, transfers
from locoprop_kernels.testing import TextbookLayer
from locoprop_torch import GroupedLinear
from tests.helpers import present, published
from tests.problems import unfolded


def random_convolution(draw):
    spatial = draw.choice([1, 2, 2, 3])
    groups = draw.choice([1, 1, 2, 3])
    inputs, outputs = groups * draw.randint(1, 3), groups * draw.randint(1, 3)
    kernel = [draw.randint(1, 3) for _ in range(spatial)]
    mode = draw.choice(["zeros", "reflect", "replicate", "circular"])
    stride = [draw.randint(1, 3) for _ in range(spatial)]
    padding = draw.choice(["valid", "same", [draw.randint(0, 2) for _ in range(spatial)]])
    if padding == "same":
        stride = [1] * spatial
    module = [nn.Conv1d, nn.Conv2d, nn.Conv3d][spatial - 1](
        inputs,
        outputs,
        kernel,
        stride,
        padding,
        dilation=[draw.randint(1, 2) for _ in range(spatial)],
        groups=groups,
        bias=draw.random() < 0.7,
        padding_mode=mode,
    ).double()
    x = torch.randn(draw.randint(1, 3), inputs, *(draw.randint(5, 7) for _ in range(spatial)), dtype=torch.float64)
    if draw.random() < 0.3 and spatial == 2:
        x = x.to(memory_format=torch.channels_last)
    if draw.random() < 0.3 and spatial == 2:
        module = module.to(memory_format=torch.channels_last)
    return module, x[0] if draw.random() < 0.15 else x


@pytest.mark.parametrize("repetition", range(25))
def test_convolution_is_the_textbook_form_on_unfolded_inputs(repetition, monkeypatch):
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    torch.manual_seed(seed)
    module, x = random_convolution(draw)
    transfer = draw.choice(["tanh", "identity", "softplus"])
    rule = draw.choice([rules.RMSprop(eps=1e-4), rules.Adam(eps=1e-4), rules.SGD(0.9)])
    chunks = patches.Patches.chunks
    monkeypatch.setattr(patches.Patches, "chunks", lambda self, max_bytes=0: chunks(self, 500))
    model = nn.Sequential(module)
    options: dict[str, Any] = {"lr": 1e-3, "activation_lr": 2.0, "prox": 0.1, "rule": rule, "local_iterations": 4}
    opt = published(model, transfers={"0": transfer}, **options)
    weight = module.weight.detach().clone(memory_format=torch.contiguous_format)
    parts = weight.flatten(1).chunk(module.groups)
    biases = [None] * module.groups if module.bias is None else module.bias.detach().chunk(module.groups)
    textbook = [TextbookLayer(w, b, transfers.get(transfer), rule) for w, b in zip(parts, biases, strict=True)]
    rates = [1e-3 * max(1 - t / 4, 0.25) for t in range(4)]
    for _ in range(2):
        opt.zero_grad()
        a = model(x)
        # Not symmetric: columns that circular padding makes equal would cancel, and leave rounding errors alone.
        weights = torch.linspace(-1, 2, a.shape[-1])
        (gradient,) = torch.autograd.grad(loss := (a.square() * weights).sum(), a, retain_graph=True)
        loss.backward()
        rows = (gradient if x.dim() == module.weight.dim() else gradient[None]).movedim(1, -1).flatten(0, -2)
        for layer, inputs, residual in zip(textbook, unfolded(module, x), rows.chunk(module.groups, 1), strict=True):
            target = transfers.get(transfer)(layer.preactivation(inputs)) - 2.0 * residual
            layer.step(inputs, target, rates, prox=0.1, reduction="mean")
        opt.step()
        expected = torch.cat([layer.weight for layer in textbook]).reshape(module.weight.shape)
        torch.testing.assert_close(module.weight.detach(), expected, rtol=1e-10, atol=1e-10)
        if module.bias is not None:
            expected = torch.cat([present(layer.bias) for layer in textbook])
            torch.testing.assert_close(module.bias.detach(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (3,)])
def test_grouped_linear_is_one_layer_per_group(shape):
    torch.manual_seed(0)
    module = GroupedLinear(4, 3, 2).double()
    x = torch.randn(4, *shape, dtype=torch.float64)
    expected = torch.stack(
        [F.linear(part, w, b) for part, w, b in zip(x, module.weight, present(module.bias), strict=True)]
    )
    torch.testing.assert_close(module(x), expected)
    linears = [nn.Linear(3, 2).double() for _ in range(4)]
    layers = nn.ModuleList(linears)
    for i, layer in enumerate(linears):
        layer.weight.data, layer.bias.data = module.weight.data[i].clone(), present(module.bias).data[i].clone()
    options: dict[str, Any] = {"lr": 1e-2, "rule": "adam"}
    opt = published(module, transfers={"": "tanh"}, **options)
    single = published(layers, transfers={str(i): "tanh" for i in range(4)}, **options)
    for _ in range(3):
        opt.zero_grad()
        single.zero_grad()
        module(x).tanh().square().sum().backward()
        sum(layer(part).tanh().square().sum() for layer, part in zip(linears, x, strict=True)).backward()
        opt.step()
        single.step()
        torch.testing.assert_close(module.weight, torch.stack([layer.weight for layer in linears]))
        torch.testing.assert_close(module.bias, torch.stack([layer.bias for layer in linears]))
    with pytest.raises(ValueError, match=r"x must be \[4, ..., 3\]"):
        module(x[:2])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_state_of_a_grouped_convolution_resumes_exactly(memory_format):
    def steps(model, opt, count):
        for k in range(count):
            opt.zero_grad()
            torch.manual_seed(k)
            model(torch.randn(2, 4, 6, 6)).square().sum().backward()
            opt.step()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Conv2d(6, 2, 2))
    model.to(memory_format=memory_format)  # type: ignore[call-overload]  # missing in torch's overloads
    opt = published(model, lr=1e-3, rule="adam")
    steps(model, opt, 2)
    for p, state in opt.state.items():
        assert state["exp_avg"].shape == p.shape
        assert int(state["step"]) == 20
    twin = copy.deepcopy(model)
    resumed = published(twin, lr=1e-3, rule="adam")
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    steps(model, opt, 2)
    steps(twin, resumed, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_accumulated_passes_of_a_convolution_are_the_whole_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh()).double()
    twin = copy.deepcopy(model)
    x = torch.randn(6, 2, 9, dtype=torch.float64)
    opt, whole = (published(m, lr=1e-3) for m in (model, twin))
    opt.zero_grad()
    whole.zero_grad()
    for part in x.split(2):
        model(part).square().sum().backward()
    twin(x).square().sum().backward()
    opt.step()
    whole.step()
    torch.testing.assert_close(model[0].weight, twin[0].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_under_autocast_and_in_low_precision(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, groups=2)).to(dtype)
    model[0].bias.requires_grad_(False)
    opt = published(model, lr=1e-2, activation_lr=100.0)
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.randn(5, 3, 9, 8, dtype=dtype).mT
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        loss = model(x).square().mean()
    loss.backward()
    opt.step()
    assert opt.skipped_steps == 0
    assert [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)] == [False, True, False, False]
    assert all(p.dtype == dtype for p in model.parameters())


def test_unsupported_layers_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Unflatten(1, (4, 1)), nn.ConvTranspose1d(4, 2, 1))
    with pytest.raises(ValueError, match=r"aux.*1\.weight, 1\.bias, 3\.weight, 3\.bias"):
        published(model)
    aux = torch.optim.AdamW([*model[1].parameters(), *model[3].parameters()])
    opt = published(model, lr=1e-3, aux=aux)
    before = [p.clone() for p in model.parameters()]
    model(torch.randn(5, 4)).square().sum().backward()
    opt.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


class Circular(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input.roll(1, -1), weight, bias)


def scaled(layer):
    layer.forward = lambda x: F.linear(x * 0.1, layer.weight, layer.bias)
    return layer


def scaled_convolution(layer):
    layer._conv_forward = lambda x, weight, bias: F.conv2d(x * 0.1, weight, bias)
    return layer


@pytest.mark.parametrize(
    "layer",
    [Circular(1, 2, 3), scaled(nn.Linear(8, 8)), scaled_convolution(nn.Conv2d(1, 2, 3))],
    ids=["subclass", "linear", "convolution"],
)
def test_layers_that_compute_something_else_are_not_trained(layer):
    model = nn.Sequential(nn.Linear(8, 8), layer)
    with pytest.raises(ValueError, match=r"1\.weight, 1\.bias"):
        published(model)
    assert "  1  " not in repr(published(model, aux="adamw"))


def wrapped_as_by_accelerate(layer):
    layer.forward = types.MethodType(torch.autocast("cpu", enabled=False)(layer.forward.__func__), layer)
    layer.forward = functools.update_wrapper(functools.partial(layer.forward), layer.forward)


def compiled(layer):
    layer.forward = torch.compile(layer.forward, backend="eager")


@pytest.mark.parametrize("wrap", [wrapped_as_by_accelerate, compiled, lambda layer: layer.compile(backend="eager")])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(4, 2), lambda: nn.Conv1d(1, 2, 2)], ids=["linear", "convolution"])
def test_layers_whose_forward_is_wrapped_are_trained_as_they_are(layer, wrap):
    results = []
    for wrapping in (lambda layer: None, wrap):
        torch.manual_seed(0)
        model = layer()
        wrapping(model)
        opt = published(model)
        before = model.weight.detach().clone()
        model(torch.randn(3, 1, 4)).square().sum().backward()
        opt.step()
        assert not torch.equal(model.weight, before)
        results.append(model.weight.detach())
    torch.testing.assert_close(*results)
