"""How much of LocoProp's progress is left with few rows: the autoencoder after equal numbers of steps.

    python -m bench.progress --out bench/results/progress
    python -m bench.progress --data mnist.npz --epochs 2 --out bench/results/progress_mnist

Trains the demo's network (or with a file the paper's) with all rows and with 32 rows per local step, from the same
weights on the same batches, with each seed. A run that the results have already is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import device
from bench.autoencoder.runs import write
from locoprop_torch.demo.data import curves_tensors, file_tensors
from locoprop_torch.demo.experiments import CURVES, FILES
from locoprop_torch.demo.training import train

__all__ = ["main"]

METHODS = {"locoprop-m": "all rows", "locoprop-rows": "32 rows"}


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m bench.progress``."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.progress", description=__doc__, formatter_class=raw)
    parser.add_argument("--data", default="curves", help="curves, an .npz file or a folder of IDX files")
    parser.add_argument("--images", type=int, help="take so many train images")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the train images (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and batches")
    parser.add_argument("--out", type=Path, default=Path("bench_out/progress"), help="folder of the results")
    given = parser.parse_args(arguments)
    curves = given.data == "curves"
    experiment = replace(CURVES if curves else FILES, epochs=given.epochs)
    images, test = curves_tensors(0, given.images or 4000) if curves else file_tensors(given.data, given.images)
    path = given.out / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": []}
    steps = given.epochs * -(-len(images) // experiment.batch_size)
    results["about"] = {
        "data": Path(given.data).stem,
        "steps": steps,
        "batch_size": experiment.batch_size,
        "layers": [*experiment.encoder, *reversed(experiment.encoder[:-1])],
        "versions": device.versions(),
    }
    for seed in given.seeds:
        for method, label in METHODS.items():
            key = {"rows": label, "seed": seed, "steps": steps}
            if any(key.items() <= run.items() for run in results["runs"]):
                continue
            history = asdict(train(experiment, method, images, test, seed))
            results["runs"].append({**key, "train_loss": history["train_loss"], "test_loss": history["test_loss"]})
            write(path, json.dumps(results, indent=1) + "\n")
    _show(results, given.seeds, steps)
    return 0


def _show(results: dict[str, Any], seeds: Sequence[int], steps: int) -> None:
    table = Table(title=f"Train loss of the last epoch, after {steps} steps ({results['about']['data']})")
    for heading in ("seed", *METHODS.values(), "ratio"):
        table.add_column(heading)
    for seed in seeds:
        runs = [run for run in results["runs"] if (run["seed"], run["steps"]) == (seed, steps)]
        last = {run["rows"]: run["train_loss"][-1] for run in runs}
        whole, few = (last[label] for label in METHODS.values())
        table.add_row(str(seed), f"{whole:.2f}", f"{few:.2f}", f"{few / whole:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
