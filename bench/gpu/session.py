"""What the sections of a run share: the device, the time that is left, the results, and predictions beside them."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import cases, measure, report
from bench.contestants import Contestant
from locoprop_kernels import devices

__all__ = ["Line", "Session", "tiny"]


@dataclass(frozen=True)
class Line:
    """A prediction beside a measurement; ``predicted`` is ``None`` where nobody has made one."""

    section: str
    what: str
    predicted: float | None
    measured: float
    unit: str

    @property
    def surprise(self) -> float:
        """How far the measurement is from the prediction, as the logarithm of their ratio."""
        if not self.predicted or self.measured <= 0:
            return 0.0
        return abs(math.log(self.measured / self.predicted))

    def __str__(self) -> str:
        predicted, ratio = "not predicted", ""
        if self.predicted:
            predicted = f"predicted {self.predicted:.3g} {self.unit}"
            ratio = f", {self.measured / self.predicted:.2f} of that"
        return f"{self.section}: {self.what}: {predicted}, measured {self.measured:.3g} {self.unit}{ratio}"


@dataclass
class Session:
    """A run of the command.

    Attributes:
        options: of the command line.
        device: where to measure.
        dry: whether everything is tiny and interpreted.
        console: for people.
        out: the JSON file.
        results: what goes into it.
        lines: predictions beside measurements, of all sections.
        section: the one that runs.
        until: when it must end, on ``time.monotonic``'s clock.
    """

    options: argparse.Namespace
    device: torch.device
    dry: bool
    console: Console
    out: Path
    results: dict[str, Any]
    lines: list[Line] = field(default_factory=list)
    section: str = ""
    until: float = math.inf

    @property
    def left(self) -> float:
        """Seconds until the section must end."""
        return self.until - time.monotonic()

    @property
    def model(self) -> devices.DeviceModel:
        """What is assumed of the device; of an H100 where nothing is known of it."""
        if self.device.type != "cuda":
            return devices.H100
        properties = torch.cuda.get_device_properties(self.device)
        name = properties.name.replace(" ", "-")
        found = next((one for one in devices.DEVICES if one.name in name), devices.H100)
        return found.with_multiprocessors(properties.multi_processor_count)

    def enough(self, seconds: float, what: str) -> bool:
        """Whether the section has ``seconds`` left for ``what``; if not, a line says that it is left out."""
        if self.left >= seconds:
            return True
        self.skip(what, f"{max(0.0, self.left):.0f} s left of the section's time")
        return False

    def skip(self, what: str, reason: str) -> None:
        """Say that something is left out."""
        self.results.setdefault("left_out", []).append({"section": self.section, "what": what, "reason": reason})
        self.console.print(f"[dim]{self.section}: {what} left out: {reason}[/]")

    def compare(self, what: str, predicted: float | None, measured: float, unit: str) -> None:
        """Put a measurement beside its prediction."""
        line = Line(self.section, what, predicted, measured, unit)
        self.lines.append(line)
        self.results.setdefault("lines", []).append(asdict(line))
        self.console.print(str(line), markup=False, soft_wrap=True)
        self.save()

    def time(
        self, name: str, case: cases.Case, field: Sequence[Contestant], predicted: float | None = None
    ) -> dict[str, float]:
        """Time contestants of a case; medians in seconds of those that took part, the first beside ``predicted``."""
        case = tiny(case) if self.dry else case
        budget = measure.Budget(seconds=self.options.seconds, rounds=(1, 1) if self.dry else (3, 100), longest=5.0)
        entry = measure.measure(case, list(field), self.device, self.results["rates"], budget, lambda text: None)
        self.results.setdefault("cases", {})[name] = {"predicted_seconds": predicted, **entry}
        report.print_case(self.console, name, entry)
        facts = entry["contestants"]
        found = {one: fact["seconds"]["p50"] for one, fact in facts.items() if "seconds" in fact}
        if field and field[0].name in found:
            scaled = None if predicted is None else 1e3 * predicted
            self.compare(name, scaled, 1e3 * found[field[0].name], "ms")
        else:
            reason = facts[field[0].name].get("skipped", "") if facts else entry.get("skipped", "")
            self.skip(name, reason or "no contestant could take part")
        return found

    def save(self) -> None:
        """Write the file."""
        report.save(self.results, self.out)

    def surprises(self, most: int = 5) -> list[Line]:
        """The lines whose measurements are farthest from their predictions."""
        return sorted((line for line in self.lines if line.surprise), key=lambda line: -line.surprise)[:most]

    def table(self) -> Table:
        """All predictions beside measurements."""
        table = Table("section", "what", "unit", title="Predictions beside measurements")
        for column in ("predicted", "measured", "ratio"):
            table.add_column(column, justify="right")
        for line in self.lines:
            predicted = "" if not line.predicted else f"{line.predicted:.3g}"
            ratio = "" if not line.predicted else f"{line.measured / line.predicted:.2f}"
            table.add_row(line.section, line.what, line.unit, predicted, f"{line.measured:.3g}", ratio)
        return table


def tiny(case: cases.Case) -> cases.Case:
    """The same case with sizes that the interpreter gets through."""
    layers = tuple(
        replace(
            layer,
            batch=min(layer.batch, 12),
            inputs=9 - 2 * i,
            outputs=7 - 2 * i,
            convolution=None,
        )
        for i, layer in enumerate(case.layers[:2])
    )
    rows = None if case.rows is None else 6
    return replace(case, layers=layers, iterations=2, rows=rows)
