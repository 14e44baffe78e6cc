"""``LocoProp(rows=...)`` keeps the rows of a pass that its step takes, and steps as if it had kept them all."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from locoprop_torch import GroupedLinear
from locoprop_torch.kept import KeptRows
from locoprop_torch.optimizer import LocoProp as Optimizer
from tests.helpers import batch, loss_of, mlp, moved, published, weights

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
        self.second = nn.Conv2d(4, 2, 2, stride=2)
        self.second.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

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
    opt = published(model, **{"lr": 1e-3, "rows": 3, "local_iterations": 4, **options})
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


def test_mixed_dtypes_take_the_same_rows(keep_all):
    def run(model, loss, sizes, seed):
        with torch.autocast("cpu", torch.bfloat16):
            x, y = batch(sizes[0], seed, torch.float32)
            F.mse_loss(model(x).float(), y).backward()
        loss(model, sizes[1], seed).backward()

    assert_as_if_all_were_kept(mlp, keep_all, run, torch.float32, sizes=(30, 40))


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
