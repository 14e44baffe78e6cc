"""Layers beyond nn.Linear, and the parts that a user may bring: against the textbook form and plain autograd."""

import copy
import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import locoprop_kernels as lk
from locoprop_kernels import patches, rules, transfers
from locoprop_kernels.testing import TextbookLayer
from locoprop_torch import GroupedLinear, LocoProp, expose_projections
from locoprop_torch.layouts import layout_of

pytestmark = pytest.mark.usefixtures("one_thread")


def unfolded(module, x):
    """Patches of every group, ``[positions, K]``, cut out one by one."""
    if x.dim() == module.weight.dim() - 1:
        x = x[None]
    spatial = len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        pads = [(t // 2, t - t // 2) for t in totals]
    else:
        pads = [(0, 0)] * spatial if module.padding == "valid" else [(p, p) for p in module.padding]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(map(any, pads)):
        x = F.pad(x, [amount for pair in reversed(pads) for amount in pair], mode=mode)
    counts = [
        (size - d * (k - 1) - 1) // s + 1
        for size, d, k, s in zip(x.shape[2:], module.dilation, module.kernel_size, module.stride, strict=True)
    ]
    rows = []
    for example in x:
        for position in itertools.product(*map(range, counts)):
            index = tuple(
                slice(o * s, o * s + d * (k - 1) + 1, d)
                for o, s, d, k in zip(position, module.stride, module.dilation, module.kernel_size, strict=True)
            )
            rows.append(example[(slice(None), *index)])
    groups = zip(*(row.chunk(module.groups) for row in rows), strict=True)
    return [torch.stack([part.flatten() for part in group]) for group in groups]


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
    options = {"lr": 1e-3, "activation_lr": 2.0, "prox": 0.1, "rule": rule, "local_iterations": 4}
    opt = LocoProp(model, transfers={"0": transfer}, **options)
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
            target = layer.transfer(layer.preactivation(inputs)) - 2.0 * residual
            layer.step(inputs, target, rates, prox=0.1, reduction="mean")
        opt.step()
        expected = torch.cat([layer.weight for layer in textbook]).reshape(module.weight.shape)
        torch.testing.assert_close(module.weight.detach(), expected, rtol=1e-10, atol=1e-10)
        if module.bias is not None:
            expected = torch.cat([layer.bias for layer in textbook])
            torch.testing.assert_close(module.bias.detach(), expected, rtol=1e-10, atol=1e-10)


GEOMETRIES = {
    "1-D, reflected": (nn.Conv1d(3, 4, 5, 2, 2, padding_mode="reflect"), (4, 3, 31)),
    "1-D, dilated, by examples": (nn.Conv1d(20, 4, 3, dilation=2), (6, 20, 9)),
    "3x3": (nn.Conv2d(3, 4, 3, padding=1), (5, 3, 12, 11)),
    "3x3, many channels": (nn.Conv2d(32, 4, 3, padding="same"), (3, 32, 7, 6)),
    "groups, strides": (nn.Conv2d(40, 4, (3, 2), (2, 3), (1, 0), (1, 2), groups=2), (3, 40, 9, 12)),
    "tiles": (nn.Conv2d(2, 4, 16, 16), (3, 2, 48, 32)),
    "circular, even kernel": (nn.Conv2d(2, 4, (4, 5), padding=(2, 1), padding_mode="circular"), (3, 2, 8, 7)),
    "replicated": (nn.Conv2d(2, 4, 3, padding=2, padding_mode="replicate"), (3, 2, 6, 5)),
    "1x1": (nn.Conv2d(32, 4, 1, groups=2), (3, 32, 5, 4)),
    "one position": (nn.Conv2d(5, 4, 3), (7, 5, 3, 3)),
    "3-D": (nn.Conv3d(2, 4, 3, (1, 2, 1), 1), (2, 2, 5, 6, 7)),
}


@pytest.mark.parametrize("weight", ["contiguous", "channels last"])
@pytest.mark.parametrize("image", ["contiguous", "channels last", "view"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_chunks_are_the_unfolded_input(geometry, image, weight):
    module, shape = GEOMETRIES[geometry]
    x = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)  # every number is there once
    expected = unfolded(module, x)
    if image != "contiguous":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    if image == "view":
        x = torch.stack([x, -x], -1)[..., 0]
    if weight == "channels last":
        module = copy.deepcopy(module)
        module.weight = nn.Parameter(module.weight.detach().movedim(1, -1).contiguous().movedim(-1, 1))
        channels = shape[1] // module.groups
        expected = [rows.unflatten(1, (channels, -1)).mT.flatten(1) for rows in expected]
    rows = layout_of(module).inputs(x)
    want = torch.stack(expected) if module.groups > 1 else expected[0]
    assert rows.shape == want.shape
    row = 4 * rows.shape[-1] * module.groups
    for limit in (1, 3 * row, 20 * row, 2**30):
        chunks = list(rows.chunks(limit))
        assert all(chunk.numel() * 4 <= max(limit, row) for chunk in chunks)
        assert torch.equal(torch.cat(chunks, dim=-2), want)
    for group in range(module.groups if module.groups > 1 else 0):
        assert torch.equal(torch.cat(list(rows.group(group).chunks())), want[group])


def test_patches_are_written_along_the_longer_runs():
    """What takes most of the time of a copy on a CPU: [K, b] for an ordinary image, [b, K] where channels are last."""
    image, tiles = torch.randn(4, 32, 10, 10), torch.randn(4, 3, 64, 64)
    cases = [(image, 3, 1, False, False), (tiles, 4, 4, False, False), (tiles, 16, 16, False, True)]
    cases.append((image.contiguous(memory_format=torch.channels_last), 3, 1, True, True))
    for x, kernel, stride, channels_last, by_rows in cases:
        for chunk in patches.Patches(x, (kernel,) * 2, (stride,) * 2, (1, 1), channels_last).chunks(2**16):
            assert chunk.is_contiguous() == by_rows
            assert chunk.t().is_contiguous() != by_rows


def test_patches_are_those_of_torch():
    x = torch.randn(6, 8, 40, 40)
    rows = layout_of(nn.Conv2d(8, 4, 5, padding=2)).inputs(x)
    expected = F.unfold(x, 5, padding=2).mT.reshape(-1, 200)
    assert torch.equal(torch.cat(list(rows.chunks(2**16))), expected)


def test_patches_are_multiplied_in_the_layout_they_were_written_in(monkeypatch):
    """Another copy of every chunk would take longer than its product where a layer is small."""
    from locoprop_kernels import reference

    contiguous = []
    rounded = reference.rounded

    def seen(matrix, dtype):
        if matrix.shape[-1] == 9 * 32:
            contiguous.append((matrix.is_contiguous(), matrix.mT.is_contiguous()))
        return rounded(matrix, dtype)

    monkeypatch.setattr(reference, "rounded", seen)
    model = nn.Sequential(nn.Conv2d(32, 4, 3, bias=False), nn.Tanh())
    opt = LocoProp(model, lr=1e-6, local_iterations=2, backend="reference")
    model(torch.randn(4, 32, 10, 10)).square().sum().backward()
    opt.step()
    rows, weight = contiguous
    assert rows == (False, True)
    assert weight == (True, False)


class Counted(patches.Rows):
    """Rows that count how often they are formed, and of which bounds and sizes."""

    def __init__(self, rows):
        super().__init__(tuple(rows.shape), rows.dtype, rows.device)
        self.rows, self.limits, self.sizes = rows, [], []

    def chunks(self, max_bytes=patches.CHUNK_BYTES):
        self.limits.append(max_bytes)
        for chunk in self.rows.split(max(1, max_bytes // (self.rows.shape[1] * self.rows.itemsize))):
            self.sizes.append(len(chunk))
            yield chunk


def counted_loop(rows, outputs=3, **options):
    torch.manual_seed(1)
    weight = torch.randn(outputs, rows.shape[1])
    problem = lk.LocalProblem(
        rows, torch.randn(rows.shape[0], outputs), weight, grad_weight=torch.ones_like(weight), transfer="tanh"
    )
    report = lk.local_steps_([problem], lr=[1e-2] * 5, backend="reference", commit=False, **options)
    assert report.driver == "product"
    return report.delta_weight[0]


@pytest.mark.parametrize(("compute_dtype", "size"), [(None, 4), (torch.bfloat16, 2), (torch.float16, 2)])
def test_rows_are_formed_once_if_they_fit(monkeypatch, compute_dtype, size):
    kept, formed = Counted(torch.randn(50, 6)), Counted(torch.randn(50, 6))
    formed.rows = kept.rows
    results = []
    for rows, bound, times in ((kept, 50 * 6 * size, 1), (formed, 50 * 6 * size - 1, 4)):
        monkeypatch.setattr("locoprop_kernels.reference.KEPT_BYTES", bound)
        results.append(counted_loop(rows, compute_dtype=compute_dtype))
        assert len(rows.limits) == times  # the first local step needs none
    assert torch.equal(*results)


@pytest.mark.parametrize(("inputs", "outputs"), [(2, 64), (4, 4)])
def test_chunks_of_rows_are_bounded_by_what_the_loop_makes_of_them(monkeypatch, inputs, outputs):
    """A layer may have more outputs than inputs: chunks of 16 MiB of ``X`` would make far larger ones of ``E``."""
    monkeypatch.setattr("locoprop_kernels.reference._CACHED_BYTES", 2000 * 4 * 64)
    monkeypatch.setattr("locoprop_kernels.reference.CHUNK_BYTES", 3000 * 4 * 4)
    rows = Counted(torch.randn(6000, inputs))
    counted_loop(rows, outputs)
    assert max(rows.sizes) == (2000 if outputs == 64 else 3000)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (3,)])
def test_grouped_linear_is_one_layer_per_group(shape):
    torch.manual_seed(0)
    module = GroupedLinear(4, 3, 2).double()
    x = torch.randn(4, *shape, dtype=torch.float64)
    expected = torch.stack([F.linear(part, w, b) for part, w, b in zip(x, module.weight, module.bias, strict=True)])
    torch.testing.assert_close(module(x), expected)
    layers = nn.ModuleList(nn.Linear(3, 2) for _ in range(4)).double()
    for i, layer in enumerate(layers):
        layer.weight.data, layer.bias.data = module.weight.data[i].clone(), module.bias.data[i].clone()
    options = {"lr": 1e-2, "rule": "adam"}
    opt = LocoProp(module, transfers={"": "tanh"}, **options)
    single = LocoProp(layers, transfers={str(i): "tanh" for i in range(4)}, **options)
    for _ in range(3):
        opt.zero_grad()
        single.zero_grad()
        module(x).tanh().square().sum().backward()
        sum(layer(part).tanh().square().sum() for layer, part in zip(layers, x, strict=True)).backward()
        opt.step()
        single.step()
        torch.testing.assert_close(module.weight, torch.stack([layer.weight for layer in layers]))
        torch.testing.assert_close(module.bias, torch.stack([layer.bias for layer in layers]))
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
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Conv2d(6, 2, 2)).to(memory_format=memory_format)
    opt = LocoProp(model, lr=1e-3, rule="adam")
    steps(model, opt, 2)
    for p, state in opt.state.items():
        assert state["exp_avg"].shape == p.shape
        assert int(state["step"]) == 20
    twin = copy.deepcopy(model)
    resumed = LocoProp(twin, lr=1e-3, rule="adam")
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    steps(model, opt, 2)
    steps(twin, resumed, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_accumulated_passes_of_a_convolution_are_the_whole_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh()).double()
    twin = copy.deepcopy(model)
    x = torch.randn(6, 2, 9, dtype=torch.float64)
    opt, whole = (LocoProp(m, lr=1e-3) for m in (model, twin))
    opt.zero_grad()
    whole.zero_grad()
    for part in x.split(2):
        model(part).square().sum().backward()
    twin(x).square().sum().backward()
    opt.step()
    whole.step()
    torch.testing.assert_close(model[0].weight, twin[0].weight)


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
    opt = LocoProp(model, lr=1e-3, activation_lr=3.0, reduction="sum")
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
        3.0 * model.first.weight.grad,
        3.0 * model.first.bias.grad,
        "tanh",
    )
    lk.local_steps_([problem], lr=[1e-3 * max(1 - t / 10, 0.25) for t in range(10)], reduction="sum")
    opt.step()
    torch.testing.assert_close(model.first.weight.detach(), problem.weight)
    assert model.second.weight is model.first.weight


def test_copies_of_tied_grouped_and_primal_layers():
    torch.manual_seed(0)
    model = nn.Sequential(Tied(), nn.Unflatten(1, (1, 2)), nn.Conv1d(1, 2, 2), nn.Tanh())
    pair = model, LocoProp(model, lr=1e-2, target={"2": "primal"})
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
        LocoProp(Tied((torch.tanh, torch.erf)))
    LocoProp(Tied((torch.tanh, torch.erf)), transfers={"second": "tanh"})
    with pytest.raises(ValueError, match="must share their bias"):
        LocoProp(Tied(share_bias=False))


def test_embedding_tied_with_the_head():
    torch.manual_seed(0)
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Linear(4, 4), nn.Tanh(), head)
    twin = copy.deepcopy(model)
    tokens = torch.randint(7, (3, 5))
    opt = LocoProp(model, lr=0.1, activation_lr=1.0, local_iterations=1, rule="sgd", reduction="sum")
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    for m, o in ((model, opt), (twin, plain)):
        o.zero_grad()
        F.cross_entropy(m(tokens).flatten(0, 1), tokens.flatten()).backward()
        o.step()
    assert model[0].weight is model[3].weight
    torch.testing.assert_close(model[0].weight, twin[0].weight)


def test_softmax_over_channels_and_groups():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Softmax(dim=1))
    assert "softmax" in repr(LocoProp(model))
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Softmax(dim=-1))
    assert "identity" in repr(LocoProp(model))
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Softmax(dim=1))
    with pytest.raises(ValueError, match="must be elementwise, got softmax"):
        LocoProp(model)


@pytest.mark.parametrize(
    ("module", "name"),
    [(nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.SiLU(), "silu"), (nn.ReLU(), "relu")],
    ids=str,
)
def test_transfers_of_transformers_are_found(module, name):
    assert name in repr(LocoProp(nn.Sequential(nn.Linear(3, 3), module)))
    layer = nn.TransformerEncoderLayer(8, 2, 12, activation=module, batch_first=True)
    aux = torch.optim.AdamW([p for n, p in layer.named_parameters() if "linear" not in n])
    lines = repr(LocoProp(layer, aux=aux)).splitlines()
    assert next(line for line in lines if "linear1" in line).endswith(f" {name}")
    assert next(line for line in lines if "linear2" in line).endswith(" identity")


def test_functional_transfers_beside_our_own_modules():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = expose_projections(nn.MultiheadAttention(8, 2, batch_first=True))
            self.experts, self.conv, self.up = GroupedLinear(4, 2, 2), nn.Conv1d(5, 5, 1), nn.Linear(8, 3)

        def forward(self, x):
            x = x + self.attention(x, x, x, need_weights=False)[0]
            x = torch.tanh(self.experts(x.unflatten(-1, (4, 2)).movedim(2, 0))).movedim(0, 2).flatten(2)
            return F.silu(self.up(torch.softmax(self.conv(x), 1)))

    lines = repr(LocoProp(nn.Sequential(Block(), nn.Identity()))).splitlines()
    found = {line.split()[0]: line.split()[-1] for line in lines if line.startswith("  0.")}
    assert found == {
        **{f"0.attention.{name}_proj": "identity" for name in ("q", "k", "v", "out")},
        "0.experts": "tanh",
        "0.conv": "softmax",
        "0.up": "silu",
    }


def test_closed_form_of_a_convolution():
    torch.manual_seed(0)
    module = nn.Conv2d(2, 3, 2).double()
    rows = layout_of(module).inputs(torch.randn(4, 2, 5, 5, dtype=torch.float64))
    a = torch.randn(rows.shape[0], 3, dtype=torch.float64)
    problems = [
        lk.LocalProblem(x, a, module.weight.detach().flatten(1), grad_weight=torch.ones(3, 8, dtype=torch.float64))
        for x in (rows, torch.cat(list(rows.chunks(300))))
    ]
    torch.testing.assert_close(*(lk.closed_form(problem, prox=0.1)[0] for problem in problems))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_under_autocast_and_in_low_precision(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, groups=2)).to(dtype)
    model[0].bias.requires_grad_(False)
    opt = LocoProp(model, lr=1e-2, activation_lr=100.0)
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
        LocoProp(model)
    aux = torch.optim.AdamW([*model[1].parameters(), *model[3].parameters()])
    opt = LocoProp(model, lr=1e-3, aux=aux)
    before = [p.clone() for p in model.parameters()]
    model(torch.randn(5, 4)).square().sum().backward()
    opt.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def attention_arguments(case):
    torch.manual_seed(1)
    x, memory = torch.randn(3, 5, 8), torch.randn(3, 6, 8)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.arange(6) >= torch.tensor([6, 4, 5])[:, None]
    return {
        "self": ((x, x, x), {}),
        "causal": ((x, x, x), {"attn_mask": causal, "is_causal": True, "need_weights": False}),
        "cross": ((x, memory, memory), {"key_padding_mask": padding, "average_attn_weights": False}),
        "masks": (
            (x, memory, memory),
            {"key_padding_mask": padding, "attn_mask": torch.randn(6, 5, 6), "need_weights": False},
        ),
        "unbatched": ((x[0], memory[0], memory[1]), {"attn_mask": torch.randn(5, 6)}),
    }[case]


@pytest.mark.parametrize("options", [{"batch_first": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("case", ["self", "causal", "cross", "masks", "unbatched"])
def test_exposed_projections_compute_the_same(case, options):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, **options)
    nn.init.normal_(attention.out_proj.weight)
    inputs, masks = attention_arguments(case)
    if not attention.batch_first and case != "unbatched":
        inputs = [x.transpose(0, 1) for x in inputs]
    expected, weights = attention(*inputs, **masks)
    actual, actual_weights = expose_projections(attention)(*inputs, **masks)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_weights, weights)


def test_exposed_projections_of_other_dimensions():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    inputs = torch.randn(3, 5, 8), torch.randn(3, 7, 6), torch.randn(3, 7, 4)
    torch.testing.assert_close(expose_projections(attention)(*inputs), attention(*inputs))


def test_transformer_layers_are_trained_through_exposed_projections():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    norms = [p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()]
    with pytest.raises(ValueError, match=r"self_attn\.in_proj_weight.*expose_projections"):
        LocoProp(model, aux=torch.optim.AdamW(norms))
    x = torch.randn(4, 5, 8)
    expected = model(x)
    model = expose_projections(model)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.eval()(x), expected)
    opt = LocoProp(model.train(), lr=1e-3, activation_lr=100.0, aux=torch.optim.AdamW(norms, 1e-3))
    losses = []
    for _ in range(10):
        opt.zero_grad()
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert "layers.0.self_attn.q_proj" in repr(opt)
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="add_bias_kv"):
        expose_projections(nn.MultiheadAttention(8, 2, add_bias_kv=True))


# --- targets, regularisers, weight decay, groups


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double()


def train(model, steps=2, **options):
    opt = LocoProp(model, **{"lr": 1e-2, "activation_lr": 3.0, **options})
    for k in range(steps):
        torch.manual_seed(k)
        x, y = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
        opt.zero_grad()
        F.mse_loss(model(x), y, reduction="sum").backward()
        opt.step()
    return [p.detach().clone() for p in model.parameters()]


def assert_equal_weights(actual, expected):
    for p, q in zip(actual, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_dual_target_written_by_hand():
    functions = {"0": torch.tanh, "2": torch.relu, "4": lambda a: a}
    target = {name: lambda a, g, f=f: f(a) - 3.0 * g for name, f in functions.items()}
    assert_equal_weights(train(mlp(), target=target), train(mlp()))


def test_targets_of_several_passes():
    results = []
    for target in ("dual", lambda a, g: torch.tanh(a) - 10.0 * g):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh()).double()
        opt = LocoProp(model, lr=1e-2, target=target)
        opt.zero_grad()
        for size in (5, 2, 7):
            (model(torch.randn(size, 2, 4, dtype=torch.float64)) ** 2).sum().backward()
        opt.step()
        results.append(list(model.parameters()))
    assert_equal_weights(*results)


@pytest.mark.parametrize("inplace", [False, True])
def test_primal_target(inplace):
    model, twin = mlp(), mlp()
    model[3].inplace = inplace
    gradients = {}

    def by_hand(name, f):
        return lambda a, g: f(a) - 3.0 * gradients[name]

    for name, module in (("0", twin[1]), ("2", twin[3]), ("4", twin[4])):
        module.register_full_backward_hook(lambda _, __, g, name=name: gradients.__setitem__(name, g[0]))
    functions = {"0": torch.tanh, "2": torch.relu, "4": lambda a: a}
    expected = train(twin, target={name: by_hand(name, f) for name, f in functions.items()})
    assert_equal_weights(train(model, target="primal"), expected)


def test_primal_target_needs_an_activation_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return torch.tanh(self.fc(x))

    with pytest.raises(ValueError, match=r"'primal' of layer 'fc'.*module"):
        train(Model().double(), target="primal")


def test_bad_targets():
    with pytest.raises(ValueError, match="target must be one of dual, primal"):
        train(mlp(), target="trial")
    with pytest.raises(ValueError, match=r"target must name captured layers.*got \['7'\]"):
        train(mlp(), target={"7": "primal"})
    with pytest.raises(ValueError, match=r"target of layer '0' must have the shape .*\[7, 6\], got \[7\]"):
        train(mlp(), target={"0": lambda a, g: a[:, 0]})
    with pytest.raises(TypeError, match="target of layer '0' must return a tensor, got int"):
        train(mlp(), target=lambda a, g: 0)


def test_own_regulariser():
    def proximal(parameter, start):
        return 0.3 * (parameter - start)

    assert_equal_weights(train(mlp(), regulariser=proximal), train(mlp(), prox=0.3))
    # coupled weight decay: a regulariser that is already there in the first local step
    model, twin = mlp(), mlp()
    actual = train(model, local_iterations=1, rule="sgd", regulariser=lambda w, _: 0.1 * w, reduction="sum")
    plain = torch.optim.SGD(twin.parameters(), lr=1e-2, weight_decay=0.1)
    for k in range(2):
        torch.manual_seed(k)
        x, y = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
        plain.zero_grad()
        (3.0 * F.mse_loss(twin(x), y, reduction="sum")).backward()
        plain.step()
    assert_equal_weights(actual, [p.detach() for p in twin.parameters()])
    with pytest.raises(TypeError, match="regulariser must be"):
        train(mlp(), regulariser=0.1)
    with pytest.raises(ValueError, match="regulariser must return a tensor of shape"):
        train(mlp(), regulariser=lambda w, w0: w.sum())


def random_problem(transfer):
    torch.manual_seed(1)
    x, w = torch.randn(9, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    residual = torch.randn(9, 3, dtype=torch.float64)
    return lk.LocalProblem(x, x @ w.T, w, grad_weight=residual.T @ x, transfer=transfer), residual


def test_trace_with_a_regulariser():
    problem, residual = random_problem("tanh")
    smooth = lk.Regulariser(lambda w, _: w / (1 + w**2).sqrt(), value=lambda w, _: (1 + w**2).sqrt())
    report = lk.local_steps_([problem], lr=[1e-3] * 5, trace=True, commit=False, regulariser=smooth)
    f, delta = problem.transfer, report.problems[0].delta_weight
    loss = (
        f.matching_loss(
            problem.preactivation + problem.x @ delta.T, problem.preactivation, f(problem.preactivation) - residual
        ).sum()
        / 9
    )
    new, old = ((1 + w**2).sqrt().sum() for w in (problem.weight + delta, problem.weight))
    torch.testing.assert_close(report.trace[0][-1], loss + new - old)
    with pytest.raises(ValueError, match="trace needs the value"):
        lk.local_steps_([problem], lr=[1e-3], trace=True, regulariser=lambda w, _: w)


def test_decoupled_weight_decay_is_adamws():
    model, twin = mlp(), mlp()
    actual = train(model, local_iterations=1, rule="adam", weight_decay=0.5, reduction="sum", activation_lr=1.0)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.5)
    for k in range(2):
        torch.manual_seed(k)
        x, y = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
        plain.zero_grad()
        F.mse_loss(twin(x), y, reduction="sum").backward()
        plain.step()
    assert_equal_weights(actual, [p.detach() for p in twin.parameters()])


def test_parameter_groups_have_their_own_hyperparameters():
    own = {"activation_lr": 0.5, "prox": 0.2, "local_iterations": 3, "rule": "adam", "lr": 1e-3}
    model = mlp()
    group = {"params": model[2].parameters(), **own}
    actual = train(model, steps=1, param_groups=[group])
    whole, alone = train(mlp(), steps=1), train(mlp(), steps=1, **own)
    assert_equal_weights(actual, [*whole[:2], *alone[2:4], *whole[4:]])
    model = mlp()
    opt = LocoProp(model, param_groups=[{"params": model[2].parameters(), "transfer": "softplus"}])
    assert next(line for line in repr(opt).splitlines() if line.startswith("  2 ")).endswith("softplus(beta=1)")
    opt.load_state_dict(opt.state_dict())
    assert str(opt.param_groups[1]["transfer"]) == "softplus(beta=1)"
    actual = train(model := mlp(), param_groups=[{"params": model[2].parameters(), "transfer": "softplus"}])
    assert_equal_weights(actual, train(mlp(), transfers={"2": "softplus"}))
    with pytest.raises(ValueError, match="weight_decay must be"):
        train(mlp(), weight_decay=-1.0)


# --- transfers and rules of the user's own


def own_function(a):
    return a * torch.sigmoid(a) + torch.log1p(a.square())


@pytest.fixture
def registered():
    yield lk.register_transfer("own", own_function)
    del transfers._DEFINITIONS["own"]


def test_registered_transfer(registered):
    problem, residual = random_problem("own")
    textbook = TextbookLayer(problem.weight, None, registered, rules.RMSprop())
    target = own_function(problem.preactivation) - residual
    rates = [0.01] * 6
    report = lk.local_steps_([problem], lr=rates, reduction="sum", trace=True)
    textbook.step(problem.x, target, rates, 0.0, "sum")
    torch.testing.assert_close(problem.weight, textbook.weight, rtol=1e-10, atol=1e-10)

    lk.register_transfer("own", F.silu)  # anew: now with a potential to compare the quadrature with
    a, reference = torch.randn(2, 50, dtype=torch.float64).unbind()
    silu = transfers.get("silu")
    torch.testing.assert_close(transfers.get("own").matching_loss(a, reference), silu.matching_loss(a, reference))
    assert report.trace[0][0] == 0


def test_registered_transfer_in_a_model(registered):
    class Own(nn.Module):
        def forward(self, a):
            return own_function(a)

    model = nn.Sequential(nn.Linear(4, 6), Own(), nn.Linear(6, 2)).double()
    opt = LocoProp(model, lr=1e-3, rule="sgd", transfers={"0": "own"}, target={"0": "primal"})
    x = torch.randn(8, 4, dtype=torch.float64)
    losses = []
    for _ in range(20):
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    problem = random_problem("own")[0]
    single = lk.LocalProblem(*(tensor.float() for tensor in (problem.x, problem.preactivation, problem.weight)))
    single.grad_weight, single.transfer = problem.grad_weight.float(), registered
    with pytest.raises(ValueError, match="'own' has no Triton function"):
        lk.local_steps_([single], lr=[0.1], backend="triton")
    with pytest.raises(ValueError, match="regulariser"):
        lk.local_steps_([single], lr=[0.1], backend="triton", regulariser=lambda w, _: w)


def test_bad_transfers():
    with pytest.raises(ValueError, match="package's transfer functions"):
        lk.register_transfer("tanh", torch.tanh)
    with pytest.raises(ValueError, match="not elementwise"):
        lk.register_transfer("rows", lambda a: torch.softmax(a, -1))
    with pytest.raises(ValueError, match="keep shape and dtype"):
        lk.register_transfer("sum", lambda a: a.sum())
    with pytest.raises(TypeError, match="torch_fn must be callable"):
        lk.register_transfer("number", 3)
    assert not {"rows", "sum", "number"} & set(transfers.available())
    lk.register_transfer("rows", lambda a: torch.softmax(a, -1), elementwise=False)
    del transfers._DEFINITIONS["rows"]


class SignDescent(rules.Rule):
    """A rule of three lines."""

    @property
    def slots(self):
        return {"momentum": 0.0}

    def update_(self, delta, grad, state, lr, step):
        delta.add_(state["momentum"].mul_(0.9).add_(grad, alpha=0.1).sign(), alpha=-lr)


def test_own_rule():
    model = mlp()
    before = [p.clone() for p in model.parameters()]
    after = train(model, rule=SignDescent(), local_iterations=4, lr=1e-3, steps=1)
    steps = 1e-3 * (1 + 0.75 + 0.5 + 0.25)
    for p, q in zip(before, after, strict=True):
        assert (p - q).abs().max() <= steps * (1 + 1e-12)


# --- known algorithms recovered


def test_implicit_sgd_is_the_limit_of_many_local_steps():
    """Proximal point of the linearised layer: ``W = W_0 - η γ ∂L/∂A(W)ᵀ X`` at the new weights (squared loss)."""
    problem, residual = random_problem("identity")
    eta = 0.05
    start = problem.weight.clone()
    lk.local_steps_([problem], rule="sgd", lr=[0.02] * 3000, prox=1 / eta, reduction="sum")
    delta = problem.weight - start
    implicit_gradient = (residual + problem.x @ delta.T).T @ problem.x
    torch.testing.assert_close(problem.weight, start - eta * implicit_gradient, rtol=1e-8, atol=1e-10)


def test_closed_form_is_the_kfac_step():
    """``Δ = -G (XᵀX/B + λI)⁻¹``: the gradient, preconditioned by the inputs' covariance."""
    problem, residual = random_problem("identity")
    gradient, covariance = residual.T @ problem.x / 9, problem.x.T @ problem.x / 9
    delta, _ = lk.closed_form(problem, prox=0.1)
    torch.testing.assert_close(
        delta, -gradient @ torch.linalg.inv(covariance + 0.1 * torch.eye(4, dtype=torch.float64))
    )
    report = lk.local_steps_([problem], rule="sgd", lr=[0.2] * 3000, prox=0.1, commit=False)
    torch.testing.assert_close(report.problems[0].delta_weight, delta, rtol=1e-8, atol=1e-10)


def test_target_propagation():
    """A local step towards the targets of an inverse network, on the matching loss between them and ``f(A)``."""
    torch.manual_seed(0)
    model, inverse = mlp(), nn.Linear(2, 5).double()
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    targets = {"2": lambda a, g: inverse(y).relu(), "4": lambda a, g: y, "0": lambda a, g: torch.tanh(a)}
    opt = LocoProp(model, lr=0.1, rule="sgd", local_iterations=1, target=targets, reduction="sum")
    before = [p.detach().clone() for p in model.parameters()]
    h = torch.tanh(model[0](x))
    a = model[2](h)
    opt.zero_grad()
    model(x).sum().backward()
    opt.step()
    expected = before[2] - 0.1 * (a.relu() - inverse(y).relu()).T @ h
    torch.testing.assert_close(model[2].weight, expected)
    assert torch.equal(model[0].weight, before[0])
