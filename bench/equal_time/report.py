"""The table and the picture of the comparison at equal time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bench.equal_time.contestants import CONTESTANTS, Setting
from bench.equal_time.training import Run

__all__ = ["draw", "entry", "show"]


def entry(runs: Sequence[Run], best: Run, step: float, setting: Setting) -> dict[str, Any]:
    """What ``results.json`` has of a contestant.

    Args:
        runs: with all of its values.
        best: the one that goes on.
        step: seconds of a step.
        setting: has the times to compare at.
    """
    at = {f"{seconds:g}": _at(best, seconds / step) for seconds in setting.seconds}
    return {"at": at, "best": best.values, "step_seconds": step, "runs": [asdict(run) for run in runs]}


def _at(run: Run, steps: float) -> dict[str, float | None]:
    found = {curve: run.loss_after(steps, curve) for curve in ("train_loss", "test_loss")}
    return {"steps": round(steps), **{key: value if math.isfinite(value) else None for key, value in found.items()}}


def show(results: dict[str, Any]) -> None:
    """Print losses after each time, and their ratio to the best first-order method's."""
    table = Table(title="Train loss after equal time (ratio to the best first-order method's; test loss)")
    times = [f"{seconds:g}" for seconds in results["setting"]["seconds"]]
    for heading in ("contestant", "values", "step", *(f"{time} s" for time in times)):
        table.add_column(heading)
    for name, found in results["contestants"].items():
        cells = [_cell(results, found["at"][time], time) for time in times]
        values = ", ".join(f"{key} {value:g}" for key, value in found["best"].items())
        table.add_row(CONTESTANTS[name].label, values, f"{1e3 * found['step_seconds']:.0f} ms", *cells)
    console = Console(width=140)
    console.print(table)
    bound = results["data"]["lower_bound"]
    console.print(f"No model can go below {bound:.2f}, the entropy of the train images' grey pixels.")


def _cell(results: dict[str, Any], at: dict[str, Any], time: str) -> str:
    baselines = [
        found["at"][time]["train_loss"] or math.inf
        for name, found in results["contestants"].items()
        if CONTESTANTS[name].first_order
    ]
    least = min(baselines, default=math.inf)
    if at["train_loss"] is None:
        return "not reached"
    ratio = f"{at['train_loss'] / least:.2f}; " if math.isfinite(least) else ""
    return f"{at['train_loss']:.2f} ({ratio}{at['test_loss']:.2f})"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the train loss of each contestant's best values against time."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for name, found in results["contestants"].items():
        run = next(run for run in found["runs"] if run["values"] == found["best"])
        seconds = [steps * found["step_seconds"] for steps in run["steps"]]
        style = "--" if CONTESTANTS[name].first_order else "-"
        axes.plot(seconds[1:], run["train_loss"][1:], style, label=CONTESTANTS[name].label)
    axes.axhline(results["data"]["lower_bound"], color="0.4", linewidth=1, linestyle=":", label="lower bound")
    axes.set(xlabel="training time (seconds)", ylabel="train loss (nats per image)", yscale="log")
    axes.set_title(f"{results['data']['name']}, batches of {results['setting']['batch_size']}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
