"""Capture of layer inputs and pre-activations during ordinary forward and backward passes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from locoprop_kernels.patches import Rows, Stacked
from locoprop_kernels.transfers import Transfer
from locoprop_torch.layouts import Layout, layout_of

__all__ = ["ActivationHook", "Layer"]


@dataclass(eq=False)
class _Pass:
    """One call of a layer. Tensors are the forward pass's own, not copies.

    ``gradient`` is ``∂L/∂A``, and ``activation_gradient`` ``∂L/∂f(A)`` where the activation is a module; both only
    where a target needs them.
    """

    module: nn.Module
    x: Tensor
    preactivation: Tensor
    versions: tuple[int, int]
    counted: bool = False
    gradient: Tensor | None = None
    activation_gradient: Tensor | None = None


class _ForwardHook:
    """Forward hook of a captured layer. A copied or unpickled model carries one that does nothing."""

    def __init__(self, layer: Layer | None = None) -> None:
        self._layer = weakref.ref(layer) if layer is not None else lambda: None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        layer = self._layer()
        if layer is not None and torch.is_grad_enabled() and output.requires_grad:
            layer.watch(module, args[0] if args else next(iter(kwargs.values())), output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _ForwardHook:
        return _ForwardHook()

    def __reduce__(self) -> tuple[type[_ForwardHook], tuple[()]]:
        return _ForwardHook, ()


class ActivationHook:
    """Forward hook of an activation module: finds the layer that it follows, and keeps ``∂L/∂f(A)`` for it."""

    def __init__(self, layers: Iterable[Layer] = ()) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        for reference in self._layers:
            layer = reference()
            captured = layer.latest(args[0]) if layer is not None and args else None
            if captured is not None and output.requires_grad:
                output.register_hook(partial(_keep_activation_gradient, captured))

    def __deepcopy__(self, memo: dict[int, Any]) -> ActivationHook:
        return ActivationHook()

    def __reduce__(self) -> tuple[type[ActivationHook], tuple[()]]:
        return ActivationHook, ()


def _keep_activation_gradient(captured: _Pass, gradient: Tensor) -> None:
    old = captured.activation_gradient
    captured.activation_gradient = gradient if old is None else old + gradient


class Layer:
    """A captured layer: its modules, its transfer function, and the passes that a backward pass has gone through.

    Args:
        modules: the modules by name; more than one where they share their parameters.
        transfer: their transfer function.
        keep_gradients: keep ``∂L/∂A`` of each pass.
    """

    def __init__(self, modules: Mapping[str, Any], transfer: Transfer, keep_gradients: bool = False) -> None:
        self.name, module = next(iter(modules.items()))
        self.modules = dict(modules)
        self.transfer = transfer
        self.keep_gradients = keep_gradients
        self.weight: Tensor = module.weight
        self.bias: Tensor | None = module.bias
        self.passes: list[_Pass] = []
        self._latest: tuple[weakref.ref[Tensor], weakref.ref[_Pass]] | None = None
        self._gradient_arrived = False
        self._handles: dict[int, RemovableHandle] = {
            id(module): module.register_forward_hook(_ForwardHook(self), with_kwargs=True)
            for module in modules.values()
        }
        weakref.finalize(self, _remove, self._handles).atexit = False

    @property
    def parameters(self) -> dict[str, Tensor]:
        """``{"weight": W, "bias": b}``, without the bias where there is none."""
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}

    @property
    def trained(self) -> dict[str, Tensor]:
        """The parameters that are not frozen and have a gradient."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad and p.grad is not None}

    def forget(self) -> None:
        """Drop all captured passes."""
        for captured in self.passes:
            captured.counted = False
            captured.gradient = captured.activation_gradient = None
        self.passes = []
        self._gradient_arrived = False

    def latest(self, output: Tensor) -> _Pass | None:
        """The pass whose output is ``output``, if that is the layer's last."""
        if self._latest is None or self._latest[0]() is not output:
            return None
        return self._latest[1]()

    def watch(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """Count this call of the layer once a backward pass goes through its output."""
        trainable = [p for p in self.parameters.values() if p.requires_grad]
        if not trainable:
            return
        layer = weakref.ref(self)
        for parameter in trainable:
            if id(parameter) not in self._handles:
                self._handles[id(parameter)] = parameter.register_post_accumulate_grad_hook(_GradientHook(layer))
        captured = _Pass(module, x.detach(), output.detach(), (x._version, output._version))
        self._latest = weakref.ref(output), weakref.ref(captured)

        def count(gradient: Tensor) -> None:
            owner = layer()
            if owner is not None:
                owner._count(captured, gradient)

        output.register_hook(count)

    def _count(self, captured: _Pass, gradient: Tensor) -> None:
        if self._gradient_arrived and all(p.grad is None for p in self.parameters.values()):
            self.forget()  # the gradients of the passes so far were cleared behind the optimiser's back
        if not captured.counted:  # a second backward pass through the same forward pass adds gradients, not rows
            captured.counted = True
            self.passes.append(captured)
        if self.keep_gradients:
            captured.gradient = gradient if captured.gradient is None else captured.gradient + gradient

    @property
    def layout(self) -> Layout:
        """How the layer's parameters form local problems."""
        layout = layout_of(self.modules[self.name])
        assert layout is not None
        return layout

    def rows(self) -> list[tuple[Tensor | Rows, Tensor]]:
        """Inputs ``[B, K]`` and pre-activations ``[B, N]`` of all captured passes, one row per example, for each group.

        Raises:
            ValueError: an input was overwritten since the forward pass, or does not fit the weight any more.
        """
        weights = self.layout.weights(self.weight)
        inputs: list[list[Tensor | Rows]] = [[] for _ in weights]
        outputs: list[list[Tensor]] = [[] for _ in weights]
        for captured in self.passes:
            layout = layout_of(captured.module)
            assert layout is not None
            self._restore(captured)
            x, a = layout.inputs(captured.x), layout.outputs(captured.preactivation)
            seen = [(rows.shape[-1], columns.shape[-1]) for rows, columns in zip(x, a, strict=True)]
            if seen != [(k, n) for n, k in (weight.shape for weight in weights)]:
                raise ValueError(
                    f"layer {self.name!r} changed shape since the forward: it mapped {seen[0][0]} to {seen[0][1]}, "
                    f"its weight is now {list(self.weight.shape)}"
                )
            for g in range(len(weights)):
                inputs[g].append(x[g])
                outputs[g].append(a[g])
        return [(_concatenated(x), torch.cat(a) if len(a) > 1 else a[0]) for x, a in zip(inputs, outputs, strict=True)]

    def _restore(self, captured: _Pass) -> None:
        """Bring a pass to the dtypes of a local problem; compute its pre-activation again where it was overwritten."""
        x, a = captured.x, captured.preactivation
        if x._version != captured.versions[0]:
            raise ValueError(
                f"the input of layer {self.name!r} was overwritten in place between the forward pass and step()"
            )
        allowed = (self.weight.dtype, torch.bfloat16, torch.float16)
        if x.dtype not in allowed:
            captured.x, captured.versions = x.to(self.weight.dtype), (0, captured.versions[1])
        if a._version != captured.versions[1]:  # an in-place activation function, say
            a = type(captured.module).forward(captured.module, x.to(self.weight.dtype))
        elif a.dtype not in allowed:
            a = a.to(self.weight.dtype)
        captured.preactivation, captured.versions = a, (captured.x._version, a._version)


def _concatenated(parts: list[Tensor | Rows]) -> Tensor | Rows:
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(tensors) if len(tensors) == len(parts) else Stacked(parts)


class _GradientHook:
    """Notes that a gradient was accumulated: if it is gone at the next backward pass, somebody has cleared it."""

    def __init__(self, layer: weakref.ref[Layer]) -> None:
        self._layer = layer

    def __call__(self, parameter: Tensor) -> None:
        layer = self._layer()
        if layer is not None:
            layer._gradient_arrived = True


def _remove(handles: dict[int, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
