"""A performance model of the Triton drivers, to be held against ``bench.gpu``. All of it is estimates.

What is assumed of the devices is in ``locoprop_kernels/devices.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.cases import Case, select
from locoprop_kernels import schedule
from locoprop_kernels.devices import DEVICES, H100, DeviceModel
from locoprop_kernels.epilogues import Issued
from locoprop_kernels.kernels import configs
from locoprop_kernels.kernels.choose import choose, predicted
from locoprop_kernels.schedule import row_blocks, rows_bytes
from locoprop_kernels.schedule.costs import ACTIVATION_BYTES, OPERAND_BYTES, UPDATE_BYTES
from locoprop_kernels.schedule.row_blocks import PASS_BYTES
from locoprop_kernels.schedule.tiling import Layer, all_tiles

__all__ = ["BEFORE", "DESIGNS", "LATENCY_BEFORE", "WANTED", "Prediction", "main", "predict", "predict_with"]

_PAGE = Path(__file__).with_name("MODEL.md")
_COLUMNS: tuple[str, ...] = (
    "case",
    "GFLOP",
    "tiles n × b × k",
    "driver",
    "balance",
    "a local step",
    "of it, HBM could take",
    "floor",
    "loop",
    "of floor",
    "loop with least L2",
)
_DESIGN_COLUMNS: tuple[str, ...] = (
    "case",
    "design",
    "issued for an element",
    "tiles",
    "driver",
    "loops",
    "with least L2",
)
_FLOAT8_COLUMNS: tuple[str, ...] = ("case", "bf16", "fp8", "bf16 with least L2", "fp8 with least L2")

#: The epilogues of sm_90 as they were when their instructions were first counted.
BEFORE = (("activation", Issued(62.0, 4.0)), ("update", Issued(45.2, 2.0)))
#: A tile's reads were ten then.
LATENCY_BEFORE = 3e-6
#: What is wanted of them.
WANTED = (("activation", Issued(15.0, 2.0)), ("update", Issued(25.0, 2.0)))
#: Cases whose predictions are compared with those of the design before, with the configuration and driver it took.
DESIGNS = {
    "paper-local": (configs.Config(128, 128, 64, 64, stages=4, slices=2), "single"),
    "square-4096-B8192": (configs.Config(128, 256, 256, 64, stages=4, slices=8, driver="grouped"), "grouped"),
}

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
        queue: what the schedule predicts for it: products or their loads, epilogues, latencies, waits.
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


def predict(
    case: Case,
    found: tuple[configs.Config, ...] | None = None,
    device: DeviceModel = H100,
    precision: str = "bf16",
) -> Prediction:
    """Predicted local loops of ``case`` in product form, as the Triton backend would run them.

    Args:
        case: the case.
        found: the configurations to choose from; ``None`` for the default ones.
        device: what is assumed of the device.
        precision: of the operands, ``"bf16"`` or ``"fp8"``.
    """
    found = found or configs.candidates(device.target, precision)
    device = device.in_float8() if precision == "fp8" else device
    sizes = _sizes(case)
    most = max(batch for batch, _, _ in sizes)
    for_rows = tuple(config for config in configs.for_rows(device.target, precision) if config.b >= most)
    choice = choose(found, sizes, "product", 2, device, None, for_rows)
    return predict_with(case, choice.config, choice.driver, device)


def predict_with(case: Case, config: configs.Config, driver: str, device: DeviceModel = H100) -> Prediction:
    """The same for one configuration and driver."""
    if driver == "rows":
        return _predict_rows(case, config, device)
    sizes = _sizes(case)
    steps = case.iterations - 1
    even = _even(sizes, config, driver, device)
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
    queued = queue / 1e12
    step = max(queued, memory)
    # The first step has no product.
    first = UPDATE_BYTES * weights / device.cache_bandwidth
    if device.operand_bytes == 1:
        # Four launches ahead find the scales: the largest |X| (float32), the first update twice, and E after it.
        first += 2 * first + step / 2 + 4 * device.launch + 4 * inputs / device.memory_bandwidth
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


def _even(sizes: Sequence[Layer], config: configs.Config, driver: str, device: DeviceModel) -> float:
    """Picoseconds of a local step if every program had the same share of the work, and waited for nothing."""
    programs = device.multiprocessors * (config.occupancy if driver == "single" else 1)
    total = 0
    for phase, tiles in zip(("activation", "update"), all_tiles(sizes, config.tiles), strict=True):
        total += int(schedule.tile_costs(tiles, sizes, config.tiles, phase, device, programs).sum())
    return total / programs


def _predict_rows(case: Case, config: configs.Config, device: DeviceModel) -> Prediction:
    """The same for the rows driver: a pass over the weights for each local step, and one to check the result."""
    sizes = _sizes(case)
    weights = sum(inputs * outputs for _, inputs, outputs in sizes)
    queued = predicted(config, "rows", sizes, "product", device) / 1e12
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
    parser.add_argument("--precision", choices=["bf16", "fp8"], default="bf16", help="default: %(default)s")
    parser.add_argument("--designs", action="store_true", help="the design before beside the present one, instead")
    parser.add_argument("--write", action="store_true", help="put all tables into bench/MODEL.md, by an H100")
    options = parser.parse_args(arguments)
    if options.write:
        _write(_PAGE)
        return 0
    device = devices[options.device]
    if options.precision == "fp8" and not device.flops_fp8:
        parser.error(f"argument --precision: no kernel multiplies float8_e4m3fn on {device.name}; take bf16")
    if options.designs:
        rows, columns = _designs(device), _DESIGN_COLUMNS
    else:
        cases = [case for case in select(options.case, quick=False) if case.loss != "squared"]
        rows = [_row(case, device, options.precision) for case in cases]
        columns = _COLUMNS
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)
    return 0


def _row(case: Case, device: DeviceModel, precision: str = "bf16") -> list[str]:
    """A line of the table of predictions."""
    found = predict(case, device=device, precision=precision)
    config = found.config
    return [
        case.name,
        f"{4 * (case.iterations - 1) * sum(b * k * n for b, k, n in _sizes(case)) / 1e9:,.0f}",
        f"{config.n} × {config.b} × {config.k}",
        found.driver,
        f"{found.balance:.2f}",
        *(f"{1e6 * seconds:,.0f} µs" for seconds in (found.step, found.memory)),
        *(f"{1e3 * seconds:.3g} ms" for seconds in (found.floor, found.seconds)),
        f"{found.floor / found.seconds:.0%}",
        f"{1e3 * predict(case, device=device.pessimistic, precision=precision).seconds:.3g} ms",
    ]


def _beside_float8(case: Case) -> list[str]:
    """The loop with operands in bfloat16 and in float8, on an H100."""
    found = [
        predict(case, device=device, precision=precision).seconds
        for device in (H100, H100.pessimistic)
        for precision in ("bf16", "fp8")
    ]
    return [case.name, *(f"{1e3 * seconds:.3g} ms" for seconds in found)]


def _designs(device: DeviceModel) -> list[list[str]]:
    """The local loops of a few cases in a CUDA graph: by the epilogues and tiles of before, and by those of now."""
    rows = []
    for name, (config, driver) in DESIGNS.items():
        (case,) = select([name], quick=False)[:1]
        old = replace(device, other_epilogues=BEFORE, tile_latency=LATENCY_BEFORE)
        wanted = replace(device, other_epilogues=WANTED)
        present = predict(case, device=device)
        for design, model, tiles, by in (
            ("before", old, config, driver),
            ("its tiles, epilogues of now", device, config, driver),
            ("now", device, present.config, present.driver),
            ("with the epilogues that are wanted", wanted, present.config, present.driver),
        ):
            loops = [predict_with(case, tiles, by, one).seconds - one.start for one in (model, model.pessimistic)]
            issued = " and ".join(f"{model.epilogues[phase].instructions:g}" for phase in ("activation", "update"))
            shape = f"{tiles.n} × {tiles.b} × {tiles.k}" + f", {tiles.occupancy} programs" * (tiles.occupancy > 1)
            rows.append([name, design, issued, shape, by, *(f"{1e3 * seconds:.3g} ms" for seconds in loops)])
    return rows


def _write(page: Path) -> None:
    """Replace the tables of the page, whose tables of predictions keep their cases."""
    text = page.read_text()
    for columns in (_DESIGN_COLUMNS, _COLUMNS, _FLOAT8_COLUMNS):
        head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
        before, found, after = text.partition(head)
        if not found:
            raise ValueError(f"{page.name} must have a table with the columns {', '.join(columns)}")
        old = list(takewhile(lambda line: line.startswith("|"), after.splitlines(keepends=True)))
        rows = _designs(H100)
        if columns is not _DESIGN_COLUMNS:
            cases = {case.name: case for case in select([], quick=False)}
            own = [cases[line.split("|")[1].strip()] for line in old]
            rows = [_row(case, H100) if columns is _COLUMNS else _beside_float8(case) for case in own]
        new = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        text = before + head + new + after[len("".join(old)) :]
    page.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
