"""FSDP2 (``fully_shard``): every process solves the local problems of the rows of weights that it holds."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from locoprop_torch import LocoProp, PerExample
from tests.helpers import RECENT, mlp, weights
from tests.processes.test_data_parallel import (
    MASK,
    OPTIONS,
    TOLERANCE,
    Convolution,
    Grouped,
    Tied,
    batch_of,
    check_as_one,
    frozen,
    shrink,
)

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or not RECENT, reason="needs gloo; older FSDP2 needs a GPU"
)


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "unit": (mlp, {"rule": "adam", "lr": 1e-3, "activation_lr": PerExample(2.0)}),
    "mlp": (mlp, {}),
    "squared": (mlp, {"local_loss": "squared", "prox": 0.1}),
    "adam": (mlp, {"rule": "adam"}),
    "convolution": (Convolution, {"aux": "adamw", "weight_decay": 0.1, "rule": "adam"}),
    "grouped": (Grouped, {"aux": "adamw", "weight_decay": 0.1, "prox": 0.1, "rule": "adam"}),
    "softmax": (mlp, {"transfers": {"4": "softmax"}, "weight_decay": 0.2}),
    "masked": (mlp, {"masks": {"0.weight": MASK}}),
    "regularised": (mlp, {"regulariser": shrink, "masks": {"0.weight": MASK}}),
    "tied": (Tied, {"rule": "adagrad"}),
    "frozen": (frozen, {"rule": "momentum", "reduction": "sum"}),
}


def made(name, dtype):
    make, options = MODELS[name]
    torch.manual_seed(0)
    return make().to(dtype), options


def sharded(model, hybrid=False, device="cpu", **options):
    """The model, every layer with parameters by itself and the rest; ``hybrid``: in two processes, copied to others."""
    from torch.distributed.fsdp import fully_shard

    count = dist.get_world_size()
    shape, names = ((count // 2, 2), ("copies", "shards")) if hybrid else ((count,), ("shards",))
    mesh = dist.device_mesh.init_device_mesh(device, shape, mesh_dim_names=names)
    for layer in list(model.modules()):
        # Those that share parameters must be in one group.
        if isinstance(layer, (nn.Linear, nn.Conv1d)) and not isinstance(model, Tied):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(tensor):
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def trained(name, sizes, rank, dtype, rows, steps=5, parts=1, reshard=None, synchronised=False, hybrid=False):
    """The weights after some steps of one process of several, or of one that has all batches where ``rank`` is None."""
    model, own = made(name, dtype)
    if rank is not None:
        model = sharded(model, hybrid, **({} if reshard is None else {"reshard_after_forward": reshard}))
    opt = LocoProp(model, **{**OPTIONS, **own}, rows=rows)
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
    own = {key: value for key, value in options.items() if key not in ("reshard", "synchronised", "hybrid")}
    expected = trained(name, sizes, None, dtype, rows, **own)
    found = pools[len(sizes)].run(of_process, name, sizes, dtype, rows, options)
    check_as_one(found, expected, weights(made(name, dtype)[0]), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_are_one(pools, name, rows, dtype):
    compare(pools, name, [5, 4], dtype, rows)


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("name", ["mlp", "convolution"])
def test_fewer_outputs_than_processes(pools, name, rows):
    compare(pools, name, [3, 1, 0, 8], rows=rows)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_four_processes(pools, name, hybrid, rows, dtype):
    compare(pools, name, [3, 1, 0, 8], dtype, rows, hybrid=hybrid)


def test_the_same_bits_again(pools):
    arguments: Any = ("mlp", [4, 3], torch.float32, 2, {})
    first, second = (pools[2].run(of_process, *arguments)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("name", ["unit", "convolution", "softmax"])
def test_hybrid_sharding(pools, name, rows):
    compare(pools, name, [3, 1, 0, 8], rows=rows, hybrid=True)


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("synchronised", [False, True])
def test_gradient_accumulation(pools, rows, synchronised):
    compare(pools, "mlp", [2, 6], rows=rows, parts=3, synchronised=synchronised)


@pytest.mark.parametrize("reshard", [False, True, 1])
def test_what_is_resharded_after_the_forward_pass(pools, reshard):
    compare(pools, "mlp", [4, 3], rows=3, reshard=reshard)


def mixed(rank, policy, rows):
    """The weights after steps with passes in another precision than the parameters, and what is in state."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = sharded(mlp(), mp_policy=MixedPrecisionPolicy(**policy))
    opt = LocoProp(model, **OPTIONS, rows=rows, rule="adam")
    for step in range(5):
        opt.zero_grad()
        xs, ys = batch_of(step, 0, [5, 4], torch.float64)
        (F.mse_loss(model(xs[rank]).double(), ys[rank], reduction="sum") * 2 / 9).backward()
        opt.step()
    kinds = {value.dtype for slots in opt.state.values() for name, value in slots.items() if name != "step"}
    return [whole(p) for p in model.parameters()], kinds


BRAIN, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
POLICIES: dict[str, dict[str, Any]] = {
    "all": {"param_dtype": SINGLE, "reduce_dtype": DOUBLE, "output_dtype": DOUBLE},
    "passes": {"param_dtype": SINGLE},
    "averages": {"reduce_dtype": SINGLE},
    "half": {"param_dtype": BRAIN, "reduce_dtype": SINGLE, "output_dtype": DOUBLE},
    "inputs as they are": {"param_dtype": DOUBLE, "cast_forward_inputs": False},
}


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_mixed_precision(pools, policy, rows):
    expected = trained("adam", [5, 4], None, torch.float64, rows)
    coarsest = max(torch.finfo(dtype).eps for name, dtype in POLICIES[policy].items() if name.endswith("dtype"))
    tolerance = max(8 * coarsest, TOLERANCE[torch.float64])
    for found, kinds in pools[2].run(mixed, POLICIES[policy], rows):
        assert kinds == {torch.float64}
        for weight, other, start in zip(found, expected, weights(mlp()), strict=True):
            assert (weight - other).norm() < tolerance * (other - start).norm()


def refused(rank):
    """What is said about models that cannot be trained, or not in this way."""
    from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import Shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    found = []

    def catch(step):
        try:
            step()
        except ValueError as error:
            found.append(str(error))

    even = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    by_inputs: Any = fully_shard(copy.deepcopy(even), mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    catch(lambda: LocoProp(by_inputs))
    offloaded: Any = fully_shard(copy.deepcopy(even), mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    catch(lambda: LocoProp(offloaded))
    flat = FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"))
    catch(lambda: LocoProp(flat))
    model = mlp()
    early = LocoProp(model)
    fully_shard(model, mesh=mesh)
    in_place = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    fully_shard(in_place, mesh=mesh)
    for some, opt in ((model, early), (in_place, LocoProp(in_place)), (target := sharded(mlp()), None)):
        opt = opt or LocoProp(target, target="primal")
        x, y = batch_of(0, 0, [4, 4], torch.float64)
        F.mse_loss(some(x[rank]), y[rank]).backward()
        catch(opt.step)
    return found


def test_what_is_refused(pools):
    first, second = pools[2].run(refused)
    assert first == second
    by_inputs, offloaded, flat, early, in_place, target = first
    assert (
        "layer '0': its weight must be sharded by output rows, once, as fully_shard or ColwiseParallel does, got "
        "(Shard(dim=1),)" in by_inputs
    )
    assert "RowwiseParallel" in by_inputs
    assert "does not support CPUOffloadPolicy" in offloaded
    assert "FullyShardedDataParallel, whose flat parameters have no rows" in flat
    assert "build a new optimiser" in early
    assert "the output of layer '0' was overwritten in place, and its weight is sharded by now" in in_place
    assert "only the target 'dual' is supported" in target


def discarded(rank, how):
    """The weights after a step, before which a gradient was discarded."""
    torch.manual_seed(0)
    model = sharded(mlp())
    opt = LocoProp(model, **OPTIONS)
    for seed in (1, 2):
        (opt if how == "optimiser" else model).zero_grad()
        xs, ys = batch_of(seed, 0, [4, 3], torch.float64)
        F.mse_loss(model(xs[rank]), ys[rank]).backward()
    opt.step()
    return [whole(p) for p in model.parameters()], opt.last_reports[0].problems[0].rows


@pytest.mark.parametrize("how", ["optimiser", "model"])
def test_rows_go_with_a_discarded_gradient(pools, how):
    assert [rows for _, rows in pools[2].run(discarded, how)] == [7, 7]
