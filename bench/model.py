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
from locoprop_kernels.schedule import row_blocks, rows_bytes
from locoprop_kernels.schedule.costs import ACTIVATION_BYTES, OPERAND_BYTES, UPDATE_BYTES
from locoprop_kernels.schedule.row_blocks import PASS_BYTES

__all__ = ["Prediction", "main", "predict", "predict_with"]

# Of a weight's UPDATE_BYTES, what the epilogues write: Δ, its 16-bit copy and two slots.
_WRITTEN_BYTES = 14
# Of the rows driver, what lies in the cache for a weight: G_0, Δ and two slots. The check at the end reads as much: the
# weight itself in the place of G_0.
_ROWS_KEPT_BYTES = 16


@dataclass(frozen=True)
class Prediction:
    """Seconds of the local loops, and what they are made of.

    Attributes:
        config: tile sizes.
        driver: ``"single"``, ``"grouped"`` or ``"rows"``.
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
    sizes = _sizes(case)
    most = max(batch for batch, _, _ in sizes)
    for_rows = tuple(config for config in configs.for_rows(device.target, "bf16") if config.b >= most)
    choice = choose(found, sizes, "product", 2, device, None, for_rows)
    return predict_with(case, choice.config, choice.driver, device)


def predict_with(case: Case, config: configs.Config, driver: str, device: DeviceModel = H100) -> Prediction:
    """The same for one configuration and driver."""
    if driver == "rows":
        return _predict_rows(case, config, device)
    sizes = _sizes(case)
    steps = case.iterations - 1
    even = predicted(config, "grouped", sizes, "product", device.with_multiprocessors(1)) / device.multiprocessors
    queue = predicted(config, driver, sizes, "product", device)
    weights = sum(layer.inputs * layer.outputs for layer in case.layers)
    activations = sum(batch * outputs for batch, _, outputs in sizes)
    inputs = sum(batch * inputs for batch, inputs, _ in sizes)
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


def _predict_rows(case: Case, config: configs.Config, device: DeviceModel) -> Prediction:
    """The same for the rows driver: a pass over the weights for each local step, and one to check the result."""
    sizes = _sizes(case)
    weights = sum(inputs * outputs for _, inputs, outputs in sizes)
    queued = predicted(config, "rows", sizes, "product", device) / device.macs_per_second
    # Only n-blocks whose programs run take part in the traffic; their programs run all local steps.
    programs = len(row_blocks(sizes, config.tiles))
    resident = min(1.0, device.multiprocessors * config.occupancy / programs)
    working = resident * _ROWS_KEPT_BYTES * weights
    missed = max(0.0, 1 - device.cache_bytes / working)
    memory = missed * PASS_BYTES * weights / device.memory_bandwidth
    step = max(queued, memory)
    check = _ROWS_KEPT_BYTES * weights / device.cache_bandwidth
    floor = 2 * 2 * (case.iterations - 1) * sum(batch * inputs * outputs for batch, inputs, outputs in sizes)
    return Prediction(
        config=config,
        driver="rows",
        seconds=device.start + _rows_bytes(case) / device.memory_bandwidth + case.iterations * step + check,
        step=step,
        queue=queued,
        memory=memory,
        floor=floor / device.flops_bf16,
        balance=rows_bytes(sizes, config.tiles) / device.cache_bandwidth / queued,
    )


def _rows_bytes(case: Case) -> int:
    """Least traffic with HBM: as of :meth:`Case.bytes`, but for the rows that no local step takes."""
    rows = 0
    for layer in case.layers:
        taken = min(layer.batch, case.local_batch(layer) * (case.iterations - 1))
        rows += taken * (OPERAND_BYTES * layer.inputs + 4 * layer.outputs)
    weights = sum((layer.inputs + 1) * layer.outputs for layer in case.layers)
    return rows + 28 * weights


def _sizes(case: Case) -> tuple[tuple[int, int, int], ...]:
    return tuple((case.local_batch(layer), layer.inputs, layer.outputs) for layer in case.layers)


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
            f"{4 * (case.iterations - 1) * sum(b * k * n for b, k, n in _sizes(case)) / 1e9:,.0f}",
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
