"""What the project set out to reach on a GPU, and what a run says of it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["goals", "print_goals"]


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


def print_goals(console: Console, found: list[dict[str, Any]]) -> None:
    """A table of them."""
    table = Table("goal", "bound", "measured", "met")
    for goal in found:
        value = "" if goal["measured"] is None else f"{goal['measured']:.3g}"
        met = {True: "yes", False: "no", None: "not measured"}[goal["met"]]
        table.add_row(goal["goal"], goal["bound"], value, met)
    console.print(table)
