"""A step of LocoProp under ``DistributedDataParallel``, one process for each GPU, beside a step of Adam."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.cases import PAPER_WIDTHS
from locoprop_torch import LocoProp

__all__ = ["measure"]


def _network(widths: tuple[int, ...], device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(device)


def _seconds(step: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Of one step, the median; every process waits for its own device."""
    found = []
    for _ in range(repeats + 3):
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begin)
    return sorted(found[3:])[repeats // 2]


def _worker(rank: int, processes: int, store: str, dry: bool) -> None:
    """Join the group, time both steps, and leave their seconds in a file beside ``store``."""
    gpu = not dry
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    try:
        found = [_timed(ours, device) for ours in (True, False)]
        if rank == 0:
            Path(store + ".txt").write_text(" ".join(map(repr, found)))
    finally:
        dist.destroy_process_group()


def _timed(ours: bool, device: torch.device) -> float:
    """Seconds of a step; the wrapped model ends here, because a group of gloo must not have it as its last owner.

    ``DistributedDataParallel`` gives its group back without giving up the interpreter's lock, and a thread of
    the group may wait for that lock to end (seen with torch 2.13).
    """
    gpu, rank = device.type == "cuda", dist.get_rank()
    widths, batch, repeats = (PAPER_WIDTHS, 1000, 20) if gpu else ((6, 5, 6), 8, 1)
    x = torch.rand(batch, widths[0], device=device, generator=torch.Generator(device).manual_seed(rank))
    model = _network(widths, device)
    ddp = nn.parallel.DistributedDataParallel(model, device_ids=[rank] if gpu else None)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), fused=gpu)
    if ours:
        transfers = {str(2 * i): "tanh" for i in range(len(widths) - 2)} | {str(2 * len(widths) - 4): "sigmoid"}
        optimizer = LocoProp(model, rows=32 if gpu else 4, transfers=transfers)

    def step() -> None:
        optimizer.zero_grad()
        _loss(ddp(x), x).backward()
        optimizer.step()

    return _seconds(step, device, repeats)


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(output, target, reduction="sum") / len(target)


def measure(processes: int, dry: bool, timeout: float) -> tuple[float, float]:
    """Seconds of a step of LocoProp and of one of Adam; dry on the CPU over gloo, one process being this one.

    Raises:
        RuntimeError: the processes take too long, or one of them fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        if processes == 1:
            _worker(0, 1, store, dry)
        else:
            context = torch.multiprocessing.spawn(
                _worker, (processes, store, dry), nprocs=processes, join=False, daemon=True
            )
            assert context is not None
            until = time.monotonic() + timeout
            # It returns when a process has ended, too.
            while not context.join(max(0.0, until - time.monotonic())):
                if time.monotonic() >= until:
                    for process in context.processes:
                        process.terminate()
                    raise RuntimeError(f"{processes} processes took more than {timeout:.0f} s")
        ours, adam = map(float, Path(store + ".txt").read_text().split())
    return ours, adam
