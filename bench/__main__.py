"""``python -m bench``: time LocoProp against its alternatives. See ``--help``."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench import cases, compare, contestants, device, measure, report, scaling

__all__ = ["main", "run"]


def _run_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times contestants on the same work, interleaved, after checking their results. "
        "Other commands: `python -m bench compare BASELINE NEW`, `python -m bench scaling`.",
    )
    parser.add_argument(
        "--case",
        nargs="*",
        default=[],
        help="Take the cases with these names or families; a final * stands for any ending (default: all).",
    )
    parser.add_argument(
        "--contestant",
        nargs="*",
        default=[],
        help="Take the contestants with these names; a final * stands for any ending (default: all).",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="Run on this device (default: the GPU if there is one).",
    )
    parser.add_argument("--out", type=Path, help="Write bench.json, the table and the plots to this folder.")
    parser.add_argument("--json", type=Path, help="Write the JSON alone, to this file.")
    parser.add_argument(
        "--quick", action="store_true", help="Time three cases in half a minute, without what has to be compiled first."
    )
    parser.add_argument(
        "--threads", type=int, help="Give torch this many threads on the CPU (default: its own choice)."
    )
    parser.add_argument(
        "--clock",
        choices=[*device.CLOCKS],
        default="wall",
        help="Read this clock; cpu is the processor time of one thread, for busy machines (default: %(default)s).",
    )
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="Time each case for this long (default: %(default)s)."
    )
    parser.add_argument(
        "--longest",
        type=float,
        default=6.0,
        help="Leave out cases whose textbook step takes more seconds than this (default: %(default)s).",
    )
    parser.add_argument("--list", action="store_true", help="List the cases and contestants, and stop.")
    return parser


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    if arguments[:1] == ["compare"]:
        return compare.main(arguments[1:])
    if arguments[:1] == ["scaling"]:
        return scaling.main(arguments[1:])
    options = _run_parser().parse_args(arguments)
    where = torch.device(options.device)
    if where.type == "cuda" and not torch.cuda.is_available():
        print("--device cuda: this machine has no GPU that torch can use", file=sys.stderr)
        return 2
    if options.threads is not None or options.clock == "cpu":
        torch.set_num_threads(options.threads or 1)
    try:
        chosen = cases.select(options.case, options.quick)
        fields = choose(contestants.all_contestants(where), options.contestant, options.quick)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        print("cases:", *(case.name for case in chosen), sep="\n  ")
        print("contestants:", *(contestant.name for contestant in fields), sep="\n  ")
        return 0
    console = Console() if sys.stdout.isatty() else Console(width=140)
    budget = measure.Budget(
        seconds=2.0 if options.quick else options.seconds, longest=options.longest, clock=options.clock
    )
    file = options.json or (options.out / "bench.json" if options.out else None)
    results = run(chosen, fields, where, budget, console, command(arguments), file)
    if options.out:
        from bench import plots

        written = plots.draw(results, options.out)
        _save_table(results, options.out / "table.txt")
        console.print("wrote", ", ".join(str(path) for path in (file, *written)))
    return 0


def choose(found: list[contestants.Contestant], patterns: list[str], quick: bool) -> list[contestants.Contestant]:
    """Contestants by name or prefix.

    Raises:
        ValueError: a pattern matches none.
    """
    if not patterns:
        return [one for one in found if not (quick and one.slow_start)]

    def matches(name: str, pattern: str) -> bool:
        return name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1]))

    for pattern in patterns:
        if not any(matches(one.name, pattern) for one in found):
            raise ValueError(f"--contestant {pattern!r} matches none of {', '.join(one.name for one in found)}")
    return [one for one in found if any(matches(one.name, pattern) for pattern in patterns)]


def command(arguments: list[str]) -> str:
    """The command for the report, without folders of this machine."""
    return " ".join(["python -m bench", *(Path(a).name if "/" in a else a for a in arguments)])


def run(
    chosen: list[cases.Case],
    fields: list[contestants.Contestant],
    where: torch.device,
    budget: measure.Budget,
    console: Console,
    how: str,
    file: Path | None = None,
) -> dict[str, Any]:
    """Measure the cases; prints each table, and writes ``file`` anew, as soon as a case is done."""
    warnings.filterwarnings("ignore", message=".*TensorFloat32.*|.*TF32.*")
    results: dict[str, Any] = {
        "schema": 1,
        "command": how,
        "commit": device.commit(),
        "device": device.describe(where),
        "versions": device.versions(),
        "clock": "device events" if where.type == "cuda" else budget.clock,
        "rates": device.rates(where, budget.clock),
        "cases": {},
    }
    report.print_device(console, results)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("cases", total=len(chosen))
        for case in chosen:

            def log(text: str) -> None:
                progress.update(task, description=text)

            entry = measure.measure(case, fields, where, results["rates"], budget, log)
            results["cases"][case.name] = entry
            report.print_case(console, case.name, entry)
            if file is not None:
                report.save(results, file)
            progress.advance(task)
    return results


def _save_table(results: dict[str, Any], path: Path) -> None:
    with path.open("w") as file:
        console = Console(file=file, width=140)
        console.print(results["command"])
        report.print_device(console, results)
        for name, case in results["cases"].items():
            report.print_case(console, name, case)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
