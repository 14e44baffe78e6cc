"""FSDP2 (``fully_shard``): every process solves the local problems of the rows of weights that it holds."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from locoprop_torch import LocoProp
from tests.helpers import RECENT, mlp, weights
from tests.processes.test_data_parallel import OPTIONS, TOLERANCE, Grouped, Tied, batch_of, frozen

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or not RECENT, reason="needs gloo; older FSDP2 needs a GPU"
)


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
MODELS = {
    "mlp": (mlp, {}),
    "squared": (mlp, {"local_loss": "squared", "prox": 0.1}),
    "convolution": (Convolution, {"aux": "adamw", "weight_decay": 0.1, "rule": "adam"}),
    "grouped": (Grouped, {"aux": "adamw", "weight_decay": 0.1, "prox": 0.1, "rule": "adam"}),
    "softmax": (mlp, {"transfers": {"4": "softmax"}, "weight_decay": 0.2}),
    "regularised": (mlp, {"regulariser": shrink, "masks": {"0.weight": MASK}}),
    "tied": (Tied, {"rule": "adagrad"}),
    "frozen": (frozen, {"rule": "momentum", "reduction": "sum"}),
}


def made(name, dtype):
    make, options = MODELS[name]
    torch.manual_seed(0)
    return make().to(dtype), options


def sharded(model, **options):
    """The model, every layer with parameters by itself and the rest."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in list(model.modules()):
        # Those that share parameters must be in one group.
        if isinstance(layer, (nn.Linear, nn.Conv1d)) and not isinstance(model, Tied):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(tensor):
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def trained(name, sizes, rank, dtype, rows, steps=5, parts=1, reshard=None, synchronised=False):
    """The weights after some steps of one process of several, or of one that has all batches where ``rank`` is None."""
    model, own = made(name, dtype)
    if rank is not None:
        model = sharded(model, **({} if reshard is None else {"reshard_after_forward": reshard}))
    opt = LocoProp(model, **OPTIONS, **own, rows=rows)
    count = 1 if rank is None else len(sizes)
    for step in range(steps):
        opt.zero_grad()
        for part in range(parts):
            if rank is not None and not synchronised:
                model.set_requires_gradient_sync(part == parts - 1)
            xs, ys = batch_of(step, part, sizes, dtype)
            x, y = (torch.cat(xs), torch.cat(ys)) if rank is None else (xs[rank], ys[rank])
            (F.mse_loss(model(x), y, reduction="sum") * count / sum(sizes) / parts).backward()
        opt.step()
    assert not opt.skipped_steps
    return [whole(p) for p in model.parameters()]


def of_process(rank, *arguments, **options):
    return trained(arguments[0], arguments[1], rank, *arguments[2:4], **arguments[4])


def compare(pools, name, sizes, dtype=torch.float64, rows=None, **options):
    own = {key: value for key, value in options.items() if key not in ("reshard", "synchronised")}
    expected = trained(name, sizes, None, dtype, rows, **own)
    found = pools[len(sizes)].run(of_process, name, sizes, dtype, rows, options)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    start = weights(made(name, dtype)[0])
    displacement, error = (
        torch.cat([(a - b).double().flatten() for a, b in zip(expected, others, strict=True)])
        for others in (start, found[0])
    )
    assert displacement.norm() > 0
    assert error.norm() <= TOLERANCE[dtype] * displacement.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_are_one(pools, name, rows, dtype):
    compare(pools, name, [5, 4], dtype, rows)


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("name", ["mlp", "convolution"])
def test_fewer_outputs_than_processes(pools, name, rows):
    compare(pools, name, [3, 1, 0, 8], rows=rows)


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("synchronised", [False, True])
def test_gradient_accumulation(pools, rows, synchronised):
    compare(pools, "mlp", [2, 6], rows=rows, parts=3, synchronised=synchronised)


@pytest.mark.parametrize("reshard", [False, True, 1])
def test_what_is_resharded_after_the_forward_pass(pools, reshard):
    compare(pools, "mlp", [4, 3], rows=3, reshard=reshard)
