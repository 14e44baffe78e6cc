"""Forward hooks that stay with the modules they were put on: copies and pickles of a module carry nothing of them."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = [
    "AttachedHook",
    "ForwardHook",
    "InputGradientHook",
    "LayerHook",
    "attach",
    "backward_pass",
    "keeps_graph",
    "while_alive",
]

# Looked up on the instance by ``copy`` and ``pickle`` before they look at the class.
_COPYING = ("__deepcopy__", "__reduce_ex__")


class ForwardHook:
    """Base of our hooks, by which they are told from those of the user.

    Torch's quantisation puts hooks that it finds on the modules that it makes, where ours do nothing.
    """

    _module: weakref.ref[nn.Module] | None = None

    def attached_to(self, module: nn.Module) -> None:
        """Act on calls of this module, and of no other."""
        self._module = weakref.ref(module)

    @property
    def __name__(self) -> str:
        """What ``torch.jit.script`` asks of a hook first; it could not compile ours, so it gets a message instead."""
        raise AttributeError(
            "LocoProp's hooks cannot be scripted: script a copy, torch.jit.script(copy.deepcopy(model)), which has none"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the module that it was put on by torch gets a hook that does nothing.
        return ForwardHook, ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *others: Any) -> None:
        """What torch calls, with ``kwargs`` and the output where it was :func:`attach` that put it on the module."""
        if len(others) != 2 or self._module is None:
            return
        # The replicas of nn.DataParallel share the hooks of the module.
        if self._module() is module or getattr(module, "_is_replica", False):
            self.on_call(module, args, *others)

    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """What the hook does after a call of its module."""


class LayerHook(ForwardHook):
    """Tells a captured layer of each call that may have gradients.

    Args:
        layer: the layer, which is not kept alive.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = weakref.ref(layer)

    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Tell the layer."""
        layer = self._layer()
        if layer is None:
            return
        layer.called = True
        transformed = torch._C._are_functorch_transforms_active() or torch._C._is_tracing()
        if torch.is_grad_enabled() and output.requires_grad and not transformed:
            if output.is_nested:
                raise TypeError(
                    f"layer {layer.name!r} must be called with a dense tensor where gradients are recorded, got a "
                    "nested one: give it .values(), or leave its parameters to aux"
                )
            layer.watch(module, args[0] if args else next(iter(kwargs.values())), output)


class AttachedHook:
    """A hook on a module; :meth:`remove` takes it off."""

    def __init__(self, module: nn.Module, handle: RemovableHandle) -> None:
        self._module, self._handle = weakref.ref(module), handle

    def remove(self) -> None:
        """Take the hook off, and with the last of ours everything that we have put on the module."""
        self._handle.remove()
        module = self._module()
        if module is not None and not any(isinstance(hook, ForwardHook) for hook in module._forward_hooks.values()):
            for name in _COPYING:
                vars(module).pop(name, None)


def attach(module: nn.Module, hook: ForwardHook) -> AttachedHook:
    """Put ``hook`` on ``module``, before all other hooks: it sees what ``forward`` returned, unchanged by them."""
    hook.attached_to(module)
    handle = module.register_forward_hook(hook, with_kwargs=True, prepend=True)
    copies = _CleanCopies(module)
    vars(module)["__deepcopy__"] = copies.deepcopy
    vars(module)["__reduce_ex__"] = copies.reduce_ex
    return AttachedHook(module, handle)


class _CleanCopies:
    """Copies a module as if there were no hooks of ours on it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def deepcopy(self, memo: dict[int, Any]) -> Any:
        module = self._module()
        assert module is not None
        with _taken_off(module):
            return copy.deepcopy(module, memo)

    def reduce_ex(self, protocol: int) -> Any:
        module = self._module()
        assert module is not None
        with _taken_off(module):
            reduced = module.__reduce_ex__(protocol)
            if isinstance(reduced, tuple) and len(reduced) > 2 and isinstance(reduced[2], dict):
                # The state refers to the live dictionaries, which get their hooks back before it is read.
                state = {k: copy.copy(v) if isinstance(v, OrderedDict) else v for k, v in reduced[2].items()}
                reduced = (*reduced[:2], state, *reduced[3:])
        return reduced


@contextmanager
def _taken_off(module: nn.Module) -> Iterator[None]:
    """Without anything of ours on ``module``, for a while."""
    dictionaries: tuple[dict[int, Any], ...] = (module._forward_hooks, module._forward_hooks_with_kwargs)
    before = [list(dictionary.items()) for dictionary in dictionaries]
    ours = [key for key, hook in module._forward_hooks.items() if isinstance(hook, ForwardHook)]
    copying = {name: vars(module).pop(name) for name in _COPYING if name in vars(module)}
    for dictionary in dictionaries:
        for key in ours:
            dictionary.pop(key, None)
    try:
        yield
    finally:
        vars(module).update(copying)
        for dictionary, items in zip(dictionaries, before, strict=True):
            dictionary.clear()
            dictionary.update(items)


def backward_pass() -> int:
    """The number of the backward pass that is running; -1 outside of one."""
    return torch._C._current_graph_task_id()


def keeps_graph() -> bool:
    """Whether the backward pass that is running leaves its graph to another (``retain_graph=True``)."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


class InputGradientHook:
    """Hook on a layer's input, for gradients that are differentiated again, as in gradient penalties.

    Their own backward pass reaches the weight by a way that need not go through the layer's output.

    Args:
        owner: the layer.
        method: its method that is told of that backward pass.
        captured: what the method is told: the pass that the input belongs to.
    """

    def __init__(self, owner: weakref.ref[Any], method: Callable[..., None], captured: Any) -> None:
        self._owner, self._method, self._captured = owner, method, weakref.ref(captured)

    @torch.compiler.disable
    def __call__(self, gradient: Tensor) -> None:
        captured = self._captured()
        if captured is not None and torch.is_grad_enabled() and gradient.requires_grad:
            gradient.register_hook(partial(while_alive, self._owner, self._method, captured))


# A backward pass within a compiled function calls hooks as they are.
@torch.compiler.disable
def while_alive(owner: weakref.ref[Any], method: Callable[..., None], *arguments: Any) -> None:
    """A hook that calls a method of its owner and does not keep the owner alive."""
    found = owner()
    if found is not None:
        method(found, *arguments)
