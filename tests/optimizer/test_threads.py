"""Several threads of a process, each with a model and an optimiser of its own, as in a search of hyper-parameters."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from locoprop_torch import LocoProp

COUNT = 4


def network(generator):
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(seed, backend="auto"):
    """The parameters of a model that has been trained for some steps."""
    generator = torch.Generator().manual_seed(seed)
    model = network(generator)
    opt = LocoProp(model, rows=8, backend=backend)
    assert [layer.transfer.name for layer in opt._layers.values()] == ["tanh", "identity"]
    for _ in range(15):
        x, y = torch.randn(32, 20, generator=generator), torch.randint(5, (32,), generator=generator)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_models_are_built_and_trained_side_by_side(backend):
    alone = [trained(seed, backend) for seed in range(COUNT)]
    with ThreadPoolExecutor(COUNT) as pool:
        for _ in range(5):
            together = list(pool.map(trained, range(COUNT), COUNT * [backend]))
            for one, other in zip(alone, together, strict=True):
                assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


def test_other_threads_notice_nothing_while_transfer_functions_are_found(capsys):
    """Tracing sends the calls of all modules of the process through the tracer."""
    other = network(torch.Generator().manual_seed(0))
    x = torch.ones(3, 20)
    expected = other(x)
    seen: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()  # a list would be put back

    def meanwhile():
        seen.put(other(x))
        seen.put(other[0].weight)
        print("heard")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            print("not heard")
            thread = threading.Thread(target=meanwhile)
            thread.start()
            thread.join()
            return torch.tanh(self.layer(x))

    opt = LocoProp(Model())
    assert [layer.transfer.name for layer in opt._layers.values()] == ["tanh"]
    assert torch.equal(seen.get_nowait(), expected)
    assert seen.get_nowait() is other[0].weight
    assert set(capsys.readouterr().out.split("\n")) == {"heard", ""}
