"""DistributedDataParallel: a step of several processes is that of one process on their batches, one after another."""

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from locoprop_torch import GroupedLinear, LocoProp, PerExample
from tests.helpers import mlp, weights

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

#: Of the displacement from where training began.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
OPTIONS: dict[str, Any] = {"lr": 1e-2, "activation_lr": 3.0, "local_iterations": 4}


class Grouped(nn.Module):
    """Grouped layers, a convolution with groups, and a normalisation for ``aux``."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2), nn.LayerNorm(6)
        self.grouped, self.head = GroupedLinear(2, 6, 5), nn.Linear(10, 3)

    def forward(self, x):
        hidden = self.norm(torch.tanh(self.conv(x.unflatten(-1, (2, 3)))).flatten(1)[:, :6])
        return self.head(torch.sigmoid(self.grouped(torch.stack([hidden, hidden.flip(-1)]))).movedim(0, 1).flatten(1))


class Tied(nn.Module):
    """A layer that is used twice, and another one that shares its weight."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.again.weight, self.again.bias = self.first.weight, self.first.bias

    def forward(self, x):
        hidden = torch.tanh(self.first(torch.tanh(self.first(x))))
        return self.head(torch.tanh(self.again(hidden)))


def frozen():
    model = mlp()
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model


class Convolution(nn.Module):
    """A convolution, a normalisation for ``aux`` and a head with fewer outputs than there may be processes."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(2, 5, 3, padding=1), nn.LayerNorm(15), nn.Linear(15, 3)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.conv(x.unflatten(-1, (2, 3)))).flatten(1)))


def shrink(start, increment):
    """The gradient of a regulariser that looks at all outputs of a layer."""
    return 1e-2 * (start + increment) / (start + increment).norm()


MASK = torch.arange(30).view(5, 6) % 3 != 1
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "unit": (mlp, {"rule": "adam", "lr": 1e-3, "activation_lr": PerExample(2.0)}),
    "mlp": (mlp, {}),
    "squared": (mlp, {"local_loss": "squared"}),
    "softmax": (mlp, {"transfers": {"4": "softmax"}, "rule": "adam"}),
    "grouped": (Grouped, {"aux": "adamw", "weight_decay": 0.1, "prox": 0.1}),
    "tied": (Tied, {"rule": "adagrad"}),
    "frozen": (frozen, {"rule": "momentum", "reduction": "sum"}),
    "convolution": (Convolution, {"aux": "adamw", "weight_decay": 0.1, "rule": "adam"}),
    "regularised": (mlp, {"regulariser": shrink, "masks": {"0.weight": MASK}}),
}


def made(name, dtype):
    make, options = MODELS[name]
    torch.manual_seed(0)
    return make().to(dtype), options


def batch_of(step, part, sizes, dtype):
    """Inputs and targets of every process in one part of a step."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    xs, ys = (torch.randn(sum(sizes), width, generator=generator, dtype=torch.float64).to(dtype) for width in (6, 3))
    return xs.split(sizes), ys.split(sizes)


def trained(name, sizes, rank, dtype, options, steps=5, parts=1, how="after", late=False):
    """The weights after some steps of one process of several, or of one that has all batches where ``rank`` is None."""
    model, own = made(name, dtype)
    options = {**OPTIONS, **own, **options}
    make: dict[str, Any] = {} if how in ("after", "before", "inner") else {how: True}
    wrapped = model
    if how == "before":
        opt = LocoProp(model, **options)
    if rank is not None:
        wrapped = nn.parallel.DistributedDataParallel(model, **make)
    if how != "before":
        opt = LocoProp(wrapped if how != "inner" else model, **options)
    count = 1 if rank is None else len(sizes)
    for step in range(steps):
        opt.zero_grad()
        # torch does not take a first backward pass under no_sync with static_graph.
        count_parts = 1 if late and not step else parts
        for part in range(count_parts):
            last = part == count_parts - 1
            with contextlib.nullcontext() if last or rank is None else wrapped.no_sync():
                xs, ys = batch_of(step, part, sizes, dtype)
                x, y = (torch.cat(xs), torch.cat(ys)) if rank is None else (xs[rank], ys[rank])
                # DistributedDataParallel averages gradients, so this is the mean over all examples.
                (F.mse_loss(wrapped(x), y, reduction="sum") * count / sum(sizes) / count_parts).backward()
        opt.step()
    assert not opt.skipped_steps
    return weights(model)


def of_process(rank, name, sizes, dtype, options, arguments):
    return trained(name, sizes, rank, dtype, options, **arguments)


def check_as_one(found, expected, start, dtype, rounding=0.0):
    """The weights that several processes found are all the same bits, and those of one that began at ``start``."""
    first, *others = found
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    displacement, error = (
        torch.cat([(a - b).double().flatten() for a, b in zip(expected, weight, strict=True)])
        for weight in (start, first)
    )
    assert displacement.norm() > 0
    assert error.norm() <= TOLERANCE[dtype] * displacement.norm() + rounding


def compare(pools, name, sizes, dtype, rows=None, shard_state=False, **arguments):
    """Several processes give the weights of one, and all the same bits."""
    options = {"rows": rows, "shard_state": shard_state}
    expected = trained(name, sizes, None, dtype, options, **{k: v for k, v in arguments.items() if k != "how"})
    found = pools[len(sizes)].run(of_process, name, sizes, dtype, options, arguments)
    check_as_one(found, expected, weights(made(name, dtype)[0]), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_are_one(pools, name, rows, dtype):
    compare(pools, name, [5, 5], dtype, rows)


@pytest.mark.parametrize("rows", [None, 2, 5])
@pytest.mark.parametrize("sizes", [[7, 2], [0, 6], [3, 1, 0, 8]])
@pytest.mark.parametrize("name", ["mlp", "grouped", "unit"])
def test_uneven_batches(pools, name, sizes, rows):
    compare(pools, name, sizes, torch.float64, rows)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("shard_state", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_four_processes(pools, name, shard_state, rows, dtype):
    compare(pools, name, [3, 1, 0, 8], dtype, rows, shard_state)


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("sizes", [[5, 5], [2, 6]])
@pytest.mark.parametrize("name", ["mlp", "tied", "unit"])
def test_gradient_accumulation_without_synchronisation(pools, name, sizes, rows):
    compare(pools, name, sizes, torch.float64, rows, parts=3)


WAYS = ["before", "inner", "static_graph", "gradient_as_bucket_view", "find_unused_parameters"]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("how", WAYS)
def test_ways_to_wrap(pools, how, parts):
    compare(pools, "mlp", [4, 3], torch.float64, 3, how=how, parts=parts, late=how == "static_graph")


def test_the_same_bits_again(pools):
    first, second = (pools[2].run(of_process, "mlp", [4, 3], torch.float32, {"rows": 2}, {})[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def of_another_number(rank, sizes, options):
    """Passes before and after a step; accumulates another number of parts in each process."""
    model = mlp()
    opt = LocoProp(model, **OPTIONS, **options)
    wrapped = nn.parallel.DistributedDataParallel(model)
    xs, ys = batch_of(0, 0, sizes, torch.float64)
    parts = xs[rank].split(2), ys[rank].split(2)
    for i, (x, y) in enumerate(zip(*parts, strict=True)):
        last = i == len(parts[0]) - 1
        with contextlib.nullcontext() if last else wrapped.no_sync():
            (F.mse_loss(wrapped(x), y, reduction="sum") * len(sizes) / sum(sizes)).backward()
    opt.step()
    return weights(model)


@pytest.mark.parametrize("rows", [None, 3])
def test_more_parts_in_one_process_than_in_the_other(pools, rows):
    sizes = [6, 2]
    found = pools[2].run(of_another_number, sizes, {"rows": rows})
    model = mlp()
    opt = LocoProp(model, **OPTIONS, rows=rows)
    (xs, ys) = batch_of(0, 0, sizes, torch.float64)
    pieces = [some[0].split(2) + some[1].split(2) for some in (xs, ys)]
    order = [[0, 3], [1], [2]]  # parts of both processes, then those that the first one has alone
    for which in order:
        x, y = (torch.cat([piece[i] for i in which]) for piece in pieces)
        (F.mse_loss(model(x), y, reduction="sum") / sum(sizes)).backward()
    opt.step()
    for weight, expected in zip(found[0], weights(model), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-13)


class Pooled(nn.Module):
    """Takes sequences and images of any size."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)).movedim(1, -1)).flatten(0, -2)


def of_other_sizes(rank, rows, shard_state):
    """The weights after a step with sequences of another length, and another number of them, in each process."""
    torch.manual_seed(0)
    model = Pooled().double()
    opt = LocoProp(model, **OPTIONS, rows=rows, shard_state=shard_state)
    wrapped = model if rank is None else nn.parallel.DistributedDataParallel(model)
    xs = [torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for shape in SHAPES]
    for x in xs if rank is None else [xs[rank]]:
        (wrapped(x).square().sum() * (1 if rank is None else 2)).backward()
    opt.step()
    return weights(model)


SHAPES = [(3, 2, 5), (2, 2, 7)]


@pytest.mark.parametrize("shard_state", [False, True])
def test_batches_of_other_shapes(pools, shard_state):
    """With all rows: of few, one process takes others if its passes come one after another."""
    for weight, expected in zip(
        pools[2].run(of_other_sizes, None, shard_state)[0], of_other_sizes(None, None, False), strict=True
    ):
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-13)
    first, second = pools[2].run(of_other_sizes, 4, shard_state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
