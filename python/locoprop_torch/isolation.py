"""Running a model's ``forward`` so that the model and the rest of the program do not notice.

:class:`Copier` makes a throw-away copy of the model to run it on; :func:`undisturbed` puts back what ``forward``
reaches besides.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import enum
import functools
import io
import itertools
import logging
import random
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

__all__ = ["Copier", "is_opaque", "uncompiled", "undisturbed"]

# Objects that a copy of a model may consist of, and that `forward` may reach besides: above, something is amiss.
_MOST_OBJECTS = 100_000
# Tensors up to here are copied with their values: `forward` may ask for those of a flag or of a count of steps.
_MOST_BYTES = 2**20
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_CONTAINERS: tuple[type, ...] = (collections.OrderedDict, collections.defaultdict, dict, list, set, collections.deque)
_FILL: dict[type, Callable[[Any, list[Any]], object]] = {
    list: list.extend,
    set: set.update,
    collections.deque: collections.deque.extend,
}
# There is one of each, or too much hangs on it; none of them changes when a model runs.
_SHARED = (type, types.ModuleType, enum.Enum, logging.Logger, fx.Graph)
# Made by C code, and safe to copy with what they refer to.
_DEEP_COPIED = (np.random.Generator, np.random.RandomState, random.Random, bytearray, itertools.count)
_HOOKS = frozenset(name for name in vars(nn.Module()) if "_hooks" in name)
# What makes a module copy, pickle or run itself in a way of its own.
_NOT_COPIED = frozenset({"__deepcopy__", "__reduce_ex__", "_compiled_call_impl"})


def _is_library(module: Any) -> bool:
    """Whether ``module`` names a part of torch, NumPy or Python, rather than the user's code."""
    return str(module).partition(".")[0] in {"torch", "numpy", "builtins", *sys.stdlib_module_names}


def _base(kind: type) -> type | None:
    """Which of the mutable containers a class derives from."""
    return next((base for base in _CONTAINERS if issubclass(kind, base)), None)


def _contents(container: Any, base: Any) -> list[Any]:
    """The elements of a container, or its items; without running a method that a subclass overrides."""
    return list(base.items(container) if issubclass(base, dict) else base.__iter__(container))


def _fill(container: Any, base: Any, contents: list[Any]) -> None:
    if base in _FILL:
        _FILL[base](container, contents)
    else:
        for key, value in contents:
            base.__setitem__(container, key, value)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` has wrapped."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # slow to import; without it nothing has been compiled
    while dynamo is not None and isinstance(module, dynamo.OptimizedModule):
        module = module._orig_mod
    return module


def is_opaque(module: nn.Module) -> bool:
    """Whether a module can be neither copied nor looked into."""
    return hasattr(type(module), "__del__") or isinstance(module, torch.jit.ScriptModule)


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
        self._copies: dict[int, Any] = {}  # by id of the original, which the model keeps alive
        self._left = _MOST_OBJECTS

    def copy(self, obj: Any) -> Any:
        """The copy of ``obj``, always the same one.

        Raises:
            ValueError: there are too many objects.
        """
        kind = type(obj)
        if issubclass(kind, _PLAIN):
            return obj
        if id(obj) not in self._copies:
            self._copies[id(obj)] = obj  # where it refers to itself and is not set below, the copy shares it
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
        if (base := _base(kind)) is not None:
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
            raise ValueError(f"its attributes hold more than {_MOST_OBJECTS:,} objects")

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
        vars(made)["training"] = True  # a model built in eval() has the same transfer functions
        return made

    def _tensor(self, tensor: Tensor) -> Tensor:
        if nn.parameter.is_lazy(tensor):
            return tensor
        if not isinstance(tensor, nn.Parameter) and tensor.numel() * tensor.element_size() <= _MOST_BYTES:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad and tensor.is_leaf)
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    def _array(self, array: Any) -> Any:
        if array.nbytes <= _MOST_BYTES:
            return copy.deepcopy(array)
        view = array.view()
        view.flags.writeable = False  # an array without values would not do, so writing to this one fails
        return view

    def _container(self, obj: Any, kind: type, base: Any) -> Any:
        contents = _contents(obj, base)
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
        _fill(made, base, copies)
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
        except TypeError:  # a tuple of torch's C code
            return obj
        self._attributes(obj, made, kind)
        return made

    def _callable(self, obj: Any, kind: type) -> Any:
        """Functions and methods that hold on to objects, such as to ``self``."""
        if issubclass(kind, functools.partial):
            return functools.partial(self.copy(obj.func), *self.copy(obj.args), **self.copy(obj.keywords))
        if issubclass(kind, types.FunctionType):
            return obj if _is_library(obj.__module__) else self._function(obj)
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
            with contextlib.suppress(ValueError):  # an empty cell
                cell.cell_contents = self.copy(old.cell_contents)
                same = same and cell.cell_contents is old.cell_contents
        return function if same else made

    def _instance(self, obj: Any, kind: Any) -> Any:
        if not kind.__dictoffset__ and not any("__slots__" in vars(base) for base in kind.__mro__):
            return obj
        try:
            made = kind.__new__(kind) if issubclass(kind, types.SimpleNamespace) else object.__new__(kind)
        except TypeError:  # made by C code
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
                    with contextlib.suppress(AttributeError):  # not set
                        slot.__set__(made, self.copy(slot.__get__(obj)))


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
        while pending and len(self._seen) < _MOST_OBJECTS:
            obj = pending.pop()
            if id(obj) not in self._seen and not issubclass(type(obj), (*_PLAIN, nn.Parameter)):
                self._seen[id(obj)] = obj
                with contextlib.suppress(Exception):  # a stranger, such as a tensor that has no shape yet
                    pending += self._keep(obj, type(obj))

    def restore(self) -> None:
        """Put everything back that has changed."""
        self._undo.close()

    def _keep(self, obj: Any, kind: type) -> Iterable[Any]:
        """Remember the state of ``obj``; returns the objects that it leads to."""
        if issubclass(kind, types.FunctionType):
            return () if _is_library(obj.__module__) else self._function(obj)
        if issubclass(kind, (staticmethod, classmethod, types.MethodType)):
            return (obj.__func__,)
        if issubclass(kind, property):
            return obj.fget, obj.fset
        if issubclass(kind, functools.partial):
            return obj.func, obj.args, obj.keywords
        if issubclass(kind, type):
            return () if _is_library(obj.__module__) else self._class(obj)
        if issubclass(kind, torch.Generator):
            self._undo.callback(obj.set_state, obj.get_state())
        elif issubclass(kind, Tensor):
            self._tensor(obj)
        elif (base := _base(kind)) is not None:
            return self._container(obj, base)
        elif issubclass(kind, (tuple, frozenset)):
            return obj
        elif kind.__dictoffset__ and not issubclass(kind, (types.ModuleType, logging.Logger)):
            return (*self._container(object.__getattribute__(obj, "__dict__"), dict), kind)
        return ()

    def _function(self, function: types.FunctionType) -> Iterator[Any]:
        names: set[str] = set()
        codes = [function.__code__]
        for code in codes:  # and those of the functions that are defined in it
            names.update(code.co_names)
            codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        scope = function.__globals__
        modules = [value for name in names if isinstance(value := scope.get(name), types.ModuleType)]
        for namespace in [scope, *(vars(module) for module in modules if not _is_library(module.__name__))]:
            self._names(namespace, names)
            yield from (namespace[name] for name in names & namespace.keys())
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
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
        if tensor.is_inference() or tensor.numel() * tensor.element_size() > _MOST_BYTES:
            return
        version, values = tensor._version, tensor.detach().clone()

        def undo() -> None:
            if tensor._version != version:
                tensor.detach().copy_(values)

        self._undo.callback(undo)

    def _container(self, obj: Any, base: Any) -> list[Any]:
        def elements(contents: list[Any]) -> list[Any]:
            return list(itertools.chain.from_iterable(contents)) if issubclass(base, dict) else contents

        kept = _contents(obj, base)

        def undo() -> None:
            now = elements(_contents(obj, base))
            if len(now) != len(elements(kept)) or any(a is not b for a, b in zip(now, elements(kept), strict=True)):
                base.clear(obj)
                _fill(obj, base, kept)

        self._undo.callback(undo)
        return elements(kept)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Nobody notices that ``forward`` of a copy of ``model`` runs: no output, no random numbers drawn, no hooks."""
    tables = [value for name, value in vars(nn.modules.module).items() if name.startswith("_global_")]
    hooks = [table for table in tables if isinstance(table, dict)]
    cuda = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    with contextlib.ExitStack() as stack:
        stack.callback(_Outside(model).restore)
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng(devices=range(cuda)))
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(sys.maxsize)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        for table in hooks:
            stack.callback(table.update, dict(table))
            table.clear()
        yield
