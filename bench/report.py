"""Results as JSON without local paths, and as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["load", "print_case", "print_device", "save"]


def save(results: dict[str, Any], path: Path) -> None:
    """Write ``results``; refuses local paths and host names.

    Raises:
        ValueError: the text holds a path of this machine.
    """
    text = json.dumps(_rounded(results), indent=1, ensure_ascii=False)
    for private in {str(Path.home()), str(Path.cwd()), str(Path(__file__).resolve().parents[1])} - {"/"}:
        if private in text:
            raise ValueError(f"results must not hold local paths, got {private!r} in them")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def load(path: Path) -> dict[str, Any]:
    """Results that :func:`save` wrote."""
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def print_device(console: Console, results: dict[str, Any]) -> None:
    """What the results were measured on."""
    device, rates = results["device"], results["rates"]
    threads = f", {device['threads']} threads" if "threads" in device else ""
    clock = f"; clock: {results['clock']}" if "clock" in results else ""
    console.print(f"[bold]{device['name']}[/], {device['capability']}{threads}{clock}; commit {results['commit']}")
    console.print(", ".join(f"{name} {version}" for name, version in results["versions"].items()))
    products = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items() if name != "copy")
    for name, route in device.get("routes", {}).items():
        products += f"; {name} by {route}" if name in rates else ""
    console.print(f"measured here: copy {rates['copy'] / 1e9:,.1f} GB/s; products {products}")


def print_case(console: Console, name: str, case: dict[str, Any]) -> None:
    """The table of one case."""
    if "skipped" in case:
        console.print(f"[dim]{name}: left out, {case['skipped']}[/]")
        return
    what = "training step" if case["scope"] == "step" else "local loops"
    title = f"{name}: {what}, {case['loss']} loss, T={case['iterations']}, {case['flops'] / 1e9:,.1f} GFLOP needed"
    table = Table(title=title, title_justify="left")
    table.add_column("contestant")
    baselines = _baselines(case)
    columns = ["error", "median", "p10 – p90", *(f"× {base}" for base in baselines), "of floor", "of matmul", "peak"]
    for column in columns:
        table.add_column(column, justify="right")
    for contestant, fact in case["contestants"].items():
        if "seconds" in fact:
            table.add_row(contestant, *_cells(fact, baselines))
    console.print(table)
    for contestant, fact in case["contestants"].items():
        if "skipped" in fact:
            console.print(f"[dim]  {contestant}: {fact['skipped']}[/]")


def _baselines(case: dict[str, Any]) -> list[str]:
    facts = [fact for fact in case["contestants"].values() if "speedup" in fact]
    return list(facts[0]["speedup"]) if facts else []


def _cells(fact: dict[str, Any], baselines: list[str]) -> list[str]:
    seconds = fact["seconds"]

    def share(key: str) -> str:
        return f"{fact[key]:.0%}" if key in fact else ""

    return [
        f"{fact['error']:.0e}" if "error" in fact else "",
        _time(seconds["p50"]),
        f"{_time(seconds['p10'])} – {_time(seconds['p90'])}",
        *(f"{fact['speedup'][base]['p50']:.2f}" for base in baselines),
        share("fraction_of_floor"),
        share("share_of_matmul_rate"),
        f"{fact['peak_bytes'] / 2**20:,.0f} MiB" if "peak_bytes" in fact else "",
    ]


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
