"""``shard_state=True``: each process solves some outputs, keeps their state, and sends the others the increments."""

import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from locoprop_torch import LocoProp
from locoprop_torch.ownership import cut
from tests.helpers import moved, weights
from tests.processes.pool import free_port, join
from tests.processes.test_data_parallel import MODELS, OPTIONS, WAYS, batch_of, compare, made

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def loads(layers, bounds):
    """What each process has to do."""
    return [
        sum((ends[p + 1] - ends[p]) * cost for (_, cost, _), ends in zip(layers, bounds, strict=True))
        for p in range(len(bounds[0]) - 1)
    ]


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 64])
def test_outputs_are_cut_evenly(processes):
    layers = [(512, 784.0, True), (10, 512.0, True), (4096, 1024.0, True), (64, 7.5, True), (1, 3.0, True)]
    bounds = cut(layers, processes)
    for (count, _, _), ends in zip(layers, bounds, strict=True):
        assert list(ends) == sorted(ends)
        assert (ends[0], ends[-1], len(ends)) == (0, count, processes + 1)
    total = loads(layers, bounds)
    # Sixteen outputs of the largest layers are the least that is moved.
    assert max(total) <= sum(total) / processes + 2 * 16 * 1024


def test_a_layer_that_cannot_be_parted_has_one_owner():
    layers = [(30, 10.0, True), (10, 30.0, False), (30, 10.0, True)]
    assert cut(layers, 3) == [(0, 30, 30, 30), (0, 0, 10, 10), (0, 0, 0, 30)]
    assert cut([(5, 1.0, False)], 2) == [(0, 0, 5)]
    # Fewer outputs than processes.
    assert sorted(loads([(2, 1.0, True)], cut([(2, 1.0, True)], 4))) == [0, 0, 1, 1]


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_are_one(pools, name, rows):
    compare(pools, name, [5, 5], torch.float64, rows, shard_state=True)


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("name", ["mlp", "convolution"])
def test_in_single_precision(pools, name, rows):
    compare(pools, name, [5, 5], torch.float32, rows, shard_state=True)


@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("name", ["mlp", "grouped", "softmax", "unit"])
def test_four_processes_with_uneven_batches(pools, name, rows):
    compare(pools, name, [3, 1, 0, 8], torch.float64, rows, shard_state=True)


@pytest.mark.parametrize("how", WAYS)
def test_ways_to_wrap(pools, how):
    compare(pools, "mlp", [4, 3], torch.float64, 3, shard_state=True, how=how, parts=2, late=how == "static_graph")


def step_of(rank, opt, wrapped, number, scale=1.0):
    xs, ys = batch_of(number, 0, [4] * dist.get_world_size(), torch.float64)
    opt.zero_grad()
    (F.mse_loss(wrapped(xs[rank]), ys[rank]) * scale).backward()
    opt.step()


def prepared(name="mlp", **options):
    model, own = made(name, torch.float64)
    opt = LocoProp(model, **{**OPTIONS, **own, "rows": 3, "shard_state": True, **options})
    return model, opt, nn.parallel.DistributedDataParallel(model)


def shared_out(rank):
    """How many elements of state a process has, and what reports say."""
    _, opt, wrapped = prepared("grouped")
    step_of(rank, opt, wrapped, 0)
    own = [p for group in opt.param_groups if not group.get("aux") for p in group["params"]]
    kept = sum(value.numel() for p in own for slot, value in opt.state[p].items() if slot != "step")
    solved = {problem.name: report.reason for report in opt.last_reports for problem in report.problems}
    return kept, sum(p.numel() for p in own), solved


def test_state_is_shared_out(pools):
    found = pools[4].run(shared_out)
    slots = 2  # RMSprop with momentum
    assert sum(kept for kept, _, _ in found) == slots * found[0][1]
    assert max(kept for kept, _, _ in found) < slots * found[0][1]
    for _, _, solved in found:
        assert solved.keys() == {"conv", "grouped", "head"}
    assert any(reason == "solved by other processes" for _, _, solved in found for reason in solved.values())


def infinite(rank):
    """What a step moves that is not finite in one process, and what the next one does."""
    model, opt, wrapped = prepared(weight_decay=0.5)
    found = []
    for number, scale in enumerate((float("inf") if rank == 1 else 1.0, 1.0)):
        before = weights(model)
        step_of(rank, opt, wrapped, number, scale)
        found.append((any(moved(model, before)), opt.skipped_steps))
    return found, weights(model)


@pytest.mark.filterwarnings("ignore:LocoProp skipped a step")
def test_what_is_not_finite_in_one_process_is_in_none(pools):
    (first, weight), (second, other) = pools[2].run(infinite)
    assert first == second == [(False, 1), (True, 1)]
    assert all(torch.equal(a, b) for a, b in zip(weight, other, strict=True))


def saved_and_loaded(rank, path, name):
    """Steps without a break, and with one: a whole state saved by each process, and loaded by new optimisers."""
    found = []
    for broken in (None, True, False):
        model, opt, wrapped = prepared(name)
        for number in range(4):
            step_of(rank, opt, wrapped, number)
            if broken is not None and number == 1:
                torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, f"{path}{rank}")
                model, opt, wrapped = prepared(name, shard_state=broken)
                saved = torch.load(f"{path}{rank}")
                model.load_state_dict(saved["model"])
                opt.load_state_dict(saved["optimizer"])
                # Before the next step, too, a state is whole.
                again = opt.state_dict()["state"]
                assert again.keys() == saved["optimizer"]["state"].keys()
                for place, slots in saved["optimizer"]["state"].items():
                    assert all(torch.equal(again[place][slot], value) for slot, value in slots.items())
        found.append(weights(model))
    shapes = [tuple(slots["exp_avg"].shape) for slots in saved["optimizer"]["state"].values() if "exp_avg" in slots]
    return found, shapes, [tuple(p.shape) for p in model.parameters()]


@pytest.mark.parametrize("name", ["convolution", "unit"])
def test_every_process_saves_a_whole_state(pools, tmp_path, name):
    for (unbroken, again, replicated), shapes, expected in pools[2].run(saved_and_loaded, f"{tmp_path}/", name):
        assert sorted(shapes) == sorted(expected)
        for a, b, c in zip(unbroken, again, replicated, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-13)


def changed(rank):
    """The weights after steps between which the owners change, and after the same steps of replicas."""
    found = []
    for shard_state in (True, False):
        model, opt, wrapped = prepared("frozen", shard_state=shard_state, param_groups=[])
        for number in range(6):
            if number == 2:
                opt.rows = None
                opt.param_groups[0]["local_iterations"] = 2
            if number == 4:
                opt.shard_state = not shard_state
            step_of(rank, opt, wrapped, number)
        found.append(weights(model))
    return found


def test_state_follows_its_owner(pools):
    for one, other in pools[2].run(changed):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def alone(rank, ports):
    """What is said where one process asks for the state alone; then both do."""
    dist.destroy_process_group()
    join(rank, 2, ports[0], patience=1.0)
    _, opt, wrapped = prepared()
    step_of(rank, opt, wrapped, 0)
    text = ""
    if rank == 0:
        try:
            opt.state_dict()
        except RuntimeError as error:
            text = str(error)
    else:
        time.sleep(1.5)
    step_of(rank, opt, wrapped, 1)
    count = len(opt.state_dict()["state"])
    dist.destroy_process_group()
    join(rank, 2, ports[1])
    return text, count


def test_state_dict_of_one_process_alone_says_what_to_do(pools):
    if not hasattr(dist.ProcessGroup, "get_group_store"):
        pytest.skip("this version of torch has no such store")
    (text, whole), (_, other) = pools[2].run(alone, [free_port(), free_port()])
    assert "call it in every process and let one of them save what it returns" in text
    assert whole == other == 6


def left(rank, port):
    """What is said where the process group is gone."""
    _, opt, wrapped = prepared()
    step_of(rank, opt, wrapped, 0)
    dist.destroy_process_group()
    del wrapped
    texts = []
    for act in (opt.state_dict, opt.step):
        try:
            act()
        except ValueError as error:
            texts.append(str(error))
    join(rank, 2, port)
    return texts


def test_the_state_is_refused_where_its_processes_are_gone(pools):
    for texts in pools[2].run(left, free_port()):
        assert len(texts) == 2
        assert all("is spread over 2 processes" in text or "is not initialised" in text for text in texts)
