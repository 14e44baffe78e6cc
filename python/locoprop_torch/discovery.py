"""Which transfer function follows each layer: read off the model with ``torch.fx``, nothing is executed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from locoprop_kernels import transfers
from locoprop_kernels.transfers import Transfer
from locoprop_torch.attention import MultiheadAttention
from locoprop_torch.layouts import GroupedLinear

__all__ = ["find_transfers", "transfer_of"]

# Names of the transfer function and of its parameter (with its position among the arguments), if it has one.
_Signature = tuple[str, str | None]
_MODULES: dict[type[nn.Module], _Signature] = {
    nn.Tanh: ("tanh", None),
    nn.Sigmoid: ("sigmoid", None),
    nn.ReLU: ("relu", None),
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.Softplus: ("softplus", "beta"),
    nn.ELU: ("elu", "alpha"),
    nn.GELU: ("gelu", "approximate"),
    nn.SiLU: ("silu", None),
    nn.Softmax: ("softmax", "dim"),
}
_FUNCTIONS: dict[Callable[..., Any], _Signature] = {
    torch.tanh: ("tanh", None),
    torch.tanh_: ("tanh", None),
    F.tanh: ("tanh", None),
    torch.sigmoid: ("sigmoid", None),
    torch.sigmoid_: ("sigmoid", None),
    F.sigmoid: ("sigmoid", None),
    torch.special.expit: ("sigmoid", None),
    torch.relu: ("relu", None),
    torch.relu_: ("relu", None),
    F.relu: ("relu", None),
    F.relu_: ("relu", None),
    F.leaky_relu: ("leaky_relu", "negative_slope"),
    F.leaky_relu_: ("leaky_relu", "negative_slope"),
    F.softplus: ("softplus", "beta"),
    F.elu: ("elu", "alpha"),
    F.elu_: ("elu", "alpha"),
    torch.atan: ("arctan", None),
    torch.atan_: ("arctan", None),
    torch.arctan: ("arctan", None),
    F.gelu: ("gelu", "approximate"),
    F.silu: ("silu", None),
    F.softmax: ("softmax", "dim"),
    torch.softmax: ("softmax", "dim"),
}
_METHODS: dict[str, _Signature] = {
    "tanh": ("tanh", None),
    "sigmoid": ("sigmoid", None),
    "relu": ("relu", None),
    "atan": ("arctan", None),
    "arctan": ("arctan", None),
    "softmax": ("softmax", "dim"),
}
# These only move elements, so an elementwise transfer function behind them acts on the layer's output all the same.
_MOVES_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten)
_MOVES_FUNCTIONS = {torch.flatten, torch.reshape, torch.unsqueeze, torch.squeeze, torch.transpose, torch.permute}
_MOVES_METHODS = {"contiguous", "flatten", "reshape", "view", "unsqueeze", "squeeze", "transpose", "permute"}


def _softmax_dims(layer: nn.Module | None) -> tuple[int, ...]:
    """The dimensions that mean "over the features" in a softmax of the layer's output."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return 1, 1 - layer.weight.dim()
    return (-1,)


def _transfer_of(signature: _Signature, value: Any, softmax_dims: tuple[int, ...] = (-1,)) -> Transfer | None:
    """The transfer function of a call with parameter ``value`` (``None`` = default); ``None`` if it is unknown."""
    name, parameter = signature
    if parameter is None or value is None:
        return None if name == "softmax" else transfers.get(name)
    if name == "softmax":
        return transfers.get(name) if value in softmax_dims else None
    if name == "gelu":
        return {"none": transfers.get("gelu"), "tanh": transfers.get("gelu_tanh")}.get(value)
    return transfers.get(name, **{parameter: value}) if isinstance(value, (int, float)) else None


def transfer_of(activation: Callable[..., Any], feature_dim: int, ndim: int) -> Transfer | None:
    """The transfer function that a module or function is, applied to an output ``[..., N]``; ``None`` if unknown.

    Args:
        activation: module such as ``nn.Tanh()``, or function such as ``torch.tanh``.
        feature_dim: the output's dimension of size ``N``: a softmax must be over this one.
        ndim: number of dimensions of the output.
    """
    if isinstance(activation, nn.Identity):
        return transfers.get("identity")
    if not isinstance(activation, nn.Module):
        signature = _FUNCTIONS.get(activation)
        return None if signature is None else _transfer_of(signature, None)
    signature = _MODULES.get(type(activation))
    if signature is None:
        return None
    value = getattr(activation, signature[1]) if signature[1] else None
    if isinstance(activation, nn.Softmax):
        dim = value if value is not None else (0 if ndim in (0, 1, 3) else 1)  # torch's own choice
        value = -1 if dim % ndim == feature_dim % ndim else None
    return _transfer_of(signature, value)


def _is_square(node: fx.Node, of: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "square" or (node.target == "pow" and node.args[1:] == (2,))
    if node.target in (torch.square, operator.pow, torch.pow):
        return node.target is torch.square or node.args[1:] == (2,)
    return node.target in (operator.mul, torch.mul) and node.args == (of, of)


def _signature(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[_Signature | None, Any]:
    """``(signature, value of its parameter)`` of the call that ``node`` is."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        signature = _MODULES.get(type(module))
        return signature, getattr(module, signature[1]) if signature and signature[1] else None
    tables: dict[str, dict[Any, _Signature]] = {"call_function": _FUNCTIONS, "call_method": _METHODS}
    target = str(node.target).rstrip("_") if node.op == "call_method" else node.target
    signature = tables.get(node.op, {}).get(target)
    if signature is None or signature[1] is None:
        return signature, None
    positional = node.args[1] if len(node.args) > 1 else None
    return signature, node.kwargs.get(signature[1], positional)


def _moves(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _MOVES_MODULES)
    return node.target in (_MOVES_METHODS if node.op == "call_method" else _MOVES_FUNCTIONS)


def _follower(node: fx.Node, modules: dict[str, nn.Module], softmax_dims: tuple[int, ...]) -> Transfer | None:
    """The transfer function that alone consumes the output of ``node``, if it is a known one."""
    moved = False
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op == "output":
            return None
        if _moves(user, modules):
            moved |= not (user.op == "call_module" and isinstance(modules[str(user.target)], nn.Identity))
            node = user
            continue
        signature, value = _signature(user, modules)
        if signature is None:
            return None
        transfer = _transfer_of(signature, value, softmax_dims)
        if transfer is None or (moved and not transfer.elementwise):
            return None
        if transfer.name == "relu" and len(user.users) == 1 and _is_square(next(iter(user.users)), user):
            return transfers.get("squared_relu")
        return transfer
    return None


class _Tracer(fx.Tracer):
    """Leaves our own modules whole, as fx leaves those of torch: their forward branches on shapes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (GroupedLinear, MultiheadAttention)) or super().is_leaf_module(m, module_qualified_name)


def _trace(module: nn.Module) -> fx.Graph | None:
    try:
        return _Tracer().trace(module)
    except Exception:  # whatever a model's Python does with a proxy: the parts that can be traced are traced alone
        return None


def find_transfers(model: nn.Module, layers: Iterable[nn.Module]) -> dict[nn.Module, Transfer]:
    """The transfer function behind each layer of ``model``.

    Args:
        model: any module. Where ``torch.fx`` cannot trace it as a whole, its parts are traced one by one.
        layers: modules of ``model`` to look at.

    Returns:
        A transfer function for every layer; the identity where nothing known follows, where the output has several
        consumers, and where calls of the same layer are followed by different functions.
    """
    wanted = set(layers)
    found: dict[nn.Module, set[Transfer]] = {layer: set() for layer in wanted}

    def visit(module: nn.Module) -> None:
        if module in wanted or wanted.isdisjoint(module.modules()):
            return
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            if module.linear1 in wanted:  # its forward branches on data, so nothing can trace it
                found[module.linear1].add(transfer_of(module.activation, -1, 3) or transfers.get("identity"))
            for child in module.children():
                visit(child)
            return
        graph = _trace(module)
        if graph is None:
            children = list(module.children())
            if isinstance(module, nn.Sequential):
                visit_pairs(children)
            for child in children:
                visit(child)
            return
        modules = dict(module.named_modules(remove_duplicate=False))
        for node in graph.nodes:
            if node.op != "call_module":
                continue
            called = modules[str(node.target)]
            if called in wanted:
                found[called].add(_follower(node, modules, _softmax_dims(called)) or transfers.get("identity"))
            else:
                visit(called)  # a leaf of the trace, such as a transformer layer of torch.nn

    def visit_pairs(children: list[nn.Module]) -> None:
        children = [child for child in children if not isinstance(child, _MOVES_MODULES)]
        for layer, follower in pairwise(children):
            signature = _MODULES.get(type(follower))
            if layer in wanted and signature is not None:
                value = getattr(follower, signature[1]) if signature[1] else None
                transfer = _transfer_of(signature, value, _softmax_dims(layer))
                found[layer].add(transfer or transfers.get("identity"))

    visit(model)
    return {
        layer: candidates.pop() if len(candidates) == 1 else transfers.get("identity")
        for layer, candidates in found.items()
    }
