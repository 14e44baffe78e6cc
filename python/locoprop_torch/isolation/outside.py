"""Putting back what a ``forward`` reaches besides the copy of the model that it runs on."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import logging
import random
import sys
import threading
import types
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from locoprop_torch.isolation.objects import (
    MOST_BYTES,
    MOST_OBJECTS,
    PLAIN,
    container_base,
    contents_of,
    fill,
    is_library,
)

__all__ = ["undisturbed"]


class _Outside:
    """What the ``forward`` methods of a model reach by name: globals, closures and attributes of classes.

    It is remembered when this is made, and put back by :meth:`restore`, in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._undo = contextlib.ExitStack()
        self._seen: dict[int, Any] = {}
        pending: list[Any] = []
        for module in model.modules():
            attributes = vars(module).values()
            pending += [type(module), *map(type, attributes), *(value for value in attributes if callable(value))]
        while pending and len(self._seen) < MOST_OBJECTS:
            obj = pending.pop()
            if id(obj) not in self._seen and not issubclass(type(obj), (*PLAIN, nn.Parameter)):
                self._seen[id(obj)] = obj
                # Looking at an object may raise anything, such as at a tensor that has no shape yet.
                with contextlib.suppress(Exception):
                    pending += self._keep(obj, type(obj))

    def restore(self) -> None:
        """Put everything back that has changed."""
        self._undo.close()

    def _keep(self, obj: Any, kind: type) -> Iterable[Any]:
        """Remember the state of ``obj``; returns the objects that it leads to."""
        if issubclass(kind, types.FunctionType):
            return () if is_library(obj.__module__) else self._function(obj)
        if issubclass(kind, (staticmethod, classmethod, types.MethodType)):
            return (obj.__func__,)
        if issubclass(kind, property):
            return obj.fget, obj.fset
        if issubclass(kind, functools.partial):
            return obj.func, obj.args, obj.keywords
        if issubclass(kind, type):
            return () if is_library(obj.__module__) else self._class(obj)
        if issubclass(kind, torch.Generator):
            self._undo.callback(obj.set_state, obj.get_state())
        elif issubclass(kind, Tensor):
            self._tensor(obj)
        elif (base := container_base(kind)) is not None:
            return self._container(obj, base)
        elif issubclass(kind, (tuple, frozenset)):
            return obj
        elif kind.__dictoffset__ and not issubclass(kind, (types.ModuleType, logging.Logger)):
            return (*self._container(object.__getattribute__(obj, "__dict__"), dict), kind)
        return ()

    def _function(self, function: types.FunctionType) -> Iterator[Any]:
        names: set[str] = set()
        codes = [function.__code__]
        # The list grows by the code of the functions that are defined inside.
        for code in codes:
            names.update(code.co_names)
            codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        scope = function.__globals__
        modules = [value for name in names if isinstance(value := scope.get(name), types.ModuleType)]
        for namespace in [scope, *(vars(module) for module in modules if not is_library(module.__name__))]:
            self._names(namespace, names)
            yield from (namespace[name] for name in names & namespace.keys())
        for cell in function.__closure__ or ():
            # An empty cell raises a ValueError.
            with contextlib.suppress(ValueError):
                self._undo.callback(setattr, cell, "cell_contents", cell.cell_contents)
                yield cell.cell_contents
        yield from (function.__defaults__, function.__kwdefaults__, vars(function))

    def _names(self, namespace: dict[str, Any], names: set[str]) -> None:
        kept = {name: namespace[name] for name in names & namespace.keys()}

        def undo() -> None:
            for name in names & namespace.keys() - kept.keys():
                del namespace[name]
            namespace.update({name: value for name, value in kept.items() if namespace.get(name) is not value})

        self._undo.callback(undo)

    def _class(self, cls: type) -> Iterable[Any]:
        kept = dict(vars(cls))

        def undo() -> None:
            for name in vars(cls).keys() - kept.keys():
                type.__delattr__(cls, name)
            for name, value in kept.items():
                if vars(cls).get(name) is not value:
                    type.__setattr__(cls, name, value)

        self._undo.callback(undo)
        return (*kept.values(), *cls.__bases__)

    def _tensor(self, tensor: Tensor) -> None:
        if tensor.is_inference() or tensor.numel() * tensor.element_size() > MOST_BYTES:
            return
        version, values = tensor._version, tensor.detach().clone()

        def undo() -> None:
            if tensor._version != version:
                tensor.detach().copy_(values)

        self._undo.callback(undo)

    def _container(self, obj: Any, base: Any) -> list[Any]:
        def elements(contents: list[Any]) -> list[Any]:
            return list(itertools.chain.from_iterable(contents)) if issubclass(base, dict) else contents

        kept = contents_of(obj, base)

        def undo() -> None:
            now = elements(contents_of(obj, base))
            if len(now) != len(elements(kept)) or any(a is not b for a, b in zip(now, elements(kept), strict=True)):
                base.clear(obj)
                fill(obj, base, kept)

        self._undo.callback(undo)
        return elements(kept)


class _Unheard:
    """A stream that nothing comes to from the thread that makes it; what others write goes where it went before."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# What follows changes what all threads share, such as where they print: one at a time, or it would not be put back.
_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run ``forward`` of a copy of ``model`` unnoticed: nothing is printed, no random number is drawn, no hook runs."""
    tables = [value for name, value in vars(nn.modules.module).items() if name.startswith("_global_")]
    hooks = [table for table in tables if isinstance(table, dict)]
    cuda = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    with _one_at_a_time, contextlib.ExitStack() as stack:
        stack.callback(_Outside(model).restore)
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng(devices=range(cuda)))
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(sys.maxsize)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(_Unheard(sys.stdout or io.StringIO())))
        stack.enter_context(contextlib.redirect_stderr(_Unheard(sys.stderr or io.StringIO())))
        for table in hooks:
            stack.callback(table.update, dict(table))
            table.clear()
        yield
