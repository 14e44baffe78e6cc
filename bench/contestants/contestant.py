"""What a contestant is, and the reasons why one cannot take part."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from bench.work import Work

__all__ = [
    "DTYPES",
    "Contestant",
    "Entry",
    "Parameters",
    "always",
    "has_compiler",
    "has_package",
    "only_steps",
    "takes_all_rows",
]

#: Weight and bias of each layer.
Parameters = list[tuple[Tensor, Tensor | None]]

#: Dtype of the products' operands by the name of a precision; TF32 is how a GPU multiplies float32.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(eq=False)
class Entry:
    """A contestant that is set up for one case.

    Attributes:
        run: does the work once.
        parameters: where the updated weights and biases are; ``None`` if the result is not LocoProp's.
        details: facts for the report, read after the timing.
        keep: objects that must live as long as the entry.
    """

    run: Callable[[], object]
    parameters: Callable[[], Parameters] | None = None
    details: Callable[[], dict[str, Any]] = dict
    keep: object = None


def always(case: Case, device: torch.device) -> str | None:
    """No reason against any case on any device."""
    return None


@dataclass(frozen=True)
class Contestant:
    """A way to do the work.

    Attributes:
        name: what ``--contestant`` matches.
        build: sets it up; may raise.
        unavailable: why it cannot do a case on a device, or ``None``.
        tolerance: largest relative error of the step, against float64, with which its time is reported.
        precision: dtype of the products' operands; picks the floor to compare with.
        slow_start: compiles first; left out of ``--quick``.
    """

    name: str
    build: Callable[[Work], Entry]
    unavailable: Callable[[Case, torch.device], str | None] = always
    tolerance: float = 1e-2
    precision: str = "fp32"
    slow_start: bool = False


def only_steps(case: Case, device: torch.device) -> str | None:
    """The reason of a contestant that trains networks."""
    return None if case.scope == "step" else "trains networks, and this case is local loops alone"


def takes_all_rows(case: Case, device: torch.device) -> str | None:
    """The reason of a contestant that works on the whole batch in every local step."""
    return None if case.rows is None else "takes all rows in every local step"


def has_compiler(case: Case, device: torch.device) -> str | None:
    """The reason of a contestant that ``torch.compile`` makes; on a GPU Triton compiles instead."""
    if reason := takes_all_rows(case, device):
        return reason
    return "no C++ compiler" if device.type == "cpu" and shutil.which("g++") is None else None


def has_package(case: Case, device: torch.device) -> str | None:
    """The reason of the PyPI package, which trains networks and has to be installed."""
    if reason := only_steps(case, device) or takes_all_rows(case, device):
        return reason
    return None if importlib.util.find_spec("locoprop") else "the PyPI package locoprop is not installed"
