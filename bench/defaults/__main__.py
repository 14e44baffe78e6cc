"""Which defaults of ``LocoProp`` need no tuning? Trains many small networks with each configuration and with Adam.

    python -m bench.defaults run adam library "rule=adam,T=5|10,rows=16|32" --mnist mnist.npz --seeds 0 1 2
    python -m bench.defaults report

It runs on the CPU, each run on one thread. Tables and digits come with scikit-learn (`pip install -e .[study]`), curves
and text with this repository and Python, MNIST from a file laid out as Keras' mnist.npz; settings that need it are left
out where it is not given. Results are appended to a file, and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from bench.defaults import results
from bench.defaults.configurations import expand
from bench.defaults.report import draw, print_report, print_units
from bench.defaults.results import Record
from bench.defaults.tasks import TASKS
from bench.defaults.training import run

RESULTS = Path("bench/results/defaults/runs.jsonl")


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m bench.defaults``."""
    given = _parser().parse_args(arguments)
    return int(given.command(given))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.defaults", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser(
        "run", help="train, and append results to the file", description=__doc__, formatter_class=raw
    )
    running.set_defaults(command=_run)
    running.add_argument(
        "configurations", nargs="+", help="adam, library, or NAME=VALUE|VALUE,..., see configurations.py"
    )
    running.add_argument("--mnist", type=Path, metavar="FILE", help=".npz with x_train, y_train, x_test, y_test")
    running.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and batches (default: 0)")
    running.add_argument("--jobs", type=int, default=1, help="processes, one thread each (default: 1)")
    running.add_argument("--quick", action="store_true", help="ten steps of each run: to see that everything works")
    reporting = commands.add_parser("report", help="print the table of ratios, draw the plot")
    reporting.set_defaults(command=_report)
    reporting.add_argument("configurations", nargs="*", help="these alone (default: all)")
    reporting.add_argument("--by-task", action="store_true", help="a table for each configuration, with every task")
    reporting.add_argument("--units", action="store_true", help="also how large the measured units of γ were")
    reporting.add_argument("--plot", type=Path, metavar="FILE", help="write the plot of the best configurations")
    reporting.add_argument("--seeds", type=int, nargs="+", help="these seeds alone, which every entry must have")
    for command in (running, reporting):
        command.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)}")
        command.add_argument("--out", type=Path, default=RESULTS, help=f"the file of results (default: {RESULTS})")
    return parser


def _run(given: argparse.Namespace) -> int:
    console = Console(stderr=True)
    try:
        names = expand(given.configurations)
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    tasks = [task for task in given.tasks or TASKS if given.mnist or not TASKS[task].needs_file]
    if left := [task for task in given.tasks or TASKS if task not in tasks]:
        console.print(f"left out without --mnist: {', '.join(left)}")
    done = results.read(given.out)
    wanted = [(task, name, seed) for seed in given.seeds for name in names for task in tasks]
    todo = [key for key in wanted if key not in done]
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("runs", total=len(wanted), completed=len(wanted) - len(todo))
        for record in _records([partial(run, *key, mnist=given.mnist, quick=given.quick) for key in todo], given.jobs):
            results.append(given.out, record)
            progress.advance(bar)
    return 0


def _records(runs: Sequence[Callable[[], Record]], jobs: int) -> Iterator[Record]:
    """What the runs return, each as soon as it is there; more than one job are processes with a thread each."""
    if jobs == 1:
        yield from (one() for one in runs)
        return
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(one) for one in runs]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _report(given: argparse.Namespace) -> int:
    records = results.read(given.out).values()
    tasks, seeds = given.tasks or TASKS, given.seeds
    chosen = [one for one in records if one["task"] in tasks and (not seeds or one["seed"] in seeds)]
    names = expand(given.configurations) if given.configurations else None
    console = Console() if sys.stdout.isatty() else Console(width=180)
    summary = print_report(console, chosen, names, given.by_task)
    if given.units:
        print_units(console, chosen)
    if given.plot and summary:
        draw(summary, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
