"""A performance model of the Triton drivers on an H100, to be held against ``bench.gpu``. All of it is estimates."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bench.cases import Case, select
from locoprop_kernels.kernels import configs

__all__ = ["H100", "Device", "Prediction", "main", "predict", "predict_with"]


@dataclass(frozen=True)
class Device:
    """Rates of a device, in units per second.

    Attributes:
        flops: products with bf16 operands.
        memory: bytes of HBM.
        cache: bytes out of L2.
        cache_bytes: size of L2.
        programs: multiprocessors; one program each.
        tile_efficiency: share of ``flops`` that a kernel reaches inside its tiles.
        start: seconds of a step before and after the loop: tables, copies, launches from Python.
    """

    flops: float
    memory: float
    cache: float
    cache_bytes: float
    programs: int
    tile_efficiency: float
    start: float


#: Measured on such machines: 798 TFLOP/s and 3.0 TB/s. Published: 50 MB of L2, 5.5 TB/s from it. Guessed: the rest.
H100 = Device(798e12, 3.0e12, 5.5e12, 50e6, 132, 0.65, 60e-6)


@dataclass(frozen=True)
class Prediction:
    """Seconds of the local loops, and what they are made of.

    Attributes:
        config: tile sizes.
        driver: ``"single"`` or ``"grouped"``.
        seconds: the whole: start, local steps, and the traffic that fills the caches.
        step: a local step; the longer of the next two.
        queue: what the schedule predicts for it: products or loads from L2, epilogues, waits.
        memory: traffic of a local step with HBM, as far as its tensors exceed L2.
        floor: the products of the whole loop at the full rate.
        balance: an even share of the work over the longest queue; 1 is perfect.
    """

    config: configs.Config
    driver: str
    seconds: float
    step: float
    queue: float
    memory: float
    floor: float
    balance: float


def predict(case: Case, found: tuple[configs.Config, ...] | None = None, device: Device = H100) -> Prediction:
    """Predicted local loops of ``case`` with bf16 operands in product form, as the Triton backend would run them."""
    found = found or configs.candidates("sm_90", "bf16")
    choice = configs.choose(found, _sizes(case), "product", 2, device.programs)
    return predict_with(case, choice.config, "single" if choice.programs else "grouped", device)


def predict_with(case: Case, config: configs.Config, driver: str, device: Device = H100) -> Prediction:
    """The same for one configuration and driver."""
    sizes = _sizes(case)
    steps = case.iterations - 1
    rate = device.flops * device.tile_efficiency / device.programs / 2  # multiply-accumulates of a program
    even = configs.predicted(config, "grouped", sizes, "product", 1) / device.programs
    queue = configs.predicted(config, driver, sizes, "product", device.programs)
    weights = sum(layer.inputs * layer.outputs for layer in case.layers)
    activations = sum(layer.batch * layer.outputs for layer in case.layers)
    inputs = sum(layer.batch * layer.inputs for layer in case.layers)
    read = 2 * inputs + 6 * activations + 18 * weights  # X, A0, E; G_0, Δ, two slots and the copy of Δ
    written = 2 * activations + 14 * weights
    missed = max(0.0, 1 - device.cache_bytes / read)
    memory = missed * (read + written) / device.memory
    step = max(queue / rate, memory)
    first = 30 * weights / device.cache  # no product
    return Prediction(
        config=config,
        driver=driver,
        seconds=device.start + case.bytes(2) / device.memory + first + steps * step,
        step=step,
        queue=queue / rate,
        memory=memory,
        floor=2 * 2 * steps * sum(layer.macs for layer in case.layers) / device.flops,
        balance=even / queue,
    )


def _sizes(case: Case) -> tuple[tuple[int, int, int], ...]:
    return tuple((layer.batch, layer.inputs, layer.outputs) for layer in case.layers)


def main(patterns: list[str]) -> int:
    """Print the table of ``bench/MODEL.md`` for cases in product form."""
    table = Table(
        "case", "GFLOP", "tiles", "driver", "balance", "a step", "from L2", "from HBM", "floor", "loop", "share"
    )
    for case in select(patterns, quick=False):
        if case.loss == "squared":
            continue
        found = predict(case)
        config = found.config
        table.add_row(
            case.name,
            f"{4 * (case.iterations - 1) * sum(layer.macs for layer in case.layers) / 1e9:,.0f}",
            f"{config.n}x{config.b}x{config.k}",
            found.driver,
            f"{found.balance:.2f}",
            *(f"{1e6 * seconds:,.0f} µs" for seconds in (found.step, found.queue, found.memory)),
            *(f"{1e3 * seconds:.3g} ms" for seconds in (found.floor, found.seconds)),
            f"{found.floor / found.seconds:.0%}",
        )
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
