"""A file for each measurement of the routes of products, so that later processes need not measure again.

A cache that is not there, cannot be read or written, or holds something else is no error: it is as if it were empty.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["folder", "keep", "processor", "read"]

_VARIABLE = "LOCOPROP_CACHE_DIR"


def folder() -> Path | None:
    """Where the files are: ``LOCOPROP_CACHE_DIR``, or ``locoprop`` in the user's cache; ``None`` for nowhere."""
    if (given := os.environ.get(_VARIABLE)) is not None:
        return Path(given) if given else None
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "locoprop"
    try:
        return Path.home() / ".cache" / "locoprop"
    except RuntimeError:  # a user without a home
        return None


def read(key: dict[str, Any]) -> str | None:
    """The route that was kept under ``key``, one of its ``"routes"``; or ``None``."""
    if (path := _path(key)) is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return next(route for route in key["routes"] if found["key"] == key and found["route"] == route)
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        return None


def keep(key: dict[str, Any], route: str, seconds: dict[str, float]) -> str:
    """Keep a route and what was measured; returns the route that is kept now, another process' if it was first."""
    if (path := _path(key)) is None:
        return route
    text = json.dumps({"key": key, "route": route, "seconds": seconds}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as beside:
            whole = Path(beside) / path.name
            whole.write_text(text + "\n", encoding="utf-8")
            try:
                # Unlike a rename, a link never replaces the file of a process that was first.
                os.link(whole, path)
            except OSError:
                if read(key) is None:  # a file that is of no use, or a file system without links
                    os.replace(whole, path)
    except OSError:
        return route
    return read(key) or route


def processor() -> str:
    """Name of the processor, with family and model where Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"


def _path(key: dict[str, Any]) -> Path | None:
    if (where := folder()) is None:
        return None
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return where / f"products-{digest[:16]}.json"
