"""The pictures of the report: curves, reconstructions, ablations, the method's figures; PNG files by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from bench.autoencoder.compare import Entry, final_loss, median_curve, numbers, spread
from bench.autoencoder.tasks import as_images

__all__ = ["ablations", "beyond", "cosines", "curves", "reconstructions", "traces"]

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
_LINES = {"LocoProp": "-", "second-order": "-.", "first-order": "--"}
# Okabe & Ito's colours, which colour-blind readers can tell apart; dashes and markers say it again.
_COLOURS = {
    "LocoProp": ["#009E73", "#0072B2", "#56B4E9"],
    "second-order": ["#CC79A7", "#882255", "#AA4499"],
    "first-order": ["#999999", "#777777", "#444444", "#F0E442", "#E69F00", "#D55E00"],
}
_MARKERS = "os^vDP"


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130, bbox_inches="tight")
    return path


def _figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def _styles(entries: dict[str, Entry]) -> list[dict[str, Any]]:
    """Colour, dashes and marker of each entry, by its place among those of its kind."""
    places: dict[str, int] = {}
    styles = []
    for entry in entries.values():
        kind = entry["kind"]
        place = places[kind] = places.get(kind, -1) + 1
        colours = _COLOURS[kind]
        style = {
            "color": colours[place % len(colours)],
            "linestyle": _LINES[kind],
            "marker": _MARKERS[place % len(_MARKERS)],
            "linewidth": 2 if kind == "LocoProp" else 1.4,
            "markersize": 4,
        }
        styles.append(style)
    return styles


def _loss_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.25, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def _draw(axes: Axes, x: Sequence[float], entry: Entry, name: str, style: dict[str, Any]) -> None:
    low, middle, high = (np.where(np.isfinite(part), part, np.nan) for part in spread(entry, name))
    axes.plot(x, middle, label=entry["label"], markevery=max(1, len(middle) // 10), **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


@matplotlib.rc_context(_STYLE)
def curves(entries: dict[str, Entry], title: str, clock: str, path: Path) -> Path:
    """Train loss against epochs and against time: median over the seeds, and the range between lowest and highest."""
    figure, (by_epoch, by_time) = _figure(1, 2, (12, 5), sharey=True)
    for entry, style in zip(entries.values(), _styles(entries), strict=True):
        epochs = range(1, 1 + len(spread(entry)[0]))
        _draw(by_epoch, epochs, entry, "train_loss", style)
        _draw(by_time, median_curve(entry), entry, "train_loss", style)
    for axes, label in ((by_epoch, "epoch"), (by_time, f"training time (seconds, {clock} clock)")):
        _loss_axis(axes)
        axes.set_xlabel(label)
    by_time.set_xscale("log")
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_epoch.set_ylabel("train loss (nats per image)")
    figure.legend(*by_time.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(title)
    return _save(figure, path)


@matplotlib.rc_context(_STYLE)
def reconstructions(entries: dict[str, Entry], originals: str, title: str, path: Path) -> Path:
    """The first test images, and what each optimiser's network makes of them, best train loss first."""
    ordered = sorted((entry for entry in entries.values() if entry["runs"][0]["samples"]), key=final_loss)
    rows = [("images", originals), *((entry["label"], entry["runs"][0]["samples"]) for entry in ordered)]
    figure, panels = _figure(len(rows), 1, (7.5, 0.62 * len(rows) + 0.5))
    for axes, (label, text) in zip(panels, rows, strict=True):
        axes.imshow(np.hstack(list(as_images(text))), cmap="gray_r", vmin=0, vmax=255, aspect="equal")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(title)
    return _save(figure, path)


@matplotlib.rc_context(_STYLE)
def ablations(groups: dict[str, list[dict[str, Any]]], title: str, path: Path) -> Path:
    """Final train loss of every variant, a panel for each question."""
    columns = 3
    rows = -(-len(groups) // columns)
    figure, panels = _figure(rows, columns, (12, 2.6 * rows))
    for axes, (question, variants) in zip(panels, groups.items(), strict=False):
        losses = np.array(numbers(variant["train_loss"] for variant in variants))
        shown = np.where(np.isfinite(losses), losses, 0)
        bars = axes.barh(range(len(variants)), shown, color="#0072B2", height=0.7)
        texts = [f"{loss:.1f}" if np.isfinite(loss) else "diverged" for loss in losses]
        axes.bar_label(bars, texts, fontsize=8, padding=2)
        axes.set_yticks(range(len(variants)), [variant["label"] for variant in variants], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max(shown.max(), 1))
        axes.grid(False)
        axes.set_title(question, fontsize=10)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    figure.suptitle(title)
    return _save(figure, path)


@matplotlib.rc_context(_STYLE)
def cosines(found: dict[str, Any], path: Path) -> Path:
    """Cosine between LocoProp-S's increment after T local steps and the closed form, against T."""
    figure, (axes,) = _figure(1, 1, (6.5, 4))
    for marker, (label, values) in zip(_MARKERS, found["cosines"].items(), strict=False):
        axes.plot(found["T"], values, marker=marker, markersize=4, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("local steps T")
    axes.set_ylabel("cosine with the preconditioned step")
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.02)
    axes.legend(frameon=False, fontsize=9)
    axes.set_title(found["title"], fontsize=10)
    return _save(figure, path)


@matplotlib.rc_context(_STYLE)
def traces(found: dict[str, dict[str, list[float]]], title: str, path: Path) -> Path:
    """The local objective of every layer over the local steps, in shares of its largest change."""
    figure, panels = _figure(1, len(found), (5.5 * len(found), 4), sharey=True)
    for axes, (label, layers) in zip(panels, found.items(), strict=True):
        for i, (name, values) in enumerate(layers.items()):
            scale = max(abs(value) for value in values) or 1.0
            axes.plot(
                np.array(values) / scale, label=name, color=matplotlib.colormaps["viridis"](i / max(1, len(layers)))
            )
        axes.axhline(0, color="0.4", linewidth=1)
        axes.set_title(label)
        axes.set_xlabel("local step")
    panels[0].set_ylabel("local objective − its start (largest change = 1)")
    panels[-1].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return _save(figure, path)


@matplotlib.rc_context(_STYLE)
def beyond(tasks: dict[str, dict[str, Entry]], path: Path) -> Path:
    """Test loss against training time of the tasks beyond the paper, all optimisers with the same time."""
    figure, panels = _figure(1, len(tasks), (5.5 * len(tasks), 4))
    for axes, (task, entries) in zip(panels, tasks.items(), strict=True):
        for entry, style in zip(entries.values(), _styles(entries), strict=True):
            _draw(axes, median_curve(entry), entry, "test_loss", style)
        axes.set_title(task)
        axes.set_xlabel("training time (seconds)")
        axes.legend(frameon=False, fontsize=9)
    panels[0].set_ylabel("test loss")
    return _save(figure, path)
