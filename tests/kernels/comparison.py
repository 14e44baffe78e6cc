"""Interpreted kernels against the reference, judged by the size of the step."""

import torch

import locoprop_kernels as lk
from locoprop_kernels.kernels import choose, configs
from tests.kernels.plans import plans_of_their_own
from tests.problems import TRANSFERS, problem_for, random_layer, relative_error

ELEMENTWISE = [t for t in TRANSFERS if t.elementwise]
#: Different in every dimension, small enough for several ragged tiles.
SMALL = configs.Config(n=8, b=32, k=16, r=4, slices=2)
ULP = 2.0**-23


def twins(seed, b, k, n, bias=True, transfer="tanh", dtype=torch.float32, **options):
    """Two problems of the same numbers, one for each backend."""
    layer = random_layer(seed, b, k, n, bias, dtype)
    return [problem_for(*layer, transfer, **options) for _ in range(2)]


def rates(iterations):
    """Learning rates that fall to half."""
    return [0.01 * (1 - t / (2 * iterations)) for t in range(iterations)]


def ulps_of_the_step(actual, expected):
    """Largest difference of the increments of two reports, in units of the last place of the largest increment."""
    worst = 0.0
    for ours, theirs in zip(actual.problems, expected.problems, strict=True):
        for name in ("delta_weight", "delta_bias"):
            value, right = getattr(ours, name), getattr(theirs, name)
            assert (value is None) == (right is None)
            if right is not None:
                assert value.shape == right.shape
                if right.abs().max() > 0:
                    worst = max(worst, float((value - right).abs().max() / right.abs().max()) / ULP)
    return worst


def error_of_the_step(report, exact):
    """Largest relative error of the weights' increments of two reports."""
    return max(map(relative_error, report.delta_weight, exact.delta_weight))


def compare(ours, theirs, limit=64, config=SMALL, driver=None, **arguments):
    """Run both backends without committing, and both commits; returns both reports, the Triton backend's first."""
    with configs.use(config, driver):
        actual = lk.local_steps_(ours, backend="triton", commit=False, **arguments)
    expected = lk.local_steps_(theirs, backend="reference", commit=False, **arguments)
    assert actual.backend == "triton"
    assert ulps_of_the_step(actual, expected) <= limit
    for trace, right in zip(actual.trace, expected.trace, strict=True):
        assert (trace is None) == (right is None)
        if right is not None:
            torch.testing.assert_close(trace, right, rtol=1e-4, atol=1e-12)
    actual.commit_()
    expected.commit_()
    assert actual.committed
    for problem, right in zip(ours, theirs, strict=True):
        assert problem.state.keys() == right.state.keys()
        for name, slots in right.state.items():
            assert problem.state[name].keys() == slots.keys()
            for slot, value in slots.items():
                tolerance = {"rtol": 0, "atol": 4 * limit * ULP * float(value.abs().max())}
                torch.testing.assert_close(problem.state[name][slot], value, **tolerance)
    return actual, expected


def run_both(ours, theirs, config=SMALL, driver=None, compute_dtype=None, **arguments):
    """Reports of both backends, uncommitted; ``compute_dtype`` is the kernels' alone."""
    arguments = {**arguments, "commit": False}
    with configs.use(config, driver):
        actual = lk.local_steps_(ours, backend="triton", compute_dtype=compute_dtype, **arguments)
    return actual, lk.local_steps_(theirs, backend="reference", **arguments)


def cut_batches(monkeypatch, parts=3):
    """Have update tiles multiply their batch in parts, as on a GPU with more programs than tiles."""
    original = choose.choose

    def cut(*arguments):
        return original(*arguments)._replace(splits=(parts,) * len(arguments[1]))

    monkeypatch.setattr(choose, "choose", cut)
    plans_of_their_own(monkeypatch)
