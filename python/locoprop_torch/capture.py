"""Capture of layer inputs and pre-activations during ordinary forward and backward passes.

Four hooks follow a layer through a training step:

* a forward hook keeps the input and the pre-activation of every call, a *pass*;
* a hook on the output notes which passes a backward pass goes through;
* a hook on each parameter looks, just before a gradient is added to ``.grad``, whether the gradient that is there
  still is what the earlier passes have left: rows go where their gradient went;
* a hook after that addition counts the noted passes. A backward pass that adds to no parameter's ``.grad``
  (``torch.autograd.grad``, ``backward(inputs=...)``, ``torch.func``) counts none.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.weak import TensorWeakRef

from locoprop_kernels.patches import Rows, Stacked
from locoprop_kernels.transfers import Transfer
from locoprop_torch.hooks import ForwardHook, attach
from locoprop_torch.layouts import Layout, layout_of
from locoprop_torch.masks import trained_parameters

__all__ = ["ActivationHook", "CapturedLayer"]


@dataclass(eq=False)
class _Gradients:
    """``∂L/∂A`` of a pass, and ``∂L/∂f(A)`` where the activation is a module; both only where a target needs them."""

    output: Tensor | None = None
    activation: Tensor | None = None

    def add(self, other: _Gradients) -> None:
        """Add those of another backward pass."""
        for name in ("output", "activation"):
            old, new = getattr(self, name), getattr(other, name)
            if new is not None:
                setattr(self, name, new if old is None else old + new)


@dataclass(eq=False)
class _Pass:
    """One call of a layer. Tensors are the forward pass's own, not copies; ``None`` once they were used."""

    module: nn.Module
    x: Tensor | None
    preactivation: Tensor | None
    versions: tuple[int, int]
    counted: bool = False
    gradients: _Gradients | None = None
    arriving: dict[int, _Gradients] | None = None  # by backward pass, until it is known to count

    def arrive(self, number: int, gradients: _Gradients) -> None:
        """Gradients have come in a backward pass."""
        if self.arriving is None:
            self.arriving = {}
        self.arriving.setdefault(number, _Gradients()).add(gradients)

    def keep(self, number: int) -> None:
        """The backward pass counts: what has come in it does too."""
        if self.arriving is not None and number in self.arriving:
            if self.gradients is None:
                self.gradients = _Gradients()
            self.gradients.add(self.arriving.pop(number))

    def drop(self, number: int) -> None:
        """The backward pass does not count."""
        if self.arriving is not None:
            self.arriving.pop(number, None)

    def release(self) -> None:
        """Let go of the tensors, which the graph behind the loss would keep until the next forward pass."""
        self.x = self.preactivation = self.gradients = self.arriving = None


class _Seen(NamedTuple):
    """A parameter's gradient as a backward pass has left it."""

    tensor: TensorWeakRef
    version: int
    copy: Tensor | None

    def is_still(self, gradient: Tensor) -> bool:
        """Whether ``gradient`` is that tensor, and nobody has written to it."""
        return self.tensor() is gradient and gradient._version == self.version


class _LayerHook(ForwardHook):
    def __init__(self, layer: CapturedLayer) -> None:
        self._layer = weakref.ref(layer)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        layer = self._layer()
        if layer is None:
            return
        layer.called = True
        transformed = torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()
        if torch.is_grad_enabled() and output.requires_grad and not transformed:
            layer.watch(module, args[0] if args else next(iter(kwargs.values())), output)


class ActivationHook(ForwardHook):
    """Forward hook of an activation module: finds the layer that it follows, and keeps ``∂L/∂f(A)`` for it."""

    def __init__(self, layers: Iterable[CapturedLayer] = ()) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        for reference in self._layers:
            layer = reference()
            captured = layer.latest(args[0]) if layer is not None and args else None
            if captured is not None and output.requires_grad:
                output.register_hook(_ActivationGradient(captured))


class _ActivationGradient:
    def __init__(self, captured: _Pass) -> None:
        self._captured = captured

    def __call__(self, gradient: Tensor) -> None:
        self._captured.arrive(_backward_pass(), _Gradients(activation=gradient.detach()))


class _InputGradient:
    """Hook on a layer's input. Where its gradient is differentiated again, as in gradient penalties, that reaches the
    weight by a way that need not go through the layer's output."""

    def __init__(self, layer: weakref.ref[CapturedLayer], captured: _Pass) -> None:
        self._layer, self._captured = layer, weakref.ref(captured)

    def __call__(self, gradient: Tensor) -> None:
        captured = self._captured()
        if captured is None or not (torch.is_grad_enabled() and gradient.requires_grad):
            return
        layer = self._layer

        def reach(_: Tensor) -> None:
            owner = layer()
            if owner is not None:
                owner._reach(captured)

        gradient.register_hook(reach)


def _backward_pass() -> int:
    """A number for the backward pass that is running; -1 outside of one."""
    return torch._C._current_graph_task_id()


class CapturedLayer:
    """A captured layer: its modules, its transfer function, and the passes whose rows are in its gradient.

    Args:
        modules: the modules by name; more than one where they share their parameters.
        paths: where ``model.get_submodule`` finds each of them.
        transfer: their transfer function.
        keep_gradients: keep ``∂L/∂A`` of each pass.
        reason: why the transfer function could not be read off the model, if so.
    """

    def __init__(
        self,
        modules: Mapping[str, Any],
        paths: Mapping[str, str],
        transfer: Transfer,
        keep_gradients: bool = False,
        reason: str | None = None,
    ) -> None:
        self.name, module = next(iter(modules.items()))
        self.modules, self.paths = dict(modules), {name: paths[name] for name in modules}
        self.transfer, self.reason = transfer, reason
        self.keep_gradients = keep_gradients
        parameters = trained_parameters(module)
        assert parameters is not None
        self.parameters: dict[str, nn.Parameter] = {kind: found.parameter for kind, found in parameters.items()}
        self.passes: list[_Pass] = []
        self.called = False
        self._latest: tuple[weakref.ref[Tensor], weakref.ref[_Pass]] | None = None
        self._reached: dict[int, list[_Pass]] = {}  # by backward pass
        self._seen: dict[str, _Seen] = {}
        self._checked = -1
        self._handles: dict[int, tuple[Any, ...]] = {  # by module or parameter
            id(module): (attach(module, _LayerHook(self)),) for module in modules.values()
        }
        self.detach = weakref.finalize(self, _remove, self._handles)
        self.detach.atexit = False

    @property
    def weight(self) -> nn.Parameter:
        """The weight as the optimiser trains it: the original one where the module masks it."""
        return self.parameters["weight"]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are not frozen and have a gradient."""
        return {kind: p for kind, p in self.parameters.items() if p.requires_grad and p.grad is not None}

    @property
    def layout(self) -> Layout:
        """How the layer's parameters form a local problem."""
        layout = layout_of(self.modules[self.name])
        assert layout is not None
        return layout

    # --- passes

    def latest(self, output: Tensor) -> _Pass | None:
        """The pass whose output is ``output``, if that is the layer's last."""
        if self._latest is None or self._latest[0]() is not output:
            return None
        return self._latest[1]()

    @torch.compiler.disable  # hooks cannot be part of a compiled graph: each layer ends one
    def watch(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """Count this call of the layer once a backward pass through its output adds to the parameters' gradients."""
        trainable = {kind: p for kind, p in self.parameters.items() if p.requires_grad}
        if not trainable:
            return
        for kind, parameter in trainable.items():
            if id(parameter) not in self._handles:
                self._watch_gradient(kind, parameter)
        captured = _Pass(module, x.detach(), output.detach(), (x._version, output._version))
        self._latest = weakref.ref(output), weakref.ref(captured)
        layer = weakref.ref(self)

        def reach(gradient: Tensor) -> None:
            owner = layer()
            if owner is not None:
                owner._reach(captured, gradient)

        output.register_hook(reach)
        if x.requires_grad:
            handle = x.register_hook(_InputGradient(layer, captured))
            if x.is_leaf:  # such an input may live on
                weakref.finalize(captured, handle.remove).atexit = False

    def _watch_gradient(self, kind: str, parameter: nn.Parameter) -> None:
        layer = weakref.ref(self)

        def before(gradient: Tensor) -> None:
            owner = layer()
            if owner is not None:
                owner._gradient_comes()

        def after(parameter: Tensor) -> None:
            owner = layer()
            if owner is not None:
                owner._gradient_came(kind, parameter)

        handles = (parameter.register_hook(before), parameter.register_post_accumulate_grad_hook(after))
        self._handles[id(parameter)] = handles

    def _reach(self, captured: _Pass, gradient: Tensor | None = None) -> None:
        """A backward pass has come to the output of ``captured``, or to the gradient of its input."""
        if captured.x is None:  # a step has used it
            return
        number = _backward_pass()
        if number not in self._reached:
            self._reached[number] = []
            layer = weakref.ref(self)

            def end() -> None:
                owner = layer()
                if owner is not None:
                    owner._backward_ends(number)

            Variable._execution_engine.queue_callback(end)
        self._reached[number].append(captured)
        if self.keep_gradients and gradient is not None:
            captured.arrive(number, _Gradients(output=gradient.detach()))

    def _gradient_comes(self) -> None:
        """A gradient is about to be added to a parameter's: once in each backward pass, look what is there."""
        number = _backward_pass()
        if number != self._checked:
            self._checked = number
            self.forget_discarded()

    def _gradient_came(self, kind: str, parameter: Tensor) -> None:
        """A gradient was added: the passes of this backward pass count."""
        gradient = parameter.grad
        if gradient is not None:
            copy = gradient.detach().clone() if self.keep_gradients else None
            self._seen[kind] = _Seen(TensorWeakRef(gradient), gradient._version, copy)
        number = _backward_pass()
        for captured in self._reached.pop(number, ()):
            captured.keep(number)
            self._count(captured)

    def _count(self, captured: _Pass) -> None:
        if not captured.counted and captured.x is not None:
            captured.counted = True
            self.passes.append(captured)

    def _backward_ends(self, number: int) -> None:
        for captured in self._reached.pop(number, ()):
            captured.drop(number)

    def forget(self, release: bool = False) -> None:
        """Drop all captured passes.

        Args:
            release: their tensors too; without it a later backward pass through the same graph counts them again.
        """
        for captured in self.passes:
            captured.counted = False
            captured.gradients = None
            if release:
                captured.release()
        self.passes = []
        if _backward_pass() < 0:
            self._reached.clear()  # of backward passes that have raised

    def forget_discarded(self) -> None:
        """Drop the captured passes if the gradient they belong to is gone: ``None``, or overwritten with zeros."""
        if self.passes and all(self._is_discarded(kind, p.grad) for kind, p in self.parameters.items()):
            self.forget()

    def _is_discarded(self, kind: str, gradient: Tensor | None) -> bool:
        seen = self._seen.get(kind)
        if gradient is None or seen is None:
            return True
        # Only what somebody has written to is looked at: that waits for the device.
        return not seen.is_still(gradient) and gradient.layout == torch.strided and not bool(gradient.any())

    # --- what a step reads

    def rows(self, layout: Layout) -> tuple[Tensor | Rows, Tensor | Rows] | None:
        """Inputs ``[B, K]`` and pre-activations ``[B, N]`` of all captured passes, one row per example.

        With groups both begin with ``G``. ``None`` if there are no rows.

        Args:
            layout: of the layer.

        Raises:
            ValueError: an input was overwritten since the forward pass, or does not fit the weight any more.
        """
        if not self.passes:
            return None
        inputs: list[Tensor | Rows] = []
        outputs: list[Tensor | Rows] = []
        weight = layout.weight(self.weight)
        n, k = weight.shape[-2:]
        restored = [self._restored(captured) for captured in self.passes]
        xs, preactivations = (_of_one_dtype(list(tensors), weight.dtype) for tensors in zip(*restored, strict=True))
        for captured, x, a in zip(self.passes, xs, preactivations, strict=True):
            own = layout if captured.module is self.modules[self.name] else layout_of(captured.module)
            assert own is not None
            x_rows, a_rows = own.inputs(x), own.outputs(a)
            if (x_rows.shape[-1], a_rows.shape[-1]) != (k, n):
                raise ValueError(
                    f"layer {self.name!r} changed shape since the forward: it mapped {x_rows.shape[-1]} to "
                    f"{a_rows.shape[-1]}, its weight is now {list(self.weight.shape)}"
                )
            if x_rows.shape[-2]:
                inputs.append(x_rows)
                outputs.append(a_rows)
        return (_stacked(inputs), _stacked(outputs)) if inputs else None

    def residual_parts(self) -> Iterator[tuple[Layout, Tensor, _Gradients]]:
        """The layout, pre-activation and gradients of each captured pass, in the order of :meth:`rows`."""
        for captured in self.passes:
            layout = layout_of(captured.module)
            assert layout is not None
            assert captured.preactivation is not None
            if captured.preactivation.numel():
                yield layout, captured.preactivation, captured.gradients or _Gradients()

    def gradient_factor(self) -> float:
        """By what the parameters' gradients were multiplied since the last backward pass, as by ``GradScaler``.

        Raises:
            ValueError: what was done to them is no multiplication by a number; they may have zeros more.
        """
        factors = set()
        for kind, parameter in self.trained.items():
            seen, gradient = self._seen.get(kind), parameter.grad
            assert gradient is not None
            if seen is None or seen.copy is None:
                factors.add(1.0)
            elif (factor := _factor(seen.copy, gradient)) is not None:
                factors.add(factor)
        factor = min(factors, default=1.0)
        if not all(abs(other - factor) <= 1e-2 * abs(factor) for other in factors):  # nor with a NaN
            raise ValueError(
                f"the gradients of layer {self.name!r} were changed otherwise than by multiplication with one number "
                "since the backward pass, which only the target 'dual' can follow"
            )
        return factor

    def _restored(self, captured: _Pass) -> tuple[Tensor, Tensor]:
        """Input and pre-activation in the dtypes of a local problem; computed again where it was overwritten."""
        x, a = captured.x, captured.preactivation
        assert x is not None
        assert a is not None
        if x._version != captured.versions[0]:
            raise ValueError(
                f"the input of layer {self.name!r} was overwritten in place between the forward pass and step()"
            )
        allowed = (self.weight.dtype, torch.bfloat16, torch.float16)
        if x.dtype not in allowed:
            captured.x = x = x.to(self.weight.dtype)
        if a._version != captured.versions[1]:  # an in-place activation function, say
            a = type(captured.module).forward(captured.module, x.to(self.weight.dtype))
        elif a.dtype not in allowed:
            a = a.to(self.weight.dtype)
        captured.preactivation, captured.versions = a, (x._version, a._version)
        return x, a


def _factor(before: Tensor, after: Tensor) -> float | None:
    """The number with ``after = number * before`` where neither is zero; ``None`` without such places, NaN if none."""
    if before.shape != after.shape:
        return float("nan")
    both = (before != 0) & (after != 0)
    old, new = before[both].double(), after[both].double()
    if not len(old) or not bool(torch.isfinite(new).all()):
        return None  # a step with what is not finite is skipped anyway
    factor = float((old * new).sum() / (old * old).sum())
    close = (new - factor * old).abs() <= 16 * torch.finfo(after.dtype).eps * (factor * old).abs()
    return factor if bool(close.all()) else float("nan")


def _of_one_dtype(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors as they are, or all in ``dtype`` where they differ, as passes with and without autocast do."""
    return tensors if len({tensor.dtype for tensor in tensors}) == 1 else [tensor.to(dtype) for tensor in tensors]


def _stacked(parts: list[Tensor | Rows]) -> Tensor | Rows:
    """All parts as one, without a copy."""
    return parts[0] if len(parts) == 1 else Stacked(parts)


def _remove(handles: dict[int, tuple[Any, ...]]) -> None:
    for handle in itertools.chain.from_iterable(handles.values()):
        handle.remove()
    handles.clear()
