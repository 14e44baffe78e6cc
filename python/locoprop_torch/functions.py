"""What torch calls the transfer functions: modules, functions and methods of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from locoprop_kernels import transfers
from locoprop_kernels.transfers import Transfer

__all__ = ["FUNCTIONS", "METHODS", "MODULES", "Signature", "named_transfer", "transfer_of"]

# Name of the transfer function, and names of its parameters in the order of the arguments after the first.
Signature = tuple[str, ...]
MODULES: dict[type[nn.Module], Signature] = {
    nn.Tanh: ("tanh",),
    nn.Sigmoid: ("sigmoid",),
    nn.ReLU: ("relu",),
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.Softplus: ("softplus", "beta", "threshold"),
    nn.ELU: ("elu", "alpha"),
    nn.SELU: ("selu",),
    nn.CELU: ("celu", "alpha"),
    nn.Softsign: ("softsign",),
    nn.Hardtanh: ("hardtanh", "min_val", "max_val"),
    nn.ReLU6: ("relu6",),
    nn.LogSigmoid: ("logsigmoid",),
    nn.GELU: ("gelu", "approximate"),
    nn.SiLU: ("silu",),
    nn.Mish: ("mish",),
    nn.Softmax: ("softmax", "dim"),
    # With the negative log-likelihood behind it, it is the cross-entropy, and softmax the transfer function of that.
    # It has no matching loss of its own: its Jacobian is not symmetric.
    nn.LogSoftmax: ("softmax", "dim"),
}
FUNCTIONS: dict[Callable[..., Any], Signature] = {
    torch.tanh: ("tanh",),
    torch.tanh_: ("tanh",),
    F.tanh: ("tanh",),
    torch.sigmoid: ("sigmoid",),
    torch.sigmoid_: ("sigmoid",),
    F.sigmoid: ("sigmoid",),
    torch.special.expit: ("sigmoid",),
    torch.relu: ("relu",),
    torch.relu_: ("relu",),
    F.relu: ("relu",),
    F.relu_: ("relu",),
    F.leaky_relu: ("leaky_relu", "negative_slope"),
    F.leaky_relu_: ("leaky_relu", "negative_slope"),
    F.softplus: ("softplus", "beta", "threshold"),
    F.elu: ("elu", "alpha"),
    F.elu_: ("elu", "alpha"),
    torch.selu: ("selu",),
    torch.selu_: ("selu",),
    F.selu: ("selu",),
    F.selu_: ("selu",),
    torch.celu: ("celu", "alpha"),
    torch.celu_: ("celu", "alpha"),
    F.celu: ("celu", "alpha"),
    F.celu_: ("celu", "alpha"),
    F.softsign: ("softsign",),
    F.hardtanh: ("hardtanh", "min_val", "max_val"),
    F.hardtanh_: ("hardtanh", "min_val", "max_val"),
    F.relu6: ("relu6",),
    F.logsigmoid: ("logsigmoid",),
    torch.atan: ("arctan",),
    torch.atan_: ("arctan",),
    torch.arctan: ("arctan",),
    F.gelu: ("gelu", "approximate"),
    F.silu: ("silu",),
    F.mish: ("mish",),
    F.softmax: ("softmax", "dim"),
    torch.softmax: ("softmax", "dim"),
    F.log_softmax: ("softmax", "dim"),
    torch.log_softmax: ("softmax", "dim"),
}
METHODS: dict[str, Signature] = {
    "tanh": ("tanh",),
    "sigmoid": ("sigmoid",),
    "relu": ("relu",),
    "atan": ("arctan",),
    "arctan": ("arctan",),
    "softmax": ("softmax", "dim"),
    "log_softmax": ("softmax", "dim"),
}
# Torch's softplus is the identity where beta * x is above its threshold: below this one float32 shows the difference.
_LEAST_THRESHOLD = 15


def named_transfer(
    signature: Signature, values: Iterable[Any] = (), softmax_dims: tuple[int, ...] = (-1,)
) -> tuple[Transfer | None, str | None]:
    """The transfer function of a call with these parameters (``None`` = default).

    Returns:
        It, or ``None`` if it is unknown; and why it is unknown, where the call may be a transfer function.
    """
    name = signature[0]
    given = {key: value for key, value in zip(signature[1:], values, strict=False) if value is not None}
    if name == "softmax":
        dim = given.get("dim")
        if dim in softmax_dims:
            return transfers.get(name), None
        return None, _why_no_softmax(dim, softmax_dims)
    if name == "gelu":
        forms = {"none": transfers.get("gelu"), "tanh": transfers.get("gelu_tanh")}
        return forms.get(given.get("approximate", "none")), None
    if not all(isinstance(value, (int, float)) for value in given.values()):
        return None, None
    threshold = given.pop("threshold", math.inf)
    if threshold < _LEAST_THRESHOLD:
        return None, f"softplus with threshold {threshold:g} is the identity above it"
    return transfers.get(name, **given), None


def _why_no_softmax(dim: Any, softmax_dims: tuple[int, ...]) -> str | None:
    """Why it is not known whether a softmax is over the features; ``None`` where it is not over them."""
    if dim is None:
        over = "without dim"
    elif isinstance(dim, int) and dim > 0 and not any(at > 0 for at in softmax_dims):
        over = f"over dim {dim}"
    else:
        return None
    return f"softmax {over}: say 'softmax' in transfers if that is the dimension of the features"


def transfer_of(activation: Callable[..., Any], feature_dim: int, ndim: int) -> Transfer | None:
    """The transfer function that a module or function is, applied to an output ``[..., N]``; ``None`` if unknown.

    Args:
        activation: module such as ``nn.Tanh()``, or function such as ``torch.tanh``. A log-softmax is unknown here:
            its values are not those of a transfer function.
        feature_dim: the output's dimension of size ``N``: a softmax must be over this one.
        ndim: number of dimensions of the output.
    """
    if isinstance(activation, nn.Identity):
        return transfers.get("identity")
    if not isinstance(activation, nn.Module):
        signature = FUNCTIONS.get(activation)
        return None if signature is None else named_transfer(signature)[0]
    signature = MODULES.get(type(activation))
    if signature is None or isinstance(activation, nn.LogSoftmax):
        return None
    values = [getattr(activation, parameter) for parameter in signature[1:]]
    if isinstance(activation, nn.Softmax):
        # Without a dimension, torch chooses by the number of dimensions.
        dim = activation.dim if activation.dim is not None else (0 if ndim in (0, 1, 3) else 1)
        values = [-1 if dim % ndim == feature_dim % ndim else None]
    return named_transfer(signature, values)[0]
