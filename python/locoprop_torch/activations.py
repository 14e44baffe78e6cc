"""What a primal target needs: the gradient of what comes out of a layer's activation, where that is a module."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from locoprop_torch.capture import CapturedLayer
from locoprop_torch.hooks import ForwardHook, backward_pass
from locoprop_torch.passes import Gradients, Pass

__all__ = ["ActivationHook"]


class ActivationHook(ForwardHook):
    """Forward hook of an activation module: finds the layer that it follows, and keeps ``∂L/∂f(A)`` for it."""

    def __init__(self, layers: Iterable[CapturedLayer] = ()) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]

    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Find the layer."""
        for reference in self._layers:
            layer = reference()
            captured = layer.latest(args[0]) if layer is not None and args else None
            if captured is not None and output.requires_grad:
                output.register_hook(_ActivationGradient(captured))
                # In place: the same tensor goes to the next module, which is none of the layer's.
                if layer is not None and output is args[0]:
                    layer.leave_latest()


class _ActivationGradient:
    def __init__(self, captured: Pass) -> None:
        self._captured = captured

    def __call__(self, gradient: Tensor) -> None:
        self._captured.arrive(backward_pass(), Gradients(activation=gradient.detach()))
