"""Draws the guide's figures from the package's own functions: ``python docs/figures.py [--out DIR]``.

The SVG files are committed; the same versions of matplotlib and torch give the same bytes again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import locoprop_kernels as lk
from locoprop_kernels import transfers
from locoprop_kernels.transfers import Transfer
from locoprop_torch.rates import local_rates

ROOT = Path(__file__).parents[1]
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.8,
    "svg.fonttype": "path",
    "svg.hashsalt": "locoprop-kernels",
}
GRID = torch.linspace(-4, 4, 401, dtype=torch.float64)


def _losses(transfer: Transfer, at: float) -> tuple[Tensor, Tensor]:
    """Matching loss and squared loss ``(f(a) - y)²/2`` over ``GRID``, for the target ``y = f(at)``."""
    reference = torch.full_like(GRID, at)
    squared = (transfer(GRID) - transfer(reference)).square() / 2
    return transfer.matching_loss(GRID, reference), squared


def _draw_losses(axes: Axes, transfer: Transfer, targets: tuple[float, ...]) -> None:
    for i, at in enumerate(targets):
        matching, squared = _losses(transfer, at)
        y = float(transfer(torch.tensor(at, dtype=torch.float64)))
        axes.plot(GRID, matching, color=f"C{i}", label=f"y = {y:.2f}")
        axes.plot(GRID, squared, color=f"C{i}", linestyle="--", linewidth=1)
    axes.set_ylim(-0.1, 3)
    axes.legend(loc="upper center", fontsize=8)


def _draw_area(axes: Axes, transfer: Transfer, start: float, end: float) -> None:
    """The transfer function, and the matching loss of ``end`` towards the target ``f(start)`` as an area."""
    values = transfer(GRID)
    y = float(transfer(torch.tensor(start, dtype=torch.float64)))
    between = ((GRID >= start) & (GRID <= end)).numpy()
    axes.plot(GRID, values, color="black")
    axes.fill_between(GRID, values, y, where=between, alpha=0.3, color="C0")
    axes.axhline(y, color="C0", linestyle=":", linewidth=1)
    loss = float(transfer.matching_loss(torch.tensor(end), torch.tensor(start)))
    axes.set_title(f"{transfer}: the area is the matching loss, {loss:.2f}")
    axes.annotate("a", (end, values.min()), ha="center")
    axes.annotate("target y", (GRID[0], y), va="bottom")


def matching_losses() -> Figure:
    """The paper's pictures of the matching losses of tanh and ReLU."""
    figure, axes = plt.subplots(2, 2, figsize=(8.5, 6))
    targets = {"tanh": (-1.5, 0.0, 1.5), "relu": (0.0, 1.0, 2.0)}
    for column, name in enumerate(targets):
        transfer = transfers.get(name)
        _draw_area(axes[0, column], transfer, 0.5, 2.5)
        _draw_losses(axes[1, column], transfer, targets[name])
        axes[1, column].set_xlabel("pre-activation a")
    axes[0, 0].set_ylabel("f(a)")
    axes[1, 0].set_ylabel("loss")
    figure.suptitle("Solid: matching loss. Dashed: squared loss (f(a) − y)²/2 of the post-activation.")
    return figure


def other_transfers() -> Figure:
    """The matching losses of the other elementwise transfer functions, and of a softmax with two classes."""
    rest = [name for name in transfers.available() if name not in ("tanh", "relu") and transfers.get(name).elementwise]
    rows = math.ceil((len(rest) + 1) / 3)
    figure, grid = plt.subplots(rows, 3, figsize=(8.5, 2.5 * rows), sharex=True)
    panels = list(grid.flat)
    for axes, name in zip(panels, rest, strict=False):
        transfer = transfers.get(name, negative_slope=0.2) if name == "leaky_relu" else transfers.get(name)
        _draw_losses(axes, transfer, (0.0, 1.0, 1.5) if name == "squared_relu" else (-1.5, 0.0, 1.5))
        axes.set_title(str(transfer))
    _draw_softmax(panels[len(rest)])
    for axes in panels[len(rest) + 1 :]:
        axes.set_visible(False)
    figure.supxlabel("pre-activation a")
    figure.suptitle("Solid: matching loss. Dashed: squared loss of the post-activation.")
    return figure


def _draw_softmax(axes: Axes) -> None:
    softmax = transfers.get("softmax")
    logits = torch.stack([GRID, torch.zeros_like(GRID)], dim=1)
    for i, at in enumerate((-1.5, 0.0, 1.5)):
        reference = torch.tensor([at, 0.0], dtype=torch.float64).expand_as(logits)
        y = softmax(reference)
        axes.plot(GRID, softmax.matching_loss(logits, reference), color=f"C{i}", label=f"y₁ = {float(y[0, 0]):.2f}")
        axes.plot(GRID, (softmax(logits) - y).square().sum(1) / 2, color=f"C{i}", linestyle="--", linewidth=1)
    axes.set_ylim(-0.1, 3)
    axes.set_title("softmax of (a, 0)")
    axes.legend(loc="upper center", fontsize=8)


def _problem(gamma: float) -> lk.LocalProblem:
    """A tanh layer with random inputs and a random gradient at its outputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=generator, dtype=torch.float64)
    weight = torch.randn(16, 32, generator=generator, dtype=torch.float64) / math.sqrt(32)
    residual = gamma * torch.randn(256, 16, generator=generator, dtype=torch.float64) / 10
    return lk.LocalProblem(x, x @ weight.t(), weight, grad_weight=residual.t() @ x, transfer="tanh")


def traces() -> Figure:
    """The local objective before every local step, as ``trace=True`` reports it, for three learning rates."""
    figure, axes = plt.subplots(figsize=(5.5, 3.4))
    iterations = 20
    for lr in (1e-4, 1e-3, 1e-2):
        rule = lk.rules.RMSprop(momentum=0.9)
        rates = local_rates(lr, iterations)
        report = lk.local_steps_([_problem(gamma=1.0)], rule=rule, lr=rates, commit=False, trace=True)
        values = report.trace[0]
        assert values is not None
        axes.plot(np.arange(iterations + 1), values, marker=".", label=f"lr = {lr:g}")
    axes.set_xlabel("local step t")
    axes.set_ylabel("local objective, 0 at the start")
    axes.legend()
    return figure


def precision() -> Figure:
    """The measurements of ``bench/results/accuracy.json``."""
    result = json.loads((ROOT / "bench/results/accuracy.json").read_text())
    rows = [row for row in result["rows"] if row["K"] == 1000]
    figure, axes = plt.subplots(figsize=(5.5, 3))
    place = np.arange(len(rows))
    for offset, form in ((-0.2, "textbook_form"), (0.2, "increment_form")):
        bars = axes.bar(place + offset, [row[form] for row in rows], 0.38, label=form.replace("_", " "))
        axes.bar_label(bars, fmt="%.0e", fontsize=8)
    axes.set_xticks(place, [row["operands"] for row in rows])
    axes.set_yscale("log")
    axes.set_ylabel("relative error of Δ, T = 10")
    axes.legend(loc="upper left")
    axes.grid(False)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "matching_losses": matching_losses,
    "other_transfers": other_transfers,
    "traces": traces,
    "precision": precision,
}


def main(argv: list[str] | None = None) -> None:
    """Write all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/figures", help="folder to write to")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure = draw()
            figure.savefig(options.out / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
