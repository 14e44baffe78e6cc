"""Groups, masks, rates per parameter and rows in chunks: interpreted kernels against the reference."""

import dataclasses
import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import locoprop_kernels as lk
from locoprop_kernels import rules
from locoprop_kernels.devices import INTERPRETER
from locoprop_kernels.kernels import choose, configs, decide, target
from locoprop_kernels.kernels.plan import Plan
from locoprop_kernels.patches import Patches, Rows, Stacked
from locoprop_kernels.settings import Settings
from tests.helpers import present
from tests.kernels.comparison import SMALL, compare, error_of_the_step, run_both
from tests.kernels.plans import kept_plans
from tests.problems import copied, problem_for, random_layer

pytestmark = pytest.mark.skipif(not target.interpreted(), reason="needs TRITON_INTERPRET=1")


def random_problem(seed, b, k, n, groups=None, masks=False, bias=True, **options):
    """A local problem in float32, with random masks where they are asked for."""
    if masks:
        generator = torch.Generator().manual_seed(seed)
        lead = [] if groups is None else [groups]
        options["mask_weight"] = torch.rand(*lead, n, k, generator=generator) > 0.5
        options["mask_bias"] = torch.rand(*lead, n, generator=generator) > 0.5 if bias else None
    return problem_for(*random_layer(seed, b, k, n, bias, torch.float32, groups), **{"transfer": "tanh", **options})


def stacked(tensor, rng):
    """The same rows in one to three parts."""
    sizes = [tensor.shape[-2]]
    while len(sizes) < 3 and sizes[-1] > 1 and rng.random() < 0.8:
        first = rng.randint(1, sizes[-1] - 1)
        sizes[-1:] = [first, sizes[-1] - first]
    return Stacked([part.clone() for part in tensor.split(sizes, dim=-2)])


@pytest.mark.parametrize("seed", range(10))
def test_random_problems(seed):
    rng = random.Random(seed)
    ours, theirs = [], []
    for i in range(rng.randint(1, 2)):
        groups = rng.choice([None, None, 1, 3])
        b, k, n = (rng.choice([1, 5, 16, 19]) for _ in range(3))
        problem = random_problem(
            100 * seed + i,
            b,
            k,
            n,
            groups,
            bias=rng.random() < 0.7,
            transfer=rng.choice(["tanh", "sigmoid", "identity", "softmax"]),
            masks=rng.random() < 0.5,
            rate_weight=rng.choice([0.0, 0.5, 1.0]),
            rate_bias=rng.choice([0.0, 0.5, 1.0]),
        )
        frozen = rng.choice(["grad_weight", "grad_bias", None, None])
        if frozen and problem.bias is not None:
            setattr(problem, frozen, None)
        changes = {name: stacked(getattr(problem, name), rng) for name in ("x", "preactivation") if rng.random() < 0.5}
        ours.append(copied(problem, **changes))
        theirs.append(problem)
    rule = rng.choice([rules.RMSprop(eps=1e-3), rules.Adam(eps=1e-3), rules.SGD(momentum=0.8)])
    arguments = {"prox": rng.choice([0.0, 0.2]), "reduction": rng.choice(["mean", "sum"]), "trace": rng.random() < 0.5}
    lr = [0.01 / (1 + t) for t in range(rng.randint(1, 3))]
    driver = rng.choice(["single", "grouped"])
    for _ in range(2):  # the state persists
        compare(ours, theirs, driver=driver, rule=rule, lr=lr, **arguments)


@pytest.mark.parametrize(("driver", "transfer"), [("single", "tanh"), ("grouped", "tanh"), ("gram", "identity")])
def test_masked_weights_stay_and_their_momentum_does_not_move_them(driver, transfer):
    ours = random_problem(1, 40, 19, 11, transfer=transfer)
    theirs = copied(ours)
    arguments = {"rule": rules.SGD(momentum=0.9), "lr": [0.01] * 3, "prox": 0.1}
    chosen = None if driver == "gram" else driver
    compare([ours], [theirs], driver=chosen, **arguments)  # fills the momentum
    generator = torch.Generator().manual_seed(2)
    weight = torch.rand(11, 38, generator=generator)[:, ::2] > 0.5  # of any strides
    bias = torch.rand(11, generator=generator) > 0.5
    for problem in (ours, theirs):
        problem.mask_weight, problem.mask_bias = weight, bias
        problem.grad_weight[~weight] = float("inf")  # which is not looked at
    before = ours.weight.clone(), ours.bias.clone()
    momentum = ours.state["weight"]["momentum_buffer"]
    assert (momentum[~weight] != 0).all()
    report, _ = compare([ours], [theirs], driver=chosen, **arguments)
    assert report.driver == driver
    for mask, after, start in zip((weight, bias), (ours.weight, ours.bias), before, strict=True):
        assert torch.equal(after[~mask], start[~mask])
        assert (after[mask] != start[mask]).all()


def test_a_mask_of_ones_and_rates_of_one_change_no_bit():
    for driver in ("single", "grouped"):
        plain = random_problem(3, 37, 19, 11)
        masked = copied(plain, mask_weight=torch.ones(11, 19, dtype=torch.bool), rate_weight=1, rate_bias=1)
        other = [random_problem(4, 20, 7, 5) for _ in range(2)]  # without a mask, in the same launch
        with configs.use(SMALL, driver):
            for problems in ([plain, other[0]], [masked, other[1]]):
                lk.local_steps_(problems, lr=[0.01] * 3, backend="triton")
        assert torch.equal(plain.weight, masked.weight)
        assert torch.equal(plain.bias, masked.bias)
        assert torch.equal(other[0].weight, other[1].weight)


@pytest.mark.parametrize("driver", ["single", "grouped"])
def test_rates_multiply_the_learning_rates(driver):
    half = random_problem(5, 37, 19, 11, rate_weight=0.5, rate_bias=0.0)
    whole = copied(half, rate_weight=1.0, rate_bias=1.0)
    bias = half.bias.clone()
    with configs.use(SMALL, driver):
        lk.local_steps_([half], lr=[0.02], backend="triton")
        lk.local_steps_([whole], lr=[0.01], backend="triton")
        assert torch.equal(half.weight, whole.weight)
        assert torch.equal(half.bias, bias)
        plans = kept_plans()
        half.rate_weight = 0.25  # a scheduler's: no reason for a new plan
        lk.local_steps_([half], lr=[0.02], backend="triton")
        assert kept_plans() == plans


@pytest.mark.parametrize("groups", [1, 3, 7])
@pytest.mark.parametrize(("driver", "transfer"), [("single", "tanh"), ("grouped", "softmax"), ("gram", "identity")])
def test_groups_are_problems_of_their_own(groups, driver, transfer):
    """Bit by bit (but for the sums of a batched ``XᵀX``), and the step is counted once."""
    sizes = (33, 19, 9) if groups == 1 else (8, 5, 3)
    together = random_problem(groups, *sizes, groups, transfer=transfer, masks=True)
    apart = [copied(together.group(index)) for index in range(groups)]
    arguments: dict[str, Any] = {"rule": "adam", "lr": [0.01] * 3, "backend": "triton", "trace": True}
    with configs.use(SMALL, None if driver == "gram" else driver):
        report = lk.local_steps_([together], **arguments)
        reports = lk.local_steps_(apart, **arguments)
    assert report.driver == (transfer if transfer == "softmax" else driver)
    torch.testing.assert_close(report.trace[0], sum(reports.trace), rtol=1e-6, atol=0)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if driver == "gram" else {"rtol": 0, "atol": 0}
    for index, problem in enumerate(apart):
        torch.testing.assert_close(together.weight[index], problem.weight, **tolerance)
        torch.testing.assert_close(together.bias[index], problem.bias, **tolerance)
        for slot in ("exp_avg", "exp_avg_sq"):
            slots = together.state["weight"][slot][index], problem.state["weight"][slot]
            torch.testing.assert_close(*slots, **tolerance)
    assert together.state["weight"]["step"] == together.state["bias"]["step"] == 3


def test_groups_of_any_strides():
    ours = random_problem(6, 33, 13, 9, 3)
    theirs = copied(ours)
    for name in ("x", "preactivation", "weight", "grad_weight", "bias", "grad_bias"):
        value = getattr(ours, name)
        setattr(ours, name, torch.empty(*value.shape[::-1], 2)[..., 0].permute(*range(value.dim())[::-1]).copy_(value))
    compare([ours], [theirs], lr=[0.01] * 3)


@pytest.mark.parametrize(
    ("dtype", "groups", "tf32"),
    [
        (torch.float32, 3, False),
        (torch.float32, None, True),
        (torch.bfloat16, None, False),
        (torch.float16, None, False),
    ],
)
def test_chunks_give_the_same_bits(dtype, groups, tf32, monkeypatch):
    monkeypatch.setattr(target, "float32_precision", lambda: "tf32" if tf32 else "ieee")
    whole = random_problem(7, 37, 19, 7, groups, transfer="relu")
    whole.x[..., 0, 0] = 1e5  # more than float16 holds
    whole.preactivation = whole.preactivation.bfloat16()
    rng = random.Random(1)
    chunks = copied(whole, x=stacked(whole.x, rng), preactivation=stacked(whole.preactivation, rng))
    arguments = {"lr": [0.01] * 2, "backend": "triton", "compute_dtype": dtype}
    with configs.use(SMALL):
        for problem in (whole, chunks):  # with one whose X is a tensor, in the same launch
            other = random_problem(8, 20, 7, 5)
            other.preactivation = other.preactivation.bfloat16()
            assert lk.local_steps_([problem, other], **arguments).committed
    assert torch.equal(whole.weight, chunks.weight)
    assert torch.equal(whole.bias, chunks.bias)


def test_chunks_that_no_product_needs_are_not_formed():
    class Never(Rows):
        def chunks(self, max_bytes=0):
            raise AssertionError("rows were formed")

    ours = random_problem(9, 37, 19, 11)
    x, preactivation = (Never(value.shape, value.dtype, value.device) for value in (ours.x, ours.preactivation))
    one_step = copied(ours, x=x, preactivation=preactivation)
    frozen = copied(ours, x=x, grad_weight=None)
    with configs.use(SMALL):
        assert lk.local_steps_([one_step], lr=[0.1], backend="triton").committed
        assert lk.local_steps_([frozen], lr=[0.1] * 3, backend="triton").committed


@pytest.mark.parametrize("driver", ["single", "grouped"])
def test_patches_of_a_grouped_convolution(driver):
    groups, generator = 3, torch.Generator().manual_seed(10)
    image = torch.randn(2, 2 * groups, 7, 6, generator=generator)
    x = Patches(image, (3, 2), (2, 1), (1, 1), groups=groups)
    whole = torch.cat(list(x.chunks()), dim=-2)
    theirs = random_problem(11, whole.shape[1], whole.shape[2], 5, groups, masks=True, rate_weight=0.5)
    theirs.x = whole
    compare([copied(theirs, x=x)], [theirs], driver=driver, rule="adam", lr=[0.01] * 3)


@pytest.mark.parametrize(
    ("dtype", "driver"), [(torch.bfloat16, "single"), (torch.bfloat16, "grouped"), (torch.float16, "grouped")]
)
def test_low_precision(dtype, driver):
    theirs = random_problem(12, 150, 30, 20, 3, masks=True, rate_weight=0.5)
    ours = copied(theirs, x=Stacked(theirs.x.split([60, 90], dim=1)))
    config = configs.Config(n=16, b=64, k=32, r=16)
    asked = "single" if dtype == torch.float16 else driver
    report, expected = run_both([ours], [theirs], config, asked, compute_dtype=dtype, lr=[1e-4] * 4)
    assert report.driver == driver  # float16 with a mask has no single launch
    assert error_of_the_step(report, expected) <= 5e-3
    assert not present(report.delta_weight[0])[~theirs.mask_weight].any()


@pytest.mark.parametrize("sizes", [(8, 32, 16, 32), (8, 16, 32, 32), (8, 48, 48, 32), (8, 8, 8, 0)])
def test_steps_of_the_reduction_divide_the_tiles(sizes):
    """Else the padding up to a step would be read, and no kernel writes it."""
    with pytest.raises(ValueError, match=f"r must divide b and k, got r={sizes[3]}, b={sizes[1]}, k={sizes[2]}"):
        configs.Config(*sizes)


def test_masks_take_configurations_whose_kernels_do_not_spill_with_them(monkeypatch):
    wide = configs.Config(n=16, b=64, k=32, r=8, driver="grouped")
    monkeypatch.setitem(configs._TABLE, ("interpreter", "ieee"), (wide, SMALL))
    for masks, config in ((False, wide), (True, SMALL)):
        with configs.use(driver="grouped"):
            lk.local_steps_([random_problem(15, 64, 32, 16, masks=masks)], lr=[0.01], backend="triton")
        assert kept_plans()[-1].layout.kind.config == config
    with pytest.raises(ValueError, match="found must hold a configuration that every kernel may use"):
        choose.choose((wide,), ((64, 32, 16),), "softmax", 2, INTERPRETER)


def test_a_plan_of_launches_per_phase_has_no_schedule():
    problem = random_problem(13, 37, 19, 11)
    found = []
    for driver in ("single", "grouped"):
        with configs.use(SMALL, driver):
            lk.local_steps_([problem], lr=[0.01], backend="triton")
        found.append(kept_plans()[-1])
    assert [one.schedule is None for one in found] == [False, True]
    tiles = [{tuple(tile) for tile in one.update_tiles.tolist()} for one in found]
    assert tiles[0] == tiles[1] == {(0, row, column) for row in range(2) for column in range(2)}


def test_programs_that_a_device_cannot_hold_are_refused():
    problem = random_problem(14, 37, 19, 11)
    settings = Settings.checked("rmsprop", [0.01], 0.0, "mean", None, False, None)
    shape, task, device = decide.shape_of(problem, settings), decide.task_of(settings), torch.device("cpu")
    with configs.use(dataclasses.replace(SMALL, occupancy=2), "single", programs=5):
        machine = decide.machine_of(device)
    (decision,) = decide.decide((shape,), task, machine)
    assert decision.programs == 10  # the interpreter takes any number
    with pytest.raises(ValueError, match="10 programs, but only 8 can be resident"):
        Plan([0], [shape], [decision], task, machine._replace(available=4), device)
    fits = Plan([0], [shape], [decision], task, machine._replace(available=5), device)
    assert present(fits.schedule).programs == 10
