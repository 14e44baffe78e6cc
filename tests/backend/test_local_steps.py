"""The interface of ``local_steps_``: what it refuses, what it reports, and how accurate low precision is."""

import dataclasses
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import locoprop_kernels as lk
from locoprop_kernels import rules, transfers
from locoprop_kernels.settings import Settings
from locoprop_kernels.testing import TextbookLayer
from locoprop_torch import LocoProp, presets
from tests.problems import RULES, relative_error

FIELDS = ("x", "preactivation", "weight", "bias", "grad_weight", "grad_bias")


def problem(b=8, k=5, n=4, **changes):
    torch.manual_seed(0)
    fields = {
        "x": torch.randn(b, k),
        "preactivation": torch.randn(b, n),
        "weight": torch.randn(n, k),
        "bias": torch.randn(n),
        "grad_weight": torch.randn(n, k),
        "grad_bias": torch.randn(n),
        "transfer": "tanh",
    }
    return lk.LocalProblem(**{**fields, **changes})


def run(problems, **options):
    return lk.local_steps_(problems, **{"rule": "rmsprop", "lr": [0.01] * 3, **options})


def assert_refused(error, message, **options):
    p = problem()
    before = p.weight.clone()
    with pytest.raises(error, match=message):
        run([p], **options)
    assert torch.equal(p.weight, before)
    assert p.state == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": []}, ValueError, "lr must have at least one entry"),
        ({"lr": 0.1}, TypeError, "lr must be a sequence"),
        ({"lr": [0.1, -0.1]}, ValueError, "lr must hold finite numbers >= 0"),
        ({"lr": [math.nan]}, ValueError, "lr must hold finite numbers >= 0"),
        ({"lr": [math.inf]}, ValueError, "lr must hold finite numbers >= 0"),
        ({"prox": -1.0}, ValueError, "prox must be finite and >= 0, got -1.0"),
        ({"prox": math.inf}, ValueError, "prox must be"),
        ({"prox": "much"}, TypeError, "prox must be a number"),
        ({"reduction": "none"}, ValueError, "reduction must be one of mean, sum; got 'none'"),
        ({"rule": "lion"}, ValueError, "rule must be one of"),
        ({"rule": torch.optim.SGD}, TypeError, "rule must be"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, reference; got 'cuda'"),
        ({"compute_dtype": torch.int32}, ValueError, "compute_dtype must be"),
        ({"compute_dtype": "bfloat16"}, ValueError, "compute_dtype must be"),
        ({"compute_dtype": torch.float8_e5m2}, ValueError, "compute_dtype must be .*e4m3fn.* got torch.float8_e5m2"),
    ],
)
def test_bad_options(options, error, message):
    assert_refused(error, message, **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(7, 5)}, ValueError, r"preactivation must have shape \[7, 4\].*got \[8, 4\]"),
        ({"x": torch.zeros(8, 6)}, ValueError, r"weight must have shape \[4, 6\]|x must"),
        ({"x": torch.zeros(8, 5, 1)}, ValueError, r"x must be \[B, K\]"),
        ({"x": torch.zeros(0, 5), "preactivation": torch.zeros(0, 4)}, ValueError, "must not be empty, got B=0"),
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(8, 5, dtype=torch.float64)}, ValueError, "x must have the weight's dtype"),
        (
            {"preactivation": torch.zeros(8, 4, dtype=torch.int64)},
            ValueError,
            "preactivation must have the weight's dtype",
        ),
        ({"x": torch.zeros(8, 5, device="meta")}, ValueError, "x must be on the weight's device cpu, got meta"),
        ({"grad_weight": torch.zeros(4, 5).to_sparse()}, ValueError, "grad_weight must be a dense tensor"),
        ({"grad_weight": torch.zeros(5, 4)}, ValueError, r"grad_weight must have shape \[4, 5\]"),
        ({"grad_bias": torch.zeros(5)}, ValueError, r"grad_bias must have shape \[4\]"),
        ({"bias": None}, ValueError, "grad_bias was given for a layer without bias"),
        ({"grad_weight": None, "grad_bias": None}, ValueError, "grad_weight or grad_bias must be given"),
        ({"state": {"weight": {"momentum_buffer": torch.zeros(4, 5)}}}, ValueError, "state of weight must have"),
        (
            {"state": {"bias": {"momentum_buffer": torch.zeros(5), "square_avg": torch.zeros(4)}}},
            ValueError,
            r"state 'momentum_buffer' of bias must have shape \[4\]",
        ),
        ({"state": []}, TypeError, "state must be a dict"),
    ],
)
def test_bad_problems(changes, error, message):
    good, bad = problem(), problem(**changes)
    before = good.weight.clone()
    with pytest.raises(error, match=rf"^problem 1.*({message})"):
        run([good, bad])
    assert torch.equal(good.weight, before)
    assert good.state == {}


def test_bad_lists():
    p = problem()
    with pytest.raises(ValueError, match="at least one LocalProblem"):
        run([])
    with pytest.raises(TypeError, match="problem 1 must be a LocalProblem, got dict"):
        run([p, {}])
    with pytest.raises(ValueError, match="problem 1: its weight is also that of problem 0"):
        run([p, problem(weight=p.weight)])
    with pytest.raises(ValueError, match="problem 1 must be on the device of problem 0"):
        run([p, problem(**{f: getattr(p, f).to("meta") for f in FIELDS})])
    with pytest.raises(ValueError, match="^layer 'head': grad_bias"):
        run([problem(name="layer 'head'", grad_bias=torch.zeros(9))])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: transfers.get("swish"), ValueError, "transfer must be one of identity, .*got 'swish'"),
        (lambda: transfers.get(cast(Any, 3)), TypeError, "transfer must be a string"),
        (lambda: transfers.get("elu", beta=1), ValueError, "takes the parameters"),
        (lambda: transfers.get("elu", alpha=math.nan), ValueError, "must be finite"),
        (lambda: rules.RMSprop(alpha=1.5), ValueError, "alpha of RMSprop must be >= 0 and < 1, got 1.5"),
        (lambda: rules.RMSprop(flavor="jax"), ValueError, "flavor of RMSprop must be one of torch, tensorflow"),
        (lambda: rules.SGD(momentum=-1.0), ValueError, "momentum of SGD"),
        (lambda: rules.SGD(nesterov=True), ValueError, "nesterov of SGD needs a momentum"),
        (lambda: rules.Adam(betas=cast(Any, (0.9,))), ValueError, "betas of Adam must be two"),
        (lambda: rules.Adam(betas=(0.9, 1.0)), ValueError, r"betas\[1\] of Adam"),
        (lambda: rules.Adagrad(eps=math.nan), ValueError, "eps of Adagrad"),
        (lambda: rules.Adagrad(eps=cast(Any, "small")), TypeError, "eps of Adagrad must be a number"),
    ],
)
def test_bad_rules_and_transfers(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_report_says_what_ran(caplog):
    with caplog.at_level("INFO", "locoprop_kernels"):
        report = run([problem(), problem()])
        run([problem()])
    assert report.backend == "reference"
    assert report.driver in ("product", "numba")
    assert report.committed
    assert report.trace == [None, None]
    assert report.delta_weight == [None, None]
    assert ("cpu" if importlib.util.find_spec("triton") else "Triton is not installed") in report.reason
    assert run([problem()], backend="reference").reason == "asked for by name"
    assert sum("auto" in record.message for record in caplog.records) <= 1


def test_a_problem_takes_low_precision_activations():
    p, q = problem(), problem()
    q.x, q.preactivation = p.x.bfloat16(), p.preactivation.bfloat16()
    before = p.weight.clone()
    run([p])
    run([q])
    assert (p.weight - q.weight).norm() < 0.05 * (p.weight - before).norm()


def test_import_without_triton():
    modules = ("compile_report", "devices", "kernels", "kernels.choose", "schedule")
    imports = ", ".join(["locoprop_torch", *(f"locoprop_kernels.{module}" for module in modules)])
    code = f"import sys; sys.modules['triton'] = None; import {imports}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_the_kernels_and_the_compile_report_import_triton():
    root = Path(lk.__file__).parent
    imports = re.compile(r"^\s*(import|from) triton\b", re.MULTILINE)
    found = {path.relative_to(root).parts[0] for path in root.rglob("*.py") if imports.search(path.read_text())}
    assert found == {"compile_report", "kernels"}


@pytest.mark.parametrize(("k", "n"), [(1000, 500), (784, 1000)])
def test_low_precision_increment_beats_the_textbook_form(k, n):
    """The table of the README: error of Δ after ten RMSprop steps against float64, B = 1000, tanh."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, k, generator=generator, dtype=torch.float64)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float64) / math.sqrt(k)
    residual = torch.randn(1000, n, generator=generator, dtype=torch.float64) / 100
    rates, rule = [2e-5] * 10, rules.RMSprop()

    def increment(dtype, operands):
        p = lk.LocalProblem(
            x=x.to(dtype), preactivation=(x @ weight.t()).to(dtype), weight=weight.to(dtype),
            grad_weight=(residual.t() @ x).to(dtype), transfer="tanh",
        )  # fmt: skip
        report = lk.local_steps_([p], rule=rule, lr=rates, compute_dtype=operands, backend="reference", commit=False)
        return report.delta_weight[0]

    exact = increment(torch.float64, None)
    assert relative_error(increment(torch.float32, None), exact) < 1e-4
    error = relative_error(increment(torch.float32, torch.bfloat16), exact)
    assert error < 1e-2
    textbook = TextbookLayer(weight, None, "tanh", rule, operands=torch.bfloat16)
    textbook.step(x, torch.tanh(x @ weight.t()) - residual, rates, 0.0, "mean")
    assert relative_error(textbook.weight - weight, exact) > 20 * error


def test_bfloat16_step_of_the_papers_autoencoder():
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    torch.manual_seed(0)
    x = torch.rand(1000, 784) * (torch.rand(1000, 784) < 0.2)
    steps = []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(1)
        modules: list[nn.Module] = []
        for i, (k, n) in enumerate(zip(sizes, sizes[1:], strict=False)):
            layer = nn.Linear(k, n)
            nn.init.xavier_uniform_(layer.weight)
            modules += [layer, nn.Identity() if i in (3, 7) else nn.Tanh()]
        model = nn.Sequential(*modules)
        opt = LocoProp(
            model, **presets["notebook"], transfers={"14": "sigmoid"}, compute_dtype=dtype,
        )  # fmt: skip
        before = [p.detach().clone() for p in model.parameters()]
        F.binary_cross_entropy_with_logits(model(x), x, reduction="none").sum(1).mean().backward()
        opt.step()
        steps.append([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    for full, low in zip(*steps, strict=True):
        assert relative_error(low, full) < 1e-2


def test_every_rule_and_every_setting_is_tested():
    """Who adds a rule or a setting finds here what else has to know of it."""
    assert {type(rule) for rule in RULES} == {type(rules.get(name)) for name in rules.available()}
    # Kernels get these by decide.Task, spec.Update or spec.StepArguments; "reduction" is in the shape of a layer.
    reaches_kernels = {
        "rule",
        "rates",
        "prox",
        "reduction",
        "compute_dtype",
        "trace",
        "regulariser",
        "rows",
        "rows_seed",
    }
    assert {field.name for field in dataclasses.fields(Settings)} == reaches_kernels
