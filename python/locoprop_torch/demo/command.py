"""The command line of the demo: what is trained, on what, and where the results go.

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
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

import locoprop_kernels
from locoprop_kernels import StepReport
from locoprop_kernels.problem import COMPUTE_DTYPES
from locoprop_kernels.steps import BACKENDS
from locoprop_torch.demo.data import TRAIN_CURVES, curves_tensors, file_tensors
from locoprop_torch.demo.experiments import CURVES, FILES, METHODS, Experiment
from locoprop_torch.demo.training import History, entropy, train, warm_up

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["main"]

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in COMPUTE_DTYPES}


def _number(minimum: int) -> Any:
    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be >= {minimum}, got {text}")
        return value

    # What argparse calls it in its messages.
    parse.__name__ = "integer"
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m locoprop_torch.demo",
        description="Train a deep autoencoder with LocoProp-M (on all rows and on few), LocoProp-S, RMSProp and Adam "
        "from the same start on the same batches, and draw the loss against epochs and against time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo_out"), help="the folder that results.json and training_curves.png go to")
    add(
        "--data",
        default="curves",
        help="'curves' draws the images and trains a small network, in about a minute on two cores; an .npz file with "
        "x_train and x_test, or a folder of IDX files as MNIST and Fashion-MNIST ship, trains the paper's "
        "784-1000-500-250-30-250-500-1000-784 network with batches of 1000",
    )
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=f"which to train, of {', '.join(METHODS)}",
    )
    add(
        "--epochs",
        type=_number(1),
        default=None,
        help="how many epochs LocoProp trains; if not given, 20 on curves and 2 on files",
    )
    add(
        "--baseline-epochs",
        type=_number(1),
        default=None,
        help="how many epochs RMSProp and Adam train; if not given, as many as LocoProp",
    )
    add(
        "--seconds",
        type=float,
        default=None,
        help="train every method for about so long, to the end of an epoch, in place of a number of epochs",
    )
    add(
        "--images",
        type=_number(1),
        default=None,
        help="how many train images to take; if not given, 4000 curves or all of a file",
    )
    add("--device", default="cpu", help="the torch device to train on")
    add("--dtype", choices=DTYPES, default="float32", help="the dtype of the operands of LocoProp's local products")
    add("--backend", choices=BACKENDS, default="auto", help="the backend of LocoProp")
    add("--seed", type=_number(0), default=0, help="the seed of the curves, the weights and the batches")
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
    if args.seconds is not None and (args.epochs or args.baseline_epochs):
        raise ValueError("--seconds is in place of --epochs and --baseline-epochs, give one of them")
    if args.seconds is not None and not 0 < args.seconds < math.inf:
        raise ValueError(f"--seconds must be finite and > 0, got {args.seconds:g}")
    epochs = args.epochs or base.epochs
    return replace(
        base,
        epochs=epochs,
        baseline_epochs=args.baseline_epochs or epochs,
        hyperparameters={method: base.hyperparameters[method] for method in args.methods},
        backend=args.backend,
        compute_dtype=DTYPES[args.dtype],
        seconds=args.seconds,
    )


def _setup(args: argparse.Namespace, experiment: Experiment, images: Tensor, test_images: Tensor) -> dict[str, Any]:
    """What ``results.json`` says of the experiment, before anything has run."""
    return {
        "data": Path(args.data).name,
        "train_images": len(images),
        "test_images": len(test_images),
        "layers": [*experiment.encoder, *reversed(experiment.encoder[:-1])],
        "batch_size": experiment.batch_size,
        **(
            {"epochs": experiment.epochs, "baseline_epochs": experiment.baseline_epochs}
            if experiment.seconds is None
            else {"seconds": experiment.seconds}
        ),
        "seed": args.seed,
        "dtype": args.dtype,
        "backend": args.backend,
        "locoprop": {"reduction": "sum", "rule": repr(experiment.rule)},
        "loss": "cross entropy in nats, summed over pixels, averaged over the batches of the epoch",
        "loss_lower_bound": entropy(images),
    }


def _environment(device: torch.device, step: StepReport | None) -> dict[str, Any]:
    """On what it runs; ``step`` is one of LocoProp's, if it takes part."""
    return {
        "locoprop_kernels": locoprop_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "backend": {"ran": step.backend, "reason": step.reason} if step else None,
    }


def _finite(values: Sequence[float]) -> list[float | None]:
    """``values``, but ``None`` for a loss that diverged: JSON has no number for it."""
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
        from locoprop_torch.demo import report
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        give_up(f'{package} is not installed: pip install "locoprop-kernels[demo]"')
    try:
        device = _device(args.device)
        experiment = _experiment(args)
        tensors = curves_tensors(args.seed, args.images or TRAIN_CURVES) if args.data == "curves" else None
        images, test_images = (part.to(device) for part in tensors or file_tensors(args.data, args.images))
        args.out.mkdir(parents=True, exist_ok=True)
        started = [warm_up(experiment, method, images) for method in experiment.hyperparameters]
    except (OSError, ValueError) as error:
        give_up(error)
    step = next((optimizer.last_reports[0] for optimizer in started if optimizer is not None), None)
    results = {"config": _setup(args, experiment, images, test_images), "environment": _environment(device, step)}
    report.show_setup(results)
    unit = "epochs" if experiment.seconds is None else "seconds"
    results["methods"] = _train_all(experiment, images, test_images, args.seed, report.progress(unit))
    report.show_table(results)
    (args.out / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    report.draw_curves(results, args.out / "training_curves.png")
    report.show_files(args.out)


def _train_all(
    experiment: Experiment, images: Tensor, test_images: Tensor, seed: int, progress: Progress
) -> dict[str, Any]:
    """The results of every method, while ``progress`` shows how far it is."""
    methods: dict[str, Any] = {}
    with progress as bars:
        tasks = {
            method: bars.add_task(
                METHODS[method], total=experiment.seconds or experiment.epochs_of(method), start=False
            )
            for method in experiment.hyperparameters
        }
        for method, options in experiment.hyperparameters.items():
            bars.start_task(tasks[method])
            history = train(experiment, method, images, test_images, seed, partial(bars.advance, tasks[method]))
            # The batches' shares of an epoch may not add up to the last bit, and the last epoch takes longer.
            bars.update(tasks[method], completed=experiment.seconds or experiment.epochs_of(method))
            methods[METHODS[method]] = _method_results(history, options)
    return methods
