"""Gradients at the start of the local problems, ``G_0``, where another target than the dual one is asked for.

* ``"dual"``: ``Y = f(A0) - γ ∂L/∂A0``, so that ``G_0 = γ ∂L/∂W``, which the backward pass has left in ``.grad``;
* ``"primal"``: ``Y = f(A0) - γ ∂L/∂f(A0)``, so that ``G_0 = γ (∂L/∂f(A0))ᵀ X``;
* a function ``(A0, ∂L/∂A0) -> Y`` of the module's output and its gradient, both in the output's shape:
  ``G_0 = (f(A0) - Y)ᵀ X``.

The last two take the gradients of the backward pass, not ``.grad``. Where ``.grad`` was multiplied by a number after
the backward pass (by ``GradScaler``, or to clip its norm) so are those.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from locoprop_kernels.arguments import check_choice
from locoprop_kernels.patches import Rows, row_chunks
from locoprop_kernels.transfers import Transfer
from locoprop_torch.capture import CapturedLayer
from locoprop_torch.layouts import Layout

__all__ = ["Target", "check_target", "starting_gradients"]

Target = str | Callable[[Tensor, Tensor], Tensor]
_BY_NAME = ("dual", "primal")


def check_target(target: Target | Mapping[str, Target]) -> None:
    """Check a target, or those by submodule name.

    Raises:
        ValueError: one of them is neither a function nor the name of a target.
    """
    for choice in target.values() if isinstance(target, Mapping) else [target]:
        if not callable(choice):
            check_choice("target", choice, _BY_NAME)


def starting_gradients(
    layer: CapturedLayer,
    kinds: Collection[str],
    target: Target,
    transfer: Transfer,
    x: Tensor | Rows,
    activation_lr: float,
) -> dict[str, Tensor]:
    """``{"weight": G_0, "bias": g_0}`` for another target than the dual one, in the shapes of the local problem.

    Args:
        layer: a layer that has rows and gradients.
        kinds: which of the two are trained.
        target: see the module.
        transfer: the layer's transfer function ``f``.
        x: inputs ``[B, K]`` or ``[G, B, K]``.
        activation_lr: ``γ``.

    Raises:
        TypeError, ValueError: a target of the user's own is not a tensor of the output's shape, or the gradient of the
            post-activation is not known because the activation is not a module.
    """
    residual = _residual(layer, target, transfer, activation_lr)
    result: dict[str, Tensor] = {}
    if "weight" in kinds:
        result["weight"] = _product(residual, x)
    if "bias" in kinds:
        result["bias"] = residual.sum(-2)
    return result


def _product(residual: Tensor, x: Tensor | Rows) -> Tensor:
    """``residualᵀ X``, a chunk of rows at a time."""
    total: Tensor | None = None
    start = 0
    for chunk in row_chunks(x):
        part = residual[..., start : start + chunk.shape[-2], :]
        product = part.mT @ chunk.to(part.dtype)
        total = product if total is None else total.add_(product)
        start += chunk.shape[-2]
    assert total is not None
    return total


def _residual(layer: CapturedLayer, target: Target, transfer: Transfer, activation_lr: float) -> Tensor:
    """``f(A0) - Y``, ``[B, N]`` or ``[G, B, N]``."""
    factor = layer.gradient_factor()
    parts: list[Tensor] = []
    for layout, a, gradients in layer.residual_parts():
        gradient = torch.zeros_like(a) if gradients.output is None else gradients.output * factor
        if callable(target):
            y = target(a, gradient)
            if not isinstance(y, Tensor):
                raise TypeError(f"target of layer {layer.name!r} must return a tensor, got {type(y).__name__}")
            if y.shape != a.shape:
                raise ValueError(
                    f"target of layer {layer.name!r} must have the shape of its output {list(a.shape)}, "
                    f"got {list(y.shape)}"
                )
            residual = transfer(_whole(layout, a)) - _whole(layout, y)
        else:
            if transfer.name != "identity":
                if gradients.activation is None:
                    raise ValueError(
                        f"target 'primal' of layer {layer.name!r} needs its activation {transfer} to be a module that "
                        "is called with the layer's output, such as torch.nn.Tanh(); or use target 'dual'"
                    )
                gradient = gradients.activation * factor
            residual = _whole(layout, activation_lr * gradient)
        parts.append(residual.to(layer.weight.dtype))
    return torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]


def _whole(layout: Layout, a: Tensor) -> Tensor:
    """A module's output, or what has its shape, as rows."""
    chunks = list(row_chunks(layout.outputs(a)))
    return torch.cat(chunks, dim=-2) if len(chunks) > 1 else chunks[0]
