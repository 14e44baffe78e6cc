"""The paper's experiments by one command: ``python -m bench.autoencoder --quick``; the guide's page has more."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import device
from bench.autoencoder import data, optimisers, search
from bench.autoencoder.networks import ACTIVATIONS, scaled
from bench.autoencoder.protocol import FULL, PROTOCOLS, REDUCED, Protocol
from bench.autoencoder.runs import Deadline, OutOfTime, write
from bench.autoencoder.tasks import SAMPLES, Autoencoder, as_text

__all__ = ["main"]

PARTS = ("compare", "longer", "ablations", "method", "beyond")
#: Exit status of a piece of work that ended before the whole was done: call again with ``--resume``.
UNFINISHED = 75


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.autoencoder",
        description="The paper's experiments: a deep autoencoder with LocoProp and its competitors.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="Take the reduced protocol: ten minutes on two cores.")
    add("--protocol", choices=PROTOCOLS, help=argparse.SUPPRESS)
    add(
        "--data",
        nargs="+",
        default=["curves"],
        metavar="DATA",
        help="Train on these: curves, fashion-mnist (Debian's package), an .npz file with x_train and x_test, a folder "
        "of IDX files (default: curves). Searches, ablations and figures of the method take the first.",
    )
    add(
        "--optimisers",
        nargs="+",
        metavar="NAME",
        help=f"Train these: {', '.join(optimisers.AUTOENCODER)} (default: all).",
    )
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="Do these parts (default: all).")
    add("--activation", nargs="+", choices=ACTIVATIONS, default=["tanh"], help="Activation functions (default: tanh).")
    add("--width", type=float, default=1.0, help="Make hidden layers this many times as wide (default: %(default)s).")
    add("--depth", type=int, default=1, help="Take each hidden layer this many times (default: %(default)s).")
    add("--seeds", type=int, help="Report this many seeds (default: 3, or 2 with --quick).")
    add(
        "--search",
        type=int,
        metavar="TRIALS",
        help="First search hyper-parameters, with this many trials for each optimiser.",
    )
    add(
        "--chosen", type=Path, default=search.CHOSEN, help="Read and write searched values here (default: %(default)s)."
    )
    add("--out", type=Path, default=Path("bench_out/autoencoder"), help="Put everything here (default: %(default)s).")
    add("--resume", action="store_true", help="Continue what --out has.")
    add("--minutes", type=float, help="Stop after about this long, between two epochs; --resume continues.")
    add("--device", default="cpu", help="Train on this device (default: %(default)s).")
    add("--clock", choices=device.CLOCKS, default="wall", help="Clock of training times (default: %(default)s).")
    add("--threads", type=int, help="Let torch use this many threads.")
    add("--text", type=Path, help="Let the GPT learn this text (default: modules of Python's library).")
    return parser


def _context(args: argparse.Namespace, protocol: Protocol) -> Any:
    from bench.autoencoder.context import Context

    if args.seeds is not None and args.seeds < 1:
        raise ValueError(f"--seeds must be >= 1, got {args.seeds}")
    if args.search is not None and args.search < 1:
        raise ValueError(f"--search must be >= 1, got {args.search}")
    runs = args.out / "runs"
    if not args.resume and runs.is_dir() and any(runs.iterdir()):
        raise ValueError(f"{args.out} has results; continue them with --resume, or name another folder with --out")
    return Context(
        protocol=protocol,
        contestants=optimisers.checked(args.optimisers, protocol),
        seeds=range(args.seeds or protocol.seeds),
        out=args.out,
        chosen=args.chosen,
        clock=args.clock,
        deadline=Deadline(args.minutes),
    )


def _tasks(args: argparse.Namespace, protocol: Protocol) -> list[Autoencoder]:
    where = torch.device(args.device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device} cannot be used: torch finds no GPU")
    encoder = scaled(protocol.encoder, args.width, args.depth)
    images = [data.load(source, protocol).to(where) for source in args.data]
    return [Autoencoder(one, protocol, encoder, activation) for one in images for activation in args.activation]


def _compare(context: Any, task: Autoencoder, parts: Sequence[str]) -> dict[str, Any]:
    from bench.autoencoder import compare, statements

    entries = compare.compare(context, task)
    extra = compare.longer(context, task, entries) if "longer" in parts else {}
    return {
        "entries": entries,
        "longer": extra,
        "images": as_text(task.images.test[:SAMPLES]),
        "statements": statements.check(entries, extra),
    }


def _work(args: argparse.Namespace, context: Any, tasks: list[Autoencoder]) -> dict[str, Any]:
    """All parts; the results as they go into ``results.json``."""
    from bench.autoencoder import ablations, beyond, compare, method

    if args.search:
        compare.tune(context, tasks[0], args.search)
    results: dict[str, Any] = {"compare": {}}
    for task in tasks if "compare" in args.parts else ():
        results["compare"][f"{task.images.name}, {task.activation}"] = _compare(context, task, args.parts)
    others: dict[str, Callable[[], dict[str, Any]]] = {
        "ablations": lambda: ablations.study(context, tasks[0]),
        "method": lambda: method.study(context, tasks[0]),
        "beyond": lambda: beyond.study(context, args.data, args.text, torch.device(args.device), args.search),
    }
    for part, study in others.items():
        if part in args.parts:
            results[part] = study()
    return results


def _about(args: argparse.Namespace, protocol: Protocol, context: Any, tasks: list[Autoencoder]) -> dict[str, Any]:
    """What the results are of; paths go by their last part, as they are of this machine alone."""
    command = shlex.join(["python", "-m", "bench.autoencoder", *_shown(args)])
    searched = search.about(context.chosen, f"{protocol.name} autoencoder", [one.name for one in context.contestants])
    return {
        "command": command,
        "protocol": asdict(protocol),
        "encoder": list(tasks[0].encoder),
        "seeds": list(context.seeds),
        "clock": args.clock,
        "search": searched,
        "data": {
            task.images.name: {
                "digest": task.images.digest,
                "train": len(task.images.train),
                "test": len(task.images.test),
            }
            for task in tasks
        },
    }


def _shown(args: argparse.Namespace) -> list[str]:
    """The command line, without what does not change results and with files by their names."""
    words = []
    for name, value in vars(args).items():
        default = _parser().get_default(name)
        if value == default or name in ("out", "resume", "minutes", "chosen"):
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [Path(str(one)).name for one in (value if isinstance(value, list) else [value])]
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``.

    Returns:
        0; or :data:`UNFINISHED` if time was up before everything was done, 130 if it was interrupted.

    Raises:
        SystemExit: code 2 after one message, for arguments, data or packages that are missing or wrong.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    protocol = PROTOCOLS[args.protocol] if args.protocol else REDUCED if args.quick else FULL
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        context = _context(args, protocol)
        tasks = _tasks(args, protocol)
        results = _work(args, context, tasks)
    except ModuleNotFoundError as error:
        parser.exit(2, f'{parser.prog}: {error.name} is not installed: pip install -c constraints.txt -e ".[paper]"\n')
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except (OutOfTime, KeyboardInterrupt) as stopped:
        again = shlex.join(["python", "-m", "bench.autoencoder", *(sys.argv[1:] if argv is None else argv)])
        more = "" if args.resume else " --resume"
        print(f"Stopped; all that is complete is in {args.out}. Continue with: {again}{more}", file=sys.stderr)
        return UNFINISHED if isinstance(stopped, OutOfTime) else 130
    about = _about(args, protocol, context, tasks)
    _publish({"config": about, "environment": _environment(args.device), **results}, args.out)
    return 0


def _environment(where: str) -> dict[str, Any]:
    """The machine, and the versions that the results depend on, the baselines' libraries among them."""
    about = device.describe(torch.device(where))
    about.pop("memory_bytes", None)
    versions = device.versions("pytorch_optimizer", "singd", "optuna")
    found = {name: version for name, version in versions.items() if version != "absent"}
    return {"device": about, "versions": found, "commit": device.commit()}


def _publish(results: dict[str, Any], out: Path) -> None:
    from rich.console import Console

    from bench.autoencoder import report

    console = Console(width=140)
    write(out / "results.json", json.dumps(results, indent=1) + "\n")
    report.show(results, console)
    for path in (out / "results.json", *report.write_report(results, out)):
        console.print(f"Wrote {path}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
