"""The results: a file with one JSON record a line, which a run that was stopped is continued in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Key", "Record", "append", "key_of", "read"]

Key = tuple[str, str, int]
Record = dict[str, Any]


def key_of(record: Record) -> Key:
    """Task, configuration and seed: what a record is the result of."""
    return record["task"], record["configuration"], record["seed"]


def read(path: Path) -> dict[Key, Record]:
    """All records of a file, by key; none if there is no file. A line that was cut off is left out."""
    return {key_of(record): record for record in _records(path)}


def _records(path: Path) -> Iterator[Record]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        yield record


def append(path: Path, record: Record) -> None:
    """Add a record as a line of its own, floats with four digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut_off else "") + json.dumps(_rounded(record)) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
