"""A throw-away copy of a model, to run its ``forward`` on."""

from __future__ import annotations

import collections
import contextlib
import copy
import enum
import functools
import itertools
import logging
import random
import types
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from locoprop_torch.isolation.objects import (
    MOST_BYTES,
    MOST_OBJECTS,
    PLAIN,
    container_base,
    contents_of,
    fill,
    is_library,
    is_opaque,
    uncompiled,
)

__all__ = ["Copier"]

# There is one of each, or too much hangs on it; none of them changes when a model runs.
_SHARED = (type, types.ModuleType, enum.Enum, logging.Logger, fx.Graph)
# Made by C code, and safe to copy with what they refer to.
_DEEP_COPIED = (np.random.Generator, np.random.RandomState, random.Random, bytearray, itertools.count)
_HOOKS = frozenset(name for name in vars(nn.Module()) if "_hooks" in name)
# What makes a module copy, pickle or run itself in a way of its own.
_NOT_COPIED = frozenset({"__deepcopy__", "__reduce_ex__", "_compiled_call_impl"})


class Copier:
    """Copies a model, so that nothing that its ``forward`` does to the copy reaches the model.

    Parameters and large tensors lose their values, modules their hooks, and all modules train. No code of the user's
    runs. Shared with the model are objects that cannot change, and those that cannot be copied in this way: made by C
    code, or with something to do at their end (``__del__``).

    Attributes:
        originals: the module that each copy was made from, by the copy's ``id``.
    """

    def __init__(self) -> None:
        self.originals: dict[int, nn.Module] = {}
        # By the id of the original, which the model keeps alive.
        self._copies: dict[int, Any] = {}
        self._left = MOST_OBJECTS

    def copy(self, obj: Any) -> Any:
        """The copy of ``obj``, always the same one.

        Raises:
            ValueError: there are too many objects.
        """
        kind = type(obj)
        if issubclass(kind, PLAIN):
            return obj
        if id(obj) not in self._copies:
            # Where the object refers to itself and nothing else is set below, its copy refers to the original.
            self._copies[id(obj)] = obj
            self._copies[id(obj)] = self._copy(obj, kind)
        return self._copies[id(obj)]

    def _copy(self, obj: Any, kind: type) -> Any:
        if issubclass(kind, nn.Module):
            return self._module(obj)
        if issubclass(kind, Tensor):
            return self._tensor(obj)
        if issubclass(kind, _SHARED) or hasattr(kind, "__del__"):
            return obj
        self._count(1)
        if (base := container_base(kind)) is not None:
            return self._container(obj, kind, base)
        if issubclass(kind, (tuple, frozenset)):
            return self._immutable(obj, kind)
        if kind is torch.Generator:
            return obj.clone_state()
        if kind is weakref.ref:
            target = obj()
            return weakref.ref(self.copy(target)) if isinstance(target, nn.Module) else obj
        if issubclass(kind, (types.FunctionType, types.MethodType, types.BuiltinMethodType, functools.partial)):
            return self._callable(obj, kind)
        if issubclass(kind, np.ndarray):
            return self._array(obj)
        if issubclass(kind, _DEEP_COPIED):
            return copy.deepcopy(obj)
        return self._instance(obj, kind)

    def _count(self, objects: int) -> None:
        self._left -= objects
        if self._left < 0:
            raise ValueError(f"its attributes hold more than {MOST_OBJECTS:,} objects")

    def _module(self, module: nn.Module) -> Any:
        plain = uncompiled(module)
        if plain is not module or is_opaque(module):
            return module if plain is module else self.copy(plain)
        made = self._copies[id(module)] = object.__new__(type(module))
        self.originals[id(made)] = module
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                vars(made)[name] = type(value)((key, self.copy(member)) for key, member in value.items())
            elif name in _HOOKS:
                vars(made)[name] = collections.OrderedDict()
            elif name not in _NOT_COPIED:
                vars(made)[name] = self.copy(value)
        # A model built in eval() has the same transfer functions.
        vars(made)["training"] = True
        return made

    def _tensor(self, tensor: Tensor) -> Tensor:
        if nn.parameter.is_lazy(tensor):
            return tensor
        if not isinstance(tensor, nn.Parameter) and tensor.numel() * tensor.element_size() <= MOST_BYTES:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad and tensor.is_leaf)
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    def _array(self, array: Any) -> Any:
        if array.nbytes <= MOST_BYTES:
            return copy.deepcopy(array)
        view = array.view()
        # An array without values would not do in NumPy, so the copy shares them, and writing to it fails.
        view.flags.writeable = False
        return view

    def _container(self, obj: Any, kind: type, base: Any) -> Any:
        contents = contents_of(obj, base)
        self._count(len(contents))
        made = self._copies[id(obj)] = base.__new__(kind)
        if base is collections.deque:
            base.__init__(made, (), obj.maxlen)
        if base is collections.defaultdict:
            made.default_factory = self.copy(obj.default_factory)
        if issubclass(base, dict):
            copies: list[Any] = [(self.copy(key), self.copy(value)) for key, value in contents]
        else:
            copies = [self.copy(item) for item in contents]
        self._attributes(obj, made, kind)
        fill(made, base, copies)
        return made

    def _immutable(self, obj: Any, kind: Any) -> Any:
        base = tuple if issubclass(kind, tuple) else frozenset
        contents = list(base.__iter__(obj))
        self._count(len(contents))
        copies = [self.copy(item) for item in contents]
        if all(made is item for made, item in zip(copies, contents, strict=True)):
            return obj
        try:
            made = base.__new__(kind, copies)
        except TypeError:
            # A tuple that torch's C code makes.
            return obj
        self._attributes(obj, made, kind)
        return made

    def _callable(self, obj: Any, kind: type) -> Any:
        """Functions and methods that hold on to objects, such as to ``self``."""
        if issubclass(kind, functools.partial):
            return functools.partial(self.copy(obj.func), *self.copy(obj.args), **self.copy(obj.keywords))
        if issubclass(kind, types.FunctionType):
            return obj if is_library(obj.__module__) else self._function(obj)
        owner = self.copy(obj.__self__)
        if owner is obj.__self__:
            return obj
        if issubclass(kind, types.MethodType):
            return types.MethodType(self.copy(obj.__func__), owner)
        return getattr(owner, obj.__name__)

    def _function(self, function: types.FunctionType) -> Any:
        cells = function.__closure__ or ()
        made = types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            self.copy(function.__defaults__),
            tuple(types.CellType() for _ in cells),
        )
        made.__kwdefaults__ = self.copy(function.__kwdefaults__)
        same = made.__defaults__ is function.__defaults__ and not made.__kwdefaults__
        self._copies[id(function)] = made
        for cell, old in zip(made.__closure__ or (), cells, strict=True):
            # An empty cell raises a ValueError.
            with contextlib.suppress(ValueError):
                cell.cell_contents = self.copy(old.cell_contents)
                same = same and cell.cell_contents is old.cell_contents
        return function if same else made

    def _instance(self, obj: Any, kind: Any) -> Any:
        if not kind.__dictoffset__ and not any("__slots__" in vars(base) for base in kind.__mro__):
            return obj
        try:
            made = kind.__new__(kind) if issubclass(kind, types.SimpleNamespace) else object.__new__(kind)
        except TypeError:
            # Only C code can make one.
            return obj
        self._copies[id(obj)] = made
        self._attributes(obj, made, kind)
        return made

    def _attributes(self, obj: Any, made: Any, kind: type) -> None:
        if kind.__dictoffset__:
            attributes = object.__getattribute__(obj, "__dict__")
            self._count(len(attributes))
            object.__getattribute__(made, "__dict__").update({key: self.copy(v) for key, v in attributes.items()})
        for base in kind.__mro__:
            for slot in vars(base).values() if "__slots__" in vars(base) else ():
                if isinstance(slot, types.MemberDescriptorType):
                    # A slot that is not set raises an AttributeError.
                    with contextlib.suppress(AttributeError):
                        slot.__set__(made, self.copy(slot.__get__(obj)))
