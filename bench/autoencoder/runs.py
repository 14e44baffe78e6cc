"""Runs in a folder: training with a checkpoint after every epoch, which a later process takes to the same numbers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from bench.autoencoder.stopwatch import Stopwatch

__all__ = ["Deadline", "History", "OutOfTime", "Plan", "Task", "diverged", "factor", "remembered", "run", "write"]


class Task(Protocol):
    """What is trained on what: a network, its batches, its loss, and what is measured after an epoch."""

    @property
    def device(self) -> torch.device:
        """Where it is trained."""

    def facts(self) -> dict[str, Any]:
        """What a run's numbers depend on; goes into its file and is compared when it is continued."""

    def network(self, seed: int) -> nn.Module:
        """A network with the weights of ``seed``."""

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of an epoch, the same whatever has been trained before."""

    def steps(self) -> int:
        """Batches of an epoch."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch, for ``backward``."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Numbers by name; ``"train_loss"`` is among them."""

    def samples(self, model: nn.Module) -> str:
        """What the report shows of a trained model: images by :func:`bench.autoencoder.tasks.as_text`, or ``""``."""


@dataclass(frozen=True)
class Plan:
    """A run: the optimiser by name, its hyper-parameters, the seed, and for how long.

    Attributes:
        label: begins the names of the run's files.
        make: the optimiser for a model.
        optimiser: its name.
        values: its hyper-parameters.
        seed: of weights and batches.
        epochs: how many.
        warm_up: epochs at the start in which the learning rate rises.
    """

    label: str
    make: Callable[[nn.Module], Optimizer]
    optimiser: str
    values: dict[str, Any]
    seed: int
    epochs: int
    warm_up: int

    def facts(self) -> dict[str, Any]:
        names = ("optimiser", "values", "seed", "epochs", "warm_up")
        return {name: getattr(self, name) for name in names}


@dataclass
class History:
    """What a run has measured so far.

    Attributes:
        facts: what its numbers depend on.
        curves: values after each epoch, by name; ``None`` where a loss was not finite.
        model_seconds: of each epoch, forward and backward passes and the hooks of the optimiser in them.
        optimiser_seconds: of each epoch, ``optimizer.step()``.
        state_bytes: size of the optimiser's saved state.
        done: whether it is complete; a run whose loss is not finite ends early.
        samples: of the trained model, from the task.
    """

    facts: dict[str, Any]
    curves: dict[str, list[float | None]] = field(default_factory=dict)
    model_seconds: list[float] = field(default_factory=list)
    optimiser_seconds: list[float] = field(default_factory=list)
    state_bytes: int = 0
    done: bool = False
    samples: str = ""

    @property
    def epochs(self) -> int:
        return len(self.model_seconds)

    def final(self, name: str = "train_loss") -> float:
        """The last value of a curve; infinite where the run diverged."""
        last = self.curves[name][-1] if self.curves.get(name) else None
        return math.inf if last is None else last


class OutOfTime(Exception):
    """The piece of work that was asked for is over; everything so far has been written."""


class Deadline:
    """Ends a piece of work between two epochs, ``minutes`` from now; never if that is ``None``."""

    def __init__(self, minutes: float | None = None) -> None:
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def check(self) -> None:
        """Raise :class:`OutOfTime` if the time is up."""
        if time.monotonic() > self._end:
            raise OutOfTime


def factor(step: int, steps: int, warm_up: int) -> float:
    """Of the learning rate in ``step`` of ``steps``: linear to 1 over the first ``warm_up`` steps, then linear to 0."""
    if step < warm_up:
        return (step + 1) / warm_up
    return max(0.0, (steps - step) / max(1, steps - warm_up))


def diverged(history: History) -> bool:
    """Whether the train loss is not finite."""
    return math.isinf(history.final())


def write(path: Path, content: str | bytes) -> None:
    """Put ``content`` at ``path`` as a whole: an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(beside, path)


def remembered(path: Path, facts: dict[str, Any], measure: Callable[[], float]) -> float | None:
    """A number that ``path`` has for these facts, or else is measured now and kept; ``None`` if not finite."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if found.get("facts") != facts:
        value = measure()
        found = {"facts": facts, "value": value if math.isfinite(value) else None}
        write(path, json.dumps(found) + "\n")
    return found["value"]


def run(
    plan: Plan, task: Task, folder: Path, clock: str, deadline: Deadline, progress: Callable[[], object] = lambda: None
) -> History:
    """Train, or continue what ``folder`` has of this run; a complete one is only read.

    Args:
        plan: the run.
        task: what it trains.
        folder: has ``NAME.json`` of every run, and ``NAME.pt`` of those that are not complete. The name ends with a
            digest of the run's facts, so that other settings are another run.
        clock: ``"wall"`` or ``"cpu"``, see :data:`bench.device.CLOCKS`.
        deadline: asked before every epoch.
        progress: called after every epoch, also those that an earlier process has trained.

    Raises:
        OutOfTime: from ``deadline``; nothing is lost.
        ValueError: a file of this run cannot be read; names it, and the command that mends it.
    """
    facts = json.loads(json.dumps({**plan.facts(), **task.facts(), "clock": clock}))
    name = f"{plan.label}-{plan.optimiser}-s{plan.seed}-{_digest(facts)}"
    path, checkpoint = folder / f"{name}.json", folder / f"{name}.pt"
    history = _read(path, facts)
    if not history.done:
        _train(plan, task, history, (path, checkpoint), Stopwatch(task.device, clock), (deadline, progress))
        checkpoint.unlink(missing_ok=True)
    else:
        for _ in range(plan.epochs):
            progress()
    return history


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def _read(path: Path, facts: dict[str, Any]) -> History:
    if not path.is_file():
        return History(facts)
    try:
        history = History(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); remove it to train this run again: rm {path}") from error
    return history


def _train(
    plan: Plan,
    task: Task,
    history: History,
    paths: tuple[Path, Path],
    watch: Stopwatch,
    hooks: tuple[Deadline, Callable[[], object]],
) -> None:
    path, checkpoint = paths
    deadline, progress = hooks
    model = task.network(plan.seed).to(task.device)
    optimizer = plan.make(model)
    total, warm_up = plan.epochs * task.steps(), plan.warm_up * task.steps()
    scheduler = LambdaLR(optimizer, lambda step: factor(step, total, warm_up))
    if history.epochs:
        _load(checkpoint, history, model, optimizer, scheduler)
    for _ in range(history.epochs):
        progress()
    for epoch in range(history.epochs, plan.epochs):
        deadline.check()
        _epoch(model, optimizer, scheduler, task, task.batches(plan.seed, epoch), watch)
        finite = _measure(task, model, history)
        for seconds, one in zip((history.model_seconds, history.optimiser_seconds), watch.take(), strict=True):
            seconds.append(one)
        history.done = not finite or epoch + 1 == plan.epochs
        history.samples = task.samples(model) if history.done else ""
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        history.state_bytes = _save(checkpoint, saved, history)
        write(path, json.dumps(asdict(history), indent=1) + "\n")
        progress()
        if not finite:
            break


def _epoch(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    task: Task,
    batches: Iterator[tuple[Tensor, Tensor]],
    watch: Stopwatch,
) -> None:
    model.train()
    for x, y in batches:
        watch.start()
        optimizer.zero_grad()
        task.loss(model, x, y).backward()
        watch.split()
        optimizer.step()
        watch.stop()
        scheduler.step()


@torch.no_grad()
def _measure(task: Task, model: nn.Module, history: History) -> bool:
    """Append to the curves; whether the train loss is finite."""
    model.eval()
    values = task.evaluate(model)
    for name, value in values.items():
        history.curves.setdefault(name, []).append(value if math.isfinite(value) else None)
    return math.isfinite(values["train_loss"])


def _save(path: Path, saved: dict[str, Any], history: History) -> int:
    """Write a checkpoint; the bytes of the optimiser's part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".optimizer")
    torch.save(saved["optimizer"], beside)
    size = beside.stat().st_size
    beside.unlink()
    new = path.with_name(path.name + ".new")
    torch.save({**saved, "epochs": history.epochs, "history": asdict(history)}, new)
    os.replace(new, path)
    return size


def _load(path: Path, history: History, model: nn.Module, optimizer: Optimizer, scheduler: LambdaLR) -> None:
    """Continue from a checkpoint. It may be an epoch ahead of the run's file, which is then brought up to it."""
    try:
        # Some optimisers keep objects of their own in their state, which only unpickling brings back; it is our file.
        saved = torch.load(path, weights_only=False)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path}: the checkpoint cannot be read ({error}); remove this run's files to train it again: "
            f"rm {path.with_suffix('')}.*"
        ) from error
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    for name, value in saved["history"].items():
        setattr(history, name, value)
