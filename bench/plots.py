"""Plots of a report: ratios of all cases, and times against sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

__all__ = ["draw"]


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots to ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = {name: case for name, case in results["cases"].items() if _has_baseline(case)}
    written = []
    if cases:
        written.append(_speedups(cases, results["device"]["name"], folder / "speedups.png"))
    return written


def _has_baseline(case: dict[str, Any]) -> bool:
    return any(fact.get("speedup") for fact in case["contestants"].values())


def _speedups(cases: dict[str, Any], device: str, path: Path) -> Path:
    """Speed-up over the first baseline of each case, with the 10 % to 90 % range of paired rounds."""
    names = sorted({name for case in cases.values() for name in case["contestants"] if name.startswith("ours")})
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.28 * len(cases) * max(1, len(names))), layout="constrained")
    height = 0.8 / max(1, len(names))
    labels = []
    for i, (case, entry) in enumerate(cases.items()):
        baseline = "?"
        for j, name in enumerate(names):
            fact = entry["contestants"].get(name, {})
            if not fact.get("speedup"):
                continue
            baseline = next(iter(fact["speedup"]))
            ratio = fact["speedup"][baseline]
            error = [[ratio["p50"] - ratio["p10"]], [ratio["p90"] - ratio["p50"]]]
            axes.barh(i + j * height, ratio["p50"], height, xerr=error, color=f"C{j}", label=name if i == 0 else None)
        labels.append(f"{case}\nover {baseline}")
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(labels))], labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times faster (median of paired rounds, 10 % to 90 %)")
    axes.set_title(device, fontsize=9)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
