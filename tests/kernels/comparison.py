"""Interpreted kernels against the reference, judged by the size of the step."""

import random

import pytest
import torch

pytest.importorskip("triton")
import locoprop_kernels as lk
from locoprop_kernels.kernels import configs, drivers
from tests.problems import TRANSFERS, problem_for, random_layer

pytestmark = pytest.mark.skipif(not drivers.interpreted(), reason="needs TRITON_INTERPRET=1")

ELEMENTWISE = [t for t in TRANSFERS if t.elementwise]

# Different in every dimension, small enough for several ragged tiles.
SMALL = configs.Config(n=8, b=32, k=16, r=4, parts=2)

ULP = 2.0**-23


def twins(seed, b, k, n, bias=True, transfer="tanh", dtype=torch.float32, **options):
    layer = random_layer(seed, b, k, n, bias, dtype)
    return [problem_for(*layer, transfer, **options) for _ in range(2)]


def ulps_of_the_step(actual, expected):
    """Largest difference of the increments of two reports, in units of the last place of the largest increment."""
    worst = 0.0
    for ours, theirs in zip(actual.problems, expected.problems, strict=True):
        for name in ("delta_weight", "delta_bias"):
            value, right = getattr(ours, name), getattr(theirs, name)
            assert (value is None) == (right is None)
            if right is not None and right.abs().max() > 0:
                worst = max(worst, float((value - right).abs().max() / right.abs().max()) / ULP)
    return worst


def compare(ours, theirs, limit, config=SMALL, driver=None, **arguments):
    """Run both backends without committing, and both commits; returns the Triton backend's report."""
    with configs.use(config, driver):
        actual = lk.local_steps_(ours, backend="triton", commit=False, **arguments)
    expected = lk.local_steps_(theirs, backend="reference", commit=False, **arguments)
    assert actual.backend == "triton"
    assert ulps_of_the_step(actual, expected) <= limit
    actual.commit_()
    expected.commit_()
    assert actual.committed
    for problem, right in zip(ours, theirs, strict=True):
        assert problem.state.keys() == right.state.keys()
        for name, slots in right.state.items():
            assert problem.state[name].keys() == slots.keys()
            for slot, value in slots.items():
                size = float(value.abs().max())
                tolerance = {"rtol": 0, "atol": 4 * limit * ULP * size}
                torch.testing.assert_close(problem.state[name][slot], value, **tolerance)
    return actual, expected


def cut_batches(monkeypatch, parts=3):
    """Have update tiles multiply their batch in parts, as on a GPU with more programs than tiles."""
    choose = configs.choose

    def cut(*arguments):
        return choose(*arguments)._replace(splits=(parts,) * len(arguments[1]))

    monkeypatch.setattr(configs, "choose", cut)


def steps(seed, iterations):
    return [0.01 * (1 - t / (2 * iterations)) for t in range(iterations)], random.Random(seed)


def relative_error(report, exact):
    pairs = zip(report.delta_weight, exact.delta_weight, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
