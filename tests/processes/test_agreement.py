"""What processes must agree in, and what happens where they do not: all of them raise, and nothing has changed."""

import itertools
import os
import re
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from locoprop_kernels import cpu_kernels, routes
from locoprop_torch import LocoProp, ownership
from locoprop_torch.sharding import own
from tests.helpers import RECENT, batch, mlp, moved, weights
from tests.processes.pool import Pool, free_port, join
from tests.processes.test_fully_sharded import sharded

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def caught(rank, spoil):
    """What a step raises after ``spoil`` has acted on one of two processes, and what it has moved."""
    model = mlp()
    opt = LocoProp(model, lr=1e-2, aux=None)
    wrapped = nn.parallel.DistributedDataParallel(model)
    x, y = batch(4, seed=rank)
    F.mse_loss(wrapped(x), y).backward()
    before = weights(model)
    if rank == 1:
        spoil(model, opt, x)
        before = weights(model)
    state = opt.rows_seed
    try:
        opt.step()
    except ValueError as error:
        return str(error), any(moved(model, before)), bool(opt.state), opt.rows_seed - state
    return None


def other_rate(model, opt, x):
    opt.param_groups[0]["lr"] = 2e-2


def bad_rate(model, opt, x):
    opt.param_groups[0]["lr"] = -1.0


def other_rule(model, opt, x):
    opt.local_loss = "squared"


def other_seed(model, opt, x):
    opt.rows_seed = 7


def other_sharing(model, opt, x):
    opt.shard_state = True


def no_gradient(model, opt, x):
    model[2].weight.grad = None


def own_gradient(model, opt, x):
    model[2].weight.grad.mul_(2)


def own_weight(model, opt, x):
    with torch.no_grad():
        model[0].weight[1, 1] += 1


def other_input(model, opt, x):
    x.add_(1)


def other_layer(model, opt, x):
    model[0] = nn.Linear(6, 5).double()


def sparse_gradient(model, opt, x):
    model[4].weight.grad = model[4].weight.grad.to_sparse()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_rate, r"must agree in parameter group 0, got lr=0.01\d*, .* in process 0 and lr=0.02"),
        (bad_rate, "process 1 of 2 could not make the step: ValueError: lr must be finite and >= 0, got -1.0"),
        (other_rule, "must agree in local_loss, got matching in process 0 and squared in process 1"),
        (other_seed, "must agree in rows_seed, got 0 in process 0 and 7 in process 1"),
        (other_sharing, "must agree in shard_state, got False in process 0 and True in process 1"),
        (no_gradient, "must agree in layer '2', got weight .*, with a gradient in torch.strided; .* in process 1"),
        (own_gradient, "the gradients differ between the processes, so they were not averaged: wrap the model"),
        (own_weight, "the weights differ between the processes: every process must start with the same ones"),
        (other_input, "process 1 of 2 could not make the step: ValueError: the input of layer '0' was overwritten"),
        (other_layer, "process 1 of 2 could not make the step: ValueError: layer '0' is no longer the module"),
        (
            sparse_gradient,
            "must agree in layer '4', got weight .* gradient in torch.strided; .* in torch.sparse_coo",
        ),
    ],
)
def test_all_processes_raise_the_same(pools, spoil, message):
    first, second = pools[2].run(caught, spoil)
    assert first == second, (first, second)
    text, *changes = first
    assert not any(changes)
    assert re.search(message, text), text


def without_numba(rank):
    """What a step raises where one of two processes has no numba."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "version", lambda: None if rank else "0.61.0")
        return caught(rank, lambda *nothing: None)


def test_all_processes_have_numba_or_none_has(pools):
    """Compiled loops have other last bits, so that weights would drift apart."""
    first, second = pools[2].run(without_numba)
    assert first == second
    text, *changes = first
    assert not any(changes)
    assert "must agree in numba, got 0.61.0 in process 0 and None in process 1" in text


def infinite_gradient(rank, rows):
    """Whether a step is made where one process has a loss that is not finite, and whether the next one is."""
    model = mlp()
    opt = LocoProp(nn.parallel.DistributedDataParallel(model), lr=1e-2, rows=rows)
    wrapped = nn.parallel.DistributedDataParallel(model)
    found = []
    for scale in (float("inf") if rank == 1 else 1.0, 1.0):
        x, y = batch(4, seed=rank)
        opt.zero_grad()
        before = weights(model)
        (F.mse_loss(wrapped(x), y) * scale).backward()
        opt.step()
        found.append((any(moved(model, before)), opt.skipped_steps))
    return found


@pytest.mark.filterwarnings("ignore:LocoProp skipped a step")
@pytest.mark.parametrize("rows", [None, 2])
def test_what_is_not_finite_in_one_process_is_in_none(pools, rows):
    assert pools[2].run(infinite_gradient, rows) == [[(False, 1), (True, 1)]] * 2


def infinite_loss(rank):
    """Whether a step is made where a closure returns a loss that is not finite in one process."""
    model = mlp()
    opt = LocoProp(model, lr=1e-2, aux=None)
    wrapped = nn.parallel.DistributedDataParallel(model)
    before = weights(model)

    def closure():
        loss = F.mse_loss(wrapped(batch(4, seed=rank)[0]), batch(4, seed=rank)[1])
        loss.backward()
        return loss * (float("nan") if rank == 0 else 1.0)

    opt.step(closure)
    return any(moved(model, before)), opt.skipped_steps


@pytest.mark.filterwarnings("ignore:LocoProp skipped a step")
def test_the_loss_of_every_process_must_be_finite(pools):
    assert pools[2].run(infinite_loss) == [(False, 1)] * 2


def message_of(step):
    try:
        step()
    except ValueError as error:
        return str(error)
    return None


def without_averages(rank):
    """What a step says where gradients are those of each process alone."""
    found = []
    model = mlp()
    opt = LocoProp(model, lr=1e-2)
    x, y = batch(4, seed=rank)
    F.mse_loss(model(x), y).backward()
    found.append(message_of(opt.step))
    opt.zero_grad()
    wrapped = nn.parallel.DistributedDataParallel(model)
    with wrapped.no_sync():
        F.mse_loss(wrapped(x), y).backward()
    found.append(message_of(opt.step))
    return found


def test_gradients_must_have_been_averaged(pools):
    for messages in pools[2].run(without_averages):
        assert all("gradients differ between the processes, so they were not averaged" in text for text in messages)


def within_join(rank, how):
    """What is said where one process has two batches and the other one, in the first step."""
    from torch.distributed.algorithms.join import Join

    model = mlp()
    wrapped = nn.parallel.DistributedDataParallel(model)
    opt = LocoProp(wrapped, lr=1e-2)
    try:
        with wrapped.join() if how == "method" else Join([wrapped, opt]):  # type: ignore[list-item]
            for seed in range(2 - rank):
                opt.zero_grad()
                F.mse_loss(wrapped(batch(4, seed=seed)[0]), batch(4, seed=seed)[1]).backward()
                opt.step()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("how", ["method", "context"])
def test_joining_is_refused(pools, how):
    first, second = pools[2].run(within_join, how)
    assert first == second
    assert "give every process the same number of batches, smaller or empty ones (x[:0], y[:0])" in first


def with_empty_batches(rank, shard_state):
    """What the message says: one process has three batches, the other one."""
    model = mlp()
    wrapped = nn.parallel.DistributedDataParallel(model)
    opt = LocoProp(wrapped, lr=1e-2, rows=3, shard_state=shard_state)
    loader = [batch(4, seed=seed) for seed in range(3 - 2 * rank)]
    most = torch.tensor(len(loader))
    dist.all_reduce(most, dist.ReduceOp.MAX)
    empty = [tensor[:0] for tensor in loader[0]]
    for x, y in itertools.islice(itertools.chain(loader, itertools.repeat(empty)), int(most)):
        opt.zero_grad()
        count = torch.tensor(len(x))
        dist.all_reduce(count)
        (F.mse_loss(wrapped(x), y, reduction="sum") * 2 / count).backward()
        opt.step()
    return opt.skipped_steps, opt.rows_seed, weights(model)


@pytest.mark.parametrize("shard_state", [False, True])
def test_processes_may_have_empty_batches_in_the_end(pools, shard_state):
    (skipped, count, first), (_, _, second) = pools[2].run(with_empty_batches, shard_state)
    assert (skipped, count) == (0, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    model = mlp()
    opt = LocoProp(model, lr=1e-2, rows=3)
    for number in range(3):
        parts = [batch(4, seed=number), *([batch(4, seed=0)] if not number else [])]
        x, y = (torch.cat(some) for some in zip(*parts, strict=True))
        opt.zero_grad()
        (F.mse_loss(model(x), y, reduction="sum") / len(x)).backward()
        opt.step()
    for weight, expected in zip(first, weights(model), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-13)


def of_several_models(rank):
    """Whether each process may train a model of its own, and what is said of models that are not wrapped alike."""
    groups = [dist.new_group([number]) for number in range(2)]
    model = mlp(seed=rank)
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=groups[rank])
    opt = LocoProp(wrapped, lr=1e-2, rows=2)
    before = weights(model)
    x, y = batch(4 + rank, seed=rank)
    F.mse_loss(wrapped(x), y).backward()
    opt.step()
    found = all(moved(model, before)), opt.last_reports[0].problems[0].rows
    other = nn.Sequential(nn.Linear(6, 5 + rank), nn.Tanh(), nn.Linear(5 + rank, 3)).double()
    opt = LocoProp(other)
    F.mse_loss(other(x), y).backward()
    longer = nn.Sequential(mlp(), *(nn.Linear(3, 3).double() for _ in range(rank)))
    another = LocoProp(longer)
    F.mse_loss(longer(x), y).backward()
    return *found, message_of(opt.step), message_of(another.step)


def test_every_process_may_have_a_model_and_a_group_of_its_own(pools):
    first, second = pools[2].run(of_several_models)
    assert first[:2] == (True, 4)
    assert second[:2] == (True, 5)
    assert first[2] == second[2]
    assert re.search(r"must agree in layer '0', got weight \[5, 6\].* and weight \[6, 6\].* in process 1", first[2])
    assert first[3] == second[3]
    assert "must agree in layers, got 0.0, 0.2, 0.4 in process 0 and 0.0, 0.2, 0.4, 1 in process 1" in first[3]


def other_route(rank):
    """Which route products take after a step of processes that had chosen different ones."""
    before = dict(routes._chosen)
    routes._chosen[torch.float32] = routes.Choice(("mm", "onednn")[rank], "a test")
    try:
        model = mlp(dtype=torch.float32)
        wrapped = nn.parallel.DistributedDataParallel(model)
        opt = LocoProp(wrapped, lr=1e-2)
        x, y = batch(4, seed=rank, dtype=torch.float32)
        F.mse_loss(wrapped(x), y).backward()
        opt.step()
        return routes.route(torch.float32)
    finally:
        routes._chosen.clear()
        routes._chosen.update(before)


@pytest.mark.skipif(len(routes.available(torch.float32)) < 2, reason="there is one route")
def test_all_processes_multiply_by_the_route_of_the_first(pools):
    assert pools[2].run(other_route) == ["mm", "mm"]


# --- process groups that begin late, are gone, or lose a process


def passes_of_before(rank, ports):
    """A pass that was cut down to its rows by one process; then there are two. And a group that is gone."""
    dist.destroy_process_group()
    found = []
    model = mlp()
    opt = LocoProp(model, lr=1e-2, rows=1, local_iterations=2)
    x, y = batch(8, seed=rank)
    F.mse_loss(model(x), y).backward()
    join(rank, 2, ports[0])
    found.append(message_of(opt.step))
    opt.zero_grad()
    wrapped = nn.parallel.DistributedDataParallel(model)
    F.mse_loss(wrapped(x), y).backward()
    found.append(message_of(opt.step))
    dist.destroy_process_group()
    found.append(message_of(opt.step))
    join(rank, 2, ports[1])
    return found


def test_groups_that_begin_late_or_are_gone(pools):
    ports = [free_port(), free_port()]
    for late, good, gone in pools[2].run(passes_of_before, ports):
        assert "process 0 of 2 could not make the step: ValueError: layer '0' was called before there were" in late
        assert good is None
        assert "the process group of the model's DistributedDataParallel is not initialised" in gone


def die(*_):
    os._exit(1)


def dying(rank, port, how):
    """Of two processes the second one dies before its second step, or in it before it has sent its increments.

    What the first one raises, when, and what has moved.
    """
    dist.destroy_process_group()
    join(rank, 2, port, patience=3.0)
    model = mlp()
    wrapped = sharded(model) if how == "sharded" else nn.parallel.DistributedDataParallel(model)
    opt = LocoProp(model, lr=1e-2, shard_state=how == "shared out")
    x, y = batch(4, seed=rank)
    for step in range(2):
        opt.zero_grad()
        F.mse_loss(wrapped(x), y).backward()
        before, seed, state = [own(p).clone() for p in model.parameters()], opt.rows_seed, str(opt.state)
        if step and rank == 1:
            if how != "shared out":
                die()
            ownership.Owners.exchange = die  # type: ignore[method-assign]
        begin = time.monotonic()
        try:
            opt.step()
        except RuntimeError:
            # What is left says whether the step was made in part.
            unchanged = all(torch.equal(own(p), old) for p, old in zip(model.parameters(), before, strict=True))
            return time.monotonic() - begin, unchanged and str(opt.state) == state, opt.rows_seed - seed
    return None


@pytest.mark.parametrize("how", ["replicated", "shared out", "sharded"])
def test_the_others_raise_where_a_process_dies(how):
    if how == "sharded" and not RECENT:
        pytest.skip("older FSDP2 needs a GPU")
    pool = Pool(2)
    try:
        seconds, unchanged, seeds = pool.run_until_first(dying, free_port(), how)
    finally:
        pool.stop()
    assert seconds < 10
    assert unchanged
    assert not seeds
