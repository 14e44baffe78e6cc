"""Error of the local increment in low precision: increment form against textbook form, both judged in float64.

The layers, batch and rule are those of one LocoProp-M step of the paper's autoencoder: ``python -m bench.accuracy``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import locoprop_kernels as lk
from locoprop_kernels import rules
from locoprop_kernels.testing import TextbookLayer

# (B, K, N) of each layer.
SHAPES = ((1000, 1000, 500), (1000, 784, 1000))
OPERANDS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
ITERATIONS = 10
RATES = [2e-5] * ITERATIONS


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def measure(b: int, k: int, n: int, seed: int) -> list[dict[str, Any]]:
    """Relative error of ``Δ`` ``[n, k]`` after ten RMSprop steps from ``b`` examples, for each dtype and form."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, k, generator=generator, dtype=torch.float64)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float64) / math.sqrt(k)
    residual = torch.randn(b, n, generator=generator, dtype=torch.float64) / 100
    rule = rules.RMSprop()

    def increment(dtype: torch.dtype, operands: torch.dtype | None) -> torch.Tensor:
        problem = lk.LocalProblem(
            x=x.to(dtype),
            preactivation=(x @ weight.t()).to(dtype),
            weight=weight.to(dtype),
            grad_weight=(residual.t() @ x).to(dtype),
            transfer="tanh",
        )
        report = lk.local_steps_([problem], rule=rule, lr=RATES, compute_dtype=operands, commit=False)
        delta = report.delta_weight[0]
        assert delta is not None
        return delta

    def textbook(operands: torch.dtype) -> torch.Tensor:
        layer = TextbookLayer(weight, None, "tanh", rule, operands=operands)
        layer.step(x, torch.tanh(x @ weight.t()) - residual, RATES, prox=0.0, reduction="mean")
        return layer.weight - weight

    exact = increment(torch.float64, None)
    return [
        {
            "B": b,
            "K": k,
            "N": n,
            "operands": str(operands).removeprefix("torch."),
            "increment_form": _relative_error(increment(torch.float32, operands), exact),
            "textbook_form": _relative_error(textbook(operands), exact),
        }
        for operands in OPERANDS
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("bench/results/accuracy.json"),
        help="Write this file (default: %(default)s).",
    )
    parser.add_argument("--seed", type=int, default=0, help="Draw the matrices from this seed (default: %(default)s).")
    options = parser.parse_args(argv)
    console = Console()
    console.print(
        f"torch {torch.__version__}, reference backend on the CPU; textbook operands rounded, summed in float64"
    )
    rows = [row for shape in SHAPES for row in measure(*shape, options.seed)]
    table = Table("B×K→N", "operands", "textbook form", "increment form", "ratio", title="relative error of Δ, T = 10")
    for row in rows:
        ratio = row["textbook_form"] / row["increment_form"]
        table.add_row(
            f"{row['B']}×{row['K']}→{row['N']}",
            row["operands"],
            f"{row['textbook_form']:.1e}",
            f"{row['increment_form']:.1e}",
            f"{ratio:.0f}",
        )
    console.print(table)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result = {"command": "python -m bench.accuracy", "torch": torch.__version__, "seed": options.seed, "rows": rows}
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
