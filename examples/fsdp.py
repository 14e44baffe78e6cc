"""Sharded parameters: ``torchrun --nproc-per-node 2 examples/fsdp.py``.

Run again, with any number of processes, it goes on from its last checkpoint: ``... examples/fsdp.py 80`` to 80 steps.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from locoprop_torch import LocoProp

SAVED = Path("checkpoints")


def parts(model: nn.Module, opt: LocoProp, step: int) -> dict[str, Any]:
    """What a checkpoint has; every process comes here, and saves and loads its own part."""
    of_model, of_optimizer = get_state_dict(model, opt)
    return {"model": of_model, "optimizer": of_optimizer, "step": step}


def resumed(model: nn.Module, opt: LocoProp) -> int:
    """Load the last whole checkpoint, if there is one; the number of steps that it was after."""
    # The file .metadata is written last.
    steps = [int(path.parent.name) for path in SAVED.glob("*/.metadata")]
    if not steps:
        return 0
    state = parts(model, opt, 0)
    checkpoint.load(state, checkpoint_id=SAVED / str(max(steps)))
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


def main() -> None:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 4))
    mesh = init_device_mesh("cpu", (size,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    # After the model has been sharded.
    opt = LocoProp(model, transfers={"2": "softmax"})
    x = torch.randn(1024, 20)
    y = x[:, :4].argmax(1)
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    # Every process takes its part of each batch.
    for step in range(resumed(model, opt), steps):
        part = slice(step % 8 * 128 + rank * 128 // size, step % 8 * 128 + (rank + 1) * 128 // size)
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x[part]), y[part])
        loss.backward()
        opt.step()
        if (step + 1) % 20 == 0:
            checkpoint.save(parts(model, opt, step + 1), checkpoint_id=SAVED / str(step + 1))
    with torch.no_grad():
        final = nn.functional.cross_entropy(model(x), y)
    if rank == 0:
        print(f"loss {final:.6f}")


if __name__ == "__main__":
    # On GPUs: "nccl", torch.cuda.set_device(...), a mesh of "cuda", and the batches there.
    torch.distributed.init_process_group("gloo")
    main()
    # A sharded model refers to itself: what is left of it would keep the group until Python ends, which may abort then.
    gc.collect()
    torch.distributed.destroy_process_group()
