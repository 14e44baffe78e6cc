"""Capture of layer inputs and pre-activations during ordinary forward and backward passes."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from locoprop_kernels.transfers import Transfer

__all__ = ["Layer", "is_supported"]


def is_supported(module: nn.Module) -> bool:
    """Whether LocoProp can train ``module``: an ``nn.Linear`` that owns its parameters and is called as a module."""
    # MultiheadAttention reads the weight of its output projection without calling it; parametrised ones compute it.
    called = not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return isinstance(module, nn.Linear) and called and isinstance(module.weight, nn.Parameter)


@dataclass(eq=False)
class _Pass:
    """One call of a layer. Tensors are the forward pass's own, not copies."""

    x: Tensor
    preactivation: Tensor
    versions: tuple[int, int]
    counted: bool = False


class _ForwardHook:
    """Forward hook of a captured layer. A copied or unpickled model carries one that does nothing."""

    def __init__(self, layer: Layer | None = None) -> None:
        self._layer = weakref.ref(layer) if layer is not None else lambda: None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        layer = self._layer()
        if layer is not None and torch.is_grad_enabled() and output.requires_grad:
            layer.watch(args[0] if args else kwargs["input"], output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _ForwardHook:
        return _ForwardHook()

    def __reduce__(self) -> tuple[type[_ForwardHook], tuple[()]]:
        return _ForwardHook, ()


class Layer:
    """A captured layer: its module, its transfer function, and the passes that a backward pass has gone through.

    Args:
        name: the module's name in the model.
        module: the module.
        transfer: its transfer function.
    """

    def __init__(self, name: str, module: nn.Linear, transfer: Transfer) -> None:
        self.name = name
        self.module = module
        self.transfer = transfer
        self.weight: Tensor = module.weight
        self.bias: Tensor | None = module.bias
        self.passes: list[_Pass] = []
        self._gradient_arrived = False
        self._handles: dict[int, RemovableHandle] = {
            id(module): module.register_forward_hook(_ForwardHook(self), with_kwargs=True)
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
        self.passes = []
        self._gradient_arrived = False

    def watch(self, x: Tensor, output: Tensor) -> None:
        """Count this call of the layer once a backward pass goes through its output."""
        trainable = [p for p in self.parameters.values() if p.requires_grad]
        if not trainable:
            return
        layer = weakref.ref(self)
        for parameter in trainable:
            if id(parameter) not in self._handles:
                self._handles[id(parameter)] = parameter.register_post_accumulate_grad_hook(_GradientHook(layer))
        captured = _Pass(x.detach(), output.detach(), (x._version, output._version))

        def count(_: Tensor) -> None:
            owner = layer()
            if owner is not None:
                owner._count(captured)

        output.register_hook(count)

    def _count(self, captured: _Pass) -> None:
        if self._gradient_arrived and all(p.grad is None for p in self.parameters.values()):
            self.forget()  # the gradients of the passes so far were cleared behind the optimiser's back
        if not captured.counted:  # a second backward pass through the same forward pass adds gradients, not rows
            captured.counted = True
            self.passes.append(captured)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Inputs ``[B, K]`` and pre-activations ``[B, N]`` of all captured passes, one row per example.

        Raises:
            ValueError: an input was overwritten since the forward pass, or does not fit the weight any more.
        """
        n, k = self.weight.shape
        inputs, preactivations = [], []
        for captured in self.passes:
            x, a = captured.x, captured.preactivation
            if x.shape[-1] != k or a.shape[-1] != n:
                raise ValueError(
                    f"layer {self.name!r} changed shape since the forward: it mapped {x.shape[-1]} to {a.shape[-1]}, "
                    f"its weight is now {[n, k]}"
                )
            if x._version != captured.versions[0]:
                raise ValueError(
                    f"the input of layer {self.name!r} was overwritten in place between the forward pass and step()"
                )
            if x.dtype not in (self.weight.dtype, torch.bfloat16, torch.float16):
                x = x.to(self.weight.dtype)
            if a._version != captured.versions[1]:  # an in-place activation function, say
                a = F.linear(x.to(self.weight.dtype), self.weight, self.bias)
            elif a.dtype not in (self.weight.dtype, torch.bfloat16, torch.float16):
                a = a.to(self.weight.dtype)
            inputs.append(x.reshape(-1, k))
            preactivations.append(a.reshape(-1, n))
        if len(inputs) == 1:
            return inputs[0], preactivations[0]
        return torch.cat(inputs), torch.cat(preactivations)


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
