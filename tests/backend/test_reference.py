"""Properties of the reference backend: the increment form against the textbook form, and its limits."""

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import locoprop_kernels as lk
from locoprop_kernels import patches, transfers
from locoprop_kernels.testing import TextbookLayer, torch_optimizer
from tests.helpers import present
from tests.problems import RULES, TRANSFERS, copied, problem_for, random_layer

sizes = st.integers(1, 9)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    b=sizes,
    k=sizes,
    n=sizes,
    bias=st.booleans(),
    transfer=st.sampled_from(TRANSFERS),
    rule=st.sampled_from(RULES),
    iterations=st.integers(1, 8),
    prox=st.sampled_from([0.0, 0.3]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_increment_form_is_the_textbook_form(seed, b, k, n, bias, transfer, rule, iterations, prox, reduction):
    x, weight, bias_value, residual = random_layer(seed, b, k, n, bias)
    problem = problem_for(x, weight, bias_value, residual, transfer)
    textbook = TextbookLayer(weight, bias_value, transfer, rule)
    rates = [0.01 * (1 - t / (2 * iterations)) for t in range(iterations)]
    for _ in range(2):  # two outer steps: the state persists
        a0 = textbook.preactivation(x)
        problem.preactivation = problem.x @ problem.weight.t() + (0 if problem.bias is None else problem.bias)
        report = lk.local_steps_([problem], rule=rule, lr=rates, prox=prox, reduction=reduction)
        assert report.committed
        textbook.step(x, transfer(a0) - residual, rates, prox, reduction)
        torch.testing.assert_close(problem.weight, textbook.weight, rtol=0, atol=1e-10)
        if bias:
            torch.testing.assert_close(problem.bias, textbook.bias, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", [rule for rule in RULES if getattr(rule, "flavor", "torch") == "torch"], ids=str)
def test_one_local_iteration_is_the_torch_optimizer(rule):
    x, weight, bias, residual = random_layer(1, 7, 5, 4)
    problem = problem_for(x, weight, bias, residual, "tanh")
    parameters = [weight.clone(), present(bias).clone()]
    optimizer = torch_optimizer(rule, parameters, lr=0.03)
    for step in range(4):
        gradients = [problem.grad_weight * (step + 1), problem.grad_bias * (step - 2)]
        problem.grad_weight, problem.grad_bias = (g.clone() for g in gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        lk.local_steps_([problem], rule=rule, lr=[0.03], reduction="sum")
        torch.testing.assert_close(problem.weight, parameters[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(problem.bias, parameters[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("prox", [0.0, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("rows", "bias"), [(12, True), (12, False), (3, True)])
def test_squared_loss_converges_to_the_closed_form(prox, reduction, rows, bias):
    x, weight, bias_value, residual = random_layer(2, rows, 5, 4, bias)
    problem = problem_for(x, weight, bias_value, residual, "identity")
    delta_weight, delta_bias = lk.closed_form(problem, prox=prox, reduction=reduction)
    ones = torch.ones(rows, 1, dtype=x.dtype)
    curvature = torch.linalg.matrix_norm(torch.cat([x, ones], 1), 2) ** 2 / (rows if reduction == "mean" else 1) + prox
    report = lk.local_steps_(
        [problem], rule="sgd", lr=[1 / float(curvature)] * 6000, prox=prox, reduction=reduction, commit=False
    )
    torch.testing.assert_close(report.problems[0].delta_weight, delta_weight, rtol=1e-6, atol=1e-8)
    if bias:
        torch.testing.assert_close(report.problems[0].delta_bias, delta_bias, rtol=1e-6, atol=1e-8)
    else:
        assert delta_bias is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prox", [0.0, 0.2])
def test_gram_form_is_the_product_form(monkeypatch, bias, prox):
    x, weight, bias_value, residual = random_layer(3, 40, 6, 5, bias)
    results = []
    for gram in (True, False):
        monkeypatch.setattr("locoprop_kernels.reference.gram_is_cheaper", lambda *_, gram=gram: gram)
        problem = problem_for(x, weight, bias_value, residual, "identity")
        report = lk.local_steps_([problem], lr=[0.01] * 7, prox=prox, trace=True)
        assert report.driver == ("gram" if gram else "product")
        results.append((problem.weight, problem.bias, report.problems[0].trace))
    for gram_value, product_value in zip(*results, strict=True):
        if gram_value is not None:
            torch.testing.assert_close(gram_value, product_value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("transfer", ["tanh", "softmax"])
@pytest.mark.parametrize("compute_dtype", [None, torch.float16])
def test_chunks_of_the_batch_change_nothing(monkeypatch, transfer, compute_dtype):
    results = []
    for rows in (7, 10**6):
        monkeypatch.setattr("locoprop_kernels.input_chunks.cached_rows", lambda _, rows=rows: rows)
        problem = problem_for(*random_layer(15, 40, 6, 5, dtype=torch.float32), transfer)
        report = lk.local_steps_([problem], lr=[0.01] * 7, compute_dtype=compute_dtype, trace=True)
        results.append((problem.weight, problem.bias, report.problems[0].trace))
    for chunked, whole in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-2 if compute_dtype else 1e-4, atol=1e-4)


def test_gram_is_taken_only_where_it_costs_less():
    tall = problem_for(*random_layer(4, 200, 6, 5), "identity")
    flat = problem_for(*random_layer(4, 6, 200, 5), "identity")
    curved = problem_for(*random_layer(4, 200, 6, 5), "tanh")
    report = lk.local_steps_([tall, flat, curved], lr=[0.01] * 5)
    assert [problem.driver for problem in report.problems] == ["gram", "product", "product"]
    assert report.driver == "gram+product"


@pytest.mark.parametrize("transfer", [t for t in TRANSFERS if t.elementwise], ids=str)
def test_rows_are_independent(transfer):
    x, weight, bias, residual = random_layer(5, 11, 6, 8)
    whole = problem_for(x, weight, bias, residual, transfer)
    part = problem_for(x, weight[2:5], present(bias)[2:5], residual[:, 2:5], transfer)
    lk.local_steps_([whole], lr=[0.01] * 6)
    lk.local_steps_([part], lr=[0.01] * 6)
    torch.testing.assert_close(whole.weight[2:5], part.weight, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(whole.bias[2:5], part.bias, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("transfer", TRANSFERS, ids=str)
def test_matching_loss_differentiates_to_the_activation_difference(transfer):
    generator = torch.Generator().manual_seed(6)
    a = (3 * torch.randn(50, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    reference = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    target = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(transfer.matching_loss(a, reference, target).sum(), a)
    torch.testing.assert_close(gradient, (transfer(a) - target).detach(), rtol=1e-9, atol=1e-9)
    divergence = transfer.matching_loss(a.detach(), reference)
    if transfer.convex:
        assert divergence.min() >= -1e-12
    assert transfer.matching_loss(reference, reference).abs().max() == 0


def test_softplus_potential_is_the_dilogarithm():
    # F(0) = -Li2(-1) = pi^2 / 12, and F grows like a^2 / 2 + pi^2 / 6.
    potential = transfers.get("softplus").potential
    a = torch.tensor([0.0, 40.0, -40.0], dtype=torch.float64)
    expected = torch.tensor([math.pi**2 / 12, 800 + math.pi**2 / 6, math.exp(-40)], dtype=torch.float64)
    torch.testing.assert_close(potential(a), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("transfer", TRANSFERS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_trace_is_the_local_objective(transfer, reduction):
    x, weight, bias, residual = random_layer(7, 9, 5, 4)
    problem = problem_for(x, weight, bias, 0.05 * residual, transfer)
    prox, iterations = 0.4, 5
    report = lk.local_steps_(
        [problem], lr=[0.002] * iterations, prox=prox, reduction=reduction, trace=True, commit=False
    )
    trace = present(report.problems[0].trace)
    assert trace.shape == (iterations + 1,)
    assert trace[0] == 0
    delta_weight, delta_bias = present(report.problems[0].delta_weight), present(report.problems[0].delta_bias)
    a0 = problem.preactivation
    loss = transfer.matching_loss(a0 + x @ delta_weight.t() + delta_bias, a0, transfer(a0) - 0.05 * residual).sum()
    loss = loss / (len(x) if reduction == "mean" else 1)
    expected = loss + prox / 2 * (delta_weight.square().sum() + delta_bias.square().sum())
    torch.testing.assert_close(trace[-1], expected, rtol=1e-9, atol=1e-12)
    assert trace[-1] < 0


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("transfer", ["tanh", "identity"])
def test_frozen_parameters_stay(frozen, transfer):
    x, weight, bias, residual = random_layer(8, 30, 4, 5)
    problem = problem_for(x, weight, bias, residual, transfer)
    setattr(problem, f"grad_{frozen}", None)
    before = {"weight": weight.clone(), "bias": present(bias).clone()}
    lk.local_steps_([problem], lr=[0.01] * 4)
    for name in ("weight", "bias"):
        assert torch.equal(getattr(problem, name), before[name]) == (name == frozen)
    assert set(problem.state) == {"weight", "bias"} - {frozen}


@pytest.mark.parametrize("transfer", ["relu", "identity"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_parameters_keep_float32_state(transfer, dtype, tolerance):
    low = problem_for(*random_layer(9, 64, 16, 12, dtype=dtype), transfer)
    high = copied(low, torch.float32)
    reports = [lk.local_steps_([p], lr=[0.01] * 5, commit=False) for p in (low, high)]
    actual, expected = (present(report.problems[0].delta_weight) for report in reports)
    assert actual.dtype == torch.float32
    assert (actual - expected).norm() <= tolerance * expected.norm()
    reports[0].commit_()
    assert low.weight.dtype == dtype
    assert low.state["weight"]["square_avg"].dtype == torch.float32


def test_commit_false_leaves_everything_and_commits_later():
    problem = problem_for(*random_layer(10, 9, 5, 4), "tanh")
    twin = problem_for(*random_layer(10, 9, 5, 4), "tanh")
    before = problem.weight.clone()
    report = lk.local_steps_([problem], lr=[0.01] * 3, commit=False)
    assert not report.committed
    assert torch.equal(problem.weight, before)
    assert problem.state == {}
    delta = report.problems[0].delta_weight
    assert report.delta_weight[0] is delta
    report.commit_()
    report.commit_()  # nothing left to apply
    assert report.delta_weight == report.delta_bias == [None]
    assert report.committed
    lk.local_steps_([twin], lr=[0.01] * 3)
    assert torch.equal(problem.weight, twin.weight)
    assert torch.equal(problem.weight, before + delta)
    assert torch.equal(problem.state["bias"]["square_avg"], twin.state["bias"]["square_avg"])


def test_divergence_changes_nothing():
    good = problem_for(*random_layer(11, 9, 5, 4), "tanh")
    bad = problem_for(*random_layer(12, 9, 5, 4), "squared_relu")
    lk.local_steps_([good, bad], rule="sgd", lr=[0.001])
    before = [p.weight.clone() for p in (good, bad)]
    report = lk.local_steps_([good, bad], rule="sgd", lr=[1e6] * 30)
    assert not report.committed
    assert not report.finite
    assert all(torch.equal(p.weight, w) for p, w in zip((good, bad), before, strict=True))


def test_same_bits_twice():
    results = []
    for _ in range(2):
        problem = problem_for(*random_layer(13, 100, 50, 40, dtype=torch.float32), "tanh")
        lk.local_steps_([problem], lr=[0.01] * 10)
        results.append(problem.weight)
    assert torch.equal(*results)


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_strided_inputs_and_compute_dtypes(compute_dtype):
    x, weight, bias, residual = random_layer(14, 33, 10, 7, dtype=torch.float32)
    expected = problem_for(x, weight, bias, residual, "sigmoid")
    actual = problem_for(x, weight, bias, residual, "sigmoid")
    actual.x = torch.empty(10, 66).t()[::2].copy_(x)
    actual.weight = torch.empty(10, 7).t().copy_(weight)
    lk.local_steps_([expected], lr=[0.01] * 6)
    lk.local_steps_([actual], lr=[0.01] * 6, compute_dtype=compute_dtype)
    step = (expected.weight - weight).norm()
    assert (actual.weight - expected.weight).norm() <= 1e-2 * step


@pytest.mark.parametrize("transfer", ["tanh", "identity"])
@pytest.mark.parametrize("rows", ["tensor", "patches"])
def test_groups_one_by_one_are_the_groups_together(monkeypatch, transfer, rows):
    """Large groups are solved one by one on CPUs; so must be three problems apart."""
    torch.manual_seed(0)
    groups, batch, n, k = 3, 20, 4, 6
    x: torch.Tensor | patches.Patches = torch.randn(groups, batch, k, dtype=torch.float64)
    if rows == "patches":
        image = torch.randn(5, groups * k, 2, 2, dtype=torch.float64)
        x = patches.Patches(image, (1, 1), (1, 1), (1, 1), groups=groups)
        assert x.shape == (groups, batch, k)

    def problem():
        torch.manual_seed(1)
        weight, bias = torch.randn(groups, n, k, dtype=torch.float64), torch.randn(groups, n, dtype=torch.float64)
        return lk.LocalProblem(
            x, torch.randn(groups, batch, n, dtype=torch.float64), weight, bias, torch.randn_like(weight),
            torch.randn_like(bias), transfer, mask_weight=torch.rand(groups, n, k) < 0.7,
        )  # fmt: skip

    together, apart, split = problem(), problem(), problem()
    options: dict[str, Any] = {"rule": "adam", "lr": [1e-2] * 4, "backend": "reference", "trace": True}
    first = lk.local_steps_([together], **options)
    monkeypatch.setattr("locoprop_kernels.reference._LARGE_GROUP", 1)
    second = lk.local_steps_([apart], **options)
    third = lk.local_steps_([split.group(g) for g in range(groups)], **options)
    torch.testing.assert_close(second.trace[0], first.trace[0])
    torch.testing.assert_close(sum(third.trace), first.trace[0])
    for other in (apart, split):
        torch.testing.assert_close(other.weight, together.weight)
        torch.testing.assert_close(other.bias, together.bias)
    assert set(apart.state["weight"]) == set(together.state["weight"])
    for slot, value in together.state["weight"].items():
        torch.testing.assert_close(apart.state["weight"][slot], value)
