"""Local loops on all rows whose products are PyTorch's and whose phases are compiled, against the reference."""

from typing import Any

import pytest
import torch
from torch import nn

import locoprop_kernels as lk
from locoprop_kernels import reference, routes, rules
from locoprop_kernels.patches import Patches, Stacked
from locoprop_torch import LocoProp
from tests.helpers import force_routes
from tests.problems import RULES, TRANSFERS, copied, increment_errors, problem_for, random_layer, relative_error

pytest.importorskip("numba", exc_type=ImportError)
from locoprop_kernels.cpu_kernels import functions, updates

OPTIONS: dict[str, Any] = {"lr": [0.02, 0.01, 0.005, 0.005], "commit": False}
COMPILED = [rule for rule in RULES if updates.family_of(rule) is not None]
KNOWN = [f for f in TRANSFERS if f.name in functions.CODES and f.name != "softmax"]
# Differences of these are taken without a difference of rounded values.
EXACT = ("identity", "tanh", "sigmoid", "relu", "leaky_relu")
NARROW = [by for by in routes.available(torch.bfloat16) if by == "upcast" or routes.runs(torch.bfloat16, by)]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """So that a small batch is solved as a large one is."""
    monkeypatch.setattr(reference, "_COMPILED_ROWS", {})


def problem(transfer="tanh", b=23, k=40, n=26, bias=True, seed=0, **options):
    """In product form: with more inputs than rows nothing is gained by ``XᵀX``."""
    return problem_for(*random_layer(seed, b, k, n, bias=bias, dtype=torch.float32), transfer, **options)


def solved(one, rule="adam", form="product", **options):
    """The report of a call that is solved by phases, and that of the reference in float64."""
    options = {**OPTIONS, **options}
    found = lk.local_steps_([one], rule, **options)
    assert [(entry.driver, entry.decision.form) for entry in found.problems] == [("phases", form)]
    state = {kind: {s: v.double() if v.dim() else v for s, v in slots.items()} for kind, slots in one.state.items()}
    double = copied(one, torch.float64, state=state)
    return found, lk.local_steps_([double], rule, **{**options, "compute_dtype": None, "backend": "reference"})


def deltas(report, index=0):
    """What was found for the weight and the bias of a problem."""
    return report._solution.increment(index).delta.values()


@pytest.mark.parametrize("scale", [0.1, 30.0])  # small changes, and large ones
@pytest.mark.parametrize("transfer", KNOWN, ids=str)
def test_every_transfer_function_is_that_of_the_reference(transfer, scale):
    limit = 1e-6 if transfer.name in EXACT else 2e-5
    assert max(increment_errors(solved(problem(transfer, grad_scale=scale), rules.SGD()))) < limit * max(1.0, scale)


@pytest.mark.parametrize("form", ["product", "gram"])
@pytest.mark.parametrize("rule", COMPILED, ids=str)
def test_every_rule_is_that_of_the_reference(rule, form):
    one = problem("tanh") if form == "product" else problem("identity", b=60, k=9)
    assert max(increment_errors(solved(one, rule, form, prox=0.3, reduction="sum"))) < 5e-6


@pytest.mark.parametrize("rule", COMPILED, ids=str)
def test_rules_go_on_with_their_state(rule):
    one = problem(rate_bias=0.5)
    for _ in range(2):
        assert lk.local_steps_([one], rule, **{**OPTIONS, "commit": True}).committed
    assert max(increment_errors(solved(one, rule))) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("b", "k", "n"),
    # Fewer than a vector, a square, a piece; as many; more of them. Two chunks, of which the second is shorter.
    [
        (2, 1, 1),
        (3, 5, 2),
        (65, 80, 63),
        (64, 64, 64),
        (1024, 1100, 3),
        (1025, 1030, 2),
        (70, 1300, 130),
        (1500, 2, 900),
    ],
)
def test_sizes_that_fill_nothing(b, k, n, bias):
    assert max(increment_errors(solved(problem("sigmoid", b, k, n, bias), rules.SGD()))) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("b", "k", "n"), [(9, 1, 1), (50, 17, 33), (500, 300, 130)])
def test_sizes_of_the_gram_form(b, k, n, bias):
    assert max(increment_errors(solved(problem("identity", b, k, n, bias), rules.SGD(), "gram", lr=[1e-4] * 4))) < 1e-5


@pytest.mark.parametrize("form", ["product", "gram"])
def test_a_frozen_bias_stays(form):
    one = problem("tanh") if form == "product" else problem("identity", b=60, k=9)
    reports = solved(copied(one, grad_bias=None), form=form)
    assert reports[0].delta_bias == [None]
    assert max(increment_errors(reports)) < 1e-5


@pytest.mark.parametrize("size", [200, 64, 7])
@pytest.mark.parametrize("by", NARROW)
def test_operands_rounded_to_bfloat16(by, size, monkeypatch):
    """As PyTorch rounds them, with one chunk of the batch and with several."""
    force_routes(monkeypatch, torch.bfloat16, by)
    monkeypatch.setattr("locoprop_kernels.input_chunks.cached_rows", lambda _: size)
    for transfer, bias in (("tanh", True), ("gelu", False), ("identity", True)):
        one = problem(transfer, b=200, k=50, n=40, bias=bias)
        form = "gram" if transfer == "identity" else "product"
        options: dict[str, Any] = {"lr": [0.002] * 9, "compute_dtype": torch.bfloat16}
        ours, exact = solved(copied(one), "sgd", form, **options)
        torchs = lk.local_steps_([copied(one)], "sgd", **{**OPTIONS, **options, "backend": "reference"})
        assert max(increment_errors((ours, exact))) < 1.5 * max(increment_errors((torchs, exact))) < 0.05
        assert max(increment_errors((ours, torchs))) < 0.5 * max(increment_errors((torchs, exact))) or by != "upcast"


@pytest.mark.parametrize("by", [by for by in routes.available(torch.float32) if routes.runs(torch.float32, by)])
@pytest.mark.parametrize("size", [100, 64, 7])
def test_chunks_of_the_batch_add_up(size, by, monkeypatch):
    force_routes(monkeypatch, torch.float32, by)
    monkeypatch.setattr("locoprop_kernels.input_chunks.cached_rows", lambda _: size)
    assert max(increment_errors(solved(problem(b=100, k=120)))) < 1e-5


def test_differences_are_more_accurate_than_those_of_rounded_values():
    # Where gradients are small, so are increments.
    one = problem("tanh", b=200, k=50, n=40, grad_scale=1e-3)
    ours, exact = solved(one, "sgd", lr=[0.01] * 9)
    torchs = lk.local_steps_([copied(one)], "sgd", lr=[0.01] * 9, commit=False, backend="reference")
    assert 10 * max(increment_errors((ours, exact))) < max(increment_errors((torchs, exact)))


@pytest.mark.parametrize("transfer", ["tanh", "gelu"])
def test_operands_that_lie_otherwise_in_memory(transfer):
    one = problem(transfer, b=70)
    expected = lk.local_steps_([copied(one)], "adam", **OPTIONS)
    wide = torch.randn(70, 60)
    wide[:, 5:31] = one.preactivation
    transposed = {name: getattr(one, name).t().contiguous().t() for name in ("preactivation", "weight", "grad_weight")}
    for changes in ({"preactivation": wide[:, 5:31]}, transposed, {"x": one.x.t().contiguous().t()}):
        found = lk.local_steps_([copied(one, **changes)], "adam", **OPTIONS)
        assert found.driver == "phases"
        assert all(relative_error(*pair) < 1e-5 for pair in zip(deltas(found), deltas(expected), strict=True))
    low = copied(one, x=one.x.bfloat16(), preactivation=one.preactivation.bfloat16())
    assert max(increment_errors(solved(low))) < 1e-4


def test_rows_that_are_not_one_tensor():
    one = problem(b=60, k=40)
    for rows in (
        lambda t: Stacked([t[:7], t[7:31], t[31:]]),
        lambda t: Stacked([t[:30].bfloat16(), t[30:].bfloat16()]),
    ):
        stacked = copied(one, x=rows(one.x), preactivation=rows(one.preactivation))
        whole = copied(one, x=torch.cat(stacked.x.parts), preactivation=torch.cat(stacked.preactivation.parts))
        found, expected = (lk.local_steps_([each], "adam", **OPTIONS) for each in (stacked, whole))
        assert found.driver == expected.driver == "phases"
        assert all(relative_error(*pair) < 1e-5 for pair in zip(deltas(found), deltas(expected), strict=True))
    images = torch.randn(3, 4, 9, 9)
    patches = Patches(images, (3, 3), (1, 1), (1, 1))
    x = torch.cat(list(patches.chunks()))
    same = problem_for(x, torch.randn(50, 36), torch.randn(50), torch.randn(147, 50), "relu")
    found, expected = (lk.local_steps_([copied(same, x=rows)], "adam", **OPTIONS) for rows in (patches, x))
    assert found.driver == "phases"
    assert all(relative_error(*pair) < 1e-5 for pair in zip(deltas(found), deltas(expected), strict=True))


def test_layers_that_share_memory_do_not_share_numbers():
    """Small after large, large after small, and forms and functions that need other memory."""
    sizes = [("tanh", 60, 40, 26), ("identity", 90, 20, 50), ("relu", 1500, 30, 900), ("gelu", 30, 70, 5)]
    problems = [problem(f, b, k, n, seed=i) for i, (f, b, k, n) in enumerate([*sizes, *reversed(sizes)])]
    together = lk.local_steps_([copied(one) for one in problems], "adam", **OPTIONS)
    assert {entry.driver for entry in together.problems} == {"phases"}
    for i, one in enumerate(problems):
        alone = lk.local_steps_([copied(one)], "adam", **OPTIONS)
        assert all(torch.equal(*pair) for pair in zip(deltas(alone), deltas(together, i), strict=True))


def test_the_same_inputs_give_the_same_bits():
    one = problem(b=300, k=350, n=200)
    first, *others = (lk.local_steps_([copied(one)], "rmsprop", **OPTIONS) for _ in range(5))
    for other in others:
        assert all(torch.equal(*pair) for pair in zip(deltas(first), deltas(other), strict=True))


@pytest.mark.parametrize("transfer", ["tanh", "identity"])
@pytest.mark.parametrize("name", ["x", "preactivation", "grad_weight", "grad_bias", "weight", "bias"])
def test_what_is_not_finite_is_not_committed(name, transfer):
    for bad in (float("nan"), float("inf"), 3e38):
        one = problem(transfer, b=60, k=20)
        getattr(one, name).view(-1)[::2] = bad
        before = copied(one)
        report = lk.local_steps_([one], "rmsprop", **{**OPTIONS, "commit": True})
        assert report.driver == "phases"
        written = [one.weight, one.bias, *(v for slots in one.state.values() for v in slots.values())]
        assert all(bool(torch.isfinite(value).all()) for value in written) or not report.committed
        if not report.committed:
            assert torch.equal(one.weight, before.weight) or bad != bad
            assert not one.state
        # In the Gram form nothing depends on A0.
        needed = transfer != "identity" or name != "preactivation"
        assert not (needed and bad != bad and report.committed)


def test_increments_may_be_held_after_the_next_step():
    one = problem(b=64, k=70, n=64)
    held = lk.local_steps_([one], "adam", **OPTIONS)
    weight, bias = deltas(held)
    kept = weight.clone(), bias.clone()
    for seed in range(3):
        lk.local_steps_([problem(b=64, k=70, n=64, seed=seed)], "adam", **{**OPTIONS, "commit": True})
    assert torch.equal(weight, kept[0])
    assert torch.equal(bias, kept[1])
    before = one.weight.clone()
    held.commit_()
    assert torch.equal(one.weight, before + kept[0])


def test_what_phases_are_for():
    large = problem(b=600, k=700)
    softmax = problem("softmax", b=600, k=700)
    options = {**OPTIONS, "lr": [0.01] * 3}
    assert lk.local_steps_([large], "adam", **options).driver == "phases"
    assert "phases compiled by numba" in str(lk.local_steps_([large], "adam", **options).problems[0].decision)
    assert lk.local_steps_([large], "adam", compute_dtype=torch.bfloat16, **options).driver == "phases"
    for one, others in (
        (softmax, {}),
        (large, {"trace": True}),
        (large, {"compute_dtype": torch.float16}),
        (large, {"regulariser": lambda weight, delta: delta}),
        (large, {"lr": [0.01]}),
        (large, {"backend": "reference"}),
        (copied(large, grad_weight=None), {}),
        (copied(large, mask_bias=torch.ones(26, dtype=torch.bool)), {}),
        (copied(large, torch.float64), {}),
    ):
        assert lk.local_steps_([one], "adam", **{**options, **others}).driver == "product"
    assert lk.local_steps_([large], rules.RMSprop(centered=True), **options).driver == "product"


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_training_is_that_of_the_reference(compute_dtype):
    found = []
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 80), nn.Tanh(), nn.Linear(80, 4)
        )
        start = [parameter.detach().clone() for parameter in model.parameters()]
        opt = LocoProp(model, rows=None, backend=backend, compute_dtype=compute_dtype)
        x, y = torch.randn(24, 1, 8, 8), torch.randn(24, 4)
        for part in (slice(0, 24), slice(0, 16), slice(8, 24)):
            opt.zero_grad()
            nn.functional.mse_loss(model(x[part]), y[part]).backward()
            opt.step()
        drivers = {one.driver for report in opt.last_reports for one in report.problems}
        assert drivers == {"phases" if backend == "auto" else "product"}
        found.append([(p - q).detach() for p, q in zip(model.parameters(), start, strict=True)])
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) < (1e-3 if compute_dtype is None else 0.1)
