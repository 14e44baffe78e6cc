"""How numba compiles the CPU kernels, and where it keeps them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numba

from locoprop_kernels import route_cache

__all__ = ["jit"]

# Sums may be reordered and products added without rounding between, as in any product of matrices; infinities and NaNs
# count as what they are, and roots and divisions are rounded as IEEE 754 says.
_FASTMATH = {"contract", "nsz", "reassoc"}


def _folder() -> str | None:
    """Where compiled kernels are kept; ``None`` for nowhere.

    By what all files of this folder say: numba itself looks at the file of a function alone, and would take a kernel
    that was made of older functions of another file.
    """
    base = route_cache.folder()
    if base is None:
        return None
    files = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return str(base / f"cpu-kernels-{digest[:16]}")


_FOLDER = _folder()


def jit(function: Any) -> Any:
    """Compile a function of numbers and arrays at its first call, and keep the result on disk for later processes."""
    options = {"fastmath": _FASTMATH, "error_model": "numpy", "nogil": True}
    if _FOLDER is None:
        return numba.njit(function, **options)
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, _FOLDER
    try:
        return numba.njit(function, cache=True, **options)
    finally:
        numba.config.CACHE_DIR = before
