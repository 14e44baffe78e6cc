"""One run of the study: a task, a configuration and a seed."""

from __future__ import annotations

import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.defaults.configurations import made, unit_of
from bench.defaults.data import Split, load
from bench.defaults.tasks import TASKS, Task
from locoprop_kernels.patches import row_chunks
from locoprop_torch import LocoProp

__all__ = ["EVALUATIONS", "LAST", "run"]

# Losses are evaluated this often, evenly over the steps; what a run ends with is the mean of the last ones.
EVALUATIONS, LAST = 10, 2
_EVALUATED = 2000


class _OutputGradient:
    """Hooks that keep ``∂L/∂A0`` of the captured layer that is called last in the first forward pass."""

    def __init__(self, optimizer: LocoProp) -> None:
        self._layers = dict(optimizer._layers)
        self._called: tuple[str, Tensor] | None = None
        self._gradient: Tensor | None = None
        self._handles = [
            module.register_forward_hook(self._hook(name))
            for name, layer in self._layers.items()
            for module in layer.modules.values()
        ]

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.retain_grad()
                self._called = name, output

        return keep

    def measured(self) -> dict[str, float]:
        """The sizes of the gradient's rows, after the first backward pass; takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        assert self._called is not None
        name, output = self._called
        assert output.grad is not None
        rows = torch.cat(list(row_chunks(self._layers[name].layout.outputs(output.grad))))
        largest = rows.abs().amax(1).square().mean().sqrt().item()
        return {
            "rows": len(rows),
            "max": largest,
            "layers": largest * len(self._layers),
            "norm": rows.square().sum(1).mean().sqrt().item(),
            "element": rows.square().mean().sqrt().item(),
            "peak": rows.abs().max().item(),
        }


def _batches(data: Split, task: Task, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(task.epochs):
        order = torch.randperm(len(data.x), generator=generator)
        for chosen in order[: len(order) // task.batch * task.batch].split(task.batch):
            yield data.x[chosen], data.y[chosen]


@torch.no_grad()
def _evaluated(model: nn.Module, task: Task, x: Tensor, y: Tensor) -> float:
    """The mean loss of a batch over examples, in batches of the task's size, for a sum is tied to it."""
    model.eval()
    count = len(x) // task.batch or 1
    batches = zip(x.tensor_split(count), y.tensor_split(count), strict=True)
    total = sum(task.loss(model(part), targets).item() * (1 if task.summed else len(part)) for part, targets in batches)
    model.train()
    return total / len(x)


def run(
    task_name: str, configuration: str, seed: int, mnist: Path | None = None, quick: bool = False
) -> dict[str, Any]:
    """Train once, on one thread.

    Args:
        task_name: key of :data:`~bench.defaults.tasks.TASKS`.
        configuration: name of a configuration.
        seed: of weights and batches.
        mnist: see :func:`bench.defaults.data.load`.
        quick: stop after as many steps as there are evaluations, each on a batch's worth of examples.

    Returns:
        the record of the run: losses at the end (``nan`` if it has diverged), all evaluations, steps, seconds of
        training, and for ``LocoProp`` the measured sizes of the gradient at the output layer in the first step.
    """
    torch.set_num_threads(1)
    # What the library says of layers that it knows nothing about would come between the lines of the progress bar.
    logging.getLogger("locoprop_torch").setLevel(logging.ERROR)
    task = TASKS[task_name]
    data = load(task.data, mnist)
    torch.manual_seed(seed)
    model = task.model()
    optimizer = made(configuration, task, model)
    record: dict[str, Any] = {"task": task_name, "configuration": configuration, "seed": seed, "terms": task.terms}
    steps = EVALUATIONS if quick else task.epochs * (len(data.x) // task.batch)
    evaluated = slice(task.batch if quick else _EVALUATED)
    at = {round(steps * (k + 1) / EVALUATIONS) for k in range(EVALUATIONS)}
    train_losses: list[float] = []
    test_losses: list[float] = []
    probe = _OutputGradient(optimizer) if isinstance(optimizer, LocoProp) else None
    seconds = 0.0
    for step, (x, y) in enumerate(_batches(data, task, seed), start=1):
        start = time.perf_counter()
        optimizer.zero_grad()
        task.loss(model(x), y).backward()
        if probe is not None:
            record["output"] = probe.measured()
            _scale(optimizer, unit_of(configuration), record["output"])
            probe = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step()
        seconds += time.perf_counter() - start
        if step in at:
            train_losses.append(_evaluated(model, task, data.x[evaluated], data.y[evaluated]))
            test_losses.append(_evaluated(model, task, data.test_x[evaluated], data.test_y[evaluated]))
            if not math.isfinite(train_losses[-1]):
                break
        if step == steps:
            break
    ended = len(test_losses) == len(at)
    for name, losses in (("train", train_losses), ("test", test_losses)):
        record[name] = sum(losses[-LAST:]) / LAST if ended else math.nan
        record[f"{name}_losses"] = losses
    record["steps"], record["seconds"] = step, seconds
    record["skipped"] = optimizer.skipped_steps if isinstance(optimizer, LocoProp) else 0
    return record


def _scale(optimizer: torch.optim.Optimizer, unit: str, measured: dict[str, float]) -> None:
    """Turn ``γ`` from multiples of a measured unit into a number."""
    if unit in measured and measured[unit] > 0:
        for group in optimizer.param_groups:
            if "activation_lr" in group:
                group["activation_lr"] /= measured[unit]
