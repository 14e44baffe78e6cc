"""The driver for few rows, in which a program owns an n-block for all local steps."""

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import locoprop_kernels as lk
from locoprop_kernels import rules
from locoprop_kernels.devices import H100
from locoprop_kernels.kernels import configs, target
from locoprop_kernels.kernels.choose import choose
from locoprop_kernels.schedule import Tiles, row_blocks, rows_step
from tests.interpreter import SharedAllocations, concurrent_programs, shuffled_programs
from tests.kernels.comparison import ELEMENTWISE, compare, error_of_the_step, rates, run_both, twins
from tests.kernels.plans import forget_plans
from tests.kernels.test_problem_features import random_problem
from tests.problems import RULES, copied, problem_for, random_layer

pytestmark = pytest.mark.skipif(not target.interpreted(), reason="needs TRITON_INTERPRET=1")

#: Different in every dimension, several ragged tiles of the problems below.
CONFIG = configs.Config(n=4, b=16, k=32, r=16)
PRECISIONS = {"ieee": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What rounding the operands may cost on so small a layer, relative to the step.
BUDGET = {"ieee": 2e-5, "tf32": 2e-3, "bf16": 2e-2, "fp16": 5e-3}


def fresh_seed():
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"{seed = }")
    return seed


@pytest.mark.parametrize("transfer", ELEMENTWISE, ids=str)
def test_every_transfer(transfer):
    """Several rules; both a small batch, and rows that each local step has to itself."""
    rule = RULES[ELEMENTWISE.index(transfer) % len(RULES)]
    for batch, options in ((13, {}), (37, {"rows": 8, "rows_seed": 3})):
        ours, theirs = twins(1, batch, 39, 11, transfer=transfer)
        report, _ = compare([ours], [theirs], 64, CONFIG, "rows", rule=rule, lr=rates(3), trace=True, **options)
        assert report.driver == "rows"


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule(rule):
    ours, theirs = twins(2, 37, 39, 9, transfer="sigmoid")
    for _ in range(2):  # the state persists
        compare([ours], [theirs], 64, CONFIG, "rows", rule=rule, lr=rates(4), prox=0.3, rows=11)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("transfer", ["tanh", "relu"])
def test_every_precision(precision, transfer, monkeypatch):
    check_precision(precision, transfer, rules.RMSprop(eps=1e-3), monkeypatch)


@pytest.mark.sweep
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("transfer", ELEMENTWISE, ids=str)
def test_every_transfer_rule_and_precision(precision, transfer, monkeypatch):
    """Every transfer function and every rule in every precision; which go together differs between precisions."""
    place = ELEMENTWISE.index(transfer) + 5 * list(PRECISIONS).index(precision)
    check_precision(precision, transfer, RULES[place % len(RULES)], monkeypatch)


def check_precision(precision, transfer, rule, monkeypatch):
    monkeypatch.setattr(target, "float32_precision", lambda: "tf32" if precision == "tf32" else "ieee")
    exact = problem_for(*random_layer(3, 37, 39, 11), transfer)
    options: dict[str, Any] = {"rule": rule, "lr": [1e-3] * 4, "rows": 8, "rows_seed": 1}
    compute_dtype = PRECISIONS[precision]
    ours = copied(exact, torch.float32)
    report, expected = run_both([ours], [exact], CONFIG, "rows", compute_dtype=compute_dtype, **options)
    assert report.driver == "rows"
    error = error_of_the_step(report, expected)
    assert error <= BUDGET[precision]
    assert precision == "ieee" or error > 1e-8  # the operands were rounded


@pytest.mark.parametrize("seed", range(8))
def test_random_problems(seed):
    """Several layers of different size in one launch; groups, masks, rates, frozen weights and biases."""
    rng = random.Random(seed)
    ours, theirs = [], []
    few = rng.choice([None, 3, 8])
    for i in range(rng.randint(1, 3)):
        b, k, n = rng.choice([1, 5, 16]) if few is None else rng.choice([17, 40]), *rng.choices([1, 3, 16, 45], k=2)
        problem = random_problem(
            200 * seed + i,
            b,
            k,
            n,
            rng.choice([None, None, 1, 3]),
            bias=rng.random() < 0.7,
            transfer=rng.choice(["tanh", "sigmoid", "softplus", "silu"]),
            masks=rng.random() < 0.5,
            rate_weight=rng.choice([0.0, 0.5, 1.0]),
            rate_bias=rng.choice([0.0, 0.5, 1.0]),
        )
        frozen = rng.choice(["grad_weight", "grad_bias", None, None])
        if frozen and problem.bias is not None:
            setattr(problem, frozen, None)
        ours.append(copied(problem))
        theirs.append(problem)
    rule = rng.choice([rules.RMSprop(eps=0.1, centered=True), rules.Adam(eps=0.1), rules.SGD(momentum=0.8)])
    options = {"prox": rng.choice([0.0, 0.2]), "reduction": rng.choice(["mean", "sum"]), "trace": rng.random() < 0.5}
    config = configs.Config(*rng.choice([(4, 16, 32, 16), (16, 32, 8, 8), (8, 64, 16, 16)]))
    lr = [0.01 / (1 + t) for t in range(rng.randint(1, 4))]
    for _ in range(2):  # the state persists
        report, _ = compare(ours, theirs, 64, config, "rows", rule=rule, lr=lr, rows=few, rows_seed=seed, **options)
        assert report.driver == "rows"


@pytest.mark.parametrize("rows", [None, 7])
def test_non_finite_results_leave_everything_untouched(rows):
    good, bad = twins(18, 14, 5, 4)[0], twins(19, 14, 5, 4, transfer="squared_relu")[0]
    before = [problem.weight.clone() for problem in (good, bad)]
    with configs.use(CONFIG, "rows"):
        report = lk.local_steps_([good, bad], rule="sgd", lr=[1e6] * 20, backend="triton", rows=rows)
    assert report.driver == "rows"
    assert not report.finite
    assert not report.committed
    assert all(torch.equal(p.weight, w) for p, w in zip((good, bad), before, strict=True))
    assert good.state == bad.state == {}


@pytest.mark.parametrize("place", ["weight", "state"])
def test_one_number_that_is_not_finite_is_found(place):
    """In the last column of the last row, where a result alone shows it."""
    ours, _ = twins(20, 9, 45, 11)
    with configs.use(CONFIG, "rows"):
        lk.local_steps_([ours], lr=[1e-3], rule="momentum", backend="triton")
        (ours.weight if place == "weight" else ours.state["weight"]["momentum_buffer"])[-1, -1] = float("inf")
        report = lk.local_steps_([ours], lr=[0.0] * 2, rule="momentum", backend="triton")
    assert not report.finite


def test_a_trace_changes_no_bit():
    pair = twins(7, 37, 19, 11)
    for problem, trace in zip(pair, (False, True), strict=True):
        with configs.use(CONFIG, "rows"):
            lk.local_steps_([problem], lr=[0.01] * 3, rows=8, backend="triton", trace=trace)
    assert torch.equal(pair[0].weight, pair[1].weight)


def step(**options):
    """One step of two layers from a fixed start; all that it has changed, in one vector."""
    layers = [twins(8, 37, 39, 9)[0], twins(9, 20, 33, 5, transfer="relu")[0]]
    with configs.use(CONFIG, "rows"):
        report = lk.local_steps_(layers, lr=[0.01] * 3, rows=8, backend="triton", trace=True, **options)
    assert report.driver == "rows"
    changed = [value for layer in layers for value in (layer.weight, layer.bias)]
    changed += [value for layer in layers for slots in layer.state.values() for value in slots.values()]
    changed += [value for value in report.trace if value is not None]
    return torch.cat([value.flatten().double() for value in changed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_bit_depends_on_the_order_of_programs(dtype):
    expected = step(compute_dtype=dtype)
    with shuffled_programs(fresh_seed()) as orders:
        assert torch.equal(step(compute_dtype=dtype), expected)
    assert any(order != sorted(order) for order in orders)


def test_programs_at_the_same_time_compute_what_they_do_one_after_the_other():
    expected = step()
    forget_plans()  # tables of other plans are not in shared memory
    with SharedAllocations(), concurrent_programs({"_rows_kernel"}, fresh_seed(), 120.0) as launches:
        found = step()
    forget_plans()
    assert launches == [5]  # three n-blocks of four rows, and two
    assert torch.equal(found, expected)


def test_where_it_is_taken():
    few, many = twins(21, 100, 19, 11)[0], twins(21, 1000, 19, 11)[0]

    def driver(problem, **options):
        return lk.local_steps_([problem], lr=[0.01] * 2, backend="triton", commit=False, **options).driver

    assert driver(few) == "rows"
    assert driver(many) != "rows"
    assert driver(many, rows=100) == "rows"
    # A configuration that is asked for is the tile kernels'.
    with configs.use(configs.Config(n=16, b=128, k=64, r=32)):
        assert driver(few) != "rows"
    for name in ("single", "grouped"):
        with configs.use(driver=name):
            assert driver(few) == name
    with configs.use(CONFIG, "rows"):
        assert driver(few) != "rows"
        assert driver(few, rows=16) == "rows"


def test_the_paper_s_network_with_few_rows_takes_it_on_an_h100():
    widths = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    layers = tuple((32, k, n) for k, n in itertools.pairwise(widths))
    found = tuple(config for config in configs.for_rows("sm_90", "bf16") if config.b >= 32)
    choice = choose(configs.candidates("sm_90", "bf16", lean=True), layers, "product", 2, H100, None, found)
    assert (choice.driver, choice.programs, choice.config.b) == ("rows", 0, 32)
    # One wide n-block would keep one multiprocessor busy and all others waiting.
    alone = ((32, 65536, 16),)
    tiles = configs.candidates("sm_90", "bf16", lean=True)
    assert choose(tiles, alone, "product", 2, H100, None, found).driver != "rows"


def test_programs_are_ordered_by_their_cost():
    layers, tiles = [(8, 10, 20), (8, 30, 9), (8, 20, 16)], Tiles(8, 16, 16)
    blocks = row_blocks(layers, tiles).tolist()
    assert sorted(blocks) == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0], [2, 1]]
    costs = [min(8, layers[layer][2] - 8 * block) * layers[layer][1] for layer, block in blocks]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("change", ["cache_bandwidth", "multiprocessor_bandwidth", "wait", "multiprocessors"], ids=str)
def test_predictions_follow_the_device(change):
    """Each of these bounds some step: of many weights, of one n-block, of narrow tiles, of many n-blocks."""
    from dataclasses import replace

    value = getattr(H100, change)
    slower = replace(H100, **{change: value * 4 if change == "wait" else value // 4})
    sizes = {"multiprocessor_bandwidth": ((128, 4096, 16),), "wait": ((16, 4096, 16),)}
    layers = sizes.get(change, ((16, 1024, 16384),))
    # With one load at a time, a step of narrow tiles is nothing but latency.
    tiles = Tiles(16, 16, 16 if change == "wait" else 1024)
    stages = 2
    assert rows_step(layers, tiles, 2, stages, slower) > 1.5 * rows_step(layers, tiles, 2, stages, H100)
