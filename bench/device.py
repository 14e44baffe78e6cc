"""The machine: what it is called, which versions run on it, and how fast it copies and multiplies."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from locoprop_kernels import route_cache, routes
from locoprop_kernels.products import product, rounded

__all__ = ["CLOCKS", "available_memory", "clock", "commit", "describe", "multiply", "rates", "synchronize", "versions"]


#: Host clocks: ``"cpu"`` is processor time of this process, which other processes hardly disturb; it means something
#: with one thread. GPUs are timed by their own events.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


_ROUTED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def describe(device: torch.device) -> dict[str, Any]:
    """Name and size of the device; nothing that identifies the host."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return {
        "type": "cpu",
        "name": route_cache.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_bytes": available_memory(device),
        "routes": {name: routes.route(dtype) for name, dtype in _ROUTED.items()},
    }


def versions(*others: str) -> dict[str, str]:
    """Versions of what the timings depend on, and of ``others``."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in ("triton", "numpy", "locoprop", *others):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def commit() -> str:
    """Short hash of the checked-out commit, with ``+`` if library or benchmarks differ from it."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "locoprop_kernels", "python", "bench/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def available_memory(device: torch.device) -> int:
    """Bytes that a case may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 * 2**30


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(run: Callable[[], object], device: torch.device, repeats: int = 1, by: str = "wall") -> float:
    """Seconds of one call, averaged over ``repeats`` back to back; by device events on a GPU, else by a host clock."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            run()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / 1e3 / repeats
    now = CLOCKS[by]
    begin = now()
    for _ in range(repeats):
        run()
    return (now() - begin) / repeats


def rates(device: torch.device, by: str = "wall", size: int | None = None) -> dict[str, float]:
    """Best measured rates: ``copy`` in bytes/s (read plus written), products in FLOP/s by precision.

    ``size`` is that of the products' matrices; the copied tensor is a hundred times larger than one of them.
    """
    gpu = device.type == "cuda"
    numbers = 2**28 if gpu else 2**25
    source = torch.empty(100 * size**2 if size else numbers, device=device).fill_(1.0)
    target = torch.empty_like(source)
    found = {"copy": 2 * source.nbytes / _best(lambda: target.copy_(source), device, by)}
    size = size or (8192 if gpu else 1536)
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16, **({"tf32": torch.float32} if gpu else {})}
    for name, dtype in precisions.items():
        if gpu:
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[name] = 2 * size**3 / _best(partial(multiply, left, right), device, by)
    if gpu:
        torch.set_float32_matmul_precision("highest")
        torch.cuda.empty_cache()
    else:
        matrix = torch.randn(size, size)
        found["fp32_torch_mm"] = 2 * size**3 / _best(lambda: torch.mm(matrix, matrix), device, by)
    return found


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` through the routine that the backend takes on this device; both operands have one dtype."""
    if left.is_cuda:
        return torch.mm(left, right)
    return product(rounded(left, left.dtype), rounded(right, right.dtype), left.dtype)


def _best(run: Callable[[], object], device: torch.device, by: str, rounds: int = 8) -> float:
    run()
    return min(clock(run, device, by=by) for _ in range(rounds))
