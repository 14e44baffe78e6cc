"""Numerics, rates, then predictions beside measurements on a GPU, in eight minutes at most.

Needs nothing from outside: torch with Triton, numpy, pytest and rich; the package need not be installed
(``PYTHONPATH=.:python python -m bench.gpu``). Each section has its share of the time, and what it leaves is the next
one's; what does not fit is left out, with a line that says so. The results go into one JSON file, written after every
measurement, and the last lines are those whose measurements were farthest from their predictions. ``--dry-run`` goes
through every section on the CPU, with tiny sizes and interpreted kernels.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import device
from bench.gpu.goals import goals, print_goals
from bench.gpu.sections import SECTIONS, Section, to_compile
from bench.gpu.session import Session
from locoprop_kernels.kernels.target import interpreted

__all__ = ["main"]

_WHOLE = sum(section.seconds for section in SECTIONS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    names = [section.name for section in SECTIONS]
    parser.add_argument("--out", type=Path, default=Path("bench_out/gpu.json"), help="file (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=_WHOLE / 60, help="for everything (default: %(default).1f)")
    parser.add_argument("--seconds", type=float, default=1.0, help="timing of each case (default: %(default)s)")
    parser.add_argument("--skip-numerics", action="store_true", help="do not run the tests")
    parser.add_argument("--section", nargs="+", choices=names, default=names, help="sections (default: all)")
    parser.add_argument(
        "--case", nargs="+", help="cases or families for the section of all contestants, which then is the only one"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, interpreted on the CPU, all sections")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code is that of the tests."""
    options = _parser().parse_args(arguments)
    if options.dry_run:
        if not interpreted():
            print("bench.gpu: --dry-run needs TRITON_INTERPRET=1, set before Triton is imported", file=sys.stderr)
            return 2
    elif not torch.cuda.is_available():
        print(
            f"bench.gpu: torch {torch.__version__} finds no GPU on this machine; nothing was run. "
            "`python -m bench` times what a CPU can do."
        )
        return 0
    if options.case:
        # What is timed rests on the rates.
        options.section = ["rates", "field"]
    session = Session(
        options=options,
        device=torch.device("cpu" if options.dry_run else "cuda"),
        dry=options.dry_run,
        console=Console(width=150),
        out=options.out,
        results=_head(options.dry_run),
    )
    chosen = [section for section in SECTIONS if section.name in options.section or section.name == "rates"]
    if not options.dry_run and hasattr(signal, "alarm"):
        # A kernel that hangs ends the run; what was measured before is in the file, with the section's name.
        signal.alarm(int(60 * options.minutes) + 25)
    _run(session, chosen, 60 * options.minutes)
    session.results["goals"] = goals(session.results)
    session.results["most_surprising"] = [str(line) for line in session.surprises()]
    session.save()
    print_goals(session.console, session.results["goals"])
    session.console.print(session.table())
    session.console.print(f"wrote {session.out}")
    session.console.print("[bold]most surprising:[/]")
    for text in session.results["most_surprising"]:
        session.console.print(text, markup=False, soft_wrap=True)
    return int(session.results.get("numerics", {}).get("exit_code", 0) != 0)


def _head(dry: bool) -> dict[str, Any]:
    where = torch.device("cpu" if dry else "cuda")
    return {
        "schema": 2,
        "command": "python -m bench.gpu" + " --dry-run" * dry,
        "commit": device.commit(),
        "device": device.describe(where),
        "versions": device.versions(),
        "clock": "wall" if dry else "device events",
    }


def _run(session: Session, chosen: list[Section], seconds: float) -> None:
    """Each section until its end; what one leaves of its time is the next one's."""
    compiling = None
    if not session.dry and "numerics" in {section.name for section in chosen}:
        from bench.gpu.numerics import Compiling

        compiling = Compiling(to_compile())
    share = seconds / sum(section.seconds for section in chosen)
    session.until = time.monotonic()
    for section in chosen:
        session.section = section.name
        session.until += share * section.seconds
        session.results["running"] = section.name
        session.console.rule(section.name)
        session.save()
        begin = time.monotonic()
        try:
            section.run(session)
        except Exception as error:
            if session.dry:
                raise
            session.skip("the rest", f"{type(error).__name__}: {str(error)[:200]}")
        if section.name == "numerics" and compiling is not None:
            session.console.print(compiling.finish(max(5.0, session.left)))
        session.results.setdefault("section_seconds", {})[section.name] = time.monotonic() - begin
    del session.results["running"]
