"""More than one process: refused at the first step, however the model came to be wrapped."""

import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from locoprop_torch import LocoProp
from tests.helpers import RECENT, loss_of, mlp, moved, weights

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(rank, world, port):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)


def two_processes(rank, port, results):
    start(rank, 2, port)
    model = mlp()
    messages = []
    opt = None
    try:
        LocoProp(nn.parallel.DistributedDataParallel(model))
    except ValueError as error:
        messages.append(str(error))
    dist.destroy_process_group()
    opt = LocoProp(model)  # built before the processes meet, as Lightning and accelerate do
    start(rank, 2, port + 1)
    wrapped = nn.parallel.DistributedDataParallel(model)
    before = weights(model)
    loss_of(wrapped, seed=rank).backward()
    try:
        opt.step()
    except ValueError as error:
        messages.append(str(error))
    results[rank] = (messages, any(moved(model, before)))
    dist.destroy_process_group()


def test_two_processes_are_refused():
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(two_processes, (free_port(), results), nprocs=2)
        for messages, changed in results.values():
            assert len(messages) == 2
            assert all("does not support several processes yet" in m and "got 2 processes" in m for m in messages)
            assert not changed


@pytest.fixture
def one_process():
    start(0, 1, free_port())
    yield
    dist.destroy_process_group()


def test_one_process_under_ddp_trains(one_process):
    model = nn.parallel.DistributedDataParallel(mlp())
    opt = LocoProp(model)
    before = weights(model)
    loss_of(model).backward()
    opt.step()
    assert all(moved(model, before))


@pytest.mark.skipif(not RECENT, reason="its FSDP2 needs a GPU")
def test_sharded_parameters_are_refused(one_process):
    from torch.distributed.fsdp import fully_shard

    model = mlp()
    opt = LocoProp(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh)
    loss_of(model).backward()
    with pytest.raises(ValueError, match="does not support sharded parameters"):
        opt.step()
    with pytest.raises(ValueError, match="does not support sharded parameters"):
        LocoProp(model)
