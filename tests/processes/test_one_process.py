"""A process group of one process changes nothing."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from locoprop_torch import LocoProp
from tests.helpers import assert_same, loss_of, mlp, transfers_of
from tests.processes.pool import free_port, join

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture
def one_process():
    join(0, 1, free_port())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("rows", [None, 2])
def test_one_process_under_ddp(one_process, rows):
    models = mlp(), mlp()
    wrapped = nn.parallel.DistributedDataParallel(models[0])
    for model in (wrapped, models[1]):
        opt = LocoProp(model, rows=rows)
        loss_of(model).backward()
        opt.step()
    assert_same(*models)


def test_names_and_functions_are_those_of_the_model(one_process):
    wrapped = nn.parallel.DistributedDataParallel(mlp())
    opt = LocoProp(wrapped, transfers={"4": "softmax"})
    assert transfers_of(opt) == {"0": "tanh", "2": "sigmoid", "4": "softmax"}
    # A checkpoint of the model without its wrapper fits.
    opt.load_state_dict(LocoProp(mlp(), transfers={"4": "softmax"}).state_dict())
    compiled: Any = torch.compile(wrapped)
    assert transfers_of(LocoProp(compiled)).keys() == {"0", "2", "4"}
