"""The kernels under several processes, and NCCL where there are two GPUs: a step is that of one process, as elsewhere.

Without GPUs the same functions run on gloo, with interpreted kernels.
"""

import importlib.util

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from locoprop_torch import LocoProp
from tests.helpers import RECENT, weights
from tests.processes.pool import Pool
from tests.processes.test_data_parallel import OPTIONS, batch_of, check_as_one, made
from tests.processes.test_fully_sharded import sharded, whole

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not RECENT, reason="needs torch.distributed; older FSDP2 a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]
SIZES = [5, 3]


@pytest.fixture(scope="module")
def gpus():
    """Two processes with a GPU each."""
    pool = Pool(2, "nccl")
    yield pool
    pool.stop()


def trained(rank, name, how, where, backend, rows, dtype, steps):
    """The weights after some steps of one process of several, or of one that has all batches where ``rank`` is None."""
    device = torch.device(where, rank or 0) if where == "cuda" else torch.device(where)
    model, own = made(name, dtype)
    model = wrapped = model.to(device)
    if how == "sharded" and rank is not None:
        model = wrapped = sharded(model, device=where)
    elif rank is not None:
        wrapped = nn.parallel.DistributedDataParallel(model)
    opt = LocoProp(model, **{**OPTIONS, **own}, rows=rows, backend=backend, shard_state=how == "shared out")
    for step in range(steps):
        opt.zero_grad()
        xs, ys = batch_of(step, 0, SIZES, dtype)
        x, y = (torch.cat(some) if rank is None else some[rank] for some in (xs, ys))
        count = 1 if rank is None else len(SIZES)
        loss = F.mse_loss(wrapped(x.to(device)), y.to(device), reduction="sum")
        (loss * count / sum(SIZES)).backward()
        opt.step()
    assert not opt.skipped_steps
    return [whole(p).cpu() for p in model.parameters()]


def compare(pool, name, how, where, backend, rows, dtype, steps=5):
    expected = trained(None, name, "alone", where, backend, rows, dtype, steps)
    found = pool.run(trained, name, how, where, backend, rows, dtype, steps)
    check_as_one(found, expected, weights(made(name, dtype)[0]), dtype)


HOW = ["replicated", "shared out", "sharded"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
@pytest.mark.parametrize(("rows", "steps"), [(3, 2), pytest.param(None, 5, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("how", HOW)
def test_interpreted_kernels(pools, how, rows, steps):
    compare(pools[2], "unit", how, "cpu", "triton", rows, torch.float32, steps)


DOUBLE = torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("name", "rows", "dtype", "backend"),
    [
        ("unit", None, DOUBLE, "reference"),
        ("unit", 3, DOUBLE, "reference"),
        ("grouped", 3, DOUBLE, "reference"),
        ("softmax", 3, DOUBLE, "reference"),
        ("unit", 3, torch.float32, "triton"),
    ],
)
def test_nccl(gpus, name, how, rows, dtype, backend):
    compare(gpus, name, how, "cuda", backend, rows, dtype)
