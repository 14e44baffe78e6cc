"""Tensor parallelism by output rows (``ColwiseParallel``): every process has the whole batch, and solves its rows."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from locoprop_kernels import rules
from locoprop_torch import LocoProp, PerExample
from tests.helpers import RECENT, weights
from tests.processes.test_data_parallel import OPTIONS, TOLERANCE, batch_of, check_as_one
from tests.processes.test_fully_sharded import whole

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or not RECENT, reason="needs gloo, and a recent DTensor"
)
MASK = torch.arange(54).view(9, 6) % 3 > 0
#: The plan of a model, by layer, and options. Where a layer is left out it is as in every other process.
MODELS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "columns": ({"0": "columns", "2": "columns"}, {"rule": "adam", "weight_decay": 0.1, "prox": 0.1}),
    "all": ({"0": "columns", "2": "columns", "4": "columns"}, {"masks": {"0.weight": MASK}}),
    "unit": ({"0": "columns", "4": "columns"}, {"rule": "adam", "lr": 1e-3, "activation_lr": PerExample(2.0)}),
    "head": ({"0": "columns"}, {"transfers": {"4": "softmax"}, "local_loss": "matching"}),
    "squared": ({"0": "columns", "2": "columns"}, {"local_loss": "squared", "reduction": "sum", "lr": 1e-3}),
    "rows": ({"0": "columns", "2": "inputs"}, {"aux": lambda params: torch.optim.SGD(params, lr=0.1)}),
}  # fmt: skip


def made(dtype, name=""):
    torch.manual_seed(0)
    # What a row-parallel layer takes must be cut evenly.
    hidden = 10 if name == "rows" else 9
    return nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 8), nn.Sigmoid(), nn.Linear(8, 3)).to(dtype)


def parallel(model, plan):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    # A row-parallel layer takes what a column-parallel one leaves.
    inner = "inputs" in plan.values()
    styles: dict[str, Any] = {
        "columns": ColwiseParallel() if inner else ColwiseParallel(output_layouts=Replicate()),
        "inputs": RowwiseParallel(),
    }
    return parallelize_module(model, mesh, {name: styles[style] for name, style in plan.items()})


def trained(rank, name, dtype, rows, parts=1):
    """The weights after some steps, of one process of several or alone: all have the same batch."""
    plan, own = MODELS[name]
    model = made(dtype, name)
    left = [p for layer, style in plan.items() if style == "inputs" for p in model[int(layer)].parameters()]
    if rank is not None:
        model = parallel(model, plan)
        left = [p for layer, style in plan.items() if style == "inputs" for p in model[int(layer)].parameters()]
    options = {**OPTIONS, **own, "rows": rows}
    if left:
        options["aux"] = own["aux"](left)
    opt = LocoProp(model, **options)
    for step in range(5):
        opt.zero_grad()
        for part in range(parts):
            (x,), (y,) = batch_of(step, part, [9], dtype)
            (F.mse_loss(model(x), y) / parts).backward()
        opt.step()
    assert not opt.skipped_steps
    assert opt.last_reports[0].problems[0].rows == 9 * parts
    return [whole(p) for p in model.parameters()]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_are_one(pools, name, rows, dtype):
    compare(pools, name, dtype, rows)


def test_accumulation(pools):
    compare(pools, "columns", torch.float64, 4, parts=2)


def compare(pools, name, dtype, rows, **options):
    expected = trained(None, name, dtype, rows, **options)
    found = pools[2].run(trained, name, dtype, rows, *options.values())
    # Weights are rounded when they are stored, at each step: a displacement may be no larger than that allows to see.
    rounding = torch.finfo(dtype).eps / 4 * torch.cat([one.double().flatten() for one in expected]).norm()
    check_as_one(found, expected, weights(made(dtype, name)), dtype, rounding)


class Own(rules.SGD):
    """A rule of the user's own, of which nobody knows whether it is elementwise."""


REFUSED: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "inputs": (
        {"0": "columns", "2": "inputs"},
        {},
        r"layer '2': its weight must be .*RowwiseParallel.*leave the layer",
    ),
    "softmax": ({"4": "columns"}, {"transfers": {"4": "softmax"}}, "must have outputs in every process.*layer '4'"),
    "own rule": ({"0": "columns"}, {"rule": Own()}, "no rule or regulariser of your own.*layer '0'"),
    "shard_state": ({"0": "columns"}, {"shard_state": True}, "shard_state=True are not supported, got layer '0'"),
    "few outputs": ({"4": "columns"}, {}, "must have outputs in every process"),
    "other batch": ({"0": "columns"}, {}, "must have the same batch"),
}


def refused(rank, name):
    plan, options, _ = REFUSED[name]
    try:
        model = parallel(made(torch.float64), plan)
        opt = LocoProp(model, **options)
        (x,), (y,) = batch_of(0, 0, [8 if name == "other batch" and rank else 9], torch.float64)
        if name == "other batch":
            # As if the second process had another number of examples, which torch does not notice either.
            for layer, size in ((opt._layers[layer], len(x)) for layer in opt._layers):
                layer.sizes = lambda size=size: [size]  # type: ignore[method-assign, misc]
            (x,), (y,) = batch_of(0, 0, [9], torch.float64)
        F.mse_loss(model(x), y).backward()
        opt.step()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "few outputs"])
def test_what_is_refused(pools, name):
    first, second = pools[2].run(refused, name)
    assert first == second
    assert re.search(REFUSED[name][2], first), first


def test_every_process_must_have_an_output(pools):
    texts = pools[4].run(refused, "few outputs")
    assert all(re.search(REFUSED["few outputs"][2], text) for text in texts)
