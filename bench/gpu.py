"""One command for a machine with a GPU: the numerics (``pytest -m gpu``), then the timings, in under eight minutes.

Needs nothing from outside: torch with Triton, numpy, pytest and rich; the package need not be installed
(``PYTHONPATH=.:python python -m bench.gpu``). The results go into one JSON file, which is written after every case.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import cases, device, measure, model, report
from bench.contestants import Contestant, all_contestants, with_config
from locoprop_kernels import devices

__all__ = ["CASES", "goals", "main"]

ROOT = Path(__file__).resolve().parents[1]

#: In order of importance: the run stops when its time is up.
CASES = (
    "paper-local",
    "paper",
    "paper-rows-local",
    "paper-rows",
    "square-4096-B8192",
    "tokens-64k-s",
    "tokens-64k-m",
    "gpt2-mlp-x12",
    "paper-s",
    "batch-10000",
    "gpt-block-m-16k",
    "gpt-block-s-64k",
    "width-x2",
    "width-x4",
    "T-2",
    "T-50",
    "batch-100",
    "square-1024-B8192",
    "square-2048-B8192",
    "square-512-B1000",
    "depth-16",
    "convnet-B128",
    "batch-65536",
    "square-8192-B8192",
    "gpt-block-m-64k",
)
_COMPILED_CASES = ("paper-local",)
# (n, b, k, r, warps, stages, parts, general) of the tile kernels, to compare with the default.
_CONFIGS = (
    (128, 256, 256, 64, 8, 4, 8, False),
    (128, 256, 256, 64, 8, 3, 8, False),
    (256, 128, 128, 64, 8, 4, 8, False),
    (128, 128, 128, 64, 8, 3, 4),
    (128, 128, 128, 64, 8, 4, 4),
    (128, 128, 64, 64, 8, 4, 2),
    (128, 128, 64, 64, 8, 3, 4),
    (64, 128, 128, 64, 4, 3, 4),
    (64, 64, 128, 64, 4, 4, 4),
    (64, 64, 64, 64, 4, 4, 2),
)
_TUNED_CASES = ("paper-local", "square-4096-B8192")


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit code is that of the numerics."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("bench_out/gpu.json"), help="Write this file (default: %(default)s)."
    )
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="Take no longer than this for everything (default: %(default)s)."
    )
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="Time each case for this long (default: %(default)s)."
    )
    parser.add_argument("--skip-numerics", action="store_true", help="Go straight to the timings.")
    parser.add_argument(
        "--case",
        nargs="*",
        default=list(CASES),
        help="Time the cases with these names or families; a final * stands for any ending (default: CASES).",
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            f"bench.gpu: torch {torch.__version__} finds no GPU on this machine; nothing was run. "
            "`python -m bench` times what a CPU can do."
        )
        return 0
    end = time.monotonic() + 60 * options.minutes
    if hasattr(signal, "alarm"):
        # A kernel that hangs ends the run; what was measured before is in the file.
        signal.alarm(int(60 * options.minutes) + 25)
    console = Console(width=150)
    results: dict[str, Any] = {
        "schema": 1,
        "command": "python -m bench.gpu",
        "commit": device.commit(),
        "device": device.describe(torch.device("cuda")),
        "versions": device.versions(),
        "clock": "device events",
    }
    if not options.skip_numerics:
        results["numerics"] = numerics(min(180.0, 60 * options.minutes * 0.4), console)
        report.save(results, options.out)
    timings(results, options, end, console)
    results["goals"] = goals(results)
    report.save(results, options.out)
    _print_goals(console, results["goals"])
    console.print(f"wrote {options.out}")
    return int(results.get("numerics", {}).get("exit_code", 0) != 0)


def numerics(limit: float, console: Console) -> dict[str, Any]:
    """Run the tests that are marked ``gpu``; which files could not be taken is part of the result."""
    files: list[str] = []
    without: list[str] = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        if "mark.gpu" in text:
            missing = "hypothesis" in text and importlib.util.find_spec("hypothesis") is None
            (without if missing else files).append(path.relative_to(ROOT).as_posix())
    facts: dict[str, Any] = {"files": files, "left_out_without_hypothesis": without}
    if not files:
        console.print("no test file has tests marked gpu that can run here")
        return {**facts, "exit_code": 0, "summary": "nothing to run"}
    begin = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-x", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as expired:
        raw = expired.stdout or b""
        code, output = 124, raw.decode() if isinstance(raw, bytes) else raw
    # pytest's code 5 says that nothing was collected.
    code = 0 if code == 5 else code
    lines = output.strip().splitlines()
    if code:
        console.print("\n".join(lines[-60:]), markup=False)
    summary = lines[-1] if lines else ""
    console.print(f"numerics: {summary}", markup=False)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}
    return {**facts, "exit_code": code, "seconds": time.monotonic() - begin, **counts}


def timings(results: dict[str, Any], options: argparse.Namespace, end: float, console: Console) -> None:
    """Measure case after case, then configurations of the kernels, until the time is up."""
    where = torch.device("cuda")
    results["rates"] = device.rates(where)
    results["cases"] = {}
    report.print_device(console, results)
    field = all_contestants(where)
    budget = measure.Budget(seconds=options.seconds, rounds=(5, 100), longest=5.0)

    def run(name: str, case: cases.Case, contestants: list[Contestant]) -> None:
        begin = time.monotonic()
        entry = {
            "predicted_seconds": _predicted(case),
            **measure.measure(case, contestants, where, results["rates"], budget, lambda text: None),
        }
        results["cases"][name] = entry
        report.print_case(console, name, entry)
        console.print(f"[dim]{time.monotonic() - begin:.0f} s[/]")
        report.save(results, options.out)

    for case in _ordered(options.case):
        if time.monotonic() > end - 20:
            results.setdefault("not_reached", []).append(case.name)
            continue
        slow = case.name in _COMPILED_CASES
        run(case.name, case, [one for one in field if slow or not one.slow_start])
    for case in cases.select(_TUNED_CASES, quick=False):
        if time.monotonic() < end - 45 and not results.get("not_reached"):
            name = f"configurations-{case.name}"
            run(name, replace(case, name=name), _configurations(field))


def _predicted(case: cases.Case) -> float | None:
    """Seconds of the local loops alone, by the model of this device; ``None`` where it has none."""
    if case.loss == "squared":
        return None
    properties = torch.cuda.get_device_properties(0)
    found = next((one for one in devices.DEVICES if one.name in properties.name.replace(" ", "-")), devices.H100)
    return model.predict(case, device=found.with_multiprocessors(properties.multi_processor_count)).seconds


def _ordered(patterns: list[str]) -> list[cases.Case]:
    chosen = {case.name: case for case in cases.select(patterns, quick=False)}
    return [chosen.pop(name) for name in CASES if name in chosen] + [*chosen.values()]


def _configurations(field: list[Contestant]) -> list[Contestant]:
    from locoprop_kernels.kernels.configs import Config

    found = [Config(*sizes) for sizes in _CONFIGS]
    tuned = [with_config(one, driver="single") for one in found if one.general]
    tuned += [with_config(one, driver="grouped") for one in found]
    return [one for one in field if one.name in ("ours-bf16", "floor-bf16")] + tuned


def goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the project set out to reach on an H100, and what this run measured (``None``: not measured)."""

    def seconds(case: str, *names: str) -> float | None:
        facts = results.get("cases", {}).get(case, {}).get("contestants", {})
        times = [facts[name]["seconds"]["p50"] for name in names if "seconds" in facts.get(name, {})]
        return min(times) if times else None

    def ratio(case: str, slow: tuple[str, ...], fast: tuple[str, ...]) -> float | None:
        above, below = seconds(case, *slow), seconds(case, *fast)
        return above / below if above and below else None

    eager = ("ours-bf16", "ours-bf16-single", "ours-bf16-grouped")
    ours = (*eager, "ours-graph-bf16")
    graphs = tuple(f"textbook-{form}graph-{p}" for form in ("", "compiled-") for p in ("fp32", "tf32", "bf16"))
    step = seconds("paper", *ours)
    found: list[tuple[str, float | None, str, float]] = [
        ("paper-local, bf16: ms", _scaled(seconds("paper-local", *ours), 1e3), "<=", 0.35),
        ("paper-local: over the eager textbook form", ratio("paper-local", ("textbook",), ours), ">=", 20),
        ("paper-local: over the best CUDA graph", ratio("paper-local", graphs, ours), ">=", 3),
        ("paper-local: fraction of the floor", ratio("paper-local", ("floor-bf16",), ours), ">=", 0.4),
        ("paper: over an eager fused-Adam step", ratio("paper", eager, ("adam-fused",)), "<=", 2),
        ("paper: s for 6000 steps (100 epochs of MNIST), products of time", _scaled(step, 6000), "<=", 10),
        ("square-4096-B8192: fraction of the floor", ratio("square-4096-B8192", ("floor-bf16",), ours), ">=", 0.85),
        ("gpt2-mlp-x12: ms", _scaled(seconds("gpt2-mlp-x12", *ours), 1e3), "<=", 10),
        ("paper-local: tf32 over bf16", ratio("paper-local", ("ours-tf32",), ours), "<=", 2.2),
    ]
    gram, product = seconds("tokens-64k-s", "ours-bf16"), seconds("tokens-64k-m", *ours)
    both = product / gram if gram and product else None
    graph = ("ours-graph-bf16",)
    local = _scaled(seconds("paper-rows-local", *graph), 1e3)
    found.append(("paper-rows-local, bf16, one graph: ms", local, "<=", 0.12))
    adam = ratio("paper-rows", graph, ("adam-fused-graph",))
    found.append(("paper-rows: over a fused-Adam step, both one graph", adam, "<=", 1.5))
    found.append(("tokens-64k: Gram over the product form", both, ">=", 10))
    return [
        {"goal": name, "bound": f"{sign} {bound:g}", "measured": value, "met": _met(value, sign, bound)}
        for name, value, sign, bound in found
    ]


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _met(value: float | None, sign: str, bound: float) -> bool | None:
    if value is None:
        return None
    return value <= bound if sign == "<=" else value >= bound


def _print_goals(console: Console, found: list[dict[str, Any]]) -> None:
    table = Table("goal", "bound", "measured", "met")
    for goal in found:
        value = "" if goal["measured"] is None else f"{goal['measured']:.3g}"
        met = {True: "yes", False: "no", None: "not measured"}[goal["met"]]
        table.add_row(goal["goal"], goal["bound"], value, met)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
