"""Runs of a number of steps, with a checkpoint at every evaluation, from which another process goes on to the bit."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.autoencoder.runs import Deadline, write
from bench.equal_time.contestants import CONTESTANTS, Problem

__all__ = ["Run", "step_seconds"]


def step_seconds(problem: Problem, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Seconds of a training step of each contestant, forward and backward pass included: they take turns.

    Returns:
        ``{name: {"p50": median, "min": least}}``.
    """
    field_ = []
    for name in names:
        model = problem.network(0)
        field_.append((name, model, CONTESTANTS[name].make(model, **CONTESTANTS[name].grid[0])))
    samples: dict[str, list[float]] = {name: [] for name in names}
    batch = problem.batch(0, 0)
    for number in range(-2, problem.setting.rounds):
        for name, model, optimizer in field_:
            start = time.perf_counter()
            problem.step(model, optimizer, batch)
            # The first steps allocate, and choose how to multiply.
            if number >= 0:
                samples[name].append(time.perf_counter() - start)
    return {name: {"p50": sorted(some)[len(some) // 2], "min": min(some)} for name, some in samples.items()}


@dataclass
class Run:
    """A contestant with values and a seed, and what it has measured so far.

    Attributes:
        name: key of :data:`~bench.equal_time.contestants.CONTESTANTS`.
        values: its hyper-parameters.
        seed: of the weights and the batches.
        steps: after how many the losses were taken; the first is 0.
        train_loss: the losses, ``None`` where they are not finite.
        test_loss: likewise.
    """

    name: str
    values: dict[str, Any]
    seed: int = 0
    steps: list[int] = field(default_factory=list)
    train_loss: list[float | None] = field(default_factory=list)
    test_loss: list[float | None] = field(default_factory=list)

    @property
    def label(self) -> str:
        words = "-".join(f"{key}{value:g}" for key, value in self.values.items())
        return "-".join(filter(None, (self.name, words, f"s{self.seed}")))

    @property
    def diverged(self) -> bool:
        return bool(self.train_loss) and self.train_loss[-1] is None

    def loss_after(self, steps: float, curve: str = "train_loss") -> float:
        """A loss after so many steps, interpolated; infinite where it is not finite, or not reached."""
        losses = [math.inf if value is None else value for value in getattr(self, curve)]
        if not self.steps or steps > self.steps[-1] or not all(map(math.isfinite, losses)):
            return math.inf
        return float(np.interp(steps, self.steps, losses))

    def resumed(self, folder: Path) -> Run:
        """This run with what ``folder`` has of it."""
        path = folder / f"{self.label}.json"
        return Run(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else self

    def train(self, problem: Problem, steps: float, folder: Path, deadline: Deadline) -> None:
        """Go on until at least so many steps have been made, to an evaluation.

        Args:
            problem: network and images.
            steps: how many.
            folder: has ``LABEL.json`` and the checkpoint ``LABEL.pt``.
            deadline: asked before the steps to every evaluation.

        Raises:
            OutOfTime: from ``deadline``; nothing is lost.
        """
        if self.diverged or (self.steps and self.steps[-1] >= steps):
            return
        model = problem.network(self.seed)
        optimizer = CONTESTANTS[self.name].make(model, **self.values)
        if not self.steps:
            self._evaluate(problem, model, 0)
        else:
            saved = torch.load(folder / f"{self.label}.pt", weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            # The checkpoint is written first.
            if saved["steps"] > self.steps[-1]:
                self._evaluate(problem, model, saved["steps"])
        while self.steps[-1] < steps and not self.diverged:
            deadline.check()
            done = self.steps[-1] + problem.setting.every
            for step in range(self.steps[-1], done):
                problem.step(model, optimizer, problem.batch(self.seed, step))
            self._evaluate(problem, model, done)
            saved = {"steps": done, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(saved, folder / f"{self.label}.new")
            (folder / f"{self.label}.new").replace(folder / f"{self.label}.pt")
            write(folder / f"{self.label}.json", json.dumps(asdict(self), indent=1) + "\n")

    def _evaluate(self, problem: Problem, model: nn.Module, steps: int) -> None:
        self.steps.append(steps)
        for curve, value in problem.losses(model).items():
            getattr(self, curve).append(value if math.isfinite(value) else None)
