"""The regression guard: ratios, or a compile report's figures, of two files side by side. No test calls it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import report

__all__ = ["differences", "figures", "main", "strip"]


_COMPILED = (
    "registers",
    "spill_bytes",
    "shared_bytes",
    "scalar_products",
    "instructions",
    "serial_loops",
    "epilogue_instructions",
)


def figures(results: dict[str, Any]) -> dict[str, float]:
    """What is comparable between runs: speed-ups, fractions of the floor, errors, and compile-report figures."""
    found: dict[str, float] = {}
    for case, entry in results.get("cases", {}).items():
        for name, fact in entry.get("contestants", {}).items():
            if not name.startswith("ours"):
                continue
            for base, ratio in fact.get("speedup", {}).items():
                found[f"{case} / {name} / speedup over {base}"] = ratio["p50"]
            for key in ("fraction_of_floor", "error"):
                if key in fact:
                    found[f"{case} / {name} / {key}"] = fact[key]
    # A compile report has records, and so has a baseline that was made from one.
    for record in results.get("records", []):
        for key, value in _compiled(record).items():
            found[f"{record['kernel']} [{record['configuration']}] {record['target']} / {key}"] = value
    return found


def _compiled(record: dict[str, Any]) -> dict[str, Any]:
    """The figures of a compiled kernel, of a report or of a baseline."""
    found = {key: record[key] for key in _COMPILED if key in record}
    if counts := record.get("epilogue"):
        found["epilogue_instructions"] = counts["instructions"]
    return found


def strip(results: dict[str, Any]) -> dict[str, Any]:
    """A report without times: what is worth committing as a baseline."""
    kept: dict[str, Any] = {
        key: results[key] for key in ("schema", "command", "commit", "device", "versions") if key in results
    }
    cases: dict[str, Any] = {}
    for case, entry in results.get("cases", {}).items():
        facts = {
            name: {key: fact[key] for key in ("speedup", "fraction_of_floor", "error") if key in fact}
            for name, fact in entry.get("contestants", {}).items()
            if name.startswith("ours") and "speedup" in fact
        }
        if facts:
            cases[case] = {"contestants": facts}
    records = [
        {key: record[key] for key in ("kernel", "configuration", "target")} | _compiled(record)
        for record in results.get("records", [])
    ]
    return {**kept, **({"cases": cases} if cases else {}), **({"records": records} if records else {})}


def differences(
    old: dict[str, float], new: dict[str, float], tolerance: float
) -> list[tuple[str, float | None, float | None, str]]:
    """``(figure, old, new, verdict)`` of everything in either; the verdict is empty within the tolerance."""
    rows: list[tuple[str, float | None, float | None, str]] = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        verdict = ""
        if before is None or after is None:
            verdict = "only new" if before is None else "only old"
        elif "error" in key:
            verdict = "less accurate" if after > 2 * before else ""
        elif "speedup" in key or "fraction" in key:
            change = after / before - 1
            verdict = f"slower {change:+.0%}" if change < -tolerance else f"faster {change:+.0%}" * (change > tolerance)
        elif after > before * (1 + tolerance if "instructions" in key else 1):
            verdict = "more"
        rows.append((key, before, after, verdict))
    return rows


def main(arguments: list[str]) -> int:
    """``python -m bench compare BASELINE NEW``: exit code 1 with ``--strict`` if something got worse."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("baseline", type=Path, help="The results, or the compile report, to compare with.")
    parser.add_argument("new", type=Path, help="The new ones.")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.15,
        help="Report ratios that changed by more than this share (default: %(default)s).",
    )
    parser.add_argument("--strict", action="store_true", help="Exit with 1 if anything is worse.")
    parser.add_argument(
        "--write", action="store_true", help="Make NEW the baseline, without its times, instead of comparing."
    )
    options = parser.parse_args(arguments)
    new = report.load(options.new)
    if options.write:
        report.save(strip(new), options.baseline)
        return 0
    old = report.load(options.baseline)
    console = Console()
    if old.get("device", {}).get("name") != new.get("device", {}).get("name"):
        console.print("[bold yellow]different devices: ratios may differ for that reason alone[/]")
    rows = differences(figures(old), figures(new), options.tolerance)
    table = Table("figure", "baseline", "new", "")
    for key, before, after, verdict in rows:
        if verdict:
            table.add_row(escape(key), *("" if value is None else f"{value:.3g}" for value in (before, after)), verdict)
    console.print(table if table.row_count else f"{len(rows)} figures, none changed by more than the tolerance")
    worse = [row for row in rows if row[3].startswith(("slower", "less", "more"))]
    return 1 if options.strict and worse else 0
