"""``python -m locoprop_torch.demo``: LocoProp against first-order optimisers on a deep autoencoder.

Writes ``results.json`` and ``training_curves.png``. Needs no download: without ``--data`` it draws the CURVES problem.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

import locoprop_kernels
from locoprop_kernels import rules
from locoprop_kernels.problem import COMPUTE_DTYPES
from locoprop_kernels.steps import BACKENDS
from locoprop_torch import data
from locoprop_torch._demo_training import METHODS, Experiment, History, entropy, train, warm_up

__all__ = ["CURVES", "FILES", "curves_tensors", "main"]

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in COMPUTE_DTYPES}
TRAIN_CURVES, TEST_CURVES = 4000, 1000

# Best of nine trials for each method on another seed: bench/results/demo_tuning.json.
CURVES = Experiment(
    encoder=(784, 400, 200, 100, 12),
    batch_size=200,
    epochs=20,
    baseline_epochs=20,
    hyperparameters={
        "locoprop-m": {"lr": 5e-5, "activation_lr": 5.0, "local_iterations": 5},
        "locoprop-s": {"lr": 1e-4, "activation_lr": 20.0, "local_iterations": 5},
        "rmsprop": {"lr": 1e-3, "alpha": 0.9, "momentum": 0.5},
        "adam": {"lr": 3e-3, "betas": (0.5, 0.999)},
    },
    rule=rules.RMSprop(alpha=0.9, momentum=0.99, eps=1e-5, flavor="tensorflow"),
)
# The paper's network and its official notebook's hyper-parameters. Nothing is tuned on the files: RMSProp and Adam
# have common values.
FILES = Experiment(
    encoder=(784, 1000, 500, 250, 30),
    batch_size=1000,
    epochs=2,
    baseline_epochs=2,
    hyperparameters={
        "locoprop-m": {"lr": 1e-5, "activation_lr": 10.0},
        "locoprop-s": {"lr": 1e-5, "activation_lr": 10.0},
        "rmsprop": {"lr": 3e-4, "alpha": 0.9, "momentum": 0.9},
        "adam": {"lr": 1e-3},
    },
    rule=rules.RMSprop(alpha=0.9, momentum=0.999, eps=1e-5, flavor="tensorflow"),
)


def curves_tensors(seed: int, count: int = TRAIN_CURVES) -> tuple[Tensor, Tensor]:
    """``count`` train images and the test images of CURVES, ``[count, 784]`` in [0, 1], disjoint draws of one seed."""
    images = torch.from_numpy(data.curves(count + TEST_CURVES, seed)).flatten(1)
    return images[TEST_CURVES:], images[:TEST_CURVES]


def _file_tensors(path: str, count: int | None) -> tuple[Tensor, Tensor]:
    images = data.load(path)
    if count is not None and count > len(images.train):
        raise ValueError(f"--images must be at most {len(images.train)}, the train images in {path}; got {count}")
    train_images, test_images = (
        torch.from_numpy(part.astype(np.float32) / 255).flatten(1) for part in (images.train[:count], images.test)
    )
    return train_images, test_images


def _number(minimum: int) -> Any:
    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be >= {minimum}, got {text}")
        return value

    parse.__name__ = "integer"  # argparse names it in its messages
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m locoprop_torch.demo",
        description="Train a deep autoencoder with LocoProp-M, LocoProp-S, RMSProp and Adam from the same start on the "
        "same batches, and draw the loss against epochs and against time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo_out"), help="folder for results.json and training_curves.png")
    add(
        "--data",
        default="curves",
        help="curves: drawn here, a small network, about a minute on two cores; or an .npz file with x_train and "
        "x_test, or a folder of IDX files as MNIST and Fashion-MNIST ship, for the paper's "
        "784-1000-500-250-30-250-500-1000-784 network with batches of 1000",
    )
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add("--epochs", type=_number(1), default=None, help="epochs of LocoProp; default 20 on curves, 2 on files")
    add(
        "--baseline-epochs",
        type=_number(1),
        default=None,
        help="epochs of RMSProp and Adam; default as many as LocoProp's",
    )
    add("--images", type=_number(1), default=None, help="train images; default 4000 curves, all of a file")
    add("--device", default="cpu", help="a torch device")
    add("--dtype", choices=DTYPES, default="float32", help="operands of LocoProp's local products")
    add("--backend", choices=BACKENDS, default="auto", help="of LocoProp")
    add("--seed", type=_number(0), default=0, help="of the curves, the weights and the batches")
    return parser


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _experiment(args: argparse.Namespace) -> Experiment:
    base = CURVES if args.data == "curves" else FILES
    epochs = args.epochs or base.epochs
    return replace(
        base,
        epochs=epochs,
        baseline_epochs=args.baseline_epochs or epochs,
        hyperparameters={method: base.hyperparameters[method] for method in args.methods},
        backend=args.backend,
        compute_dtype=DTYPES[args.dtype],
    )


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "locoprop_kernels": locoprop_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
    }


def _finite(values: Sequence[float]) -> list[float | None]:
    """JSON has no number for a loss that diverged."""
    return [value if math.isfinite(value) else None for value in values]


def _method_results(history: History, options: dict[str, Any]) -> dict[str, Any]:
    epochs, seconds = len(history.seconds), history.seconds[-1]
    curves = {name: _finite(values) for name, values in asdict(history).items()}
    return {
        "hyperparameters": options,
        **curves,
        "final": {
            "train_loss": curves["train_loss"][-1],
            "test_loss": curves["test_loss"][-1],
            "epochs": epochs,
            "seconds": seconds,
            "seconds_per_epoch": seconds / epochs,
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo with the command line ``argv``.

    Raises:
        SystemExit: code 2 after one message, for arguments or data that cannot work or missing packages.
    """
    parser = _parser()
    args = parser.parse_args(argv)

    def give_up(message: object) -> NoReturn:
        parser.exit(2, f"{parser.prog}: error: {message}\n")

    try:
        from locoprop_torch import _demo_report as report
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        give_up(f'{package} is not installed: pip install "locoprop-kernels[demo]"')
    try:
        device = _device(args.device)
        experiment = _experiment(args)
        tensors = curves_tensors(args.seed, args.images or TRAIN_CURVES) if args.data == "curves" else None
        images, test_images = (part.to(device) for part in tensors or _file_tensors(args.data, args.images))
        args.out.mkdir(parents=True, exist_ok=True)
        started = [warm_up(experiment, method, images) for method in experiment.hyperparameters]
    except (OSError, ValueError) as error:
        give_up(error)
    step = next((optimizer.last_reports[0] for optimizer in started if optimizer is not None), None)

    results: dict[str, Any] = {
        "config": {
            "data": Path(args.data).name,
            "train_images": len(images),
            "test_images": len(test_images),
            "layers": [*experiment.encoder, *reversed(experiment.encoder[:-1])],
            "batch_size": experiment.batch_size,
            "epochs": experiment.epochs,
            "baseline_epochs": experiment.baseline_epochs,
            "seed": args.seed,
            "dtype": args.dtype,
            "backend": args.backend,
            "locoprop": {"reduction": "sum", "rule": repr(experiment.rule)},
            "loss": "cross entropy in nats, summed over pixels, averaged over the batches of the epoch",
            "loss_lower_bound": entropy(images),
        },
        "environment": {
            **_environment(device),
            "backend": {"ran": step.backend, "reason": step.reason} if step else None,
        },
        "methods": {},
    }
    report.show_setup(results)
    with report.progress() as bars:
        tasks = {
            method: bars.add_task(METHODS[method], total=experiment.epochs_of(method), start=False)
            for method in experiment.hyperparameters
        }
        for method, options in experiment.hyperparameters.items():
            bars.start_task(tasks[method])
            advance = partial(bars.advance, tasks[method])
            history = train(experiment, method, images, test_images, args.seed, advance)
            bars.update(
                tasks[method], completed=experiment.epochs_of(method)
            )  # the shares may not add up to the last bit
            results["methods"][METHODS[method]] = _method_results(history, options)
    report.show_table(results)
    (args.out / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    report.draw_curves(results, args.out / "training_curves.png")
    report.show_files(args.out)


if __name__ == "__main__":
    main()
