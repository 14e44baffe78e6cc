"""Growth of time with B, K, N, T and depth: fitted exponents, and the schedule's prediction beside the measurement."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import device, processes, report
from bench.cases import Case, Layer
from bench.contestants import Contestant, all_contestants
from bench.measure import quantiles
from bench.work import Work
from locoprop_kernels import schedule

__all__ = ["exponent", "main", "sweeps"]

_TILES = schedule.Tiles(n=128, b=128, k=128)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope of log time against log size over the larger half of the points, and its standard error."""
    x, y = np.log(sizes), np.log(seconds)
    x, y = x[-max(3, (len(x) + 1) // 2 + 1) :], y[-max(3, (len(y) + 1) // 2 + 1) :]
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - slope * x - intercept
    spread = np.sqrt((residual**2).sum() / max(1, len(x) - 2) / ((x - x.mean()) ** 2).sum())
    return float(slope), float(spread)


def sweeps(gpu: bool) -> dict[str, tuple[list[int], Callable[[int], Case]]]:
    """``{variable: (values, case at a value)}``; all local loops, around B = K = N = 512 (4096 on a GPU) and T = 10."""
    base = 4096 if gpu else 512

    def case(b: int = base, k: int = base, n: int = base, t: int = 10, depth: int = 1, loss: str = "matching") -> Case:
        return Case("sweep", "scaling", (Layer(b, k, n, "tanh"),) * depth, t, scope="local", loss=loss)

    sizes = [base // 4, base // 2, base, 2 * base, 4 * base]
    return {
        "B": (sizes, lambda b: case(b=b)),
        "K": (sizes, lambda k: case(k=k)),
        "N": (sizes, lambda n: case(n=n)),
        "T": ([2, 5, 10, 20, 50], lambda t: case(t=t)),
        "depth": ([1, 2, 4, 8], lambda depth: case(depth=depth)),
        "B (Gram)": (sizes, lambda b: case(b=b, loss="squared")),
        "K (Gram)": (sizes, lambda k: case(k=k, b=4 * base, loss="squared")),
    }


def main(arguments: list[str]) -> int:
    """``python -m bench scaling``; with ``processes`` first, what several processes send each other."""
    if arguments[:1] == ["processes"]:
        return processes.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m bench scaling", description=__doc__)
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="Run on this device (default: the GPU if there is one).",
    )
    parser.add_argument(
        "--contestant",
        nargs="*",
        default=["ours-fp32", "ours-bf16", "textbook"],
        help="Time the contestants with these names (default: %(default)s).",
    )
    parser.add_argument(
        "--clock",
        choices=[*device.CLOCKS],
        default="wall",
        help="Read this clock; cpu is the processor time of one thread (default: %(default)s).",
    )
    parser.add_argument("--rounds", type=int, default=5, help="Time each point this often (default: %(default)s).")
    parser.add_argument("--out", type=Path, help="Write scaling.json and scaling.png to this folder.")
    options = parser.parse_args(arguments)
    where = torch.device(options.device)
    if where.type == "cuda" and not torch.cuda.is_available():
        print("--device cuda: this machine has no GPU that torch can use", file=sys.stderr)
        return 2
    if options.clock == "cpu":
        torch.set_num_threads(1)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    results = run(where, options.contestant, options.rounds, options.clock, console)
    if options.out:
        report.save(results, options.out / "scaling.json")
        _draw(results, options.out / "scaling.png")
    return 0


def run(where: torch.device, names: list[str], rounds: int, by: str, console: Console) -> dict[str, Any]:
    """Measure all sweeps and print the exponents."""
    gpu = where.type == "cuda"
    field = [one for one in all_contestants(where) if one.name in names]
    programs = torch.cuda.get_device_properties(where).multi_processor_count if gpu else 1
    results: dict[str, Any] = {
        "schema": 1,
        "command": f"python -m bench scaling --clock {by} --rounds {rounds} --contestant {' '.join(names)}",
        "clock": "device events" if gpu else by,
        "commit": device.commit(),
        "device": device.describe(where),
        "versions": device.versions(),
        "schedule": {"tiles": [_TILES.n, _TILES.b, _TILES.k], "programs": programs},
        "sweeps": {},
    }
    for variable, (values, make) in track([*sweeps(gpu).items()], "sweeps", console=console, transient=True):
        points = [_point(make(value), field, where, rounds, by) for value in values]
        for point, value in zip(points, values, strict=True):
            case = make(value)
            plan = schedule.build(case.sizes(), _TILES, programs)
            point["predicted"] = plan.total_makespan(case.iterations)
        fits = {one.name: exponent(values, [p["seconds"][one.name]["min"] for p in points]) for one in field}
        if "Gram" not in variable:
            fits["schedule"] = exponent(values, [point["predicted"] for point in points])
        results["sweeps"][variable] = {"values": values, "points": points, "exponents": fits}
    _print_exponents(results["sweeps"], [one.name for one in field], console)
    return results


def _print_exponents(measured: dict[str, Any], names: list[str], console: Console) -> None:
    table = Table("variable", "values", *names, "schedule's prediction")
    for variable, sweep in measured.items():
        found = [sweep["exponents"].get(name) for name in (*names, "schedule")]
        cells = ["" if fit is None else f"{fit[0]:.2f} ± {fit[1]:.2f}" for fit in found]
        table.add_row(variable, ", ".join(map(str, sweep["values"])), *cells)
    console.print("exponents of time (fastest of the rounds) over the larger sizes of each sweep:")
    console.print(table)


def _point(case: Case, field: list[Contestant], where: torch.device, rounds: int, by: str) -> dict[str, Any]:
    work = Work(case, where)
    entries = {one.name: one.build(work) for one in field}
    for entry in entries.values():
        entry.run()
    samples: dict[str, list[float]] = {name: [] for name in entries}
    for _ in range(rounds):
        for name, entry in entries.items():
            samples[name].append(device.clock(entry.run, where, by=by))
    return {"flops": case.flops(), "seconds": {name: quantiles(times) for name, times in samples.items()}}


def _draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = results["sweeps"]
    figure, grid = plt.subplots(2, (len(found) + 1) // 2, figsize=(13, 6), layout="constrained")
    for axes, (variable, sweep) in zip(grid.flat, found.items(), strict=False):
        for name in sweep["points"][0]["seconds"]:
            times = [point["seconds"][name]["min"] for point in sweep["points"]]
            axes.loglog(sweep["values"], times, "o-", label=f"{name}: {sweep['exponents'][name][0]:.2f}")
        if "schedule" in sweep["exponents"]:
            predicted = np.array([point["predicted"] for point in sweep["points"]], float)
            scale = sweep["points"][-1]["seconds"][next(iter(sweep["points"][0]["seconds"]))]["min"] / predicted[-1]
            label = f"schedule (scaled): {sweep['exponents']['schedule'][0]:.2f}"
            axes.loglog(sweep["values"], predicted * scale, "k:", label=label)
        axes.set_xticks(sweep["values"], [f"{value:,}" for value in sweep["values"]], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlabel(variable)
        axes.set_ylabel("seconds")
        axes.legend(fontsize=6)
    for axes in [*grid.flat][len(found) :]:
        axes.set_visible(False)
    figure.suptitle(f"{results['device']['name']}: time against size, with fitted exponents", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
