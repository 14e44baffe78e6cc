"""``python -m bench.products``: how fast each route of torch multiplies on this CPU, and which one the library takes.

Shapes are those of local steps: ``Δ Xᵀ`` of an increment ``[N, K]`` and inputs ``[B, K]``, and ``E X`` of errors
``[N, B]``. Operands are rounded beforehand. Routes take turns, and the best of the rounds counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench import device, report
from locoprop_kernels import routes

__all__ = ["LAYERS", "main", "measure"]

#: ``(B, K, N)``: layers of the paper's autoencoder and of a convolution, and a layer with few rows.
LAYERS = [(1000, 784, 1000), (1000, 1000, 500), (1000, 250, 30), (128, 784, 256), (32, 784, 1000), (8192, 288, 64)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m bench.products``."""
    parser = argparse.ArgumentParser(prog="python -m bench.products", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="Time each product this often (default: %(default)s).")
    parser.add_argument("--threads", type=int, help="Give torch this many threads (default: its own choice).")
    parser.add_argument(
        "--clock",
        choices=[*device.CLOCKS],
        default="wall",
        help="Read this clock; cpu is the processor time of one thread, for busy machines (default: %(default)s).",
    )
    parser.add_argument("--out", type=Path, help="Write products.json and table.txt to this folder.")
    options = parser.parse_args(arguments)
    if options.threads is not None or options.clock == "cpu":
        torch.set_num_threads(options.threads or 1)
    console = Console(width=140)
    results: dict[str, Any] = {
        "schema": 1,
        "command": f"python -m bench.products --rounds {options.rounds} --clock {options.clock}"
        + (f" --threads {options.threads}" if options.threads else ""),
        "clock": options.clock,
        "commit": device.commit(),
        "device": device.describe(CPU),
        "versions": device.versions(),
        "choices": {_name(dtype): routes.choose(dtype)._asdict() for dtype in DTYPES},
        "products": measure(LAYERS, options.rounds, options.clock, console),
    }
    _print(results, console)
    if options.out:
        report.save(results, options.out / "products.json")
        with (options.out / "table.txt").open("w", encoding="utf-8") as file:
            _print(results, Console(file=file, width=140))
    return 0


def measure(
    layers: Sequence[tuple[int, int, int]], rounds: int, by: str, console: Console | None = None
) -> list[dict[str, Any]]:
    """GFLOP/s of both products of each layer ``(B, K, N)``, by the dtype of the operands and the route."""
    found: list[dict[str, Any]] = []
    for b, k, n in track(layers, "layers", console=console or Console(quiet=True), transient=True):
        x, delta, errors = torch.randn(b, k), torch.randn(n, k), torch.randn(n, b)
        for name, left, right in (("Δ Xᵀ", delta, x.t()), ("E X", errors, x)):
            for dtype in DTYPES:
                runs = _runs(left.to(dtype), right.to(dtype))
                best = dict.fromkeys(runs, float("inf"))
                for _ in range(rounds + 1):
                    for route, run in runs.items():
                        best[route] = min(best[route], device.clock(run, CPU, by=by))
                rates = {route: 2 * b * k * n / seconds / 1e9 for route, seconds in best.items()}
                found.append({"layer": [b, k, n], "product": name, "operands": _name(dtype), "gflops": rates})
    return found


def _runs(left: Tensor, right: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What there is to time: each route by its name, and with ``upcast`` the one that float32 takes."""
    dtype = left.dtype
    runs: dict[str, Callable[[], Tensor]] = {
        route: partial(routes.multiply, left, right, route)
        for route in routes.available(dtype)
        if route != "upcast" and routes.runs(dtype, route)
    }
    if dtype != torch.float32:
        runs["upcast"] = partial(routes.multiply, left.float(), right.float(), routes.route(torch.float32))
    return runs


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _print(results: dict[str, Any], console: Console) -> None:
    where = results["device"]
    console.print(f"{where['name']}, {where['capability']}, {where['threads']} threads; clock: {results['clock']}")
    console.print(", ".join(f"{name} {version}" for name, version in results["versions"].items()))
    for name, choice in results["choices"].items():
        console.print(f"{name} operands: {choice['route']} ({choice['why']})")
    columns = [(one, route) for one in map(_name, DTYPES) for route in ("mm", "onednn", "upcast")]
    columns = [
        (one, route)
        for one, route in columns
        if any(p["operands"] == one and route in p["gflops"] for p in results["products"])
    ]
    table = Table("B × K → N", "product", title="GFLOP/s")
    for one, route in columns:
        table.add_column(f"{one}\n{route}", justify="right")
    rows: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for product in results["products"]:
        b, k, n = product["layer"]
        cells = rows.setdefault((f"{b} × {k} → {n}", product["product"]), {})
        cells |= {(product["operands"], route): rate for route, rate in product["gflops"].items()}
    for label, cells in rows.items():
        table.add_row(*label, *(f"{cells[column]:,.0f}" if column in cells else "–" for column in columns))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
