"""Gradients at the start of the local problems, ``G_0``: the only place where targets enter.

* ``"dual"``: ``Y = f(A0) - γ ∂L/∂A0``, so that ``G_0 = γ ∂L/∂W``, which the backward pass has left in ``.grad``;
* ``"primal"``: ``Y = f(A0) - γ ∂L/∂f(A0)``, so that ``G_0 = γ (∂L/∂f(A0))ᵀ X``;
* a function ``(A0, ∂L/∂A0) -> Y`` of the module's output and its gradient, both in the output's shape:
  ``G_0 = (f(A0) - Y)ᵀ X``.

The last two do not look at ``.grad``: what was done to it (clipping, loss scaling, all-reduction) has no effect on
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from locoprop_kernels.patches import Rows, row_chunks
from locoprop_kernels.transfers import Transfer
from locoprop_torch.capture import Layer
from locoprop_torch.layouts import laid_out, layout_of

__all__ = ["TARGETS", "Target", "starting_gradients"]

Target = str | Callable[[Tensor, Tensor], Tensor]
TARGETS = ("dual", "primal")


def starting_gradients(
    layer: Layer, target: Target, transfer: Transfer, rows: Sequence[Tensor | Rows], activation_lr: float
) -> dict[str, list[Tensor]]:
    """``{"weight": G_0 of each group, "bias": g_0 of each group}``, without what is not trained.

    Args:
        layer: a layer with captured passes.
        target: see the module.
        transfer: the layer's transfer function ``f``.
        rows: inputs ``[B, K]`` of each group.
        activation_lr: ``γ``.

    Raises:
        TypeError, ValueError: a target of the user's own is not a tensor of the output's shape, or the gradient of the
            post-activation is not known because the activation is not a module.
    """
    trained = layer.trained
    if target == "dual":
        split = layer.layout.split
        gradients = {kind: laid_out(activation_lr * p.grad, p) for kind, p in trained.items() if p.grad is not None}
        return {kind: split(kind)(gradient) for kind, gradient in gradients.items()}
    residuals = _residuals(layer, target, transfer, activation_lr)
    result: dict[str, list[Tensor]] = {}
    if "weight" in trained:
        result["weight"] = [_product(residual, x) for residual, x in zip(residuals, rows, strict=True)]
    if "bias" in trained:
        result["bias"] = [residual.sum(0) for residual in residuals]
    return result


def _product(residual: Tensor, x: Tensor | Rows) -> Tensor:
    parts = residual.split([len(chunk) for chunk in row_chunks(x)])
    products = [part.t() @ chunk.to(part.dtype) for part, chunk in zip(parts, row_chunks(x), strict=True)]
    return torch.stack(products).sum(0) if len(products) > 1 else products[0]


def _residuals(layer: Layer, target: Target, transfer: Transfer, activation_lr: float) -> list[Tensor]:
    """``f(A0) - Y``, ``[B, N]``, of each group."""
    groups: list[list[Tensor]] = []
    for captured in layer.passes:
        layout = layout_of(captured.module)
        assert layout is not None
        assert captured.gradient is not None
        a = captured.preactivation
        if callable(target):
            y = target(a, captured.gradient)
            if not isinstance(y, Tensor):
                raise TypeError(f"target of layer {layer.name!r} must return a tensor, got {type(y).__name__}")
            if y.shape != a.shape:
                raise ValueError(
                    f"target of layer {layer.name!r} must have the shape of its output {list(a.shape)}, "
                    f"got {list(y.shape)}"
                )
            pairs = zip(layout.outputs(a), layout.outputs(y), strict=True)
            residuals = [transfer(old) - new for old, new in pairs]
        else:
            gradient = captured.gradient if transfer.name == "identity" else captured.activation_gradient
            if gradient is None:
                raise ValueError(
                    f"target 'primal' of layer {layer.name!r} needs its activation {transfer} to be a module that is "
                    "called with the layer's output, such as torch.nn.Tanh(); or use target 'dual'"
                )
            residuals = layout.outputs(activation_lr * gradient)
        groups.append([residual.to(layer.weight.dtype) for residual in residuals])
    return [torch.cat(parts) for parts in zip(*groups, strict=True)]
