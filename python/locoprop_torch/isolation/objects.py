"""The kinds of objects that a model and its ``forward`` hold on to: what both the copy and the restoring ask."""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = [
    "MOST_BYTES",
    "MOST_OBJECTS",
    "PLAIN",
    "container_base",
    "contents_of",
    "fill",
    "is_library",
    "is_opaque",
    "uncompiled",
]

# How many objects a copy of a model may consist of, and `forward` may reach besides; with more, something is amiss.
MOST_OBJECTS = 100_000
# Tensors up to this size are copied with their values: `forward` may ask for those of a flag or of a count of steps.
MOST_BYTES = 2**20
PLAIN = (type(None), bool, int, float, complex, str, bytes)
_CONTAINERS: tuple[type, ...] = (collections.OrderedDict, collections.defaultdict, dict, list, set, collections.deque)
_FILL: dict[type, Callable[[Any, list[Any]], object]] = {
    list: list.extend,
    set: set.update,
    collections.deque: collections.deque.extend,
}


def is_library(module: Any) -> bool:
    """Whether ``module`` names a part of torch, NumPy or Python, rather than the user's code."""
    return str(module).partition(".")[0] in {"torch", "numpy", "builtins", *sys.stdlib_module_names}


def container_base(kind: type) -> type | None:
    """Which of the mutable containers a class derives from."""
    return next((base for base in _CONTAINERS if issubclass(kind, base)), None)


def contents_of(container: Any, base: Any) -> list[Any]:
    """The elements of a container, or its items; without running a method that a subclass overrides."""
    return list(base.items(container) if issubclass(base, dict) else base.__iter__(container))


def fill(container: Any, base: Any, contents: list[Any]) -> None:
    """Put what :func:`contents_of` gave into an empty container, likewise."""
    if base in _FILL:
        _FILL[base](container, contents)
    else:
        for key, value in contents:
            base.__setitem__(container, key, value)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` has wrapped."""
    # Importing it is slow, and as long as nobody has, nothing has been compiled.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    while dynamo is not None and isinstance(module, dynamo.OptimizedModule):
        module = module._orig_mod
    return module


def is_opaque(module: nn.Module) -> bool:
    """Whether a module can be neither copied nor looked into."""
    return hasattr(type(module), "__del__") or isinstance(module, torch.jit.ScriptModule)
