"""What a step sends, counted, is what the model in ``bench.processes`` says; so is FSDP2's own traffic."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench import processes
from locoprop_torch import LocoProp
from tests.helpers import RECENT
from tests.processes.test_fully_sharded import sharded

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or not RECENT, reason="needs gloo; older FSDP2 needs a GPU"
)
SIZE, ROWS, ITERATIONS, BATCH = 64, 8, 5, 64


class Received(TorchDispatchMode):
    """Bytes that the collectives of a step bring to a process, without its own."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensor = args[0][0] if isinstance(args[0], list) else args[0]
            whole = tensor.numel() * tensor.element_size()
            # A flag is reduced: one comes from every other process.
            self.found.append(
                whole * (self.size - 1) if "reduce" in str(func) else whole * (self.size - 1) // self.size
            )
        return func(*args, **(kwargs or {}))


def counted(rank, wrap):
    from torch.distributed.tensor.debug import CommDebugMode

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE))
    model = wrapped = sharded(model) if wrap == "sharded" else model
    if wrap != "sharded":
        wrapped = nn.parallel.DistributedDataParallel(model)
    opt = LocoProp(model, rows=ROWS, local_iterations=ITERATIONS, shard_state=wrap == "shared out")
    wrapped(torch.randn(BATCH // dist.get_world_size(), SIZE)).square().mean().backward()
    with CommDebugMode() as calls, Received(dist.get_world_size()) as received:
        opt.step()
    return received.found, calls.get_total_counts()


@pytest.mark.parametrize("wrap", ["replicated", "sharded", "shared out"])
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_and_calls_are_those_of_the_model(pools, size, wrap):
    for found, calls in pools[size].run(counted, wrap):
        header, rows, flag, *increments = found
        assert calls == len(found)
        # One call for all layers.
        own = [2 * processes.of_increments(SIZE, SIZE, size, 4)] if wrap == "shared out" else []
        assert increments == own
        assert header + flag == processes.AGREEMENT * (size - 1)
        assert rows == 2 * processes.of_rows(ROWS, ITERATIONS, SIZE, SIZE, size, 4)


def kept(rank):
    """Bytes of what is kept of the passes of a layer until a step, in two parts, and after it."""
    model = nn.Sequential(nn.Linear(SIZE, 2 * SIZE), nn.Tanh(), nn.Linear(2 * SIZE, SIZE))
    wrapped = nn.parallel.DistributedDataParallel(model)
    opt, found = LocoProp(model, rows=ROWS, local_iterations=ITERATIONS), []
    with wrapped.no_sync():
        wrapped(torch.randn(BATCH, SIZE)).square().mean().backward()
    wrapped(torch.randn(BATCH, SIZE)).square().mean().backward()
    for act in (lambda: None, opt.step):
        act()
        tensors = [t for layer in opt._layers.values() for one in layer.passes for t in (one.x, one.preactivation)]
        found.append(sum(t.numel() * t.element_size() for t in tensors if t is not None))
    return found


def test_passes_are_kept_whole_until_the_step(pools):
    """As the guide says, which is more than one process keeps."""
    assert pools[2].run(kept) == [[2 * (2 * BATCH) * (SIZE + 2 * SIZE) * 4, 0]] * 2


def of_both(rank, size, rows, iterations):
    """Bytes that FSDP2 brings to a process in the passes of a layer, and those that a step does."""
    model = sharded(nn.Sequential(nn.Linear(size, size, bias=False), nn.Tanh()))
    opt = LocoProp(model, rows=rows, local_iterations=iterations)
    # As in training, where the weight that the last step has changed is gathered.
    for _ in range(2):
        opt.zero_grad()
        with Received(dist.get_world_size()) as theirs:
            model(torch.randn(512 // dist.get_world_size(), size)).square().mean().backward()
        with Received(dist.get_world_size()) as ours:
            opt.step()
    return sum(theirs.found), sum(ours.found)


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_of_sharded_weights_are_those_of_the_model(pools, size):
    for theirs, _ in pools[size].run(of_both, SIZE, ROWS, ITERATIONS):
        assert theirs == processes.of_fsdp(SIZE, SIZE, size, 4)


@pytest.mark.sweep
def test_few_rows_are_a_small_part_of_the_counted_traffic(pools):
    for theirs, ours in pools[2].run(of_both, 4096, 32, 10):
        assert theirs == processes.of_fsdp(4096, 4096, 2, 4)
        assert ours <= 0.15 * theirs
        assert ours == pytest.approx(0.047 * theirs, rel=0.01)


def test_few_rows_are_a_small_part_of_the_traffic_of_sharded_weights():
    """As is said in the guide, for up to 1,024 processes."""
    for count in (2, 4, 1024):
        share = processes.of_rows(32, 10, 4096, 4096, count, 2) / processes.of_fsdp(4096, 4096, count, 2)
        assert f"{share:.1%}" == "4.7%"


def test_the_table(capsys):
    assert processes.main([]) == 0
    assert "1024" in capsys.readouterr().out
