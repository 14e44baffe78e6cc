"""A performance model of the Triton drivers on an H100, to be held against ``bench.gpu``. All of it is estimates."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bench.cases import Case, Layer, select
from locoprop_kernels import schedule

__all__ = ["H100", "Device", "Prediction", "main", "predict"]


@dataclass(frozen=True)
class Device:
    """Rates of a device, in units per second.

    Attributes:
        flops: products with bf16 operands.
        memory: bytes of HBM.
        cache: bytes out of L2.
        programs: multiprocessors; one program each.
        tile_efficiency: share of ``flops`` that a kernel reaches inside its tiles.
        barrier: seconds from the last signal of a phase to the first product of the next.
        launch: seconds from one kernel's end to the next one's start.
        start: seconds of a step before and after the loop: tables, copies, launches from Python.
    """

    flops: float
    memory: float
    cache: float
    programs: int
    tile_efficiency: float
    barrier: float
    launch: float
    start: float


#: Measured on such machines: 798 TFLOP/s and 3.0 TB/s. Published: 5.5 TB/s from L2, 1.3 µs a launch. Guessed: the rest.
H100 = Device(798e12, 3.0e12, 5.5e12, 132, 0.65, 1.5e-6, 1.3e-6, 60e-6)


@dataclass(frozen=True)
class Prediction:
    """Seconds of the local loops by driver, and what they are made of.

    Attributes:
        floor: the products at the full rate.
        single: the single launch; grouped: two launches a local step.
        streamed: bytes out of L2 in the whole loop.
        resident: bytes from and to HBM, each tensor once.
        barriers: phases that wait for each other.
        balance: lower bound over predicted longest queue; 1 is perfect.
    """

    floor: float
    single: float
    grouped: float
    streamed: int
    resident: int
    barriers: int
    balance: float


def predict(case: Case, device: Device = H100, tiles: schedule.Tiles | None = None) -> Prediction:
    """Predicted local loops of ``case`` with bf16 operands, in product form."""
    tiles = tiles or schedule.Tiles(n=128, b=128, k=128)
    plan = schedule.build([(b, k, n) for b, k, n in case.sizes()], tiles, device.programs)
    steps = case.iterations - 1
    rate = device.flops * device.tile_efficiency / device.programs / 2  # multiply-accumulates of a program
    streamed = steps * sum(_streamed(layer, tiles) for layer in case.layers)
    resident = case.bytes(2)
    compute = plan.total_makespan(case.iterations) / rate
    work = max(compute, streamed / device.cache) + resident / device.memory
    barriers = 2 * steps
    return Prediction(
        floor=2 * 2 * steps * sum(layer.macs for layer in case.layers) / device.flops,
        single=device.start + work + barriers * device.barrier,
        grouped=device.start + work + (barriers + 1) * (device.launch + device.barrier),
        streamed=streamed,
        resident=resident,
        barriers=barriers,
        balance=plan.efficiency,
    )


def _streamed(layer: Layer, tiles: schedule.Tiles) -> int:
    """Bytes that one local step of a layer reads from L2: operands of both phases in 16 bits, epilogues in 32."""

    def blocks(size: int, tile: int) -> int:
        return -(-size // tile)

    batch, inputs, outputs = layer.batch, layer.inputs, layer.outputs
    activation = outputs * inputs * blocks(batch, tiles.b) + batch * inputs * blocks(outputs, tiles.n)
    update = outputs * batch * blocks(inputs, tiles.k) + batch * inputs * blocks(outputs, tiles.n)
    return 2 * (activation + update) + 10 * outputs * batch + 34 * outputs * inputs


def main(patterns: list[str]) -> int:
    """Print the table of ``bench/MODEL.md`` for cases in product form."""
    table = Table(
        "case", "GFLOP", "L2 GB", "HBM MB", "barriers", "balance", "floor", "single launch", "grouped", "of floor"
    )
    for case in select(patterns, quick=False):
        if case.loss == "squared":
            continue
        found = predict(case)
        best = min(found.single, found.grouped)
        table.add_row(
            case.name,
            f"{4 * (case.iterations - 1) * sum(layer.macs for layer in case.layers) / 1e9:,.0f}",
            f"{found.streamed / 1e9:.2f}",
            f"{found.resident / 1e6:,.0f}",
            str(found.barriers),
            f"{found.balance:.2f}",
            *(f"{1e3 * seconds:.3g} ms" for seconds in (found.floor, found.single, found.grouped)),
            f"{found.floor / best:.0%}",
        )
    Console(width=130).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
