"""Choose the demo's hyper-parameters on CURVES: nine trials for each method, on another seed than the demo's default.

    python -m bench.tune_demo --out bench/results/demo_tuning.json

The best trial has the lowest train loss in the last epoch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from locoprop_torch.demo import CURVES, curves_tensors
from locoprop_torch.demo.experiments import METHODS
from locoprop_torch.demo.training import train

SEED = 1


def grid(**options: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of each option."""
    for values in product(*options.values()):
        yield dict(zip(options, values, strict=True))


GRIDS = {
    "locoprop-m": list(grid(lr=[5e-5, 1e-4, 2e-4], activation_lr=[3.0, 5.0, 10.0], local_iterations=[5])),
    "locoprop-rows": list(grid(lr=[5e-5, 1e-4, 2e-4], activation_lr=[3.0, 5.0, 10.0], local_iterations=[5])),
    "locoprop-s": list(grid(lr=[5e-5, 1e-4, 2e-4], activation_lr=[5.0, 10.0, 20.0], local_iterations=[5])),
    "rmsprop": list(grid(lr=[3e-4, 1e-3, 3e-3], alpha=[0.9], momentum=[0.0, 0.5, 0.9])),
    "adam": list(grid(lr=[1e-3, 3e-3, 1e-2], betas=[(0.5, 0.999), (0.8, 0.999), (0.9, 0.999)])),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune_demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="Write this JSON file.")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="Try these methods (default: all)."
    )
    args = parser.parse_args()
    train_images, test_images = curves_tensors(SEED)
    trials: dict[str, list[dict[str, Any]]] = {}
    for method in args.methods:
        trials[METHODS[method]] = rows = []
        for options in GRIDS[method]:
            experiment = replace(CURVES, hyperparameters={method: options})
            history = train(experiment, method, train_images, test_images, SEED)
            rows.append({**options, "train_loss": history.train_loss[-1], "test_loss": history.test_loss[-1]})
            print(method, rows[-1], flush=True)
        rows.sort(key=lambda row: row["train_loss"])
        report = {"seed": SEED, "epochs": CURVES.epochs, "baseline_epochs": CURVES.baseline_epochs}
        args.out.write_text(json.dumps({**report, "torch": torch.__version__, "trials": trials}, indent=2) + "\n")


if __name__ == "__main__":
    main()
