"""Local steps on a few rows of the batch: the kernels take the rows that the reference takes."""

import pytest

pytest.importorskip("triton")

import torch

import locoprop_kernels as lk
from locoprop_kernels import rules
from locoprop_kernels.kernels import configs, target
from tests.kernels.comparison import SMALL, compare, rates, run_both, twins

pytestmark = pytest.mark.skipif(not target.interpreted(), reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("transfer", ["tanh", "identity", "softmax", "silu"])
@pytest.mark.parametrize("rows", [1, 5, 16, 36])
@pytest.mark.parametrize("driver", ["single", "grouped", "rows"])
def test_both_backends_take_the_same_rows(transfer, rows, driver):
    first, second = twins(1, 37, 19, 11, transfer=transfer), twins(2, 70, 5, 9, transfer=transfer, bias=False)
    ours, theirs = zip(first, second, strict=True)
    options = {"rule": rules.RMSprop(eps=1e-3), "lr": rates(4), "rows": rows, "rows_seed": 5, "prox": 0.1}
    for _ in range(2):  # the state persists
        report, _ = compare(list(ours), list(theirs), 64, driver=driver, **options)
        assert {problem.decision.rows for problem in report.problems} == {rows}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("transfer", ["tanh", "softmax"])
def test_low_precision(dtype, limit, transfer):
    ours, theirs = twins(4, 37, 19, 11, transfer=transfer)
    options = {"lr": rates(4), "rows": 8, "rows_seed": 2, "rule": "adam"}
    actual, expected = run_both([ours], [theirs], compute_dtype=dtype, **options)
    both = zip(actual.delta_weight + actual.delta_bias, expected.delta_weight + expected.delta_bias, strict=True)
    for mine, exact in both:
        assert (mine - exact).abs().max() <= limit * exact.abs().max()


def test_tf32_reads_transposed_rows(monkeypatch):
    monkeypatch.setattr(target, "float32_precision", lambda: "tf32")
    ours, theirs = twins(5, 37, 19, 11)
    actual, exact = run_both([ours], [theirs], lr=rates(4), rows=8, rule="sgd")
    (mine,), (right,) = actual.delta_weight, exact.delta_weight
    assert (mine - right).abs().max() <= 2e-3 * right.abs().max()


def test_layers_with_and_without_sets_in_one_step():
    small, large = twins(6, 4, 7, 5), twins(7, 37, 7, 5)
    ours, theirs = zip(small, large, strict=True)
    report, _ = compare(list(ours), list(theirs), 64, lr=rates(3), rows=4, rule="adam")
    assert [problem.decision.rows for problem in report.problems] == [None, 4]


def test_traces_agree():
    ours, theirs = twins(8, 37, 19, 11, transfer="sigmoid")
    actual, expected = run_both([ours], [theirs], lr=rates(4), rows=8, trace=True, rule="sgd")
    torch.testing.assert_close(actual.trace[0], expected.trace[0], rtol=1e-4, atol=1e-7)


def test_other_rows_in_another_step_with_the_same_plan():
    steps = []
    for seed in (0, 1, 0):
        ours, _ = twins(9, 37, 19, 11)
        with configs.use(SMALL):
            lk.local_steps_([ours], lr=rates(4), rows=4, rows_seed=seed, backend="triton")
        steps.append(ours.weight)
    assert torch.equal(steps[0], steps[2])
    assert not torch.equal(steps[0], steps[1])
