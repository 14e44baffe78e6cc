"""What the study says: the test loss of each configuration as a ratio to that of Adam's defaults."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.defaults.configurations import BASELINE

__all__ = ["Summary", "draw", "print_report", "print_units", "summaries"]

# More than this and a run counts as this bad: one that diverged would make every geometric mean infinite.
WORST = 10.0
_MEASURED = ("max", "norm", "element", "peak")


@dataclass(frozen=True)
class Summary:
    """A configuration beside Adam's defaults.

    Attributes:
        name: of the configuration.
        ratios: by task, mean test loss over the seeds that both have, divided by Adam's; ``inf`` if one has diverged.
        train: by task, the same of the train loss.
        spread: by task, the largest minus the smallest ratio of a seed.
        seeds: the fewest seeds of any task.
        seconds: geometric mean over tasks of the training time, divided by Adam's.
    """

    name: str
    ratios: dict[str, float]
    train: dict[str, float]
    spread: dict[str, float]
    seeds: int
    seconds: float

    @property
    def geometric_mean(self) -> float:
        return _geometric(min(ratio, WORST) for ratio in self.ratios.values())

    @property
    def as_good(self) -> int:
        """In how many tasks it is at least as good as Adam."""
        return sum(ratio <= 1 for ratio in self.ratios.values())

    @property
    def worst(self) -> str:
        return max(self.ratios, key=lambda task: self.ratios[task])


def _geometric(values: Iterable[float]) -> float:
    return math.exp(fmean(math.log(value) for value in values))


def summaries(records: Iterable[dict[str, Any]], names: Sequence[str] | None = None) -> list[Summary]:
    """All configurations that have been run beside Adam, the best geometric mean of test losses first."""
    runs: dict[str, dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        runs[record["configuration"]][record["task"]][record["seed"]] = record
    adam = runs.pop(BASELINE, {})
    found = []
    for name, tasks in runs.items():
        pairs = {
            task: [(seeds[seed], adam[task][seed]) for seed in seeds if seed in adam[task]]
            for task, seeds in tasks.items()
            if task in adam
        }
        pairs = {task: both for task, both in pairs.items() if both}
        if pairs and (names is None or name in names):
            found.append(_summary(name, pairs))
    return sorted(found, key=lambda summary: summary.geometric_mean)


def _summary(name: str, pairs: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]) -> Summary:
    each = {task: [_loss(ours, "test") / _loss(adam, "test") for ours, adam in both] for task, both in pairs.items()}
    return Summary(
        name,
        {task: _ratio(both, "test") for task, both in pairs.items()},
        {task: _ratio(both, "train") for task, both in pairs.items()},
        {task: max(ratios) - min(ratios) for task, ratios in each.items()},
        min(map(len, pairs.values())),
        _geometric(fmean(ours["seconds"] / adam["seconds"] for ours, adam in both) for both in pairs.values()),
    )


def _loss(record: dict[str, Any], part: str) -> float:
    value = float(record[part])
    return value if math.isfinite(value) else math.inf


def _ratio(both: list[tuple[dict[str, Any], dict[str, Any]]], part: str) -> float:
    return fmean(_loss(ours, part) for ours, _ in both) / fmean(_loss(adam, part) for _, adam in both)


def print_report(
    console: Console, records: Iterable[dict[str, Any]], names: Sequence[str] | None, by_task: bool
) -> list[Summary]:
    """Print Adam's own losses, then a line for each configuration, or a table with every task."""
    records = list(records)
    found = summaries(records, names)
    table = Table("configuration", title="test loss / Adam's", title_justify="left")
    for column in ("tasks", "seeds", "geometric mean", "as good", "> 1.3", "worst", "", "train", "time"):
        table.add_column(column, justify="right")
    for one in found:
        bad = sum(ratio > 1.3 for ratio in one.ratios.values())
        train = _geometric(min(ratio, WORST) for ratio in one.train.values())
        table.add_row(
            one.name,
            str(len(one.ratios)),
            str(one.seeds),
            f"{one.geometric_mean:.3f}",
            str(one.as_good),
            str(bad),
            f"{one.ratios[one.worst]:.2f}",
            one.worst,
            f"{train:.3f}",
            f"{one.seconds:.1f}",
        )
    console.print(table)
    if by_task:
        _print_tasks(console, records, found)
    return found


def _print_tasks(console: Console, records: list[dict[str, Any]], found: Sequence[Summary]) -> None:
    """A row for each task: Adam's test loss and where it was lowest, then the ratios of all configurations."""
    adam = defaultdict(list)
    for record in records:
        if record["configuration"] == BASELINE:
            adam[record["task"]].append(record)
    table = Table("task", title="ratios by task, and their spread over seeds", title_justify="left")
    for column in ("Adam", "best / end", *(str(i + 1) for i in range(len(found)))):
        table.add_column(column, justify="right")
    for task, runs in adam.items():
        best = fmean(min(run["test_losses"]) / run["test"] for run in runs)
        cells = [f"{one.ratios[task]:.3f} ±{one.spread[task] / 2:.2f}" if task in one.ratios else "" for one in found]
        table.add_row(task, f"{fmean(run['test'] for run in runs):.4g}", f"{best:.2f}", *cells)
    console.print(table)
    for i, one in enumerate(found):
        console.print(f"{i + 1}: {one.name}", highlight=False)


def print_units(console: Console, records: Iterable[dict[str, Any]]) -> None:
    """How large measured units of ``γ`` are, in numbers of terms that the loss averages over: 1 is the exact one."""
    measured = defaultdict(list)
    for record in records:
        if "output" in record:
            measured[record["task"]].append(record)
    table = Table("task", title="measured units / number of terms", title_justify="left")
    for column in ("terms", "rows", *_MEASURED):
        table.add_column(column, justify="right")
    for task, runs in measured.items():
        of_seeds = {run["seed"]: run for run in runs}.values()
        cells = [
            fmean(1 / (run["output"][unit] * run["terms"]) for run in of_seeds if run["output"].get(unit))
            if any(run["output"].get(unit) for run in of_seeds)
            else math.nan
            for unit in _MEASURED
        ]
        first = runs[0]
        table.add_row(task, str(first["terms"]), str(first["output"]["rows"]), *(f"{cell:.3g}" for cell in cells))
    console.print(table)


def draw(found: Sequence[Summary], path: Path, most: int = 6) -> None:
    """Write a plot: a row for each task, a mark for each of the best configurations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(task for one in found[:most] for task in one.ratios))
    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.28 * len(tasks)), layout="constrained")
    for i, one in enumerate(found[:most]):
        shift = 0.6 * (i / max(1, len(found[:most]) - 1) - 0.5)
        axes.plot(
            [min(one.ratios.get(task, math.nan), WORST) for task in tasks],
            [place + shift for place in range(len(tasks))],
            "o",
            markersize=4,
            label=textwrap.fill(one.name, 100, break_on_hyphens=False),
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.axvline(1.3, color="grey", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(tasks)), tasks, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("test loss / test loss of torch.optim.Adam with its defaults")
    figure.legend(loc="outside lower center", fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
