"""Peak memory of a training loop, with ``LocoProp`` and with Adam: all tensors that are alive, from the model on.

Three loops: one batch a step; the same with activation checkpointing; the batch in eight parts whose gradients add up.
On a CPU every storage that torch allocates is followed from its birth to its end, so that the figures are the same on
every machine. What a single operator allocates and frees inside (a packed operand, say) is not seen. On a GPU torch's
allocator is asked.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from bench import device
from locoprop_kernels import scratch
from locoprop_torch import LocoProp, presets

__all__ = ["LOOPS", "LiveBytes", "main", "peak", "peak_of"]

MIB = 2**20
STEPS = 3


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is on, until they end.

    Attributes:
        live: bytes alive now.
        peak: the most there have been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._end, size).atexit = False

    def _end(self, size: int) -> None:
        self.live -= size


def _whole(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss


def _checkpointed(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    for start in range(0, len(model), 4):
        x = checkpoint(model[start : start + 4], x, use_reentrant=False)
    loss = nn.functional.mse_loss(x, y)
    loss.backward()
    return loss


def _in_parts(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    loss = x.new_zeros(())
    for xs, ys in zip(x.chunk(8), y.chunk(8), strict=True):
        loss = nn.functional.mse_loss(model(xs), ys) / 8
        loss.backward()
    return loss


LOOPS: dict[str, Callable[[nn.Sequential, Tensor, Tensor], Tensor]] = {
    "one batch": _whole,
    "checkpointed": _checkpointed,
    "eight parts": _in_parts,
}
PUBLISHED = {**presets["package"], "lr": 1e-6}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "Adam": lambda model: torch.optim.Adam(model.parameters()),
    "LocoProp": lambda model: LocoProp(model, **PUBLISHED),
    "LocoProp, rows=32": lambda model: LocoProp(model, **{**PUBLISHED, "rows": 32}),
    "LocoProp-S": lambda model: LocoProp(model, **PUBLISHED, local_loss="squared"),
}


def peak_of(work: Callable[[], object], where: torch.device) -> float:
    """Peak memory in MiB of what ``work`` allocates on the device ``where``; what was there before does not count."""
    counter = LiveBytes()
    scratch.release()  # what earlier work has left would not be seen
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
    with counter:
        work()
    if where.type == "cuda":
        return (torch.cuda.max_memory_allocated(where) - before) / MIB
    return counter.peak / MIB


def peak(optimizer: str, loop: str, width: int, layers: int, batch: int, where: torch.device) -> float:
    """Peak memory of ``STEPS`` training steps in MiB, everything from the model and the batch on.

    Args:
        optimizer: key of ``OPTIMIZERS``.
        loop: key of ``LOOPS``.
        width: inputs and outputs of each layer.
        layers: linear layers, each followed by tanh.
        batch: examples.
        where: device.
    """

    def work() -> None:
        x, y = torch.rand(2, batch, width, device=where).unbind()
        model = nn.Sequential(
            *(part for _ in range(layers) for part in (nn.Linear(width, width, device=where), nn.Tanh()))
        )
        made = OPTIMIZERS[optimizer](model)
        for _ in range(STEPS):
            made.zero_grad()
            loss = LOOPS[loop](model, x, y)
            made.step()
        float(loss.detach())

    return peak_of(work, where)


def main(argv: list[str] | None = None) -> None:
    """``python -m bench.memory``."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument(
        "--width", type=int, default=256, help="Give each layer this many inputs and outputs (default: %(default)s)."
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=12,
        help="Stack this many linear layers, each followed by tanh (default: %(default)s).",
    )
    parser.add_argument(
        "--batch", type=int, default=2048, help="Train on this many examples a step (default: %(default)s)."
    )
    parser.add_argument(
        "--device", default="cpu", help="Use cpu, or cuda to ask torch's allocator (default: %(default)s)."
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("bench/results/memory.json"),
        help="Write this file (default: %(default)s).",
    )
    options = parser.parse_args(argv)
    where = torch.device(options.device)
    console = Console()
    sizes = (options.width, options.layers, options.batch)
    about = device.describe(where)
    about.pop("memory_bytes", None)
    console.print(f"{options.layers} layers of {options.width}, {options.batch} examples; {about['name']}")
    cases = [(optimizer, loop) for optimizer in OPTIMIZERS for loop in LOOPS]
    rows = [
        {"optimizer": optimizer, "loop": loop, "peak_mib": round(peak(optimizer, loop, *sizes, where), 1)}
        for optimizer, loop in track(cases, "training", console=Console(stderr=True))
    ]
    table = Table("", *LOOPS, title="peak memory in MiB, model and optimiser included")
    for optimizer in OPTIMIZERS:
        table.add_row(optimizer, *(f"{row['peak_mib']:.0f}" for row in rows if row["optimizer"] == optimizer))
    console.print(table)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "command": "python -m bench.memory",
        "device": about,
        "versions": device.versions(),
        "width": options.width,
        "layers": options.layers,
        "batch": options.batch,
        "rows": rows,
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
