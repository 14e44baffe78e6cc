"""``LocoProp(rows=...)`` keeps the rows of a pass that its step takes, and steps as if it had kept them all."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from locoprop_torch import GroupedLinear, LocoProp
from locoprop_torch.capture import CapturedLayer
from locoprop_torch.kept import KeptRows
from locoprop_torch.optimizer import LocoProp as Optimizer
from tests.helpers import batch, captured, loss_of, mlp, moved, weights

try:
    from locoprop_kernels.kernels import target

    _kernels = target.interpreted()
except ImportError:
    _kernels = False
needs_kernels = pytest.mark.skipif(not _kernels, reason="needs a recent Triton, and TRITON_INTERPRET=1")


class Convolutions(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 4, 3, padding=1, groups=groups, padding_mode="circular")
        self.second = nn.Conv2d(4, 2, 2, stride=2).to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = GroupedLinear(3, 6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.experts(x.expand(3, -1, 6))).sum(0))


class Recurrent(nn.Module):
    """One layer, called three times."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        return self.head(x)


def image_loss(model, rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    return model(torch.randn(rows, 2, 6, 5, generator=generator, dtype=torch.float64).to(dtype)).square().mean()


def one_by_one(model, loss, sizes, seed):
    for i, size in enumerate(sizes):
        (loss(model, size, seed + i) * (size / sum(sizes))).backward()


def together(model, loss, sizes, seed):
    sum(loss(model, size, seed + i) * (size / sum(sizes)) for i, size in enumerate(sizes)).backward()


def train(model, run, loss=loss_of, sizes=(64,), **options):
    """Two steps; the optimiser."""
    opt = LocoProp(model, **{"lr": 1e-3, "rows": 3, "local_iterations": 4, **options})
    for step in range(2):
        opt.zero_grad()
        run(model, loss, sizes, 100 * step)
        opt.step()
    return opt


@pytest.fixture
def keep_all(monkeypatch):
    """Turns the choice of rows in forward passes off."""
    return lambda: monkeypatch.setattr(Optimizer, "_sampling", lambda self: None)


def assert_as_if_all_were_kept(make, keep_all, run=one_by_one, dtype=torch.float64, **options):
    """The same bits as with all rows at hand; returns the optimiser that kept a few."""
    few, exact = make().to(dtype), make().to(dtype)
    opt = train(few, run, **options)
    keep_all()
    train(exact, run, **options)
    assert all(map(torch.equal, weights(few), weights(exact)))
    assert any(moved(few, weights(make().to(dtype))))
    return opt


@pytest.mark.parametrize("run", [one_by_one, together])
@pytest.mark.parametrize("sizes", [(64,), (16, 16, 16, 16), (16, 40, 9), (40, 1, 1, 30), (2, 60), (1,) * 20])
def test_several_passes_are_shared_out(sizes, run, keep_all):
    assert_as_if_all_were_kept(mlp, keep_all, run, sizes=sizes)


KINDS = {
    "mlp": (mlp, loss_of, 1),
    "convolutions": (Convolutions, image_loss, 8),
    "grouped convolutions": (lambda: Convolutions(2), image_loss, 8),
    "grouped": (Grouped, loss_of, 1),
    "recurrent": (Recurrent, loss_of, 1),
}


@pytest.mark.parametrize("sizes", [(64,), (16, 40, 9)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind, sizes, keep_all):
    make, loss, share = KINDS[kind]
    assert_as_if_all_were_kept(make, keep_all, loss=loss, sizes=tuple(max(size // share, 1) for size in sizes))


@needs_kernels
@pytest.mark.parametrize("kind", ["mlp", "grouped convolutions"])
def test_kernels_take_what_was_kept(kind, keep_all):
    make, loss, share = KINDS[kind]
    options = {"loss": loss, "sizes": (16 // share, 32 // share), "local_iterations": 3, "backend": "triton"}
    opt = assert_as_if_all_were_kept(make, keep_all, dtype=torch.float32, **options)
    assert opt.last_reports[0].backend == "triton"


def pruned():
    model = mlp()
    prune.custom_from_mask(model[2], "weight", (torch.arange(20).reshape(4, 5) % 3 != 0).double())
    return model


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (mlp, {"local_loss": "squared"}), (mlp, {"trace": True}), (mlp, {"transfers": {"4": "softmax"}}),
        (mlp, {"target": {"0": "primal"}}), (mlp, {"regulariser": lambda weight, delta: 0.1 * (weight + delta)}),
        (mlp, {"local_iterations": 1}), (mlp, {"reduction": "sum", "lr": 1e-4}), (pruned, {}),
        (mlp, {"prox": 0.1, "rule": "adam", "compute_dtype": torch.float32}),
    ],
)  # fmt: skip
def test_every_option(make, options, keep_all):
    assert_as_if_all_were_kept(make, keep_all, sizes=(30, 30), **options)


def test_groups_with_local_iterations_of_their_own(keep_all):
    def groups(model):
        return [{"params": list(model[2].parameters()), "local_iterations": 2}]

    few, exact = mlp(), mlp()
    train(few, one_by_one, sizes=(30, 30), param_groups=groups(few))
    keep_all()
    train(exact, one_by_one, sizes=(30, 30), param_groups=groups(exact))
    assert all(map(torch.equal, weights(few), weights(exact)))


@pytest.mark.parametrize("sizes", [(8,), (3, 5)])
def test_as_many_rows_as_there_are_are_all_rows(sizes):
    few, exact = mlp(), mlp()
    train(few, one_by_one, sizes=sizes, rows=8)
    train(exact, one_by_one, sizes=sizes, rows=None)
    assert all(map(torch.equal, weights(few), weights(exact)))


# --- what is held


def held(layer):
    """Rows of inputs that are held of a layer."""
    return sum(sum(map(len, one.kept.x)) if one.kept else len(one.x) for one in layer)


def held_bytes(opt):
    """Bytes of all inputs and pre-activations that passes hold, each storage once."""
    tensors = [
        tensor
        for passes in captured(opt).values()
        for one in passes
        for tensor in ([*one.kept.x, *one.kept.preactivation] if one.kept else [one.x, one.preactivation])
    ]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("run", [one_by_one, together])
@pytest.mark.parametrize("passes", [1, 2, 8, 32])
def test_what_is_held_does_not_grow_with_the_passes(passes, run):
    model = mlp()
    opt = LocoProp(model, rows=4, local_iterations=5)
    run(model, loss_of, [64] * passes, 0)
    for layer in captured(opt).values():
        assert 4 * 4 / 2 <= held(layer) <= 4 * 4
    numbers = sum(p.shape[1] + p.shape[0] for p in model.parameters() if p.dim() == 2)
    assert held_bytes(opt) <= 4 * 4 * numbers * 8


def test_a_forward_pass_keeps_copies_of_few_rows_alone(monkeypatch):
    found = []
    monkeypatch.setattr(CapturedLayer, "_reach", lambda self, captured, gradient: found.append(captured))
    model = mlp()
    opt = LocoProp(model, rows=4, local_iterations=5)
    loss_of(model, 256).backward()
    assert all(one.x is None and one.preactivation is None for one in found)
    assert [sum(map(len, one.kept.x)) for one in found] == [16, 16, 16]
    del opt


def test_small_batches_are_held_without_a_copy():
    model = mlp()
    opt = LocoProp(model, rows=4, local_iterations=5)
    loss_of(model, 16).backward()  # four sets, and four local steps that take one
    assert all(one.kept is None for passes in captured(opt).values() for one in passes)


def test_overwriting_is_harmless_once_rows_are_kept():
    def stepped(overwrite):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
        model[0].weight.requires_grad_(False)  # autograd does not guard the input then
        opt = LocoProp(model, lr=1e-3, rows=3, local_iterations=4)
        x, y = batch(64)
        F.mse_loss(model(x), y).backward()
        if overwrite:
            x.mul_(2)
        opt.step()
        return weights(model)

    assert all(map(torch.equal, stepped(True), stepped(False)))


# --- passes of every fate


def stray_before(model, x, y):
    stray = model(torch.cat([x, x, x]))
    F.mse_loss(model(x), y).backward()
    return stray


def stray_between(model, x, y):
    F.mse_loss(model(x[:40]), y[:40]).mul(40 / 64).backward()
    stray = model(2 * x)
    F.mse_loss(model(x[40:]), y[40:]).mul(24 / 64).backward()
    return stray


def two_calls(model, x, y):
    F.mse_loss(model(x[:40]), y[:40]).mul(40 / 64).backward()
    F.mse_loss(model(x[40:]), y[40:]).mul(24 / 64).backward()


def second_loss_first(model, x, y):
    first, second = (F.mse_loss(model(part), want) for part, want in ((x[:40], y[:40]), (x[40:], y[40:])))
    second.mul(24 / 64).backward()
    first.mul(40 / 64).backward()


def one_call(model, x, y):
    F.mse_loss(model(x), y).backward()


def saliency_before(model, x, y):
    torch.autograd.grad(model(x[:50].clone().requires_grad_()).sum(), list(model.parameters()))
    one_call(model, x, y)


def zero_grad_in_between(model, x, y):
    F.mse_loss(model(x[:9]), y[:9]).backward()
    model.zero_grad()
    one_call(model, x, y)


def twice_through_one_graph(model, x, y):
    loss = F.mse_loss(model(x), y) / 2
    loss.backward(retain_graph=True)
    loss.backward()


def recomputed(model, x, y):
    F.mse_loss(checkpoint(model, x, use_reentrant=False), y).backward()


def recomputed_reentrantly(model, x, y):
    F.mse_loss(checkpoint(model, x.clone().requires_grad_(), use_reentrant=True), y).backward()


def compiled(model, x, y):
    torch._dynamo.reset()
    F.mse_loss(torch.compile(model, backend="eager")(x), y).backward()


@pytest.mark.parametrize(
    ("passes", "plain"),
    [
        (stray_before, one_call), (stray_between, two_calls), (second_loss_first, two_calls),
        (saliency_before, one_call), (zero_grad_in_between, one_call), (twice_through_one_graph, one_call),
        (recomputed, one_call), (recomputed_reentrantly, one_call), (compiled, one_call),
    ],
)  # fmt: skip
def test_only_what_counts_says_which_rows(passes, plain):
    model, twin = mlp(), mlp()
    for m, run in ((model, passes), (twin, plain)):
        opt = LocoProp(m, lr=1e-3, rows=3, local_iterations=4)
        kept = run(m, *batch(64))
        # Beside a pass that has its place, and may still count, others stay whole.
        assert kept is not None or all(held(layer) <= 9 for layer in captured(opt).values())
        opt.step()
        del kept
    for p, q in zip(weights(model), weights(twin), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_a_pass_of_an_earlier_step_counts_in_a_later_one():
    """Its rows were chosen for another step; as many are there as should be."""
    model = mlp()
    opt = LocoProp(model, lr=0.0, rows=3, local_iterations=4)  # torch refuses where weights have changed
    for p in model.parameters():
        p.data = p.data.clone()
    early = loss_of(model, 50)
    opt._model_layers.forget(release=True)
    opt.rows_seed += 1
    loss_of(model, 33, seed=2).backward()
    early.backward()
    opt.step()
    assert {problem.rows for problem in opt.last_reports[0].problems} == {83}
    assert opt.skipped_steps == 0


@pytest.mark.parametrize(
    ("change", "backend"),
    [
        ({"rows": None}, "reference"), ({"rows": 20}, "reference"), ({"rows": 1}, "reference"),
        ({"rows_seed": 7}, "reference"), ({"trace": True}, "reference"),
        pytest.param({"rows": None}, "triton", marks=needs_kernels),
    ],
)  # fmt: skip
def test_what_was_captured_wins(change, backend):
    model, twin = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    for m in (model, twin):
        opt = LocoProp(m, lr=1e-3, rows=3, local_iterations=4, backend=backend)
        loss_of(m, 64).backward()
        if m is model:
            for name, value in change.items():
                setattr(opt, name, value)
        opt.step()
        assert {problem.decision.rows for problem in opt.last_reports[0].problems} == {3}
    assert all(map(torch.equal, weights(model), weights(twin)))


@pytest.mark.parametrize("iterations", [2, 9, 40])
def test_local_iterations_may_change_in_between(iterations):
    model, twin = mlp(), mlp()
    for m, before in ((model, 4), (twin, iterations)):
        opt = LocoProp(m, lr=1e-3, rows=3, local_iterations=before)
        loss_of(m, 64).backward()
        opt.param_groups[0]["local_iterations"] = iterations
        opt.step()
        assert opt.skipped_steps == 0
    same = all(map(torch.equal, weights(model), weights(twin)))
    assert same == (iterations < 4)  # otherwise sets that were kept are taken again


def test_rows_set_after_the_forward_pass():
    model, twin = mlp(), mlp()
    opt = LocoProp(model, lr=1e-3, local_iterations=4)
    loss = loss_of(model, 64)
    opt.rows = 3
    loss.backward()
    assert all(held(layer) == 9 for layer in captured(opt).values())
    opt.step()
    other = LocoProp(twin, lr=1e-3, local_iterations=4, rows=3)
    loss_of(twin, 64).backward()
    other.step()
    assert all(map(torch.equal, weights(model), weights(twin)))


def test_mixed_dtypes_take_the_same_rows(keep_all):
    def run(model, loss, sizes, seed):
        with torch.autocast("cpu", torch.bfloat16):
            x, y = batch(sizes[0], seed, torch.float32)
            F.mse_loss(model(x).float(), y).backward()
        loss(model, sizes[1], seed).backward()

    assert_as_if_all_were_kept(mlp, keep_all, run, torch.float32, sizes=(30, 40))


def test_resume_between_steps_of_several_passes():
    def fresh():
        model = mlp()
        return model, LocoProp(model, lr=1e-3, rows=3, local_iterations=4)

    def steps(model, opt, start, count):
        for step in range(start, start + count):
            opt.zero_grad()
            one_by_one(model, loss_of, (16, 40, 9), 10 * step)
            opt.step()

    model, opt = fresh()
    steps(model, opt, 0, 2)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    steps(model, opt, 2, 2)
    again, resumed = fresh()
    one_by_one(again, loss_of, (50,), 3)  # dropped: a checkpoint has no rows
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    steps(again, resumed, 2, 2)
    assert all(map(torch.equal, weights(again), weights(model)))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_few_rows_too(how):
    model = mlp()
    opt = LocoProp(model, lr=1e-3, rows=3, local_iterations=4)
    loss_of(model, 64).backward()
    opt.step()
    twin, other = copy.deepcopy((model, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, opt)))
    for m, o in ((model, opt), (twin, other)):
        o.zero_grad()
        loss_of(m, 64, seed=2).backward()
        assert all(held(layer) == 9 for layer in captured(o).values())
        o.step()
    assert all(map(torch.equal, weights(model), weights(twin)))


def test_layers_that_come_later_keep_few_rows_too():
    model = mlp()
    opt = LocoProp(model, rows=3, local_iterations=4)
    model.append(nn.Linear(3, 3).double())
    opt.add_param_group({"params": list(model[5].parameters())})
    loss_of(model, 64).backward()
    assert held(captured(opt)["5"]) == 9


def test_bad_rows_set_later_are_refused_by_name():
    model = mlp()
    opt = LocoProp(model, rows=3)
    opt.rows = "few"
    with pytest.raises(ValueError, match="rows must be a positive integer"):
        loss_of(model)


# --- thinning


@pytest.mark.parametrize("offset", [0, 5, 100])
@pytest.mark.parametrize("first", [4, 6, 7])
def test_thinning_leaves_what_a_later_choice_would_have_taken(offset, first):
    from locoprop_kernels.sampling import Sampling

    x = torch.arange(120.0).reshape(60, 2)
    sampling = Sampling(rows=5, seed=3, steps=3)
    kept = KeptRows.of(x, x + 1, sampling, first, offset)
    for sets in (2 * first, 8 * first):
        kept.thin(sets)
        right = KeptRows.of(x, x + 1, sampling, sets, offset)
        for found, expected in zip(kept.x + kept.preactivation, right.x + right.preactivation, strict=True):
            assert torch.equal(found, expected)
    assert kept.x[0].untyped_storage().nbytes() == sum(map(len, kept.x)) * 8
