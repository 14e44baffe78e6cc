"""Interpreted kernels with float8 operands, against float64 and against the reference, which rounds alike."""

import types
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

import locoprop_kernels as lk
from locoprop_kernels import kernels, rules, steps
from locoprop_kernels.kernels import configs, target
from locoprop_kernels.kernels.device.memory import to_dtype, widened
from locoprop_kernels.patches import Stacked
from locoprop_kernels.settings import Settings
from tests.kernels.comparison import cut_batches, error_of_the_step, run_both
from tests.problems import copied, problem_for, random_layer, relative_error

pytestmark = pytest.mark.skipif(not target.interpreted(), reason="needs TRITON_INTERPRET=1")

FLOAT8 = torch.float8_e4m3fn
# Several blocks of batch and inputs, the last ones ragged.
CONFIG = configs.Config(n=32, b=64, k=32, r=32)
#: What is asked for of the increment after ten local steps; the textbook form in bfloat16 has 0.2.
GOAL = 5e-2
#: Between kernels and reference: the same rounding but below the normal range, as the kernels guess their scales.
BETWEEN = 2e-2


@triton.jit
def _rounding_kernel(value_ptr, bits_ptr, back_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    narrow = to_dtype(tl.load(value_ptr + i), tl.float8e4nv, True)
    tl.store(bits_ptr + i, narrow.to(tl.uint8, bitcast=True))
    tl.store(back_ptr + i, widened(narrow))


def test_interpreted_kernels_round_as_torch_does():
    every = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
    between = (every + every.roll(-1)) / 2  # ties
    spread = torch.randn(1532) * torch.exp2(torch.randint(-14, 12, (1532,)))
    value = torch.cat([every, between, spread, torch.tensor([448.0, 1e30, torch.inf, torch.nan])])
    expected = torch.where(value.isfinite(), value.clamp(-448, 448), torch.nan).to(FLOAT8).float()
    bits, back = torch.zeros(2048, dtype=torch.uint8), torch.zeros(2048)
    _rounding_kernel[(1,)](value, bits, back, N=2048)
    assert torch.equal(back.nan_to_num(1e9), expected.nan_to_num(1e9))
    assert torch.equal(bits.view(FLOAT8).float().nan_to_num(1e9), expected.nan_to_num(1e9))


def three(exact, driver=None, config=CONFIG, **options):
    """Reports of the kernels and of the reference with float8 operands, and of the reference in float64."""
    ours, theirs = ([copied(problem, torch.float32) for problem in exact] for _ in range(2))
    report, right = run_both(ours, exact, config, driver, compute_dtype=FLOAT8, **options)
    reference = lk.local_steps_(theirs, backend="reference", compute_dtype=FLOAT8, commit=False, **options)
    assert report.backend == "triton"
    assert bool(report.finite)
    return report, reference, right


def check(exact, driver=None, config=CONFIG, **options):
    """Kernels and reference are accurate, and agree."""
    report, reference, right = three(exact, driver, config, **options)
    assert 1e-4 < error_of_the_step(report, right) <= GOAL  # the operands were rounded
    assert error_of_the_step(reference, right) <= GOAL
    assert error_of_the_step(report, reference) <= BETWEEN
    return report


def layers_of_magnitudes(*magnitudes):
    """Layers whose inputs differ by these factors and whose outputs do not, each with a rate that suits it."""
    found = []
    for seed, magnitude in enumerate(magnitudes):
        x, weight, bias, residual = random_layer(seed, 70, 40, 20)
        problem = problem_for(x * magnitude, weight / magnitude, bias, residual, "tanh")
        problem.rate_weight = 1 / magnitude
        found.append(problem)
    return found


def test_ten_local_steps_in_a_single_launch_of_layers_of_very_different_magnitudes():
    blocks = configs.Config(n=32, b=64, k=64, r=32)
    report = check(layers_of_magnitudes(1e-4, 1e4), "single", blocks, lr=[1e-3] * 10)
    assert report.driver == "single"


def test_ten_local_steps_in_launches_of_their_own():
    exact = [problem_for(*random_layer(3, 70, 40, 20), "relu")]
    report = check(exact, "grouped", lr=[1e-3] * 10, rule=rules.SGD(momentum=0.9))
    assert report.driver == "grouped"


@pytest.mark.parametrize(
    ("transfer", "rates"),
    [("tanh", [1e-4] * 4), ("relu", [1e-6 * 8.0**t for t in range(4)]), ("squared_relu", [1.0] * 3)],
    ids=["small", "growing", "large"],
)
def test_steps_of_any_size(transfer, rates):
    """The weight moves as the bias moves the activations: all of its increment is a product of rounded operands."""
    problem = problem_for(*random_layer(7, 70, 40, 20), transfer)
    problem.grad_weight = torch.zeros_like(problem.weight)
    check([problem], "grouped", lr=rates, rule=rules.SGD(), reduction="mean")


def test_softmax_with_a_trace():
    exact = [problem_for(*random_layer(9, 70, 33, 20), "softmax")]
    report = check(exact, lr=[1e-3] * 4, trace=True)
    assert report.driver == "softmax"
    right = lk.local_steps_(exact, lr=[1e-3] * 4, trace=True, backend="reference", commit=False)
    (trace,), (expected,) = report.trace, right.trace
    assert trace is not None
    assert expected is not None
    assert (trace - expected).abs().max() <= GOAL * expected.abs().max()


@pytest.mark.parametrize(
    ("transfer", "batch", "rows", "driver"), [("identity", 120, None, "gram"), ("tanh", 70, 32, "rows")], ids=str
)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_bfloat16_takes_the_place_of_float8_where_that_gains_nothing(backend, transfer, batch, rows, driver):
    exact = problem_for(*random_layer(10, batch, 33, 20), transfer)
    found = []
    for compute_dtype in (FLOAT8, torch.bfloat16):
        problem = copied(exact, torch.float32)
        report = lk.local_steps_([problem], lr=[1e-3] * 3, backend=backend, compute_dtype=compute_dtype, rows=rows)
        assert backend == "reference" or report.driver == driver
        found.append(problem.weight)
    assert torch.equal(*found)


def test_a_small_batch_takes_no_rows_driver():
    exact = [problem_for(*random_layer(11, 30, 33, 20), "tanh")]
    report = check(exact, "rows", lr=[1e-3] * 2)
    assert report.driver in ("single", "grouped")


def test_groups_have_scales_of_their_own():
    x, weight, bias, residual = random_layer(12, 60, 33, 20, groups=2)
    sizes = torch.tensor([1e-4, 1e4], dtype=torch.float64)[:, None, None]
    exact = problem_for(x * sizes, weight / sizes, bias, residual, "tanh")
    blocks = configs.Config(n=16, b=64, k=64, r=32)
    report, reference, right = three([exact], config=blocks, lr=[1e-6] * 3)
    for one in (report, reference):
        for value, expected in zip(one.delta_weight[0], right.delta_weight[0], strict=True):
            assert relative_error(value, expected) <= GOAL


def test_masks_splits_and_frozen_parameters(monkeypatch):
    cut_batches(monkeypatch)
    exact = [problem_for(*random_layer(seed, 70, 33, 20), "tanh") for seed in (13, 14)]
    exact[0].mask_weight, exact[0].grad_bias = torch.rand(20, 33) < 0.5, None
    exact[1].grad_weight = None
    report, _, right = three(exact, "grouped", lr=[1e-3] * 3)
    for value, expected in (
        (report.delta_weight[0], right.delta_weight[0]),
        (report.delta_bias[1], right.delta_bias[1]),
    ):
        assert value is not None
        assert expected is not None
        assert relative_error(value, expected) <= GOAL
    assert report.delta_bias[0] is None
    assert report.delta_weight[1] is None
    assert not report.delta_weight[0][~exact[0].mask_weight].any()


def test_inputs_in_chunks_have_a_scale_before_they_are_rounded():
    x, weight, bias, residual = random_layer(16, 70, 40, 20)
    exact = problem_for(1e4 * x, weight / 1e4, bias, residual, "tanh", rate_weight=1e-8)
    exact.grad_weight = torch.zeros_like(weight)
    ours, theirs = (copied(exact, torch.float32) for _ in range(2))
    ours.x = Stacked(ours.x.split([30, 40]))
    report, right = run_both([ours], [exact], CONFIG, compute_dtype=FLOAT8, lr=[1e-2] * 3, rule=rules.SGD())
    options: dict[str, Any] = {"lr": [1e-2] * 3, "rule": rules.SGD(), "backend": "reference", "compute_dtype": FLOAT8}
    reference = lk.local_steps_([theirs], commit=False, **options)
    assert error_of_the_step(report, right) <= GOAL
    assert error_of_the_step(report, reference) <= BETWEEN


@pytest.mark.parametrize(
    ("where", "driver"), [("x", "single"), ("grad_weight", "grouped"), ("preactivation", "single")]
)
def test_what_is_not_finite_changes_nothing(where, driver):
    problem = copied(problem_for(*random_layer(15, 30, 40, 20), "relu"), torch.float32)
    getattr(problem, where)[3, 2] = torch.inf if where == "x" else torch.nan
    before = problem.weight.clone()
    with configs.use(CONFIG, driver):
        report = lk.local_steps_([problem], lr=[1e-3] * 2, backend="triton", compute_dtype=FLOAT8)
    assert not report.committed
    assert torch.equal(problem.weight, before)


@pytest.mark.parametrize("name", ["sm_75", "sm_80", "sm_86", "gfx90a", "gfx942", "gfx950"])
def test_targets_without_such_products_refuse(name, monkeypatch):
    problem = copied(problem_for(*random_layer(17, 9, 8, 7), "tanh"), torch.float32)
    before = problem.weight.clone()
    no_float8 = target.no_float8
    monkeypatch.setattr(target, "no_float8", lambda _: no_float8(name))
    with pytest.raises(ValueError, match=f"compute_dtype=.*capability 8.9 or later, got {name}") as refusal:
        lk.local_steps_([problem], lr=[1e-3] * 2, backend="triton", compute_dtype=FLOAT8)
    assert "torch.bfloat16 would work" in str(refusal.value)
    assert ("float8_e4m3fnuz" in str(refusal.value)) == (name == "gfx942")
    assert torch.equal(problem.weight, before)


@pytest.mark.parametrize("name", ["sm_89", "sm_90", "sm_100", "sm_103", "sm_120"])
def test_targets_that_have_such_products(name):
    assert target.no_float8(name) is None


def test_on_a_gpu_nothing_is_replaced(monkeypatch):
    """The reference would only round to float8 there, so ``"auto"`` does not fall back to it."""
    problem = types.SimpleNamespace(weight=types.SimpleNamespace(device=torch.device("cuda")))
    checked = types.SimpleNamespace(problems=[problem])
    settings = Settings.checked("sgd", [1.0], 0.0, "mean", FLOAT8, False, None)
    monkeypatch.setattr(kernels, "planned", lambda *_: "of a reason")
    with pytest.raises(ValueError, match="compute_dtype=torch.float8_e4m3fn .* of a reason; backend='ref"):
        steps._choose_backend("auto", checked, settings)  # type: ignore[arg-type]
    assert steps._choose_backend("reference", checked, settings)[0] is None  # type: ignore[arg-type]
