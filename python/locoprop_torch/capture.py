"""Capture of layer inputs and pre-activations during ordinary forward and backward passes.

These hooks follow a layer through a training step:

* a forward hook keeps the input and the pre-activation of every call, a *pass*;
* a hook on the output notes which passes a backward pass goes through, and one on the input those whose gradient is
  differentiated again;
* a hook on each parameter looks, just before a gradient is added to ``.grad``, whether the gradient that is there
  still is what the earlier passes have left: rows go where their gradient went;
* a hook after that addition counts the noted passes. A backward pass that adds to no parameter's ``.grad``
  (``torch.autograd.grad``, ``backward(inputs=...)``, ``torch.func``) counts none.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from locoprop_kernels.patches import Rows, Stacked
from locoprop_kernels.sampling import Sampling
from locoprop_kernels.transfers import Transfer
from locoprop_torch.hooks import InputGradientHook, LayerHook, attach, backward_pass, keeps_graph, while_alive
from locoprop_torch.kept import joined
from locoprop_torch.layouts import Layout, layout_class
from locoprop_torch.masks import trained_parameters
from locoprop_torch.passes import Gradients, Pass
from locoprop_torch.seen import SeenGradients
from locoprop_torch.sharding import is_sharded, own_tensor, whole
from locoprop_torch.shares import Shares
from locoprop_torch.unit import Measured, OutputGradient

__all__ = ["CapturedLayer"]


class CapturedLayer:
    """A captured layer: its modules, its transfer function, and the passes whose rows are in its gradient.

    Args:
        modules: the modules by name; more than one where they share their parameters.
        paths: where ``model.get_submodule`` finds each of them.
        transfer: their transfer function.
        keep_gradients: keep ``∂L/∂A`` of each pass.
        reason: why the transfer function could not be read off the model, if so.
        sampling: says at any time which rows the next step will take; ``None`` for all.
        output_gradient: measures the gradient at the model's output in the first step.
    """

    def __init__(
        self,
        modules: Mapping[str, Any],
        paths: Mapping[str, str],
        transfer: Transfer,
        keep_gradients: bool = False,
        reason: str | None = None,
        sampling: Callable[[], Sampling | None] = lambda: None,
        output_gradient: OutputGradient | None = None,
    ) -> None:
        self.name, self.module = next(iter(modules.items()))
        self.modules, self.paths = dict(modules), {name: paths[name] for name in modules}
        self.transfer, self.reason = transfer, reason
        self.keep_gradients = keep_gradients
        parameters, layout = trained_parameters(self.module), layout_class(self.module)
        assert parameters is not None
        assert layout is not None
        # Modules that share their parameters are of one kind, so this holds for all of them.
        self._layout: Callable[[nn.Module], Layout] = layout
        self.parameters: dict[str, nn.Parameter] = {kind: found.parameter for kind, found in parameters.items()}
        self.passes: list[Pass] = []
        # Other targets need all rows.
        self._sampling = sampling if not keep_gradients else lambda: None
        self._shares = Shares(self.name, self._layout)
        self._output_gradient = output_gradient
        self.called = False
        #: Whether a step has used the rows of the gradient, and raised before it was made.
        self.spent = False
        #: What the last step did for the layer, as far as the next one may take it again: a ``LayerWork``.
        self.work: Any = None
        # Whether a step solves the whole problem of a layer whose parameters are sharded.
        self.whole = False
        # Which outputs this process solves, where replicas share the work: rows of the weight.
        self.outputs: slice | None = None
        self._latest: tuple[weakref.ref[Tensor], weakref.ref[Pass]] | None = None
        # The passes that a backward pass has come to, by its number.
        self._reached: dict[int, list[Pass]] = {}
        self._seen = SeenGradients(self.name, self.parameters)
        # The backward pass in which the gradients were looked at last.
        self._checked = -1
        # The hooks, by the id of the module or parameter that they are on.
        self._handles: dict[int, tuple[Any, ...]] = {
            id(module): (attach(module, LayerHook(self)),) for module in modules.values()
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
    def sharded(self) -> bool:
        """Whether parameters are spread over processes."""
        return is_sharded(self.parameters["weight"])

    @property
    def layout(self) -> Layout:
        """How the layer's parameters form a local problem at present: a convolution's depends on its strides."""
        return self._layout(self.module)

    def layout_at(self, module: nn.Module) -> Layout:
        """The layout of one of the modules."""
        return self._layout(module)

    # --- passes

    def latest(self, output: Tensor) -> Pass | None:
        """The pass whose output is ``output``, if that is the layer's last."""
        if self._latest is None or self._latest[0]() is not output:
            return None
        return self._latest[1]()

    def leave_latest(self) -> None:
        """The last output has become something else, in place."""
        self._latest = None

    # Hooks cannot be part of a compiled graph, so each layer ends one.
    @torch.compiler.disable
    def watch(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """Count this call of the layer once a backward pass through its output adds to the parameters' gradients."""
        trainable = {kind: p for kind, p in self.parameters.items() if p.requires_grad}
        if not trainable:
            return
        # With sharded parameters the module has whole ones at present, and autograd adds to these.
        sharded = is_sharded(self.weight)
        put_in = module._parameters.get("weight", self.weight)
        # Another parameter, which torch.func.functional_call has put in the place of ours, has a gradient of its own.
        if put_in is not self.weight and put_in is not None and put_in.is_leaf and not sharded:
            return
        present = trained_parameters(module) or {} if sharded else {}
        for kind, parameter in trainable.items():
            if id(parameter) not in self._handles:
                self._watch_gradient(kind, parameter)
            if kind in present and id(present[kind].parameter) not in self._handles:
                self._watch_gradient(kind, present[kind].parameter)
        own_x, own_output = (own_tensor(self.name, what, t.detach()) for what, t in (("input", x), ("output", output)))
        captured = Pass(module, own_x, own_output, (own_x._version, own_output._version))
        sampling = self._sampling()
        if sampling is not None:
            self._shares.begin(captured, self.passes if self._has_gradient() else [], sampling)
        self._latest = weakref.ref(output), weakref.ref(captured)
        output.register_hook(self._hook(CapturedLayer._reach, captured))
        if x.requires_grad:
            handle = x.register_hook(InputGradientHook(weakref.ref(self), CapturedLayer._reach_by_input, captured))
            # A leaf may live on after the pass, and be the input of many more.
            if x.is_leaf:
                weakref.finalize(captured, handle.remove).atexit = False

    def _hook(self, method: Callable[..., None], *arguments: Any) -> Callable[..., None]:
        """A hook that calls a method of this layer, with ``arguments`` first, as long as the layer is alive."""
        return partial(while_alive, weakref.ref(self), method, *arguments)

    def _watch_gradient(self, kind: str, parameter: nn.Parameter) -> None:
        self._handles[id(parameter)] = (
            parameter.register_hook(self._hook(CapturedLayer._gradient_comes)),
            parameter.register_post_accumulate_grad_hook(self._hook(CapturedLayer._gradient_came, kind)),
        )

    def _reach(self, captured: Pass, gradient: Tensor) -> None:
        """A backward pass has come to the output of ``captured``."""
        number = self._note(captured)
        if number is None:
            return
        # Without a gradient of its own, the weight may leave nothing in the graph to be freed.
        captured.over = not keeps_graph() and self.weight.requires_grad
        order = None if self._output_gradient is None else self._output_gradient.begins(number)
        if self.keep_gradients or order is not None:
            captured.arrive(number, Gradients(output=gradient.detach(), order=order))

    def _reach_by_input(self, captured: Pass, gradient: Tensor) -> None:
        """A backward pass has come to the gradient of the input of ``captured``."""
        self._note(captured)

    def _note(self, captured: Pass) -> int | None:
        """Note a pass as one that the running backward pass goes through.

        Returns:
            The number of the backward pass; ``None`` where a step has used the pass already.
        """
        if captured.released:
            return None
        number = backward_pass()
        if number not in self._reached:
            self._reached[number] = []
            Variable._execution_engine.queue_callback(self._hook(CapturedLayer._backward_ends, number))
        self._reached[number].append(captured)
        return number

    def _gradient_comes(self, gradient: Tensor) -> None:
        """A gradient is about to be added to a parameter's: once in each backward pass, look what is there."""
        number = backward_pass()
        if number != self._checked:
            self._checked = number
            self.forget_discarded()

    def _gradient_came(self, kind: str, parameter: Tensor) -> None:
        """A gradient was added: the passes of this backward pass count."""
        number = backward_pass()
        measured = any(captured.is_measured for captured in self._reached.get(number, ()))
        self._seen.note(kind, parameter, self.keep_gradients, measured)
        # A backward pass comes to the last call first.
        found = sorted(self._reached.pop(number, ()), key=lambda captured: captured.number)
        for captured in found:
            captured.keep(number)
            # Weights may change before the step (SAM perturbs them, and takes that back).
            if captured.output_overwritten and not captured.overwritten and not self.sharded:
                captured.restored(self.name, self.weight.dtype)
            if not captured.counted and not captured.released:
                captured.counted = True
                self.passes.append(captured)
        if found and not self._shares.settle_alone(self.passes) and (sampling := self.sampling) is not None:
            self._shares.even_out(self.passes, sampling, self.weight.dtype)

    def _backward_ends(self, number: int) -> None:
        for captured in self._reached.pop(number, ()):
            captured.drop(number)

    def forget(self, release: bool = False) -> None:
        """Drop all captured passes.

        Args:
            release: their tensors too, as they are used; without it a later backward pass through the same graph counts
                them again.
        """
        self.spent = release and (self.spent or bool(self.passes))
        for captured in self.passes:
            captured.uncount()
            if release or captured.over:
                captured.release()
        self.passes = []
        if release:
            self._shares.end()
        # Outside of a backward pass, these are left of some that have raised.
        if self._reached and backward_pass() < 0:
            self._reached.clear()

    def forget_discarded(self) -> None:
        """Drop the captured passes if the gradient they belong to is gone: ``None``, or overwritten with zeros."""
        if (self.passes or self.spent) and self._seen.are_discarded:
            self.forget()

    def _has_gradient(self) -> bool:
        return any(p.grad is not None for p in self.parameters.values())

    # --- what a step reads

    @property
    def sampling(self) -> Sampling | None:
        """Which rows a step takes: those that some pass has been cut down to, if there is one."""
        for captured in self.passes:
            if captured.kept is not None:
                return captured.kept.sampling
        return self._sampling()

    def rows(self, weight: Tensor) -> tuple[Tensor | Rows, Tensor | Rows] | None:
        """Inputs ``[B, K]`` and pre-activations ``[B, N]`` of all captured passes, one row per example.

        With groups both begin with ``G``. ``None`` if there are no rows.

        Args:
            weight: the layer's, in the shape of a local problem.

        Raises:
            ValueError: an input was overwritten since the forward pass, or does not fit the weight any more.
        """
        sampling = self.sampling
        if sampling is not None:
            self._shares.even_out(self.passes, sampling, weight.dtype, at_step=True)
            kept = [captured.kept for captured in self.passes if captured.kept is not None and captured.size]
            if kept:
                for part in kept:
                    self._check_shape(weight, part.x[0], part.preactivation[0])
                return joined(kept, weight.dtype) if any(part.filled for part in kept) else None
        if len(self.passes) == 1:
            captured = self.passes[0]
            return self._rows_of(captured, weight, *captured.restored(self.name, weight.dtype))
        restored = [captured.restored(self.name, weight.dtype) for captured in self.passes]
        columns = (_of_one_dtype(tensors, weight.dtype) for tensors in zip(*restored, strict=True))
        all_rows = (self._rows_of(one, weight, x, a) for one, x, a in zip(self.passes, *columns, strict=True))
        found = [rows for rows in all_rows if rows is not None]
        if len(found) > 1:
            inputs, outputs = zip(*found, strict=True)
            return Stacked(inputs), Stacked(outputs)
        return found[0] if found else None

    def only_rows(self, sampling: Sampling | None) -> tuple[Tensor | Rows, Tensor | Rows] | None:
        """:meth:`rows`, where these are those of a single pass as it is; ``None`` where there is more to be done.

        Args:
            sampling: which rows the step takes, as the optimiser says; ``None`` for all.
        """
        if len(self.passes) != 1:
            return None
        captured = self.passes[0]
        if captured.kept is not None:
            return joined([captured.kept], self.weight.dtype) if captured.kept.filled else None
        x, a = captured.x, captured.preactivation
        if x is None or a is None or (x._version, a._version) != captured.versions:
            return None
        if sampling is not None and not self._shares.leave_all(captured, sampling):
            return None
        return self._layout(captured.module).rows(x, a)

    def _rows_of(
        self, captured: Pass, weight: Tensor, x: Tensor, a: Tensor
    ) -> tuple[Tensor | Rows, Tensor | Rows] | None:
        """The rows of one pass; ``None`` where it has none."""
        rows = self._layout(captured.module).rows(x, a)
        self._check_shape(weight, *rows)
        return rows if rows[0].shape[-2] else None

    def sizes(self) -> list[int]:
        """How many rows each captured pass has."""
        return [
            captured.size if captured.x is None else self._layout(captured.module).inputs(captured.x).shape[-2]
            for captured in self.passes
        ]

    def _check_shape(self, weight: Tensor, x: Tensor | Rows, a: Tensor | Rows) -> None:
        """Check that rows fit the layer's weight, in the shape of a local problem."""
        shape = weight.shape
        if x.shape[-1] != shape[-1] or a.shape[-1] != shape[-2]:
            raise ValueError(
                f"layer {self.name!r} changed shape since the forward: it mapped {x.shape[-1]} to {a.shape[-1]}, "
                f"its weight is now {list(self.weight.shape)}"
            )

    def measured(self, captured: Pass) -> Measured | None:
        """What is known of the gradient at the output of a pass, where a backward pass began there."""
        gradients = captured.gradients
        if gradients is None or gradients.order is None or gradients.output is None:
            return captured.output
        return Measured.of(gradients.order, self._layout(captured.module).outputs(whole(gradients.output)))

    def residual_parts(self) -> Iterator[tuple[Layout, Tensor, Gradients]]:
        """The layout, pre-activation and gradients of each captured pass, in the order of :meth:`rows`."""
        for captured in self.passes:
            assert captured.preactivation is not None
            if captured.preactivation.numel():
                yield self._layout(captured.module), captured.preactivation, captured.gradients or Gradients()

    def unscaled(self) -> float:
        """What the parameters' gradients were multiplied by since the backward pass to undo a scaling of the loss."""
        return self._seen.unscaled(self.trained)

    def gradient_factor(self) -> float:
        """What gradients were multiplied by since the backward pass; see :meth:`SeenGradients.factor`."""
        return self._seen.factor(self.trained)


def _of_one_dtype(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """The tensors as they are, or all in ``dtype`` where they differ, as passes with and without autocast do."""
    if all(tensor.dtype is tensors[0].dtype for tensor in tensors):
        return tensors
    return [tensor.to(dtype) for tensor in tensors]


def _remove(handles: dict[int, tuple[Any, ...]]) -> None:
    for handle in itertools.chain.from_iterable(handles.values()):
        handle.remove()
    handles.clear()
