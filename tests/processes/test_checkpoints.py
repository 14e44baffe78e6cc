"""``torch.distributed.checkpoint``: a resume on any number of processes goes on as if there had been no break."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from locoprop_torch import LocoProp
from tests.helpers import RECENT
from tests.processes.test_data_parallel import OPTIONS, batch_of
from tests.processes.test_fully_sharded import made, sharded, whole

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or not RECENT, reason="needs gloo; older FSDP2 needs a GPU"
)
SIZES = (2, 3, 1, 4)


def prepared(rank, name, how, rows):
    """A model, the optimiser, and the batch of this process in a step."""
    model, own = made(name, torch.float64)
    if how == "sharded":
        model = sharded(model)
    opt = LocoProp(model, **{**OPTIONS, **own}, rows=rows, shard_state=how == "shared out")
    wrapped = nn.parallel.DistributedDataParallel(model) if how in ("replicated", "shared out") else model
    count = dist.get_world_size() if how != "alone" else 1
    share = len(SIZES) // count

    def step(number):
        xs, ys = batch_of(number, 0, SIZES, torch.float64)
        x, y = (torch.cat(some[rank * share : (rank + 1) * share]) for some in (xs, ys))
        opt.zero_grad()
        (F.mse_loss(wrapped(x), y, reduction="sum") * count / sum(SIZES)).backward()
        opt.step()

    return model, opt, step


def parts(model, opt, flat):
    """What a checkpoint has of both, as torch's functions give it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    states = get_state_dict(model, opt, options=options)
    return dict(zip(("model", "optimizer"), states, strict=True)), options


def saved(rank, name, how, rows, flat, path, steps):
    """Take some steps and save everything."""
    import torch.distributed.checkpoint as checkpoint

    model, opt, step = prepared(rank, name, how, rows)
    for number in range(steps):
        step(number)
    checkpoint.save(parts(model, opt, flat)[0], checkpoint_id=path)


def resumed(rank, name, how, rows, flat, path, steps, more):
    """The weights after some more steps from there."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model, opt, step = prepared(rank, name, how, rows)
    states, options = parts(model, opt, flat)
    checkpoint.load(states, checkpoint_id=path)
    set_state_dict(model, opt, model_state_dict=states["model"], optim_state_dict=states["optimizer"], options=options)
    assert opt.rows_seed == steps
    for number in range(steps, steps + more):
        step(number)
    return [whole(p) for p in model.parameters()]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("convolution", (2, "sharded"), (2, "sharded")),
        ("convolution", (2, "sharded"), (4, "sharded")),
        ("softmax", (4, "sharded"), (2, "sharded")),
        ("convolution", (2, "replicated"), (4, "replicated")),
        ("convolution", (2, "replicated"), (2, "sharded")),
        ("convolution", (2, "shared out"), (4, "shared out")),
        ("unit", (4, "shared out"), (2, "replicated")),
        ("softmax", (2, "sharded"), (2, "shared out")),
    ],
)
def test_a_resume_is_exact(pools, tmp_path, name, before, after, flat):
    path, steps, more, rows = str(tmp_path / "checkpoint"), 3, 2, 3
    pools[before[0]].run(saved, name, before[1], rows, flat, path, steps)
    found = pools[after[0]].run(resumed, name, after[1], rows, flat, path, steps, more)
    model, _, step = prepared(0, name, "alone", rows)
    for number in range(steps + more):
        step(number)
    for weight, expected in zip(found[0], model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected.detach(), rtol=1e-11, atol=1e-12)


def save_a_part(rank, path):
    """Save what one process has of a sharded state, without torch.distributed.checkpoint."""
    _, opt, step = prepared(rank, "convolution", "sharded", 3)
    step(0)
    torch.save(opt.state_dict(), f"{path}{rank}")


def load_a_part(rank, path, how):
    """What is said where it is loaded by other processes, and what has changed."""
    _, opt, step = prepared(rank, "convolution", how, 3)
    state = torch.load(f"{path}{rank % 2}", weights_only=False)
    before = str(opt.state_dict())
    try:
        opt.load_state_dict(state)
    except ValueError as error:
        unchanged = before == str(opt.state_dict())
        step(1)
        return str(error), unchanged
    step(1)
    return None


@pytest.mark.parametrize(("size", "how"), [(4, "sharded"), (2, "replicated"), (2, "sharded")])
def test_parts_of_a_state_are_refused_by_other_processes(pools, tmp_path, size, how):
    pools[2].run(save_a_part, f"{tmp_path}/")
    found = pools[size].run(load_a_part, f"{tmp_path}/", how)
    if (size, how) == (2, "sharded"):
        assert found == [None, None]
        return
    assert len(set(found)) == 1
    text, unchanged = found[0]
    assert "got a part of what 2 had: save and load it with torch.distributed.checkpoint" in text
    assert unchanged
