"""Rows are held once, and no longer than until the step."""

import gc
import weakref

import pytest
import torch
from torch import nn

from bench.memory import LOOPS, LiveBytes, peak
from tests.helpers import batch, mlp, published

CPU = torch.device("cpu")


def test_live_bytes_are_counted():
    with LiveBytes() as counter:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        c = a + 1
        del a, b
        d = torch.ones(500)
    assert (counter.live, counter.peak) == (6000, 8000)
    del c, d
    assert counter.live == 0


@pytest.mark.parametrize("loop", LOOPS)
def test_peak_is_that_of_adam_and_the_rows(loop):
    """Twelve layers of 64 and 2048 examples: inputs and pre-activations are 12 MiB, the weights next to nothing."""
    rows = 2 * 12 * 2048 * 64 * 4 / 2**20
    ours, adam = (peak(name, loop, 64, 12, 2048, CPU) for name in ("LocoProp", "Adam"))
    one_layer = 4 * 2048 * 64 * 4 / 2**20  # what the local loop of one layer makes of them
    assert ours <= rows + one_layer + 0.5 * adam


@pytest.mark.parametrize("target", ["dual", "primal"])
def test_a_step_releases_what_was_captured(target):
    model = mlp()
    opt = published(model, lr=1e-3, target=target)
    x, y = batch()
    alive = []
    model[1].register_forward_hook(lambda _, args, out: alive.append(weakref.ref(args[0].untyped_storage())))
    for _ in range(2):
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        gc.collect()
        assert alive[-1]() is None  # though the loss holds the graph
    assert loss.grad_fn is not None
