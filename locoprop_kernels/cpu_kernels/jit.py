"""How numba compiles the CPU kernels, and where it keeps them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba
from numba.core import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from locoprop_kernels import constants, route_cache

__all__ = ["compiles_for", "entry", "folder", "jit", "with_whole_registers"]

# Sums may be reordered and products added without rounding between, as in any product of matrices; infinities and NaNs
# count as what they are, and roots and divisions, but for those of vectors.py, are rounded as IEEE 754 says.
_FASTMATH = {"contract", "nsz", "reassoc"}


def folder() -> str | None:
    """Where compiled kernels are kept; ``None`` for nowhere.

    Its name depends on all files here, and on the constants: numba itself looks at the file of a function alone, and
    would take a kernel that was made of older functions of another file.
    """
    base = route_cache.folder()
    if base is None:
        return None
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(constants.__file__)]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return str(base / f"cpu-kernels-{digest[:16]}")


_FOLDER = folder()


def jit(function: Any, inline: bool = False) -> Any:
    """Compile a function of numbers and arrays at its first call, and keep the result on disk for later processes.

    Args:
        function: the function.
        inline: whether it becomes part of each function that calls it, however long it is.
    """
    options = {"fastmath": _FASTMATH, "error_model": "numpy", "nogil": True, "forceinline": inline}
    return _kept(partial(numba.njit, **options), function)


def entry(function: Any) -> int:
    """Compile a function of an address at once, and keep the result likewise.

    Returns:
        the address of the C function ``void (*)(void *)``, which does without Python's lock.
    """
    return int(_kept(partial(numba.cfunc, "void(voidptr)"), function).address)


def compiles_for(feature: str) -> bool:
    """Whether kernels are compiled for processors that have a feature, by LLVM's name for it.

    That is the processor at hand, unless numba has been told otherwise.
    """
    *_, features = cpu_target.target_context.codegen().magic_tuple()
    return f"+{feature}" in features.split(",")


@intrinsic
def with_whole_registers(typing: Any) -> Any:
    """To be called by a function whose loops are to be of the widest vectors that the processor has.

    For Intel's processors with AVX-512 LLVM makes vectors of half a register, as the first of them ran slower with
    whole ones: in loops that do nothing but multiply and add, half as fast.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        attributes = builder.function.attributes
        if isinstance(attributes, set):  # llvmlite has names for attributes without a value alone
            set.add(attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), code


def _kept(compiler: Callable[..., Any], function: Any) -> Any:
    """A function that ``compiler`` compiles, which keeps the result in :func:`folder` where it can."""
    config: Any = numba.config
    before = config.CACHE_DIR
    try:
        if _FOLDER is not None:
            config.CACHE_DIR = _FOLDER
            return compiler(cache=True)(function)
    except (OSError, RuntimeError):  # a folder that cannot be written to
        pass
    finally:
        config.CACHE_DIR = before
    return compiler()(function)
