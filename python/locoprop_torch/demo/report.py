"""What the demo shows: progress bars and a table (rich), and the picture (matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["draw_curves", "progress", "show_files", "show_setup", "show_table"]

_console = Console()
# Okabe & Ito's colours, which colour-blind readers can tell apart; markers and dashes say it again.
_STYLES = {
    "LocoProp-M": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "LocoProp-M, 32 rows": {"color": "#56B4E9", "marker": "D", "linestyle": "-"},
    "LocoProp-S": {"color": "#009E73", "marker": "s", "linestyle": "-"},
    "RMSProp": {"color": "#E69F00", "marker": "^", "linestyle": "--"},
    "Adam": {"color": "#D55E00", "marker": "v", "linestyle": "--"},
}


def _title(config: dict[str, Any]) -> str:
    return f"Deep autoencoder {'-'.join(map(str, config['layers']))} on {config['data']}"


def show_setup(results: dict[str, Any]) -> None:
    """Say what is about to run, on what."""
    config, environment = results["config"], results["environment"]
    counts = f"{config['train_images']} train and {config['test_images']} test images"
    ran = environment["backend"]
    backend = f"LocoProp backend {ran['ran']} ({ran['reason']}), {config['dtype']} products" if ran else "no LocoProp"
    _console.print(
        f"{_title(config)}: {counts}, "
        f"batches of {config['batch_size']}, seed {config['seed']}\n"
        f"PyTorch {environment['torch']} on {environment['device']}, {environment['threads']} threads; {backend}",
        highlight=False,
    )


def progress(unit: str) -> Progress:
    """Bars that count epochs or seconds; they are seldom drawn anew, because they run beside what is being timed."""
    return Progress(
        TextColumn("{task.description:<19}"),
        BarColumn(),
        TextColumn(f"{{task.completed:.1f}}/{{task.total:.0f}} {unit}"),
        TimeElapsedColumn(),
        console=_console,
        refresh_per_second=2,
    )


def _loss(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.2f}"


def show_table(results: dict[str, Any]) -> None:
    """The final figures of every method."""
    table = Table(title="Cross entropy per image (nats)")
    table.add_column("method")
    for heading in ("train loss", "test loss", "epochs", "seconds", "seconds/epoch"):
        table.add_column(heading, justify="right")
    for method, entry in results["methods"].items():
        final = entry["final"]
        table.add_row(
            method,
            _loss(final["train_loss"]),
            _loss(final["test_loss"]),
            str(final["epochs"]),
            f"{final['seconds']:.1f}",
            f"{final['seconds_per_epoch']:.2f}",
        )
    _console.print(table)
    bound = results["config"]["loss_lower_bound"]
    _console.print(f"No model can go below {bound:.2f} on the train images, the entropy of their grey pixels.")


def show_files(folder: Path) -> None:
    """Say where the results are."""
    _console.print(f"Wrote {folder / 'results.json'} and {folder / 'training_curves.png'}", soft_wrap=True)


def draw_curves(results: dict[str, Any], path: Path) -> None:
    """Draw the train losses against epochs and against seconds; needs no display.

    Args:
        results: the content of ``results.json``.
        path: PNG file to write.
    """
    config = results["config"]
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        by_epoch, by_time = figure.subplots(1, 2, sharey=True)
        for method, entry in results["methods"].items():
            losses = [float("nan") if loss is None else loss for loss in entry["train_loss"]]
            epochs = range(1, len(losses) + 1)
            for axes, x in ((by_epoch, epochs), (by_time, entry["seconds"])):
                axes.plot(
                    x,
                    losses,
                    label=method,
                    markersize=5,
                    linewidth=1.8,
                    markevery=max(1, len(losses) // 10),
                    **_STYLES[method],
                )
        for axes, label in ((by_epoch, "epoch"), (by_time, "training time (seconds)")):
            _finish(axes, label, config["loss_lower_bound"])
        by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        by_epoch.set_ylabel("train loss (nats per image)")
        by_time.legend(frameon=False)
        figure.suptitle(f"{_title(config)}, batches of {config['batch_size']}")
        figure.savefig(path, dpi=150)


def _finish(axes: Axes, label: str, bound: float) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.axhline(bound, color="0.4", linewidth=1, linestyle=":", label="lower bound (entropy of the pixels)")
