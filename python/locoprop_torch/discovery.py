"""Which transfer function follows each layer: ``torch.fx`` traces a throw-away copy of the model.

Tracing runs the user's ``forward`` with stand-ins for tensors; :mod:`locoprop_torch.isolation` keeps whatever it does
away from the model and the rest of the program.
"""

from __future__ import annotations

import logging
import operator
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from locoprop_kernels import transfers
from locoprop_kernels.transfers import Transfer
from locoprop_torch.functions import FUNCTIONS, METHODS, MODULES, Signature, named_transfer, transfer_of
from locoprop_torch.isolation import Copier, is_opaque, uncompiled, undisturbed
from locoprop_torch.modules import GroupedLinear, MultiheadAttention

__all__ = ["Found", "find_transfers"]

_log = logging.getLogger("locoprop_torch")

# These only move elements, so an elementwise transfer function behind them acts on the layer's output all the same.
_MOVES_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten)
_MOVES_FUNCTIONS = {torch.flatten, torch.reshape, torch.unsqueeze, torch.squeeze, torch.transpose, torch.permute}
_MOVES_METHODS = {"contiguous", "flatten", "reshape", "view", "unsqueeze", "squeeze", "transpose", "permute"}


def _softmax_dims(layer: nn.Module | None) -> tuple[int, ...]:
    """The dimensions that mean "over the features" in a softmax of the layer's output."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return 1, 1 - layer.weight.dim()
    return (-1,)


def _is_square(node: fx.Node, of: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "square" or (node.target == "pow" and node.args[1:] == (2,))
    if node.target in (torch.square, operator.pow, torch.pow):
        return node.target is torch.square or node.args[1:] == (2,)
    return node.target in (operator.mul, torch.mul) and node.args == (of, of)


def _signature(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[Signature | None, list[Any]]:
    """``(signature, values of its parameters)`` of the call that ``node`` is."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        signature = MODULES.get(type(module))
        return signature, [getattr(module, parameter) for parameter in (signature or ())[1:]]
    tables: dict[str, dict[Any, Signature]] = {"call_function": FUNCTIONS, "call_method": METHODS}
    target = str(node.target).rstrip("_") if node.op == "call_method" else node.target
    signature = tables.get(node.op, {}).get(target)
    parameters = (signature or ())[1:]
    positional = [*node.args[1:], *[None] * len(parameters)]
    return signature, [node.kwargs.get(key, value) for key, value in zip(parameters, positional, strict=False)]


def _moves(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _MOVES_MODULES)
    return node.target in (_MOVES_METHODS if node.op == "call_method" else _MOVES_FUNCTIONS)


class _Follower(NamedTuple):
    """What alone consumes the output of a layer.

    Attributes:
        transfer: the transfer function that it is, if it is a known one.
        returned: whether the output is returned instead: what follows it is then the caller's affair.
        reason: why the function is not known, though it looks like one.
    """

    transfer: Transfer | None = None
    returned: bool = False
    reason: str | None = None


def _follower(node: fx.Node, modules: dict[str, nn.Module], softmax_dims: tuple[int, ...]) -> _Follower:
    """What alone consumes the output of ``node``."""
    moved = False
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op == "output":
            return _Follower(returned=True)
        if _moves(user, modules):
            moved |= not (user.op == "call_module" and isinstance(modules[str(user.target)], nn.Identity))
            node = user
            continue
        signature, values = _signature(user, modules)
        if signature is None:
            break
        transfer, reason = named_transfer(signature, values, softmax_dims)
        if transfer is None:
            elsewhere = moved and signature[0] == "softmax"
            return _Follower(reason=None if elsewhere else reason)
        if moved and not transfer.elementwise:
            break
        if transfer.name == "relu" and len(user.users) == 1 and _is_square(next(iter(user.users)), user):
            return _Follower(transfers.get("squared_relu"))
        return _Follower(transfer)
    return _Follower()


class _Tracer(fx.Tracer):
    """Traces a copy of a model. A part whose ``forward`` cannot be traced is recorded as one call.

    While it does, torch sends the calls of all modules through here, those that other threads make too.

    Args:
        leaves: ``id`` of the layers to look for, which stay whole.

    Attributes:
        failed: why each such part could not be traced, by its ``id``.
    """

    def __init__(self, leaves: set[int]) -> None:
        super().__init__()
        self.failed: dict[int, str] = {}
        self._leaves = leaves
        self._thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is recorded as one call: torch's are, and our own, whose ``forward`` branches on shapes."""
        if id(m) in self._leaves or is_opaque(m) or isinstance(m, (GroupedLinear, MultiheadAttention)):
            return True
        kind = type(m).__bases__[0] if parametrize.is_parametrized(m) else type(m)
        return kind.__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(m, nn.Sequential)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace into ``m``; where that fails, forget what it has recorded so far, and record the call alone."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        depth, nodes = len(self.module_stack), len(self.graph.nodes)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            for node in reversed(list(self.graph.nodes)[nodes:]):
                self.graph.erase_node(node)
            self.failed[id(m)] = _reason(m, error)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """An attribute of a module, or what stands for it."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _reason(module: nn.Module, error: Exception) -> str:
    message = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(module).__name__}.forward could not be traced: {type(error).__name__}: {message[:120]}"


@dataclass(frozen=True)
class Found:
    """What is known about the function behind a layer.

    Attributes:
        transfer: the transfer function; the identity where none was found.
        reason: why the layer's output could not be followed, or is not known, or ``None`` where it was.
    """

    transfer: Transfer
    reason: str | None = None


class _Search:
    """Looks for the transfer functions behind ``layers``, in a model and then in the parts that cannot be traced."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._found: dict[int, set[Transfer]] = {id(layer): set() for layer in layers}
        self._reasons: dict[int, str] = {}
        self._visited: set[int] = set()

    def result(self, layer: nn.Module) -> Found:
        """What was found for a layer."""
        candidates, reason = self._found[id(layer)], self._reasons.get(id(layer))
        if reason is not None or len(candidates) != 1:
            return Found(transfers.get("identity"), reason)
        return Found(next(iter(candidates)))

    def visit(self, module: nn.Module, outer: str | None = None) -> None:
        """Trace a module, or where that fails its children; ``outer`` says why it was not traced with the rest."""
        module = uncompiled(module)
        if id(module) in self._visited:
            return
        self._visited.add(id(module))
        if id(module) in self._found:
            if outer is not None:
                self._reasons[id(module)] = outer
        elif self._found.keys().isdisjoint(map(id, module.modules())):
            pass
        elif isinstance(module, (MultiheadAttention, nn.MultiheadAttention)):
            # No elementwise function follows its projections.
            pass
        elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            # Their forward branches on data, so nothing can trace it.
            if id(module.linear1) in self._found:
                self._add(module.linear1, transfer_of(module.activation, -1, 3))
            for child in module.children():
                self.visit(child)
        elif type(module).forward is nn.Module.forward:
            # A container, such as nn.ModuleList.
            for child in module.children():
                direct = id(child) in self._found
                self.visit(child, outer or (f"{type(module).__name__} has no forward" if direct else None))
        else:
            try:
                self._trace(module, outer)
            except Exception as error:
                # A model's Python may raise anything when it meets a stand-in for a tensor.
                for child in module.children():
                    self.visit(child, _reason(module, error))

    def _trace(self, module: nn.Module, outer: str | None) -> None:
        if is_opaque(module):
            raise TypeError("a module with __del__, or of TorchScript, cannot be copied")
        copier = Copier()
        copied = copier.copy(module)
        originals = copier.originals
        tracer = _Tracer({key for key, original in originals.items() if id(original) in self._found} | {*self._found})
        graph = tracer.trace(copied)
        modules: dict[str, nn.Module] = dict(copied.named_modules(remove_duplicate=False))
        for node in graph.nodes:
            if node.op != "call_module":
                continue
            called = modules[str(node.target)]
            original = originals.get(id(called), called)
            if id(original) not in self._found:
                # A module that the tracer left whole, such as a transformer layer of torch.nn.
                self.visit(original, tracer.failed.get(id(called)))
                continue
            follower = _follower(node, modules, _softmax_dims(original))
            reason = outer if follower.returned else follower.reason
            if reason is not None:
                self._reasons[id(original)] = reason
            else:
                self._add(original, follower.transfer)

    def _add(self, layer: nn.Module, transfer: Transfer | None) -> None:
        self._found[id(layer)].add(transfer or transfers.get("identity"))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def find_transfers(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Found]:
    """The transfer function behind each layer of ``model``, which is left as it was, whatever its ``forward`` does.

    Layers whose output could not be followed are logged, once, at level WARNING.

    Args:
        model: any module. Parts whose ``forward`` ``torch.fx`` cannot trace are looked into one by one.
        layers: modules of ``model`` to look at, by name.

    Returns:
        A transfer function for every layer; the identity where nothing known follows, where the output has several
        consumers, where calls of the same layer are followed by different functions, and where ``forward`` could not
        be followed.
    """
    search = _Search(layers.values())
    with undisturbed(model):
        search.visit(model)
    found = {name: search.result(layer) for name, layer in layers.items()}
    reasons: dict[str, list[str]] = {}
    for name, result in found.items():
        if result.reason is not None:
            reasons.setdefault(result.reason, []).append(name)
    if reasons:
        _log.warning(
            "what follows these layers is not known, so they get the identity; transfers={name: function} names it "
            "by hand. %s",
            "; ".join(f"{_listed(names)}: {reason}" for reason, names in reasons.items()),
        )
    return found
