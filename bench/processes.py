"""What processes send each other in a step of LocoProp, beside FSDP2's own traffic: a model, checked by counted bytes.

The model is per layer and process, in bytes received, with ``w`` processes: the rows that local steps take are
gathered, ``r (T - 1) (K + N) (w - 1) / w`` numbers. FSDP2 gathers the weight in the forward and in the backward pass
and reduces its gradient, ``3 K N (w - 1) / w``. With ``shard_state=True`` replicas gather the increments of weights and
biases once, ``(K + 1) N (w - 1) / w`` numbers in float32, beside the ``2 K N (w - 1) / w`` of the gradients.
`tests/processes/test_costs.py` counts the bytes at 2 and 4 processes; what is printed for more is the model alone.
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

__all__ = ["main", "of_fsdp", "of_increments", "of_rows"]

#: Bytes of the numbers that processes compare before a step, and of the flag after it, from each process.
AGREEMENT = 6 * 8 + 8


def of_rows(rows: int, iterations: int, inputs: int, outputs: int, processes: int, itemsize: int) -> float:
    """Bytes that a process receives for a layer's rows, if every local step takes ``rows`` of them."""
    return rows * (iterations - 1) * (inputs + outputs) * itemsize * (processes - 1) / processes


def of_fsdp(inputs: int, outputs: int, processes: int, itemsize: int) -> float:
    """Bytes that a process receives for a layer's weight, gathered twice, and its gradient, reduced once."""
    return 3 * inputs * outputs * itemsize * (processes - 1) / processes


def of_increments(inputs: int, outputs: int, processes: int, itemsize: int) -> float:
    """Bytes that a process receives for the increments of a layer, if parts are even."""
    return (inputs + 1) * outputs * itemsize * (processes - 1) / processes


def main(arguments: list[str]) -> int:
    """``python -m bench.scaling processes``."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling processes", description=__doc__)
    parser.add_argument("--rows", type=int, default=32, help="Rows in a local step (default: %(default)s).")
    parser.add_argument("--iterations", type=int, default=10, help="Local iterations (default: %(default)s).")
    parser.add_argument("--size", type=int, default=4096, help="Inputs and outputs of a layer (default: %(default)s).")
    parser.add_argument("--itemsize", type=int, default=2, help="Bytes of a number (default: %(default)s).")
    options = parser.parse_args(arguments)
    size = options.size
    table = Table("processes", "rows of a layer, MB", "FSDP2's own, MB", "share", "increments (shard_state), MB")
    for processes in (2, 4, 8, 16, 64, 256, 1024):
        ours = of_rows(options.rows, options.iterations, size, size, processes, options.itemsize)
        theirs = of_fsdp(size, size, processes, options.itemsize)
        increments = of_increments(size, size, processes, 4) / 1e6
        share = f"{ours / theirs:.1%}"
        table.add_row(str(processes), f"{ours / 1e6:.2f}", f"{theirs / 1e6:.1f}", share, f"{increments:.1f}")
    console = Console()
    console.print(f"bytes that a process receives for a layer of {size} x {size} in a step (a model, not measured):")
    console.print(table)
    console.print(f"and {AGREEMENT} bytes from each process for agreement")
    return 0
