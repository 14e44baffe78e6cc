"""Timing: all contestants of a case in one process, checked first, then interleaved round by round."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.cases import Case
from bench.contestants import Contestant, Entry
from bench.device import available_memory, clock, synchronize
from bench.work import Work

__all__ = ["Budget", "measure", "quantiles"]

Log = Callable[[str], None]


@dataclass(frozen=True)
class Budget:
    """How long a case may take.

    Attributes:
        seconds: of timing, per case, spread over the contestants.
        rounds: ``(fewest, most)``; fewer rounds than the fewest are never reported.
        clock: host clock, one of :data:`bench.device.CLOCKS`.
        longest: estimated seconds of one step of the slowest contestant beyond which a case is left out.
    """

    seconds: float = 12.0
    rounds: tuple[int, int] = (5, 200)
    longest: float = 10.0
    clock: str = "wall"


def quantiles(samples: list[float]) -> dict[str, float]:
    """Minimum, median, and the 10 % and 90 % quantiles."""
    values = np.quantile(samples, [0.0, 0.1, 0.5, 0.9])
    return dict(zip(("min", "p10", "p50", "p90"), map(float, values), strict=True))


def too_much(case: Case, device: torch.device, rates: dict[str, float], budget: Budget) -> str | None:
    """Why this machine should not try a case, by estimates of memory and time, or ``None``."""
    have = available_memory(device)
    if case.memory() > 0.8 * have:
        return f"needs about {case.memory() / 2**30:.1f} GiB, {have / 2**30:.1f} are free"
    products = 2 * 2 * case.iterations * sum(layer.macs for layer in case.layers) + case.training_flops()
    seconds = products / rates.get("fp32_torch_mm", rates["fp32"])
    if seconds > budget.longest:
        return f"one textbook step would take about {seconds:.0f} s"
    return None


def measure(
    case: Case, contestants: list[Contestant], device: torch.device, rates: dict[str, float], budget: Budget, log: Log
) -> dict[str, Any]:
    """Set up, check and time the contestants of one case.

    Returns:
        the case's entry in the JSON report: per contestant either times, or ``"skipped"`` with the reason.
    """
    result: dict[str, Any] = {
        "family": case.family,
        "layers": case.sizes(),
        "transfers": [layer.transfer for layer in case.layers],
        "iterations": case.iterations,
        "scope": case.scope,
        "loss": case.loss,
        "flops": case.flops(),
        "local_flops": case.local_flops(),
        "least_bytes": case.bytes(),
        "memory_estimate": case.memory(),
        "contestants": {},
    }
    if reason := too_much(case, device, rates, budget):
        return {**result, "skipped": reason}
    work = Work(case, device)
    entries: dict[str, Entry] = {}
    facts: dict[str, dict[str, Any]] = result["contestants"]
    for contestant in contestants:
        log(f"{case.name}: {contestant.name}")
        facts[contestant.name] = {"precision": contestant.precision}
        entry = _set_up(contestant, work, facts[contestant.name])
        if entry is not None:
            entries[contestant.name] = entry
    result["checked_against"] = "float64" if work.exact else "float32"
    log(f"{case.name}: timing")
    samples = _interleave({name: entry.run for name, entry in entries.items()}, device, budget)
    for name, entry in entries.items():
        facts[name].update(entry.details())
        facts[name]["seconds"] = quantiles(samples[name])
        facts[name]["rounds"] = len(samples[name])
    _compare(case, facts, samples, rates)
    entries.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def _set_up(contestant: Contestant, work: Work, facts: dict[str, Any]) -> Entry | None:
    """Build a contestant, run it once and check what it did; the reason goes to ``facts`` where it cannot take part."""
    if reason := contestant.unavailable(work.case, work.device):
        facts["skipped"] = reason
        return None
    gpu = work.device.type == "cuda"
    begin = time.perf_counter()
    try:
        entry = contestant.build(work)
        if gpu:
            synchronize(work.device)
            torch.cuda.reset_peak_memory_stats(work.device)
            before = torch.cuda.memory_allocated(work.device)
        entry.run()
        synchronize(work.device)
    except Exception as error:
        facts["skipped"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        return None
    facts["set_up_seconds"] = time.perf_counter() - begin
    if gpu:
        facts["peak_bytes"] = torch.cuda.max_memory_allocated(work.device) - before
    if entry.parameters is not None:
        facts["error"] = work.error(entry.parameters())
        if not facts["error"] <= contestant.tolerance:
            facts["skipped"] = f"wrong result: relative error {facts['error']:.2e} > {contestant.tolerance:.0e}"
            return None
    return entry


def _interleave(runs: dict[str, Callable[[], object]], device: torch.device, budget: Budget) -> dict[str, list[float]]:
    """Times of each run, one sample a round, the order turning from round to round."""
    once = {name: clock(run, device, by=budget.clock) for name, run in runs.items()}
    repeats = {name: max(1, min(50, int(0.005 / max(seconds, 1e-9)))) for name, seconds in once.items()}
    total = sum(once[name] * repeats[name] for name in runs)
    fewest, most = budget.rounds
    rounds = int(min(most, max(fewest, budget.seconds / max(total, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(clock(runs[name], device, repeats[name], budget.clock))
    return samples


def _compare(
    case: Case, facts: dict[str, dict[str, Any]], samples: dict[str, list[float]], rates: dict[str, float]
) -> None:
    """Ratios of paired rounds, fraction of the floor, and shares of the measured rates."""
    baselines = [name for name in ("package", "textbook", "rmsprop") if name in samples]
    for name, times in samples.items():
        fact = facts[name]
        own = np.asarray(times)
        fact["speedup"] = {base: quantiles([*(np.asarray(samples[base]) / own)]) for base in baselines}
        floor = f"floor-{fact['precision']}"
        if floor in samples:
            fact["fraction_of_floor"] = float(np.median(np.asarray(samples[floor]) / own))
        if fact["precision"] in rates:
            fact["share_of_matmul_rate"] = case.flops() / float(np.median(own)) / rates[fact["precision"]]
        fact["share_of_copy_rate"] = case.bytes() / float(np.median(own)) / rates["copy"]
