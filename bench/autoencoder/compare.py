"""The comparison: every optimiser from the same starts on the same batches, and what is read off the curves."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench import memory
from bench.autoencoder import search
from bench.autoencoder.context import Context
from bench.autoencoder.optimisers import Contestant, Values
from bench.autoencoder.runs import History, Plan, remembered, run
from bench.autoencoder.tasks import Autoencoder

__all__ = ["SUBJECT", "Entry", "compare", "longer", "median_curve", "seconds_of", "spread", "time_to", "tune"]

Entry = dict[str, Any]
SUBJECT = "autoencoder"


def plan(context: Context, contestant: Contestant, values: Values, seed: int, epochs: int, label: str) -> Plan:
    """A run of a contestant on the autoencoder."""
    protocol = context.protocol

    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        return contestant.optimiser(model, values, protocol)

    return Plan(label, make, contestant.name, values, seed, epochs, protocol.warm_up)


def tune(context: Context, task: Autoencoder, trials: int) -> None:
    """Search the hyper-parameters of every contestant on one task, on a seed that is not reported."""
    protocol = context.protocol
    subject = f"{protocol.name} {SUBJECT}"
    where = f"{task.images.name}, {task.activation}"
    for contestant in context.contestants:

        def objective(values: Values, number: int, contestant: Contestant = contestant) -> float:
            one = plan(context, contestant, values, context.search_seed, protocol.search_epochs, f"search-{number}")
            return _run(context, one, task, f"search {contestant.label}").final()

        journal = context.out / "search.log"
        found = search.search(contestant, trials, journal, f"{subject} {where}", objective)
        about = {"searched_on": where, "epochs": protocol.search_epochs, "seed": context.search_seed}
        search.remember(context.chosen, subject, {contestant.name: {**found, **about}})


def compare(context: Context, task: Autoencoder) -> dict[str, Entry]:
    """Train every contestant with the chosen values on every seed; entries by name."""
    return {one.name: _entry(context, task, one, context.protocol.epochs) for one in context.contestants}


def longer(context: Context, task: Autoencoder, entries: dict[str, Entry]) -> dict[str, Entry]:
    """The best first-order method of ``entries`` again, with ``protocol.longer`` times the epochs."""
    first = [one for one in context.contestants if one.kind == "first-order"]
    if not first:
        return {}
    best = min(first, key=lambda one: final_loss(entries[one.name]))
    entry = _entry(context, task, best, context.protocol.longer * context.protocol.epochs)
    return {best.name: {**entry, "label": f"{best.label}, {context.protocol.longer} × the epochs"}}


def _entry(context: Context, task: Autoencoder, contestant: Contestant, epochs: int) -> Entry:
    values = search.chosen(context.chosen, f"{context.protocol.name} {SUBJECT}", contestant)
    label = f"{task.images.name}-{task.activation}"
    histories = [
        _run(context, plan(context, contestant, values, seed, epochs, label), task, f"{label} {contestant.label}")
        for seed in context.seeds
    ]
    return {
        "label": contestant.label,
        "kind": contestant.kind,
        "values": values,
        "peak_mib": _peak(context, task, contestant, values),
        "state_mib": round(max(history.state_bytes for history in histories) / memory.MIB, 2),
        "runs": [_facts(history) for history in histories],
    }


def _facts(history: History) -> dict[str, Any]:
    facts = asdict(history)
    return {"seed": facts.pop("facts")["seed"], **facts}


def _run(context: Context, one: Plan, task: Autoencoder, description: str) -> History:
    with context.bar(f"{description}, seed {one.seed}", one.epochs) as advance:
        return run(one, task, context.out / "runs", context.clock, context.deadline, advance)


def _peak(context: Context, task: Autoencoder, contestant: Contestant, values: Values) -> float | None:
    """Peak memory of a few training steps in MiB, model, batches and optimiser; until its matrices have been formed."""
    steps = context.protocol.interval + 1 if contestant.kind == "second-order" else 2

    def work() -> None:
        model = task.network(0).to(task.device)
        optimizer = contestant.optimiser(model, values, context.protocol)
        batch = task.images.train[: context.protocol.batch_size].clone()
        for _ in range(steps):
            optimizer.zero_grad()
            task.loss(model, batch, batch).backward()
            optimizer.step()

    facts = {**task.facts(), "values": values, "steps": steps}
    path = context.out / "runs" / f"peak-{task.images.name}-{task.activation}-{contestant.name}.json"
    return remembered(path, facts, lambda: memory.peak_of(work, task.device))


def numbers(values: Iterable[float | None]) -> list[float]:
    """Values of a curve, infinite where it diverged."""
    return [float("inf") if value is None else value for value in values]


def seconds_of(one: dict[str, Any]) -> list[float]:
    """Training time of a run up to the end of each epoch."""
    total, times = 0.0, []
    for model, optimiser in zip(one["model_seconds"], one["optimiser_seconds"], strict=True):
        total += model + optimiser
        times.append(total)
    return times


def final_loss(entry: Entry, name: str = "train_loss") -> float:
    """Median over the seeds of the last value of a curve."""
    return statistics.median(numbers(one["curves"][name])[-1] for one in entry["runs"])


def epoch_seconds(entry: Entry, share: str | None = None) -> float:
    """Median training time of an epoch; of ``"model"`` or ``"optimiser"`` alone if ``share`` says so."""
    shares = (share,) if share else ("model", "optimiser")
    rows = zip(*([s for one in entry["runs"] for s in one[f"{name}_seconds"]] for name in shares), strict=True)
    return statistics.median(map(sum, rows))


def spread(entry: Entry, name: str = "train_loss") -> tuple[list[float], list[float], list[float]]:
    """Lowest, median and highest value after each epoch that all seeds have reached."""
    rows = list(zip(*(numbers(one["curves"][name]) for one in entry["runs"]), strict=False))
    return [min(row) for row in rows], [statistics.median(row) for row in rows], [max(row) for row in rows]


def median_curve(entry: Entry) -> list[float]:
    """Median training time up to the end of each epoch."""
    return [statistics.median(row) for row in zip(*(seconds_of(one) for one in entry["runs"]), strict=False)]


def time_to(entry: Entry, loss: float) -> float | None:
    """Median training time until the train loss is at most ``loss``; ``None`` if half the seeds stay above it."""
    times = [_first_time(one, loss) for one in entry["runs"]]
    found = statistics.median_high(times)
    return None if found == float("inf") else found


def _first_time(one: dict[str, Any], loss: float) -> float:
    reached = (
        time for time, value in zip(seconds_of(one), numbers(one["curves"]["train_loss"]), strict=True) if value <= loss
    )
    return next(reached, float("inf"))


def thresholds(entries: dict[str, Entry]) -> Sequence[float]:
    """The losses that the table of times asks for: around the best final loss of a first-order method."""
    first = [final_loss(entry) for entry in entries.values() if entry["kind"] == "first-order"]
    best = min(first or [final_loss(entry) for entry in entries.values()])
    return [round(best * part, 1) for part in (1.5, 1.25, 1.1, 1.0, 0.9)]
