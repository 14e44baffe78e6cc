"""Several processes: ``torchrun --nproc-per-node 2 examples/ddp.py``."""

import torch
from torch import nn

from locoprop_torch import LocoProp


def main() -> None:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 4))
    ddp = nn.parallel.DistributedDataParallel(model)
    opt = LocoProp(model, transfers={"2": "softmax"})
    x = torch.randn(1024, 20)
    y = x[:, :4].argmax(1)
    # Every process takes its part of each batch.
    for step in range(40):
        part = slice(step % 8 * 128 + rank * 128 // size, step % 8 * 128 + (rank + 1) * 128 // size)
        opt.zero_grad()
        loss = nn.functional.cross_entropy(ddp(x[part]), y[part])
        loss.backward()
        opt.step()
    with torch.no_grad():
        final = nn.functional.cross_entropy(model(x), y)
    if rank == 0:
        # Parameters and state are the same in all processes, so one of them saves both.
        torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, "ddp.pt")
        print(f"loss {final:.6f}")


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    main()
    # After the wrapped model has gone: a group of gloo whose last owner it is may never end.
    torch.distributed.destroy_process_group()
