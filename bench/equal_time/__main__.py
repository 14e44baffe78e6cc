"""The autoencoder's loss after equal time, on machines that others use too.

    python -m bench.equal_time measure --data mnist.npz    # seconds of a step, on an idle machine: a few seconds
    python -m bench.equal_time train --data mnist.npz      # as many steps as the times hold; as slow as you like
    python -m bench.equal_time report

Contestants take turns while steps are timed, and the least time of each counts, as other work disturbs it least. Each
then trains for as many steps as 2, 5 and 10 minutes hold: after two minutes the best values of its grid are chosen, and
go on. Training can be stopped at any time; the next call goes on from the last evaluation, to the same numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import device
from bench.autoencoder.runs import Deadline, OutOfTime, write
from bench.equal_time.contestants import CONTESTANTS, PAPER, QUICK, Problem, Setting
from bench.equal_time.training import Run, step_seconds
from locoprop_torch.demo.data import curves_tensors, file_tensors
from locoprop_torch.demo.training import entropy

__all__ = ["main"]

TIMED = ("locoprop", "rmsprop", "adam", "defaults")
#: Exit status of a piece of work that ended before the whole was done: call again.
UNFINISHED = 75


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.equal_time", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True)
    for name, function, text in (
        ("measure", _measure, "time a step of every contestant"),
        ("train", _train, "train for as many steps as the times hold"),
        ("report", _report, "print the table, write results.json and the picture"),
    ):
        command = commands.add_parser(name, help=text)
        command.set_defaults(command=function)
        command.add_argument("--data", default="curves", help="curves, an .npz file or a folder of IDX files")
        command.add_argument("--out", type=Path, default=Path("bench_out/equal_time"), help="folder of the results")
        command.add_argument("--quick", action="store_true", help="a tiny network and a tenth of a second")
        command.add_argument("--contestants", nargs="+", choices=TIMED, default=list(TIMED), help="these alone")
        command.add_argument("--minutes", type=float, help="stop training after about so long")
    return parser


def _problem(given: argparse.Namespace) -> Problem:
    setting = _setting(given)
    count = 200 if given.quick else None
    images, test = curves_tensors(0, count or 4000) if given.data == "curves" else file_tensors(given.data, count)
    return Problem(setting, images, test, Path(given.data).stem)


def _setting(given: argparse.Namespace) -> Setting:
    return QUICK if given.quick else PAPER


def _measure(given: argparse.Namespace) -> int:
    problem = _problem(given)
    about = device.describe(torch.device("cpu"))
    found = {
        "seconds": step_seconds(problem, given.contestants),
        "processor": about["name"],
        "threads": about["threads"],
        "versions": device.versions(),
        "commit": device.commit(),
    }
    write(given.out / "step_seconds.json", json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["seconds"], indent=1))
    return 0


def _step_times(given: argparse.Namespace) -> dict[str, Any]:
    path = given.out / "step_seconds.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: python -m bench.equal_time measure --out {given.out}")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _grid(name: str, folder: Path) -> list[Run]:
    return [Run(name, values).resumed(folder) for values in CONTESTANTS[name].grid]


def _best(runs: Sequence[Run], steps: float) -> Run:
    return min(runs, key=lambda run: run.loss_after(steps))


def _train(given: argparse.Namespace) -> int:
    problem, folder, deadline = _problem(given), given.out / "runs", Deadline(given.minutes)
    judged = problem.setting.judged
    later = [seconds for seconds in problem.setting.seconds if seconds > judged]
    step = {name: times["min"] for name, times in _step_times(given)["seconds"].items()}
    write(given.out / "data.json", json.dumps(_data(problem)) + "\n")
    grids = {name: _grid(name, folder) for name in given.contestants}
    try:
        # The first values of every grid first, so that a piece of the work already says something.
        for number in range(max(len(grid) for grid in grids.values())):
            for name, grid in grids.items():
                for run in grid[number : number + 1]:
                    _advance(problem, run, judged / step[name], folder, deadline)
        for seconds in later:
            for name, grid in grids.items():
                _advance(problem, _best(grid, judged / step[name]), seconds / step[name], folder, deadline)
    except OutOfTime:
        print("Time is up: call again to go on", file=sys.stderr)
        return UNFINISHED
    return 0


def _data(problem: Problem) -> dict[str, Any]:
    count = problem.setting.evaluated
    counts = {"train": len(problem.images), "test": len(problem.test_images), "evaluated": count}
    return {"name": problem.data, **counts, "lower_bound": entropy(problem.images[:count])}


def _advance(problem: Problem, run: Run, steps: float, folder: Path, deadline: Deadline) -> None:
    run.train(problem, steps, folder, deadline)
    print(run.label, run.steps[-1], run.train_loss[-1], run.test_loss[-1], flush=True)


def _report(given: argparse.Namespace) -> int:
    from bench.equal_time import report

    times, setting = _step_times(given), _setting(given)
    found = {}
    for name, step in times["seconds"].items():
        runs = [run for run in _grid(name, given.out / "runs") if run.steps]
        if runs:
            best = _best(runs, setting.judged / step["min"])
            found[name] = report.entry(runs, best, step["min"], setting)
    about = json.loads((given.out / "data.json").read_text(encoding="utf-8"))
    results = {"setting": asdict(setting), "data": about, "step": times, "contestants": found}
    write(given.out / "results.json", json.dumps(results, indent=1) + "\n")
    report.show(results)
    report.draw(results, given.out / "curves.png")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m bench.equal_time``."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        return int(given.command(given))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
