"""Interpreted kernels against the reference, judged by the size of the step."""

import random

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_builder

import locoprop_kernels as lk
from locoprop_kernels import rules
from locoprop_kernels.kernels import choose, configs, drivers, grouped
from locoprop_kernels.kernels import columns as c
from locoprop_kernels.kernels.functions import FUNCTIONS
from tests.interpreter import checked_addresses, replaced, shuffled_programs
from tests.problems import RULES, TRANSFERS, problem_for, random_layer

pytestmark = pytest.mark.skipif(not drivers.interpreted(), reason="needs TRITON_INTERPRET=1")

ELEMENTWISE = [t for t in TRANSFERS if t.elementwise]
# Different in every dimension, small enough for several ragged tiles.
SMALL = configs.Config(n=8, b=32, k=16, r=4, parts=2)
ULP = 2.0**-23


@triton.jit
def _apply_kernel(x_ptr, y_ptr, p, F: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, F(tl.load(x_ptr + offsets), p))


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
    original = choose.choose

    def cut(*arguments):
        return original(*arguments)._replace(splits=(parts,) * len(arguments[1]))

    monkeypatch.setattr(choose, "choose", cut)


def steps(seed, iterations):
    return [0.01 * (1 - t / (2 * iterations)) for t in range(iterations)], random.Random(seed)


@pytest.mark.parametrize("transfer", ELEMENTWISE, ids=str)
def test_every_transfer(transfer):
    ours, theirs = twins(1, 37, 19, 11, transfer=transfer)
    rates, _ = steps(0, 2)
    for driver in ("single", "grouped"):
        report, _ = compare([ours], [theirs], 16, driver=driver, rule=rules.SGD(momentum=0.5), lr=rates)
        assert report.driver == driver


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule(rule):
    ours, theirs = twins(2, 21, 18, 9, transfer="sigmoid")
    rates, _ = steps(0, 3)
    for _ in range(2):  # the state persists
        compare([ours], [theirs], 64, rule=rule, lr=rates, prox=0.3)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed in (0, 1, 2, 8, 10) else pytest.mark.sweep) for seed in range(12)]
)
def test_random_models(seed, monkeypatch):
    rng = random.Random(seed)
    iterations, rule = rng.randint(1, 4), rng.choice(RULES)
    ours, theirs = [], []
    for i in range(rng.randint(1, 3)):
        transfer = rng.choice([t for t in ELEMENTWISE if t.name != "squared_relu"])
        sizes = [rng.choice([1, 2, 5, 16, 31, 40]) for _ in range(3)]
        pair = twins(100 * seed + i, *sizes, bias=rng.random() < 0.7, transfer=transfer)
        frozen = rng.choice(["grad_weight", "grad_bias", None, None])
        for problem in pair:
            if frozen and problem.bias is not None:
                setattr(problem, frozen, None)
        ours.append(pair[0])
        theirs.append(pair[1])
    rates, _ = steps(0, iterations)
    config = configs.Config(
        *rng.choice([(8, 32, 16, 4), (16, 8, 32, 8), (4, 16, 8, 2)]), parts=rng.choice([1, 2, 4, 8])
    )
    arguments = {"prox": rng.choice([0.0, 0.2]), "reduction": rng.choice(["mean", "sum"])}
    driver = rng.choice(["single", "grouped"])
    if seed >= 8:
        driver = "grouped"
        cut_batches(monkeypatch, rng.randint(2, 4))
    compare(ours, theirs, 64, config, driver, rule=rule, lr=rates, **arguments)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("transfer", "sizes"), [("identity", (40, 19, 11)), ("softmax", (37, 19, 23))])
def test_forms_of_their_own(transfer, sizes, bias):
    ours, theirs = twins(23, *sizes, bias=bias, transfer=transfer)
    for _ in range(2):
        arguments = {"rule": rules.SGD(momentum=0.5), "lr": [0.01] * 4, "prox": 0.2, "trace": True}
        report, expected = compare([ours], [theirs], 32, **arguments)
        assert report.driver == ("gram" if transfer == "identity" else "softmax")
        torch.testing.assert_close(report.trace[0], expected.trace[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("transfer", "form"), [("identity", "gram"), ("softmax", "softmax")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forms_of_their_own_in_low_precision(transfer, form, dtype):
    ours, theirs = twins(24, 120, 30, 20, transfer=transfer)
    arguments = {"lr": [1e-4] * 3, "commit": False}
    with configs.use(SMALL):
        report = lk.local_steps_([ours], backend="triton", compute_dtype=dtype, **arguments)
    expected = lk.local_steps_([theirs], backend="reference", **arguments)
    assert report.driver == (form if (form, dtype) != ("gram", torch.float16) else "single")
    assert relative_error(report, expected) <= 5e-3


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("transfer", ["tanh", "softmax"])
def test_batches_in_parts(transfer, tf32, monkeypatch):
    """Few update tiles and many programs: the products over the batch are computed in parts, then added."""
    if tf32:
        monkeypatch.setattr(drivers, "float32_precision", lambda: "tf32")
    ours, theirs = twins(26, 3000, 20, 12, transfer=transfer)
    launched = []
    launch = grouped.launch_partial
    monkeypatch.setattr(grouped, "launch_partial", lambda *a: launched.append(len(a[1])) or launch(*a))
    config = configs.Config(n=16, b=512, k=128, r=64, parts=4)
    arguments = {"rule": rules.SGD(momentum=0.5), "lr": [0.1] * 3, "prox": 0.2}
    with configs.use(config, "grouped", programs=8):
        report = lk.local_steps_([ours], backend="triton", commit=False, **arguments)
    expected = lk.local_steps_([theirs], backend="reference", commit=False, **arguments)
    assert launched == [2, 2]  # 3000 examples in parts of at least 1024
    if tf32:
        assert 1e-6 < relative_error(report, expected) <= 5e-4
    else:
        assert ulps_of_the_step(report, expected) <= 32


def test_batches_in_parts_in_low_precision(monkeypatch):
    cut_batches(monkeypatch)
    for dtype in (torch.bfloat16, torch.float16):
        ours, theirs = twins(27, 100, 30, 11)
        arguments = {"lr": [1e-4] * 3, "commit": False}
        with configs.use(SMALL, "grouped"):
            report = lk.local_steps_([ours], backend="triton", compute_dtype=dtype, **arguments)
        expected = lk.local_steps_([theirs], backend="reference", **arguments)
        assert relative_error(report, expected) <= 5e-3


def test_strided_and_transposed_inputs():
    ours, theirs = twins(3, 33, 10, 7)
    ours.x = torch.empty(10, 66).t()[::2].copy_(ours.x)
    ours.preactivation = torch.empty(7, 33).t().copy_(ours.preactivation)
    ours.weight = torch.empty(10, 14).t()[::2].copy_(ours.weight)
    ours.grad_weight = torch.empty(10, 7).t().copy_(ours.grad_weight)
    ours.grad_bias = torch.empty(14)[::2].copy_(ours.grad_bias)
    ours.bias = torch.empty(7, 3)[:, 1].copy_(ours.bias)
    rates, _ = steps(0, 3)
    compare([ours], [theirs], 32, lr=rates)
    assert ours.weight.stride() == (2, 14)
    step = (theirs.weight - random_layer(3, 33, 10, 7, dtype=torch.float32)[1]).abs().max()
    assert (ours.weight - theirs.weight).abs().max() <= 32 * ULP * step + ULP * theirs.weight.abs().max()


def test_state_that_is_not_contiguous():
    ours, theirs = twins(4, 12, 10, 7)
    for problem in (ours, theirs):
        lk.local_steps_([problem], lr=[0.01], backend="reference")
    slots = ours.state["weight"]
    slots["square_avg"] = torch.empty(10, 7).t().copy_(slots["square_avg"])
    compare([ours], [theirs], 32, lr=[0.01, 0.005])


def test_whole_tiles_are_read_in_place():
    ours, theirs = twins(5, 64, 32, 16)
    before = ours.x.clone()
    compare([ours], [theirs], 32, lr=[0.01] * 3)
    assert torch.equal(ours.x, before)


@pytest.mark.parametrize("transfer", ELEMENTWISE, ids=str)
def test_trace(transfer):
    ours, theirs = twins(6, 37, 19, 11, transfer=transfer)
    report, expected = compare([ours], [theirs], 64, rule=rules.SGD(), lr=[0.002] * 2, prox=0.4, trace=True)
    (actual,), (right,) = report.trace, expected.trace
    assert actual[0] == 0
    torch.testing.assert_close(actual, right, rtol=2e-5, atol=0)


def test_trace_changes_no_bit():
    pair = twins(7, 37, 19, 11)
    for problem, trace in zip(pair, (False, True), strict=True):
        with configs.use(SMALL):
            lk.local_steps_([problem], lr=[0.01] * 3, backend="triton", trace=trace)
    assert torch.equal(pair[0].weight, pair[1].weight)


# tests/kernels/test_memory.py has two orders of larger models.
@pytest.mark.sweep
@pytest.mark.parametrize(("driver", "parts"), [("single", 1), ("grouped", 1), ("grouped", 3)])
def test_same_bits_twice_and_in_any_order(driver, parts, monkeypatch):
    cut_batches(monkeypatch, parts)
    results = []
    for seed in range(3):
        problems = [twins(8, 37, 19, 21)[0], twins(9, 20, 33, 5, transfer="relu")[0]]
        with configs.use(SMALL, driver), shuffled_programs(seed):
            lk.local_steps_(problems, lr=[0.01] * 3, backend="triton")
        results.append([problem.weight for problem in problems])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# All tests run on scratch that is NaN at first; tests/kernels/test_memory.py compares bits in fewer cases.
@pytest.mark.sweep
@pytest.mark.parametrize(("driver", "parts"), [("single", 1), ("grouped", 1), ("grouped", 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_uninitialised_scratch_is_never_read(monkeypatch, driver, parts, dtype):
    cut_batches(monkeypatch, parts)
    clean, poisoned = twins(10, 37, 19, 11, transfer="relu")
    poisoned.x = poisoned.x.clone()
    arguments = {"lr": [0.01] * 3, "rule": "adam", "backend": "triton", "compute_dtype": dtype}
    with configs.use(SMALL, driver):
        assert lk.local_steps_([poisoned], **arguments).committed  # on scratch that is NaN at first, as in all tests
        allocate = drivers.allocate
        monkeypatch.setattr(drivers, "allocate", lambda *a: allocate(*a).zero_())
        lk.local_steps_([clean], **arguments)
    assert torch.equal(clean.weight, poisoned.weight)


# tests/kernels/test_memory.py checks the addresses of larger models, and the gaps between pieces of scratch.
@pytest.mark.sweep
@pytest.mark.parametrize(("driver", "parts"), [("single", 1), ("grouped", 1), ("grouped", 3)])
def test_addresses_stay_within_tensors(driver, parts, monkeypatch):
    cut_batches(monkeypatch, parts)
    problems = [twins(11, 37, 19, 11)[0], twins(12, 5, 33, 7, bias=False, transfer="relu")[0]]
    with configs.use(SMALL, driver), checked_addresses() as counts:
        lk.local_steps_(problems, lr=[0.01] * 2, rule="adam", backend="triton", trace=True)
    assert counts["accesses"] > 1000


def relative_error(report, exact):
    pairs = zip(report.delta_weight, exact.delta_weight, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


# What rounding the operands may cost, beside 1e-2 (bfloat16) and 2e-3 (TF32) asked for on full-sized layers.
@pytest.mark.parametrize(
    ("dtype", "tf32", "limit"),
    [(torch.bfloat16, False, 5e-3), (torch.float16, False, 5e-4), (torch.float32, True, 5e-4)],
)
def test_low_precision(dtype, tf32, limit, monkeypatch):
    monkeypatch.setattr(drivers, "float32_precision", lambda: "tf32" if tf32 else "ieee")
    exact = problem_for(*random_layer(13, 200, 100, 40), "tanh")
    names = ("x", "preactivation", "weight", "bias", "grad_weight", "grad_bias")
    ours = lk.LocalProblem(**{name: getattr(exact, name).float() for name in names}, transfer="tanh")
    arguments = {"lr": [1e-4] * 10, "commit": False}
    config = configs.Config(n=32, b=128, k=64, r=16)
    with configs.use(config):
        report = lk.local_steps_([ours], backend="triton", compute_dtype=dtype, **arguments)
    expected = lk.local_steps_([exact], backend="reference", **arguments)
    error = relative_error(report, expected)
    assert error <= limit
    if dtype == torch.float32:
        assert error > 1e-6  # the operands were rounded


@pytest.mark.sweep
@pytest.mark.parametrize(("dtype", "tf32", "limit"), [(torch.bfloat16, False, 1e-2), (torch.float32, True, 2e-3)])
def test_low_precision_on_a_layer_of_full_size(dtype, tf32, limit, monkeypatch):
    """B = 1000, K = 1000, N = 500; the textbook form in bfloat16 is beside it in bench/results/accuracy.json."""
    monkeypatch.setattr(drivers, "float32_precision", lambda: "tf32" if tf32 else "ieee")
    x, weight, _, residual = random_layer(25, 1000, 1000, 500, bias=False)
    exact = problem_for(x, weight, None, residual / 100, "tanh")
    names = ("x", "preactivation", "weight", "grad_weight")
    ours = lk.LocalProblem(**{name: getattr(exact, name).float() for name in names}, transfer="tanh")
    arguments = {"lr": [2e-5] * 10, "commit": False}
    with configs.use(configs.Config(n=128, b=256, k=128, r=128)):
        report = lk.local_steps_([ours], backend="triton", compute_dtype=dtype, **arguments)
    expected = lk.local_steps_([exact], backend="reference", **arguments)
    assert relative_error(report, expected) <= limit


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_float16_keeps_its_range(size):
    layer = random_layer(14, 50, 30, 20)
    exact = problem_for(*layer[:3], layer[3] * size, "softplus")
    names = ("x", "preactivation", "weight", "bias", "grad_weight", "grad_bias")
    ours = lk.LocalProblem(**{name: getattr(exact, name).float() for name in names}, transfer="softplus")
    arguments = {"lr": [min(1.0, 1e-3 / size)] * 5, "rule": "sgd", "commit": False}
    with configs.use(SMALL):
        report = lk.local_steps_([ours], backend="triton", compute_dtype=torch.float16, **arguments)
    expected = lk.local_steps_([exact], backend="reference", **arguments)
    assert relative_error(report, expected) <= 2e-3


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
    with configs.use(SMALL):
        report = lk.local_steps_([pair[0] for pair in pairs], lr=[0.01] * 2, backend="triton", commit=False)
    expected = lk.local_steps_([pair[1] for pair in pairs], lr=[0.01] * 2, backend="reference", commit=False)
    assert relative_error(report, expected) <= 1e-2


def test_divergence_changes_nothing():
    good, bad = twins(18, 9, 5, 4)[0], twins(19, 9, 5, 4, transfer="squared_relu")[0]
    before = [p.weight.clone() for p in (good, bad)]
    with configs.use(SMALL):
        report = lk.local_steps_([good, bad], rule="sgd", lr=[1e6] * 20, backend="triton")
    assert not report.finite
    assert not report.committed
    assert all(torch.equal(p.weight, w) for p, w in zip((good, bad), before, strict=True))
    assert good.state == bad.state == {}


def test_transfers_are_exact_to_a_few_ulp():
    a = torch.cat([torch.randn(4096), 10 * torch.randn(4096), 1e-3 * torch.randn(4096), torch.tensor([0.0, 88, -88])])
    a = torch.nn.functional.pad(a, (0, 16384 - len(a)))
    for transfer in ELEMENTWISE:
        if not transfer.convex:
            continue  # their tails are differences of nearly equal numbers in torch too
        y = torch.empty_like(a)
        parameter = transfer.parameters[0] if transfer.parameters else 0.0
        _apply_kernel[(1,)](a, y, parameter, F=FUNCTIONS[transfer.name][0], BLOCK=16384)
        right = transfer(a.double())
        error = (y.double() - right).abs() / (ULP * right.abs() + 1e-37)
        assert error.max() <= 6, (str(transfer), float(error.max()), float(a[error.argmax()]))


def test_plans_that_a_cuda_graph_reads_are_kept(monkeypatch):
    monkeypatch.setattr(drivers, "_KEPT_PLANS", 2)
    monkeypatch.setattr(drivers, "_plans", type(drivers._plans)())
    plans = []
    for n in range(3, 8):
        lk.local_steps_(twins(28, 6, 5, n)[:1], lr=[0.01], backend="triton")
        plans.append(list(drivers._plans.values())[-1])
        plans[0].captured = True  # as the table's upload does in a capture
    assert list(drivers._plans.values()) == [plans[0], plans[-1]]


def test_plans_are_reused():
    ours, _ = twins(20, 9, 8, 7)
    with configs.use(SMALL):
        for _ in range(3):
            lk.local_steps_([ours], lr=[0.01] * 2, backend="triton")
            plans = dict(drivers._plans)
        lk.local_steps_([ours], lr=[0.02] * 2, backend="triton")
    assert drivers._plans.keys() == plans.keys()


def test_out_of_memory_names_the_size(monkeypatch):
    ours, _ = twins(21, 9, 8, 7)
    before = ours.weight.clone()

    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    with configs.use(SMALL):
        monkeypatch.setattr(drivers.torch, "empty", full)
        with pytest.raises(torch.OutOfMemoryError, match=r"MiB .*nothing was changed"):
            lk.local_steps_([ours], lr=[0.01] * 2, backend="triton")
    assert torch.equal(ours.weight, before)
    assert ours.state == {}


class Own(rules.Rule):
    """A rule without a Triton function."""

    @property
    def slots(self):
        return {}

    def update_(self, delta, grad, state, lr, step):
        delta.sub_(grad, alpha=lr)


def test_what_is_unsupported_says_what_works():
    ours, _ = twins(22, 9, 8, 7)
    double, _ = twins(22, 9, 8, 7, dtype=torch.float64)
    for problem, arguments, message in (
        (ours, {"rule": Own()}, "triton_function"),
        (double, {}, "float64"),
        (ours, {"compute_dtype": torch.float64}, "float64"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            lk.local_steps_([problem], lr=[0.01], backend="triton", **arguments)
        assert "backend='reference'" in str(error.value)


def test_offsets_beyond_32_bits():
    """Addresses of a layer of 2^35 elements, on a made-up table: nothing there is allocated, read or written."""
    stride, n_block, base, touched = 2**24, 300, 2**44, []
    row = torch.zeros(c.WIDTH.value, dtype=torch.int64)
    for name in ("X", "A0", "E", "ROW_SUMS", "WEIGHT_COPY"):
        row[getattr(c, name).value] = base
    for name in ("X_STRIDE", "E_STRIDE", "WEIGHT_STRIDE"):
        row[getattr(c, name).value] = stride
    row[c.BATCH.value] = row[c.OUTPUTS.value] = 2**24
    row[c.REDUCED.value], row[c.TRANSFER.value] = SMALL.r, -1

    def real(pointers):
        return np.max(pointers.data) < base or np.min(pointers.data) > 2**46

    def load(original):
        def wrapper(pointers, mask, other, *rest):
            if real(pointers):
                return original(pointers, mask, other, *rest)
            touched.append(pointers.data)
            return TensorHandle(np.zeros(pointers.data.shape, np.float32), tl.float32)

        return wrapper

    def store(original):
        def wrapper(pointers, *rest):
            if real(pointers):
                return original(pointers, *rest)
            touched.append(pointers.data)

        return wrapper

    constants = {"TRANSFERS": (), "DIVERGENCES": (), "SOURCES": "", "OPERAND": tl.float32, "PREACTIVATION": tl.float32}
    constants |= {"PRECISION": "ieee", "INTERPRETED": True, "TRACE": False, "ROWWISE": False}
    constants |= {"BLOCK_N": SMALL.n, "BLOCK_B": SMALL.b, "BLOCK_R": SMALL.r, "PARTS": 2}
    tiles = torch.tensor([[0, n_block, 5]], dtype=torch.int32)
    trace = torch.zeros(1, dtype=torch.float64)
    with (
        replaced(interpreter_builder, "create_masked_load", load),
        replaced(interpreter_builder, "create_masked_store", store),
    ):
        grouped.launch_activation(row, tiles, 1, trace, 0, constants)
    last_row, last_example = (n_block + 1) * SMALL.n - 1, 6 * SMALL.b - 1
    furthest = max(int(np.max(addresses)) for addresses in touched)
    assert furthest == base + 4 * (last_row * stride + last_example) > base + 2**32
    assert min(int(np.min(addresses)) for addresses in touched) >= base
