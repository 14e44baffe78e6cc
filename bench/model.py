"""A performance model of the Triton drivers, to be held against ``bench.gpu``. All of it is estimates.

What is assumed of the devices is in ``locoprop_kernels/devices.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bench.cases import Case, select
from locoprop_kernels.devices import DEVICES, H100, DeviceModel
from locoprop_kernels.kernels import configs
from locoprop_kernels.kernels.choose import choose, predicted
from locoprop_kernels.schedule.costs import ACTIVATION_BYTES, OPERAND_BYTES, UPDATE_BYTES

__all__ = ["Prediction", "main", "predict", "predict_with"]

# Of a weight's UPDATE_BYTES, what the epilogues write: Δ, its 16-bit copy and two slots.
_WRITTEN_BYTES = 14


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


def predict(case: Case, found: tuple[configs.Config, ...] | None = None, device: DeviceModel = H100) -> Prediction:
    """Predicted local loops of ``case`` with bf16 operands in product form, as the Triton backend would run them."""
    found = found or configs.candidates(device.target, "bf16")
    choice = choose(found, _sizes(case), "product", 2, device)
    return predict_with(case, choice.config, "single" if choice.programs else "grouped", device)


def predict_with(case: Case, config: configs.Config, driver: str, device: DeviceModel = H100) -> Prediction:
    """The same for one configuration and driver."""
    sizes = _sizes(case)
    steps = case.iterations - 1
    even = predicted(config, "grouped", sizes, "product", device.with_multiprocessors(1)) / device.multiprocessors
    queue = predicted(config, driver, sizes, "product", device)
    weights = sum(layer.inputs * layer.outputs for layer in case.layers)
    activations = sum(layer.batch * layer.outputs for layer in case.layers)
    inputs = sum(layer.batch * layer.inputs for layer in case.layers)
    # X; A0 and E; G_0, Δ, two slots and the copy of Δ.
    read = OPERAND_BYTES * inputs + ACTIVATION_BYTES * activations
    read += (UPDATE_BYTES - _WRITTEN_BYTES + OPERAND_BYTES) * weights
    written = OPERAND_BYTES * activations + _WRITTEN_BYTES * weights
    missed = max(0.0, 1 - device.cache_bytes / read)
    memory = missed * (read + written) / device.memory_bandwidth
    queued = queue / device.macs_per_second
    step = max(queued, memory)
    # The first step has no product.
    first = UPDATE_BYTES * weights / device.cache_bandwidth
    return Prediction(
        config=config,
        driver=driver,
        seconds=device.start + case.bytes(OPERAND_BYTES) / device.memory_bandwidth + first + steps * step,
        step=step,
        queue=queued,
        memory=memory,
        floor=2 * 2 * steps * sum(layer.macs for layer in case.layers) / device.flops_bf16,
        balance=even / queue,
    )


def _sizes(case: Case) -> tuple[tuple[int, int, int], ...]:
    return tuple((layer.batch, layer.inputs, layer.outputs) for layer in case.layers)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of ``bench/MODEL.md`` for cases in product form."""
    devices = {device.name: device for device in DEVICES}
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__)
    parser.add_argument("case", nargs="*", help="names, families or prefixes of cases, as of the benchmark")
    parser.add_argument("--device", choices=[*devices], default=H100.name, help="default: %(default)s")
    options = parser.parse_args(arguments)
    table = Table(
        "case", "GFLOP", "tiles", "driver", "balance", "a step", "from L2", "from HBM", "floor", "loop", "share"
    )
    for case in select(options.case, quick=False):
        if case.loss == "squared":
            continue
        found = predict(case, device=devices[options.device])
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
    sys.exit(main())
