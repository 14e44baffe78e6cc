"""What the local steps of a layer do, on the autoencoder itself after an epoch of LocoProp-M.

Composed local steps on the squared loss approach the preconditioned step, the minimiser of the local problem: how fast,
with which rule, on how many rows. And where the local objective goes, in every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import locoprop_kernels as lk
from bench.autoencoder.compare import SUBJECT
from bench.autoencoder.context import Context
from bench.autoencoder.optimisers import Values, contestant_of
from bench.autoencoder.search import chosen
from bench.autoencoder.tasks import Autoencoder
from locoprop_kernels import rules
from locoprop_torch import LocoProp

__all__ = ["cosines", "problem_of", "study"]

SEED = 0
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
#: λ in shares of the largest eigenvalue of ``XᵀX / B``.
_PROX = 0.01
#: Local steps of the traces.
_TRACED = 20


def study(context: Context, task: Autoencoder) -> dict[str, Any]:
    """Cosines against T for the second layer, and traces of all layers for LocoProp-M and LocoProp-S."""
    protocol = context.protocol
    context.deadline.check()
    subject = f"{protocol.name} {SUBJECT}"
    two = [contestant_of(name, protocol) for name in ("locoprop-m", "locoprop-s")]
    values = {one.name: chosen(context.chosen, subject, one) for one in two}
    model = task.network(SEED).to(task.device)
    # Its hooks stay on this model, which is only looked at afterwards.
    train(model, two[0].optimiser(model, values["locoprop-m"], protocol), task, epoch=0)
    batch, _ = next(task.batches(SEED, 1))
    layer = [module for module in model.modules() if isinstance(module, nn.Linear)][1]
    problem = problem_of(model, layer, task, batch)
    with context.bar("composed local steps", len(STEPS)) as advance:
        found = cosines(problem, STEPS, advance)
    traces = {}
    for name, own in values.items():
        contestant = contestant_of(name, context.protocol)
        traces[contestant.label] = _trace(model, task, batch, name, own, context)
    shape = f"{layer.in_features} → {layer.out_features}"
    where = f"{task.images.name}, after one epoch of LocoProp-M, a batch of {len(batch)}"
    return {
        "title": f"The local objective of every layer; {where}",
        "about": "The increment of T local steps on the squared loss, against the minimiser of the same local problem "
        f"(λ a hundredth of the largest eigenvalue of XᵀX/B), in float64. Layer {shape} on {where}. SGD and momentum "
        "have the largest stable learning rate, RMSProp a falling one. Below: the losses that the "
        "local steps really see, with the rule and the values of the comparison and twice its local steps.",
        "closed_form": {
            "T": list(STEPS),
            "cosines": found,
            "title": f"Layer {shape}: LocoProp-S against the closed form",
        },
        "traces": traces,
    }


def train(model: nn.Module, optimizer: torch.optim.Optimizer, task: Autoencoder, epoch: int) -> None:
    """One epoch at a constant learning rate."""
    for x, y in task.batches(SEED, epoch):
        optimizer.zero_grad()
        task.loss(model, x, y).backward()
        optimizer.step()
    optimizer.zero_grad()


def problem_of(model: nn.Module, layer: nn.Linear, task: Autoencoder, batch: Tensor) -> lk.LocalProblem:
    """The local problem of LocoProp-S of a layer on a batch, in float64, with ``γ = 1``."""
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["x"], seen["a"] = inputs[0].detach().double(), output.detach().double()

    handle = layer.register_forward_hook(keep)
    try:
        model.zero_grad()
        task.loss(model, batch, batch).backward()
    finally:
        handle.remove()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    return lk.LocalProblem(
        seen["x"],
        seen["a"],
        layer.weight.detach().double(),
        layer.bias.detach().double(),
        layer.weight.grad.double(),
        layer.bias.grad.double(),
    )


def cosines(problem: lk.LocalProblem, steps: tuple[int, ...], advance: Any = lambda: None) -> dict[str, list[float]]:
    """Cosine between the increment of ``T`` local steps and the closed form, for each ``T``, by rule and rows."""
    assert isinstance(problem.x, Tensor)
    inputs = torch.cat([problem.x, torch.ones_like(problem.x[:, :1])], dim=1)
    largest = float(torch.linalg.matrix_norm(inputs, 2)) ** 2 / len(inputs)
    prox = _PROX * largest
    exact = lk.closed_form(problem, prox=prox, reduction="mean")
    stable = 1 / (largest + prox)
    ways: dict[str, tuple[rules.Rule, float, int | None]] = {
        "SGD, all rows": (rules.SGD(), stable, None),
        "momentum 0.9, all rows": (rules.SGD(momentum=0.9), stable, None),
        "RMSProp, all rows": (rules.RMSprop(momentum=0.0), 0.0, None),
        "SGD, 32 rows": (rules.SGD(), stable, 32),
        "SGD, 8 rows": (rules.SGD(), stable, 8),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    scale = max(float(part.abs().max()) for part in exact if part is not None)
    for count in steps:
        for name, (rule, lr, rows) in ways.items():
            # RMSProp moves every weight by about lr a step: together they may go as far as the farthest has to.
            rates = [lr] * count if lr else [2 * scale / count * (1 - t / count) for t in range(count)]
            report = lk.local_steps_(
                [problem], rule=rule, lr=rates, prox=prox, reduction="mean", commit=False, rows=rows, rows_seed=1
            )
            found[name].append(_cosine((report.delta_weight[0], report.delta_bias[0]), exact))
        advance()
    return found


def _cosine(one: tuple[Tensor | None, ...], two: tuple[Tensor | None, ...]) -> float:
    first, second = (torch.cat([part.flatten() for part in parts if part is not None]) for parts in (one, two))
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0))


def _trace(
    model: nn.Module, task: Autoencoder, batch: Tensor, name: str, values: Values, context: Context
) -> dict[str, list[float]]:
    """The local objective of every layer before each local step and at the end, relative to the start."""
    contestant = contestant_of(name, context.protocol)
    copy = task.network(SEED).to(task.device)
    copy.load_state_dict(model.state_dict())
    optimizer = contestant.optimiser(copy, {**values, "local_iterations": _TRACED, "trace": True}, context.protocol)
    assert isinstance(optimizer, LocoProp)
    # The first step has no rate: it moves no weight, and warms the rule's mean square up.
    for lr in (0.0, values["lr"]):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        task.loss(copy, batch, batch).backward()
        optimizer.step()
    return {
        problem.name: problem.trace.tolist()
        for report in optimizer.last_reports
        for problem in report.problems
        if problem.trace is not None
    }
