"""Runs that are killed with SIGKILL at random moments, again and again, and go on from their last checkpoint.

Each life first compares what it has loaded, weights and all state, with a run that was never killed; then it is killed.
``LOCOPROP_KILLS=100 pytest -m sweep tests/processes/test_kills.py`` makes so many resumes.
"""

import hashlib
import json
import os
import random
import time

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import keystr, tree_flatten_with_path

from tests.helpers import RECENT
from tests.processes.pool import PATIENCE, Pool
from tests.processes.test_checkpoints import parts, prepared

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or not RECENT, reason="needs gloo; older FSDP2 needs a GPU"
)
STEPS, ROWS = 12, 3
KILLS = int(os.environ.get("LOCOPROP_KILLS", "20"))
#: How a run is checkpointed, its model, and the seconds within which it is killed after it has resumed.
RUNS = {"renamed": ("alone", "unit", 0.2), "renamed with aux": ("alone", "convolution", 0.2),
        "distributed": ("sharded", "convolution", 0.6)}  # fmt: skip


def digest(model, opt):
    """A number that stands for all that a resumed run has in this process."""
    found = hashlib.blake2b(digest_size=8)
    leaves, _ = tree_flatten_with_path([model.state_dict(), opt.state_dict()])
    for path, leaf in sorted(((keystr(path), leaf) for path, leaf in leaves), key=lambda pair: pair[0]):
        found.update(path.encode())
        if isinstance(leaf, torch.Tensor):
            leaf = leaf.to_local() if hasattr(leaf, "to_local") else leaf
            leaf = leaf.detach().contiguous().numpy().tobytes()
        found.update(leaf if isinstance(leaf, bytes) else repr(leaf).encode())
    return found.hexdigest()


def saved(folder, model, opt, how, number):
    """Leave a checkpoint that is there as a whole or not at all."""
    if how == "sharded":
        import torch.distributed.checkpoint as checkpoint

        # It writes the file that makes a checkpoint whole last.
        checkpoint.save(parts(model, opt, False)[0], checkpoint_id=str(folder / str(number)))
        return
    state = {"model": model.state_dict(), "optimizer": opt.state_dict(), "step": number}
    torch.save(state, folder / "unfinished")
    os.replace(folder / "unfinished", folder / "checkpoint")


def loaded(folder, model, opt, how):
    """Load the last whole checkpoint; the number of steps that it was after."""
    if how == "sharded":
        return loaded_by_all(folder, model, opt)
    if not (folder / "checkpoint").exists():
        return 0
    state = torch.load(folder / "checkpoint")
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["optimizer"])
    return state["step"]


def loaded_by_all(folder, model, opt):
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import set_state_dict

    done = [max((int(found.parent.name) for found in folder.glob("*/.metadata")), default=0)]
    # One process may see a checkpoint that the other has just not seen.
    dist.broadcast_object_list(done)
    if done[0]:
        states, options = parts(model, opt, False)
        checkpoint.load(states, checkpoint_id=str(folder / str(done[0])))
        set_state_dict(
            model, opt, model_state_dict=states["model"], optim_state_dict=states["optimizer"], options=options
        )
    return done[0]


def life(rank, folder, run, expected=None):
    """Go on from the last checkpoint, to the end; without ``expected`` return what stands for each step."""
    how, name, _ = RUNS[run]
    model, opt, step = prepared(rank, name, how, ROWS)
    done = loaded(folder, model, opt, how)
    found = {}
    if done and expected is not None:
        with open(folder / f"log {rank}", "a") as log:
            # Through JSON, the numbers of steps have become texts.
            log.write(f"{done} {digest(model, opt) == expected[rank][str(done)]}\n")
    for number in range(done, STEPS):
        step(number)
        found[number + 1] = digest(model, opt)
        saved(folder, model, opt, how, number + 1)
    return found


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("kills", [2, pytest.param(KILLS, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("run", RUNS)
def test_a_run_that_is_killed_again_and_again_has_the_same_bits(tmp_path, run, kills):
    how, _, most = RUNS[run]
    seed = random.randrange(2**32)
    print("seed", seed)
    pool, generator = Pool(2 if how == "sharded" else 1), random.Random(seed)
    folder, resumes, lives = tmp_path / "0", 0, 0
    try:
        (tmp_path / "unbroken").mkdir()
        expected = json.loads(json.dumps(pool.run(life, tmp_path / "unbroken", run)))
        while resumes < kills:
            resumed, folder = newest(tmp_path, folder)
            before = len(lines(folder / "log 0"))
            pool.begin(life, folder, run, expected)
            begin = time.monotonic()
            while len(lines(folder / "log 0")) <= before if resumed else not whole_ones(folder):
                pool.check()
                assert time.monotonic() - begin < 3 * PATIENCE, "a run has not resumed in time"
                time.sleep(0.002)
            time.sleep(generator.uniform(0, most))
            pool.stop()
            resumes, lives = resumes + resumed, lives + 1
        found = [line for path in tmp_path.glob("*/log *") for line in lines(path)]
    finally:
        pool.stop()
    assert len(found) >= resumes
    assert all(line.endswith("True") for line in found), found
    print(resumes, "resumes,", lives, "kills; after steps", sorted(int(line.split()[0]) for line in found))


def whole_ones(folder):
    return [*folder.glob("*/.metadata"), *folder.glob("checkpoint")]


def newest(tmp_path, folder):
    """Whether there is a run to go on with, and its folder: another one where that one may have come to its end."""
    last = [line.split()[0] for line in lines(folder / "log 0")][-1:]
    if last and int(last[0]) >= STEPS - 2:
        folder = tmp_path / str(int(folder.name) + 1)
    folder.mkdir(exist_ok=True)
    return bool(whole_ones(folder)), folder
