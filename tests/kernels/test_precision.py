"""Interpreted kernels in low precision against float64, judged by the size of the step."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

import locoprop_kernels as lk
from locoprop_kernels.kernels import configs, target
from locoprop_kernels.kernels.device import functions
from locoprop_kernels.kernels.device.activation import _all_small, _difference_of
from locoprop_kernels.kernels.spec import Products
from tests.kernels.comparison import SMALL, cut_batches, error_of_the_step, run_both, twins
from tests.problems import copied, problem_for, random_layer

pytestmark = pytest.mark.skipif(not target.interpreted(), reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize(("transfer", "form"), [("identity", "gram"), ("softmax", "softmax")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forms_of_their_own_in_low_precision(transfer, form, dtype):
    ours, theirs = twins(24, 120, 30, 20, transfer=transfer)
    report, expected = run_both([ours], [theirs], compute_dtype=dtype, lr=[1e-4] * 3)
    assert report.driver == (form if (form, dtype) != ("gram", torch.float16) else "single")
    assert error_of_the_step(report, expected) <= 5e-3


def test_batches_in_parts_in_low_precision(monkeypatch):
    cut_batches(monkeypatch)
    for dtype in (torch.bfloat16, torch.float16):
        ours, theirs = twins(27, 100, 30, 11)
        report, expected = run_both([ours], [theirs], driver="grouped", compute_dtype=dtype, lr=[1e-4] * 3)
        assert error_of_the_step(report, expected) <= 5e-3


# What rounding the operands may cost, beside 1e-2 (bfloat16) and 2e-3 (TF32) asked for on full-sized layers.
@pytest.mark.parametrize(
    ("dtype", "tf32", "limit"),
    [(torch.bfloat16, False, 5e-3), (torch.float16, False, 5e-4), (torch.float32, True, 5e-4)],
)
def test_low_precision(dtype, tf32, limit, monkeypatch):
    monkeypatch.setattr(target, "float32_precision", lambda: "tf32" if tf32 else "ieee")
    exact = problem_for(*random_layer(13, 200, 100, 40), "tanh")
    config = configs.Config(n=32, b=128, k=64, r=16)
    report, expected = run_both([copied(exact, torch.float32)], [exact], config, compute_dtype=dtype, lr=[1e-4] * 10)
    error = error_of_the_step(report, expected)
    assert error <= limit
    if dtype == torch.float32:
        assert error > 1e-6  # the operands were rounded


@pytest.mark.sweep
@pytest.mark.parametrize(("dtype", "tf32", "limit"), [(torch.bfloat16, False, 1e-2), (torch.float32, True, 2e-3)])
def test_low_precision_on_a_layer_of_full_size(dtype, tf32, limit, monkeypatch):
    """B = 1000, K = 1000, N = 500; the textbook form in bfloat16 is beside it in bench/results/accuracy.json."""
    monkeypatch.setattr(target, "float32_precision", lambda: "tf32" if tf32 else "ieee")
    x, weight, _, residual = random_layer(25, 1000, 1000, 500, bias=False)
    exact = problem_for(x, weight, None, residual / 100, "tanh")
    config = configs.Config(n=128, b=256, k=128, r=128)
    report, expected = run_both([copied(exact, torch.float32)], [exact], config, compute_dtype=dtype, lr=[2e-5] * 10)
    assert error_of_the_step(report, expected) <= limit


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_float16_keeps_its_range(size):
    layer = random_layer(14, 50, 30, 20)
    exact = problem_for(*layer[:3], layer[3] * size, "softplus")
    ours = copied(exact, torch.float32)
    report, expected = run_both(
        [ours], [exact], compute_dtype=torch.float16, rule="sgd", lr=[min(1.0, 1e-3 / size)] * 5
    )
    assert error_of_the_step(report, expected) <= 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters(dtype):
    ours, theirs = twins(15, 33, 18, 12, transfer="relu", dtype=dtype)
    with configs.use(SMALL):
        report = lk.local_steps_([ours], lr=[0.01] * 3, backend="triton")
    lk.local_steps_([theirs], lr=[0.01] * 3, backend="reference")
    assert report.committed
    assert ours.weight.dtype == dtype
    assert ours.state["weight"]["square_avg"].dtype == torch.float32
    assert (ours.weight.float() - theirs.weight.float()).abs().max() <= 2 * torch.finfo(dtype).eps * 3


def test_dtypes_may_differ_between_layers():
    pairs = [twins(16, 9, 8, 7), twins(17, 9, 7, 6, dtype=torch.bfloat16)]
    report, expected = run_both(*zip(*pairs, strict=True), lr=[0.01] * 2)
    assert error_of_the_step(report, expected) <= 1e-2


@triton.jit
def _differences(a0_ptr, change_ptr, found_ptr, P: tl.constexpr):
    offsets = tl.program_id(0) * 1024 + tl.arange(0, 1024)[None, :]
    a0, change = tl.load(a0_ptr + offsets), tl.load(change_ptr + offsets)
    if _all_small(change, P):
        found = _difference_of(a0, change, 0.0, 0, True, P)
    else:
        found = _difference_of(a0, change, 0.0, 0, False, P)
    tl.store(found_ptr + offsets, found)


@pytest.mark.parametrize("deviation", [1e-6, 0.1, 3.0, 30.0])
@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_small_and_large_changes_of_saturated_and_other_units(name, deviation):
    seed = torch.seed()
    print(f"{seed = }")
    generator = torch.Generator().manual_seed(seed)
    a0 = torch.randn(16 * 1024, generator=generator) * 10
    a0[::7] = torch.tensor([-1e3, -90.0, -1e-30, 0.0, 20.0, 90.0, 1e30]).repeat(len(a0))[: len(a0[::7])]
    change = torch.randn(len(a0), generator=generator) * deviation
    change[::11] = -a0[::11].clamp(-deviation, deviation)
    found = torch.empty_like(a0)
    function, _ = functions.FUNCTIONS[name]
    P = Products(1, 1, 1, 1, True, transfers=(function,), near=(functions.NEAR[function],))
    _differences[(16,)](a0, change, found, P=P)
    f = getattr(torch, name)
    right = f(a0.double() + change.double()) - f(a0.double())
    assert (found - right).norm() <= 2.0**-14 * right.norm()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 5e-3), (torch.float16, 5e-4)])
def test_large_steps_in_low_precision(dtype, limit):
    """Pre-activations change by a deviation of 3, across the whole of tanh."""
    x, weight, bias, residual = random_layer(28, 96, 40, 24)
    exact = problem_for(x, 0.5 * weight, bias, residual, "tanh")
    ours = copied(exact, torch.float32)
    report, expected = run_both([ours], [exact], compute_dtype=dtype, rule="sgd", lr=[3.0] * 3)
    assert (expected.delta_weight[0] @ x.mT).std() >= 3
    assert error_of_the_step(report, expected) <= limit
