"""Interpreted kernels against the reference: transfer functions, rules, forms, strides, traces."""

import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

import locoprop_kernels as lk
from locoprop_kernels import rules
from locoprop_kernels.kernels import configs, phases, target
from locoprop_kernels.kernels.device.functions import FUNCTIONS
from tests.kernels.comparison import (
    ELEMENTWISE,
    SMALL,
    ULP,
    compare,
    cut_batches,
    error_of_the_step,
    rates,
    twins,
    ulps_of_the_step,
)
from tests.problems import RULES, random_layer

pytestmark = pytest.mark.skipif(not target.interpreted(), reason="needs TRITON_INTERPRET=1")


@triton.jit
def _apply_kernel(x_ptr, y_ptr, p, F: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, F(tl.load(x_ptr + offsets), p))


@pytest.mark.parametrize("transfer", ELEMENTWISE, ids=str)
def test_every_transfer(transfer):
    ours, theirs = twins(1, 37, 19, 11, transfer=transfer)
    for driver in ("single", "grouped"):
        report, _ = compare([ours], [theirs], 16, driver=driver, rule=rules.SGD(momentum=0.5), lr=rates(2))
        assert report.driver == driver


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule(rule):
    ours, theirs = twins(2, 21, 18, 9, transfer="sigmoid")
    for _ in range(2):  # the state persists
        compare([ours], [theirs], 64, rule=rule, lr=rates(3), prox=0.3)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed in (0, 1, 2, 8, 10) else pytest.mark.sweep) for seed in range(12)]
)
def test_random_models(seed, monkeypatch):
    rng = random.Random(seed)
    iterations, rule = rng.randint(1, 4), rng.choice(RULES)
    ours, theirs = [], []
    for i in range(rng.randint(1, 3)):
        transfer = rng.choice([t for t in ELEMENTWISE if t.name != "squared_relu"])
        b, k, n = (rng.choice([1, 2, 5, 16, 31, 40]) for _ in range(3))
        pair = twins(100 * seed + i, b, k, n, bias=rng.random() < 0.7, transfer=transfer)
        frozen = rng.choice(["grad_weight", "grad_bias", None, None])
        for problem in pair:
            if frozen and problem.bias is not None:
                setattr(problem, frozen, None)
        ours.append(pair[0])
        theirs.append(pair[1])
    config = configs.Config(
        *rng.choice([(8, 32, 16, 4), (16, 8, 32, 8), (4, 16, 8, 2)]), slices=rng.choice([1, 2, 4, 8])
    )
    arguments = {"prox": rng.choice([0.0, 0.2]), "reduction": rng.choice(["mean", "sum"])}
    driver = rng.choice(["single", "grouped"])
    if seed >= 8:
        driver = "grouped"
        cut_batches(monkeypatch, rng.randint(2, 4))
    compare(ours, theirs, 64, config, driver, rule=rule, lr=rates(iterations), **arguments)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("transfer", "sizes"), [("identity", (40, 19, 11)), ("softmax", (37, 19, 23))])
def test_forms_of_their_own(transfer, sizes, bias):
    b, k, n = sizes
    ours, theirs = twins(23, b, k, n, bias, transfer)
    for _ in range(2):
        arguments = {"rule": rules.SGD(momentum=0.5), "lr": [0.01] * 4, "prox": 0.2, "trace": True}
        report, expected = compare([ours], [theirs], 32, **arguments)
        assert report.driver == ("gram" if transfer == "identity" else "softmax")
        torch.testing.assert_close(report.trace[0], expected.trace[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("transfer", ["tanh", "softmax"])
def test_batches_in_parts(transfer, tf32, monkeypatch):
    """Few update tiles and many programs: the products over the batch are computed in parts, then added."""
    if tf32:
        monkeypatch.setattr(target, "float32_precision", lambda: "tf32")
    ours, theirs = twins(26, 3000, 20, 12, transfer=transfer)
    launched = []
    launch = phases.launch_partial

    def launch_partial(*arguments):
        launched.append(len(arguments[1]))
        launch(*arguments)

    monkeypatch.setattr(phases, "launch_partial", launch_partial)
    config = configs.Config(n=16, b=512, k=128, r=64, slices=4)
    arguments: dict[str, Any] = {"rule": rules.SGD(momentum=0.5), "lr": [0.1] * 3, "prox": 0.2}
    with configs.use(config, "grouped", programs=8):
        report = lk.local_steps_([ours], backend="triton", commit=False, **arguments)
    expected = lk.local_steps_([theirs], backend="reference", commit=False, **arguments)
    assert launched == [2, 2]  # 3000 examples in parts of at least 1024
    if tf32:
        assert 1e-6 < error_of_the_step(report, expected) <= 5e-4
    else:
        assert ulps_of_the_step(report, expected) <= 32


def test_strided_and_transposed_inputs():
    ours, theirs = twins(3, 33, 10, 7)
    ours.x = torch.empty(10, 66).t()[::2].copy_(ours.x)
    ours.preactivation = torch.empty(7, 33).t().copy_(ours.preactivation)
    ours.weight = torch.empty(10, 14).t()[::2].copy_(ours.weight)
    ours.grad_weight = torch.empty(10, 7).t().copy_(ours.grad_weight)
    ours.grad_bias = torch.empty(14)[::2].copy_(ours.grad_bias)
    ours.bias = torch.empty(7, 3)[:, 1].copy_(ours.bias)
    compare([ours], [theirs], 32, lr=rates(3))
    assert ours.weight.stride() == (2, 14)
    step = (theirs.weight - random_layer(3, 33, 10, 7, dtype=torch.float32)[1]).abs().max()
    assert (ours.weight - theirs.weight).abs().max() <= 32 * ULP * step + ULP * theirs.weight.abs().max()


def test_state_that_is_not_contiguous():
    ours, theirs = twins(4, 12, 10, 7)
    for problem in (ours, theirs):
        lk.local_steps_([problem], lr=[0.01], backend="reference")
    slots = ours.state["weight"]
    slots["square_avg"] = torch.empty(10, 7).t().copy_(slots["square_avg"])
    compare([ours], [theirs], 32, lr=[0.01, 0.005])


def test_whole_tiles_are_read_in_place():
    ours, theirs = twins(5, 64, 32, 16)
    before = ours.x.clone()
    compare([ours], [theirs], 32, lr=[0.01] * 3)
    assert torch.equal(ours.x, before)


@pytest.mark.parametrize("transfer", ELEMENTWISE, ids=str)
def test_trace(transfer):
    ours, theirs = twins(6, 37, 19, 11, transfer=transfer)
    report, expected = compare([ours], [theirs], 64, rule=rules.SGD(), lr=[0.002] * 2, prox=0.4, trace=True)
    (actual,), (right,) = report.trace, expected.trace
    assert actual[0] == 0
    torch.testing.assert_close(actual, right, rtol=2e-5, atol=0)


def test_trace_changes_no_bit():
    pair = twins(7, 37, 19, 11)
    for problem, trace in zip(pair, (False, True), strict=True):
        with configs.use(SMALL):
            lk.local_steps_([problem], lr=[0.01] * 3, backend="triton", trace=trace)
    assert torch.equal(pair[0].weight, pair[1].weight)


def test_divergence_changes_nothing():
    good, bad = twins(18, 9, 5, 4)[0], twins(19, 9, 5, 4, transfer="squared_relu")[0]
    before = [p.weight.clone() for p in (good, bad)]
    with configs.use(SMALL):
        report = lk.local_steps_([good, bad], rule="sgd", lr=[1e6] * 20, backend="triton")
    assert not report.finite
    assert not report.committed
    assert all(torch.equal(p.weight, w) for p, w in zip((good, bad), before, strict=True))
    assert good.state == bad.state == {}


def test_transfers_are_exact_to_a_few_ulp():
    a = torch.cat([torch.randn(4096), 10 * torch.randn(4096), 1e-3 * torch.randn(4096), torch.tensor([0.0, 88, -88])])
    a = torch.nn.functional.pad(a, (0, 16384 - len(a)))
    for transfer in ELEMENTWISE:
        if not transfer.convex or transfer.name == "identity":
            continue  # their tails are differences of nearly equal numbers in torch too
        y = torch.empty_like(a)
        parameter = transfer.parameters[0] if transfer.parameters else 0.0
        _apply_kernel[(1,)](a, y, parameter, F=FUNCTIONS[transfer.name][0], BLOCK=16384)
        right = transfer(a.double())
        error = (y.double() - right).abs() / (ULP * right.abs() + 1e-37)
        assert error.max() <= 6, (str(transfer), float(error.max()), float(a[error.argmax()]))
