"""Tile sizes for the kernels without a GPU: compile reports say what is possible, the model what would be fast.

Tile shapes are ranked by the predicted times of a few cases; of each, launch options are tried until the kernels
neither spill registers nor exceed the shared memory. What is printed belongs into
``locoprop_kernels/kernels/configs.py``.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from bench import report
from bench.cases import Case, select
from bench.model import predict_with
from locoprop_kernels import devices
from locoprop_kernels.kernels.configs import Config

__all__ = ["main", "options", "shapes"]

CASES = ("batch-100", "paper-local", "depth-12", "width-x4", "batch-10000", "square-4096-B8192", "gpt2-mlp-x12")
_OPERAND_BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "ieee": 4}
_SIZES = (32, 64, 128, 256)


def shapes() -> list[Config]:
    """Tile shapes to look at; a thread of 8 warps holds at most 128 accumulators."""
    found = []
    for n, b, k in itertools.product(_SIZES, repeat=3):
        if 64 * 64 <= n * min(b, k) and n * max(b, k) <= 128 * 256 and max(b, k) <= 2 * min(b, k):
            found.append(Config(n, b, k, r=min(64, b, k)))
    return found


def options(shape: Config, precision: str, shared: int) -> Iterator[Config]:
    """Launch options for a shape, the most promising first: deep pipelines, then few slices."""
    row = 256 // _OPERAND_BYTES[precision]  # two swizzled rows of 128 bytes
    widest = shape.n * max(shape.b, shape.k)
    for warps in (8, 4) if widest > 64 * 128 else (4, 8):
        accumulators = widest // (32 * warps)
        if accumulators > 128:
            continue
        for r, stages in ((row // 2, 4), (row // 2, 3), (row // 4, 4), (row // 2, 2), (row // 4, 3), (row // 4, 2)):
            if stages * (shape.n + max(shape.b, shape.k)) * r * _OPERAND_BYTES[precision] > shared:
                continue
            if shape.b % r or shape.k % r:
                continue
            for elements in (32, 16):
                slices = max(1, accumulators // elements)
                if slices <= 8 and min(shape.b, shape.k) // slices >= 8:
                    yield replace(shape, r=r, warps=warps, stages=stages, slices=slices)


def _try(config: Config, target: str, precision: str) -> dict[str, Any]:
    """Compile reports of a configuration: of what the launches per phase need, then of all other kernels."""
    from locoprop_kernels.compile_report.inspection import compile_variant
    from locoprop_kernels.compile_report.variants import of_config

    least = [*of_config(target, replace(config, driver="grouped"), precision)]
    rest = [variant for variant in of_config(target, config, precision) if variant not in least]
    found: dict[str, Any] = {"kernels": [], "drivers": []}
    for driver, variants in (("grouped", least), ("single", rest)):
        # What is most likely to spill comes first.
        for variant in sorted(
            variants, key=lambda one: (one.kernel != "update in splits", one.kernel != "local_steps")
        ):
            try:
                record = compile_variant(variant, target)
            except Exception as error:  # the compiler gave up: as bad as a spill
                found["rejected"] = f"{variant.kernel}: {type(error).__name__}"
                return {**found, "config": asdict(replace(config, driver="grouped"))}
            facts = {name: getattr(record, name) for name in ("kernel", "registers", "spill_bytes", "shared_bytes")}
            found["kernels"].append(facts)
            if record.violations():
                found["rejected"] = f"{variant.kernel} [{variant.configuration}] {', '.join(record.violations())}"
                return {**found, "config": asdict(replace(config, driver="grouped"))}
        found["drivers"].append(driver)
    return {**found, "config": asdict(config)}


def search(
    target: str, precision: str, chosen: Sequence[Case], within: float, tries: int, jobs: int
) -> list[dict[str, Any]]:
    """Clean configurations, the best launch options of each shape that the model puts near the best for some case."""
    device = devices.lookup(target)
    times = {
        shape: {
            (case.name, driver): predict_with(case, shape, driver, device).seconds
            for case in chosen
            for driver in ("single", "grouped")
        }
        for shape in shapes()
    }
    fastest = {
        shape: {case.name: min(of[case.name, "single"], of[case.name, "grouped"]) for case in chosen}
        for shape, of in times.items()
    }
    best = {case.name: min(of[case.name] for of in fastest.values()) for case in chosen}
    near = [shape for shape, of in fastest.items() if any(of[name] <= (1 + within) * best[name] for name in best)]
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    with pool, Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"{target} {precision}", total=len(near))
        left = {shape: itertools.islice(options(shape, precision, device.shared_bytes), tries) for shape in near}
        kept: dict[Config, dict[str, Any]] = {}
        while left:
            tried = {shape: next(rest, None) for shape, rest in left.items()}
            futures = {
                shape: pool.submit(_try, config, target, precision)
                for shape, config in tried.items()
                if config is not None
            }
            for shape in tried:
                result = futures[shape].result() if shape in futures else None
                if result is not None and len(result["drivers"]) > len(kept.get(shape, {"drivers": []})["drivers"]):
                    kept[shape] = result
                if result is None or "single" in result["drivers"]:
                    del left[shape]
                    progress.advance(bar)
    for shape, result in kept.items():
        result["milliseconds"] = {
            case.name: {driver: 1e3 * times[shape][case.name, driver] for driver in result["drivers"]}
            for case in chosen
        }
    return list(kept.values())


def pick(found: Sequence[dict[str, Any]], most: int = 3) -> list[dict[str, Any]]:
    """Greedily, the configurations that together bring all cases nearest to the best of any."""

    def time(result: dict[str, Any], case: str) -> float:
        return float(min(result["milliseconds"][case].values()))

    cases = list(found[0]["milliseconds"])
    best = {case: min(time(result, case) for result in found) for case in cases}

    def loss(chosen: list[dict[str, Any]]) -> float:
        return sum(min(time(result, case) for result in chosen) / best[case] for case in cases)

    chosen: list[dict[str, Any]] = []
    while len(chosen) < most:
        extended = min(([*chosen, result] for result in found), key=loss)
        if chosen and loss(extended) > loss(chosen) - 0.02 * len(cases):
            break
        chosen = extended
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m bench.tune``."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    targets = list(dict.fromkeys(device.target for device in devices.DEVICES))
    parser.add_argument("--target", choices=targets, default="sm_90", help="default: sm_90")
    parser.add_argument("--precision", nargs="+", choices=[*_OPERAND_BYTES], default=["bf16"])
    parser.add_argument("--case", nargs="+", default=[*CASES], help="cases of the benchmark to predict")
    parser.add_argument(
        "--within", type=float, default=0.03, help="shapes predicted this near the best (default: 0.03)"
    )
    parser.add_argument("--tries", type=int, default=4, help="launch options of a shape to compile (default: 4)")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="processes that compile")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a JSON file")
    given = parser.parse_args(arguments)
    device = devices.lookup(given.target)
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    console = Console() if sys.stdout.isatty() else Console(width=160)
    chosen = select(given.case, quick=False)
    results: dict[str, Any] = {
        "schema": 1,
        "command": "python -m bench.tune " + " ".join(["--target", given.target, "--precision", *given.precision]),
        "versions": {"python": platform.python_version(), "triton": triton.__version__},
        "model": asdict(device),
        "estimates": "times are predictions of bench.model, not measurements",
        "precisions": {},
    }
    console.print(f"Triton {triton.__version__}, {given.target}; predictions for {device.name} in bf16, in ms")
    for precision in given.precision:
        found = search(given.target, precision, chosen, given.within, given.tries, given.jobs)
        picked = pick(found) if found else []
        results["precisions"][precision] = {"clean": found, "picked": [result["config"] for result in picked]}
        _print(console, precision, found, picked)
        if given.out:
            report.save(results, given.out)
    return 0


def _print(console: Console, precision: str, found: Sequence[dict[str, Any]], picked: Sequence[dict[str, Any]]) -> None:
    table = Table("tiles n x b x k x r", "warps", "stages", "slices", "registers", "drivers", title=precision)
    cases = list(found[0]["milliseconds"]) if found else []
    for case in cases:
        table.add_column(case, justify="right")
    for result in sorted(found, key=lambda one: sum(min(of.values()) for of in one["milliseconds"].values())):
        config = Config(**result["config"])
        table.add_row(
            f"{config.n} x {config.b} x {config.k} x {config.r}",
            *(str(value) for value in (config.warps, config.stages, config.slices)),
            str(max(kernel["registers"] for kernel in result["kernels"])),
            "+".join(result["drivers"]),
            *(f"{min(result['milliseconds'][case].values()):.3g}" for case in cases),
            style="bold" if result in picked else None,
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
