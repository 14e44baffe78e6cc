"""The kernels for CPUs that numba compiles, against the reference in float64."""

import itertools
import multiprocessing
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import locoprop_kernels as lk
from locoprop_kernels import cpu_kernels, rules
from locoprop_kernels.chosen import ChosenRows
from locoprop_torch import LocoProp
from tests.helpers import compile_kernels, force_routes
from tests.problems import RULES, TRANSFERS, copied, increment_errors, problem_for, random_layer, relative_error

pytest.importorskip("numba", exc_type=ImportError)
from locoprop_kernels.cpu_kernels import functions, threads, updates

OPTIONS: dict[str, Any] = {"lr": [0.02, 0.01, 0.005, 0.005], "rows": 8, "rows_seed": 3, "commit": False}
COMPILED = [rule for rule in RULES if updates.family_of(rule) is not None]
KNOWN = [transfer for transfer in TRANSFERS if transfer.name in functions.CODES]
# Differences of these are taken without a difference of rounded values.
EXACT = ("identity", "tanh", "sigmoid", "relu", "leaky_relu", "softmax")


def problem(transfer="tanh", b=23, k=9, n=7, bias=True, seed=0, **options):
    return problem_for(*random_layer(seed, b, k, n, bias=bias, dtype=torch.float32), transfer, **options)


def solved(one, rule="adam", **options):
    """The report of a call that the kernels solve, and that of the reference in float64."""
    options = {**OPTIONS, **options}
    found = lk.local_steps_([one], rule, **options)
    assert [entry.driver for entry in found.problems] == ["numba"]
    state = {kind: {s: v.double() if v.dim() else v for s, v in slots.items()} for kind, slots in one.state.items()}
    return found, lk.local_steps_(
        [copied(one, torch.float64, state=state)], rule, **{**options, "backend": "reference"}
    )


def increments(problems, **options) -> list[torch.Tensor]:
    """What the kernels find for some problems: the weights' increments, and the biases'."""
    report = lk.local_steps_(problems, "adam", **{**OPTIONS, **options})
    assert report.driver == "numba"
    return [value for value in (*report.delta_weight, *report.delta_bias) if value is not None]


@pytest.mark.parametrize("rows", [8, None])
@pytest.mark.parametrize("transfer", KNOWN, ids=str)
def test_every_transfer_function_is_that_of_the_reference(transfer, rows):
    limit = 1e-6 if transfer.name in EXACT else 2e-5
    # All rows of a batch with more inputs than rows: nothing is gained by XᵀX.
    one = problem(transfer, k=9 if rows else 40, n=26)
    assert max(increment_errors(solved(one, rules.SGD(), rows=rows))) < limit


@pytest.mark.parametrize("k", [9, 90])  # less than four vectors, and more
@pytest.mark.parametrize("rule", COMPILED, ids=str)
def test_every_rule_is_that_of_the_reference(rule, k):
    assert max(increment_errors(solved(problem(k=k), rule, prox=0.3))) < 5e-6


@pytest.mark.parametrize("rule", COMPILED, ids=str)
def test_rules_go_on_with_their_state(rule):
    one = problem(rate_bias=0.5)
    for seed in range(2):
        assert lk.local_steps_([one], rule, **{**OPTIONS, "commit": True, "rows_seed": seed}).committed
    assert max(increment_errors(solved(one, rule))) < 1e-5


@pytest.mark.parametrize(
    ("b", "k", "n"),
    [(2, 1, 1), (9, 3, 2), (33, 16, 3), (31, 17, 4), (24, 48, 16), (40, 100, 25), (70, 512, 50), (19, 33, 121)],
)
@pytest.mark.parametrize("transfer", ["sigmoid", "softmax"])
def test_sizes_that_fill_no_block(transfer, b, k, n):
    for rows, bias in itertools.product((1, 5, None), (True, False)):
        if transfer == "softmax" and n == 1:
            continue
        assert max(increment_errors(solved(problem(transfer, b, k, n, bias), rules.SGD(), rows=rows))) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transfer", ["tanh", "identity", "softmax"])
def test_operands_rounded_to_bfloat16(transfer, bias, monkeypatch):
    """The products round what PyTorch's round, inputs, increment and differences; and not their results, as some do."""
    force_routes(monkeypatch, torch.bfloat16, "upcast")
    one = problem(transfer, b=200, k=50, n=40, bias=bias)
    options: dict[str, Any] = {"lr": [0.01] * 9, "compute_dtype": torch.bfloat16, "rule": rules.SGD()}
    exact = lk.local_steps_([copied(one, torch.float64)], **{**OPTIONS, **options, "compute_dtype": None})
    ours, torchs = (
        lk.local_steps_([copied(one)], **{**OPTIONS, **options, "backend": backend})
        for backend in ("auto", "reference")
    )
    assert (ours.driver, torchs.driver) == ("numba", "product")
    assert max(increment_errors((ours, torchs))) < 0.2 * max(increment_errors((torchs, exact)))
    assert 1e-6 < max(increment_errors((ours, exact))) < 1e-2


def test_differences_are_more_accurate_than_those_of_rounded_values():
    # Where gradients are small, so are increments.
    one = problem("tanh", b=200, k=50, n=40, grad_scale=1e-3)
    options = {"lr": [0.01] * 9}
    ours = max(increment_errors(solved(one, "sgd", **options)))
    exact = lk.local_steps_([copied(one, torch.float64)], "sgd", **{**OPTIONS, **options})
    torchs = lk.local_steps_([copied(one)], "sgd", **{**OPTIONS, **options, "backend": "reference"})
    assert 10 * ours < max(increment_errors((torchs, exact)))


@pytest.mark.parametrize("transfer", ["tanh", "sigmoid"])  # whose small and large changes have formulas of their own
def test_no_output_depends_on_which_others_there_are(transfer):
    whole = problem(transfer, b=60, k=40, n=53)
    weight, bias = increments([whole])
    for first, last in ((0, 53), (1, 2), (5, 30), (29, 53)):
        own = {name: getattr(whole, name)[first:last] for name in ("weight", "bias", "grad_weight", "grad_bias")}
        found = increments([copied(whole, **own, preactivation=whole.preactivation[:, first:last])])
        assert all(torch.equal(one, other[first:last]) for one, other in zip(found, (weight, bias), strict=True))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("openmp", [True, False])
def test_the_number_of_threads_changes_no_bit(count, openmp, monkeypatch):
    problems = [problem(f, b=60, k=40, n=n, seed=n) for f, n in (("tanh", 200), ("relu", 130), ("softmax", 10))]
    alone = increments(problems)
    if not openmp:
        monkeypatch.setattr(threads, "_parallel", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(alone, increments(problems), strict=True))
    finally:
        torch.set_num_threads(before)


def in_another_process(problems, connection):
    torch.set_num_threads(2)
    connection.send([value.tolist() for value in increments(problems)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_have_threads_of_their_own(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    problems = [problem(f, b=60, k=40, n=200, seed=i) for i, f in enumerate(("tanh", "relu"))]
    expected = [value.tolist() for value in increments(problems)]
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=in_another_process, args=(problems, theirs))
    child.start()
    try:
        assert ours.poll(60)
        assert ours.recv() == expected
    finally:
        child.kill()
        child.join()


FIRST_IN_A_FORKED_PROCESS = """
import os
import signal
import sys

import torch

import locoprop_kernels as lk

torch.set_num_threads(2)
torch.randn(2_000_000).exp_()  # now there are threads that a forked process does not have
x = torch.randn(64, 100)
weight = torch.randn(100, 100)
problem = lk.LocalProblem(x, x @ weight.t(), weight, grad_weight=torch.randn(100, 100), transfer="tanh")
if (child := os.fork()) == 0:
    signal.alarm(60)  # whose parent may have been ended
    assert lk.local_steps_([problem], lr=[1e-3] * 3).driver == "numba"
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_may_be_the_first_to_solve_anything():
    compile_kernels()
    script = [sys.executable, "-c", FIRST_IN_A_FORKED_PROCESS]
    assert subprocess.run(script, timeout=120, check=False).returncode == 0


class Own(rules.Adam):
    """A rule of the user's own."""


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"mask_weight": torch.ones(7, 9, dtype=torch.bool)}, {}),
        ({"mask_bias": torch.ones(7, dtype=torch.bool)}, {}),
        ({"grad_weight": None}, {}),
        ({"transfer": "mish"}, {}),
        ({}, {"trace": True}),
        ({}, {"regulariser": lambda weight, delta: delta}),
        ({}, {"rule": Own()}),
        ({}, {"rule": rules.RMSprop(centered=True)}),
        ({}, {"compute_dtype": torch.float16}),
        ({}, {"lr": [0.1]}),
        ({}, {"backend": "reference"}),
    ],
)
def test_everything_else_goes_through_pytorch(changes, options):
    one = copied(problem(), **changes)
    report = lk.local_steps_([one], **{"rule": "adam", **OPTIONS, **options})
    assert report.driver == "product"


def test_other_dtypes_and_groups_go_through_pytorch():
    double = copied(problem(), torch.float64)
    grouped = problem_for(*random_layer(0, 23, 4, 3, dtype=torch.float32, groups=2), "tanh")
    for one in (double, grouped, copied(problem(), torch.bfloat16)):
        assert lk.local_steps_([one], "adam", **OPTIONS).driver == "product"


def test_without_numba_everything_goes_through_pytorch(monkeypatch):
    one = problem()
    monkeypatch.setattr(cpu_kernels, "version", lambda: None)
    report = lk.local_steps_([one], "adam", **OPTIONS)
    assert report.driver == "product"
    assert "numba" not in str(report)
    monkeypatch.undo()
    assert "compiled by numba" in str(lk.local_steps_([one], "adam", **OPTIONS))


def test_many_rows_of_one_batch_are_multiplied_by_pytorch():
    """Whose products are faster there, and take all of the processor; in bfloat16 they always are."""
    assert lk.local_steps_([problem(b=256)], "adam", **{**OPTIONS, "rows": None}).driver == "numba"
    assert lk.local_steps_([problem(b=257)], "adam", **{**OPTIONS, "rows": None}).driver == "phases"
    narrow = {**OPTIONS, "rows": None, "compute_dtype": torch.bfloat16}
    assert lk.local_steps_([problem()], "adam", **narrow).driver == "phases"
    assert lk.local_steps_([problem(b=5000)], "adam", **OPTIONS).driver == "numba"


@pytest.mark.parametrize(("operands", "most"), [(torch.float32, 256), (torch.bfloat16, 128)])
def test_many_rows_of_a_local_step_are_multiplied_by_pytorch(operands, most):
    """Not those that are asked for: a batch that is hardly larger falls into halves."""
    options = {**OPTIONS, "compute_dtype": operands}
    for b, rows, driver in (
        (4 * most, most, "numba"),
        (4 * most + 4, most + 1, "product"),
        (2 * most, 2 * most - 1, "numba"),
        (3 * most, 3 * most - 1, "product"),
    ):
        assert lk.local_steps_([problem(b=b)], "adam", **{**options, "rows": rows}).driver == driver


def test_a_large_softmax_goes_through_pytorch():
    """A thread takes all outputs of one."""
    sizes = [problem("softmax", b=9, k=256, n=n) for n in (512, 513)]
    assert [one.driver for one in lk.local_steps_(sizes, "adam", **OPTIONS).problems] == ["numba", "product"]


def test_operands_that_lie_otherwise_in_memory():
    one = problem(b=40, k=32, n=20)
    expected = increments([copied(one)])
    wide = torch.randn(40, 50)
    wide[:, 5:37] = one.x
    transposed = {name: getattr(one, name).t().contiguous().t() for name in ("preactivation", "weight", "grad_weight")}
    for changes in ({"x": one.x.t().contiguous().t()}, {"x": wide[:, 5:37]}, transposed):
        found = increments([copied(one, **changes)])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    low = copied(one, x=one.x.bfloat16(), preactivation=one.preactivation.bfloat16())
    assert max(increment_errors(solved(low))) < 1e-4


def test_rows_that_were_chosen_are_those_of_the_batch():
    one = problem(b=40, k=32, n=20)
    expected = increments([copied(one)])
    for numbers in (range(5), (4, 2, 0, 1, 3)):
        x, a0 = (
            ChosenRows(40, 5, {number: rows[number::5].clone() for number in numbers})
            for rows in (one.x, one.preactivation)
        )
        found = increments([copied(one, x=x, preactivation=a0)])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("rows", [8, None])
@pytest.mark.parametrize("name", ["x", "preactivation", "grad_weight", "weight", "bias"])
def test_what_is_not_finite_is_not_committed(name, rows):
    for bad in (float("nan"), float("inf"), 1e38):
        one = problem(b=24)
        getattr(one, name).view(-1)[::2] = bad
        before = copied(one)
        with np.errstate(all="raise"):
            report = lk.local_steps_([one], "rmsprop", **{**OPTIONS, "commit": True, "rows": rows})
        assert report.driver == "numba"
        # Numbers so large that their sum is not finite, but they are, are looked at one by one.
        parameters = [one.weight, one.bias, *(v for slots in one.state.values() for v in slots.values())]
        assert all(bool(torch.isfinite(value).all()) for value in parameters) or not report.committed
        if not report.committed:
            assert torch.equal(one.weight, before.weight) or bad != bad
            assert not one.state
    assert lk.local_steps_([problem()], "rmsprop", **{**OPTIONS, "commit": True}).committed


def transposed(tensor):
    return tensor.t().contiguous().t()


@pytest.mark.parametrize("rule", ["adam", "rmsprop", "sgd", rules.SGD(0.9)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_commit_writes_to_the_tensors_that_are_there(rule, bias):
    """However they lie in memory: in a step that makes the state, and in one that goes on with it."""
    options = {**OPTIONS, "commit": True}
    one = problem(b=40, k=32, n=60, bias=bias)
    other = copied(one, weight=transposed(one.weight), grad_weight=transposed(one.grad_weight))
    for seed in range(2):
        before = {kind: dict(slots) for kind, slots in one.state.items()}
        expected = lk.local_steps_([one], rule, **{**options, "rows_seed": seed, "commit": False})
        assert expected._solution is not None
        increment = expected._solution.increment(0)
        wanted = {kind: getattr(one, kind) + delta for kind, delta in increment.delta.items()}
        for each in (one, other):
            assert lk.local_steps_([each], rule, **{**options, "rows_seed": seed}).committed
            assert all(torch.equal(getattr(each, kind), value) for kind, value in wanted.items())
            for kind, slots in increment.state.items():
                assert all(torch.equal(each.state[kind][slot], value) for slot, value in slots.items())
        for kind, slots in before.items():
            assert all(one.state[kind][slot] is value for slot, value in slots.items())
        # From the second step on, state that lies as the weight does.
        other.state = {kind: {s: transposed(v) if v.dim() == 2 else v for s, v in slots.items()}
                       for kind, slots in other.state.items()}  # fmt: skip


def test_pytorch_knows_what_a_commit_has_written_to():
    """Otherwise a graph that has saved the weight would give a wrong gradient, and no error."""
    model = network()
    opt = LocoProp(model, transfers={"5": "softmax"}, rows=5)
    losses = [nn.functional.cross_entropy(model(torch.randn(24, 1, 8, 8)), torch.arange(24) % 4) for _ in range(2)]
    losses[0].backward()
    versions = [parameter._version for parameter in model.parameters()]
    opt.step()
    assert {one.driver for one in opt.last_reports[0].problems} == {"numba"}
    assert all(p._version > before for p, before in zip(model.parameters(), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[1].backward()


def test_memory_is_given_back_and_taken_again():
    options = {**OPTIONS, "commit": True}
    one = problem(b=64, k=64, n=64)
    reports = [lk.local_steps_([one], "adam", **options) for _ in range(3)]
    assert all(report.committed for report in reports)
    held = increments([one])
    kept = [value.clone() for value in held]
    for seed in range(3):
        lk.local_steps_([problem(b=64, k=64, n=64, seed=seed)], "adam", **options)
    assert all(torch.equal(a, b) for a, b in zip(held, kept, strict=True))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 20), nn.Tanh(), nn.Linear(20, 4)
    )


@pytest.mark.parametrize("rows", [None, 5])
def test_training_is_that_of_the_reference(rows):
    x, y = torch.randn(24, 1, 8, 8), torch.randint(4, (24,))
    found = []
    for backend in ("auto", "reference"):
        model = network()
        opt = LocoProp(model, transfers={"5": "softmax"}, rows=rows, backend=backend)
        for part in (slice(0, 24), slice(0, 16), slice(8, 24)):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            opt.step()
        assert ("numba" in {one.driver for report in opt.last_reports for one in report.problems}) == (
            backend == "auto"
        )
        found.append([(p - q).detach() for p, q in zip(model.parameters(), network().parameters(), strict=True)])
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) < 1e-3
