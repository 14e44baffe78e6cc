"""Layers beyond nn.Linear, and the user's own transfer functions and rules, on the Triton kernels."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import locoprop_kernels as lk
from locoprop_kernels import rules
from locoprop_kernels.kernels import configs
from locoprop_torch import GroupedLinear, LocoProp
from tests.problems import forget_transfer, problem_for, random_layer

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def own_tile(a, p):
    return a / (1.0 + tl.exp(-a)) + tl.log(1.0 + a * a)


def own(a):
    return a * torch.sigmoid(a) + torch.log(1 + a.square())


@triton.jit
def damped(delta, grad, s0, s1, s2, lr, step, HYPER: tl.constexpr):
    s0 = HYPER.decay * s0 + grad
    return delta - lr * s0 / (1.0 + tl.abs(s0)), s0, s1, s2


@dataclass(frozen=True)
class Damped(rules.Rule):
    decay: float = 0.5
    triton_fn = damped

    @property
    def slots(self):
        return {"sum": 0.0}

    def update_(self, delta, grad, state, lr, step):
        total = state["sum"].mul_(self.decay).add_(grad)
        delta.sub_(lr * total / (1 + total.abs()))


@pytest.fixture
def registered():
    yield lk.register_transfer("own", own, own_tile)
    forget_transfer("own")


MODELS = {
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Softmax(dim=1)),
        (3, 2, 7, 6),
    ),
    "grouped linear": (lambda: nn.Sequential(GroupedLinear(2, 5, 4), nn.SiLU()), (2, 9, 5)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_as_on_the_reference(name):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().to(DEVICE)
    twin = copy.deepcopy(model)
    start = [p.detach().clone() for p in model.parameters()]
    options: dict[str, Any] = {"lr": 1e-2, "local_iterations": 3, "rule": "adam", "prox": 0.1, "rows": None}
    pairs = [(m, LocoProp(m, backend=b, **options)) for m, b in ((model, "reference"), (twin, "triton"))]
    for _ in range(2):
        x = torch.randn(shape, device=DEVICE)
        for m, opt in pairs:
            opt.zero_grad()
            m(x).square().sum().backward()
            opt.step()
    assert pairs[1][1].last_reports[0].backend == "triton"
    for p, q, p0 in zip(model.parameters(), twin.parameters(), start, strict=True):
        assert (p - q).abs().max() <= 1e-4 * (p - p0).abs().max()


def layer_on_device(rows, bias=True) -> tuple[Any, Any, Any, Any]:
    x, weight, shift, residual = random_layer(0, rows, 20, 7, bias, torch.float32)
    return x.to(DEVICE), weight.to(DEVICE), None if shift is None else shift.to(DEVICE), residual.to(DEVICE)


def test_own_transfer_and_rule(registered):
    layer = layer_on_device(33, bias=False)
    weight = layer[1]
    problems = [problem_for(*layer, registered) for _ in range(2)]
    reports = [
        lk.local_steps_([problem], rule=Damped(), lr=[0.05] * 4, backend=backend, trace=True)
        for problem, backend in zip(problems, ("reference", "triton"), strict=True)
    ]
    reference, tiles = (problem.weight for problem in problems)
    assert (reference - tiles).abs().max() <= 1e-5 * (reference - weight).abs().max()
    torch.testing.assert_close(reports[1].trace[0], reports[0].trace[0], rtol=1e-4, atol=1e-6)


@triton.jit
def smooth_l1_tile(w, w0):
    return 0.3 * w / tl.sqrt(w * w + 1e-4) + 0.1 * (w - w0)


def smooth_l1(w, w0):
    return 0.3 * w / torch.sqrt(w * w + 1e-4) + 0.1 * (w - w0)


@pytest.mark.parametrize(("driver", "transfer"), [("single", "tanh"), ("grouped", "own"), ("gram", "identity")])
def test_own_regulariser(registered, driver, transfer):
    layer = layer_on_device(65)
    _, weight, bias, _ = layer
    *problems, plain = (problem_for(*layer, transfer) for _ in range(3))
    regulariser = lk.Regulariser(smooth_l1, triton_fn=smooth_l1_tile)
    options: dict[str, Any] = {"rule": "momentum", "lr": [0.02] * 4, "regulariser": regulariser}
    lk.local_steps_(problems[:1], backend="reference", **options)
    with configs.use(driver=None if driver == "gram" else driver):
        report = lk.local_steps_(problems[1:], backend="triton", **options)
    assert report.driver == driver
    for name, start in (("weight", weight), ("bias", bias)):
        expected, actual = (getattr(problem, name) for problem in problems)
        assert (actual - expected).abs().max() <= 1e-5 * (expected - start).abs().max()
    lk.local_steps_([plain], backend="reference", **{**options, "regulariser": None})
    assert (plain.bias - problems[0].bias).abs().max() > 1e-2 * (plain.bias - bias).abs().max()


@pytest.mark.parametrize(
    ("regulariser", "trace", "message"),
    [
        (lk.Regulariser(smooth_l1), False, "the regulariser has no Triton function"),
        (lk.Regulariser(smooth_l1, smooth_l1_tile, value=smooth_l1), True, "trace=True is not supported"),
    ],
)
def test_what_a_regulariser_needs(regulariser, trace, message):
    x, weight = torch.randn(5, 4, device=DEVICE), torch.randn(3, 4, device=DEVICE)
    problem = lk.LocalProblem(x, x @ weight.T, weight, grad_weight=torch.ones_like(weight))
    with pytest.raises(ValueError, match=message):
        lk.local_steps_([problem], lr=[0.1], backend="triton", regulariser=regulariser, trace=trace)


def test_patches_are_unfolded_up_to_a_bound(monkeypatch):
    model = nn.Conv2d(2, 3, 3, device=DEVICE)
    opt = LocoProp(model, rows=None, backend="triton")
    monkeypatch.setattr("locoprop_kernels.kernels.target._MOST_UNFOLDED_BYTES", 4 * (2 * 25) * 18 - 1)
    model(torch.randn(2, 2, 7, 7, device=DEVICE)).square().sum().backward()
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="patches whole, at most 0 MiB"):
        opt.step()
    assert torch.equal(model.weight, before)
    monkeypatch.undo()
    opt.step()
    assert opt.last_reports[0].committed
