"""What Python does in a ``LocoProp`` step with the Triton backend: everything but the launches, which are left out.

The layers are so small that torch's own arithmetic on the CPU takes no time. On a GPU this runs while the device is
busy with the step before, and bounds a step from below unless it is captured in a CUDA graph. There, torch's allocator
gives every step the same addresses, so that the table of them is on the device already; here it does not, so the table
of the first step is taken without looking at them (``--new-tables`` makes one in every step).
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import nn

from bench import device
from bench.measure import quantiles

__all__ = ["main"]


def _nothing(*arguments: object) -> None:
    """In place of a launch."""


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m bench.host``."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--layers", type=int, default=8, help="Stack this many layers (default: %(default)s).")
    parser.add_argument("--steps", type=int, default=200, help="Time this many steps (default: %(default)s).")
    parser.add_argument("--new-tables", action="store_true", help="Make a table of addresses in every step.")
    parser.add_argument("--profile", action="store_true", help="Also print where the time goes.")
    options = parser.parse_args(arguments)
    os.environ["TRITON_INTERPRET"] = "1"  # so that the Triton backend takes tensors on the CPU
    from locoprop_kernels.kernels import commit, configs, phases, plan, prepare, single, softmax
    from locoprop_torch import LocoProp, presets

    for module in (commit, phases, prepare, single, softmax):
        for name in vars(module):
            if name.startswith("launch"):
                setattr(module, name, _nothing)
    if not options.new_tables:
        uploaded = plan.Plan._uploaded

        def found(self: plan.Plan, content: tuple[Any, ...], *arguments: Any) -> torch.Tensor:
            hash(content)
            return uploaded(self, content[:1], *arguments)

        plan.Plan._uploaded = found  # type: ignore[assignment,method-assign]
    torch.set_num_threads(1)
    model = nn.Sequential(*(part for _ in range(options.layers) for part in (nn.Linear(4, 4), nn.Tanh())))
    optimizer = LocoProp(model, **presets["package"], backend="triton", compute_dtype=torch.bfloat16)
    x = torch.rand(8, 4)
    profile = cProfile.Profile()
    seconds = []
    with configs.use(driver="single", programs=1):
        for step in range(options.steps + 10):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            if options.profile:
                profile.enable()
            begin = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - begin)
            profile.disable()
            # The first steps make plans and state.
            if step == 9:
                seconds.clear()
                profile.clear()
    times = quantiles(seconds)
    where, versions = device.describe(torch.device("cpu")), device.versions()
    Console(width=140).print(
        f"{where['name']}, one thread, Python {versions['python']}, torch {versions['torch']}\n"
        f"{options.layers} layers, {options.steps} steps: {1e3 * times['p50']:.2f} ms a step without the launches "
        f"(p10 {1e3 * times['p10']:.2f}, p90 {1e3 * times['p90']:.2f})"
    )
    if options.profile:
        pstats.Stats(profile).sort_stats("cumtime").print_stats(40)
    return 0


if __name__ == "__main__":
    sys.exit(main())
