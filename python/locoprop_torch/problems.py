"""From a captured layer to its local problem, and back to the optimiser's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from locoprop_kernels import LocalProblem, rules
from locoprop_kernels.chosen import ChosenRows
from locoprop_kernels.patches import Rows
from locoprop_kernels.problem import accumulation_dtype, initial_state
from locoprop_kernels.sampling import Sampling
from locoprop_kernels.scratch import give_back
from locoprop_kernels.transfers import Transfer
from locoprop_torch.capture import CapturedLayer
from locoprop_torch.layouts import Layout, laid_out
from locoprop_torch.sharding import is_sharded, keep_own, like, own, own_or_zeros, own_rows, whole
from locoprop_torch.targets import Target, starting_gradients

__all__ = ["LayerWork", "RuleState", "Trained", "give_parameter", "layer_work", "problem_of"]


@dataclass(eq=False)
class RuleState:
    """The rule's state of one parameter.

    Attributes:
        slots: in the parameter's shape, as an optimiser stores it.
        views: the same tensors in the shape of the local problem.
        wholes: gathered copies of sharded slots, if the views are of them.
    """

    slots: dict[str, Tensor]
    views: dict[str, Tensor]
    wholes: dict[str, Tensor]

    def write_back(self, state: Mapping[str, Tensor]) -> None:
        """Bring the problem's ``state`` after a committed step into the tensors here, where it is not already."""
        for slot, view in self.views.items():
            if state[slot] is not view:
                view.copy_(state[slot])
        for slot, value in self.wholes.items():
            keep_own(self.slots[slot], value)


def problem_of(
    layout: Layout,
    parameters: Mapping[str, Tensor | None],
    rows: tuple[Tensor | Rows, Tensor | Rows],
    transfer: Transfer,
    name: str,
    examples: int | None = None,
) -> LocalProblem:
    """The local problem of a module, in which no parameter is trained yet; see :func:`give_parameter`.

    Args:
        layout: of the module.
        parameters: its ``"weight"``, and its ``"bias"`` where it has one.
        rows: its inputs and pre-activations, as the problem wants them.
        transfer: its transfer function.
        name: what error messages call it.
        examples: what a mean is taken over; ``None`` for the number of rows.
    """
    weight, bias = parameters["weight"], parameters.get("bias")
    assert weight is not None
    return LocalProblem(
        *rows,
        layout.weight(weight),
        None if bias is None else layout.bias(bias),
        transfer=transfer,
        name=name,
        examples=examples,
    )


def give_parameter(
    problem: LocalProblem,
    layout: Layout,
    kind: str,
    parameter: Tensor,
    gradient: Tensor,
    rule: rules.Rule,
    stored: Mapping[str, Tensor],
    part: Callable[[Any], Tensor] = own_or_zeros,
) -> RuleState:
    """Give a trained parameter's gradient and state to its local problem.

    Args:
        problem: the problem.
        layout: of the module.
        kind: ``"weight"`` or ``"bias"``.
        parameter: the parameter.
        gradient: ``G_0`` in the shape of the problem.
        rule: the update rule.
        stored: the rule's state so far, in the parameter's shape; empty at the first step.
        part: what the problem has of a tensor that may be sharded.
    """
    slots = _fitting(stored, parameter) if stored else initial_state(rule, parameter)
    views = {slot: part(value) if value.dim() else value for slot, value in slots.items()}
    wholes = {slot: views[slot] for slot, value in slots.items() if is_sharded(value)} if part is whole else {}
    if layout.reshapes:
        own_shape = parameter.shape[1:]
        views = {slot: layout.view(kind, t) if t.dim() and t.shape[1:] == own_shape else t for slot, t in views.items()}
    setattr(problem, f"grad_{kind}", gradient)
    problem.state[kind] = dict(views)
    return RuleState(slots, views, wholes)


class Trained(NamedTuple):
    """A parameter of a layer that a step trains.

    Attributes:
        parameter: the parameter.
        gradient: its ``.grad``.
        lr: its learning rate.
        masks: where one of them is zero, the parameter stays as it is.
    """

    parameter: nn.Parameter
    gradient: Tensor
    lr: float
    masks: Sequence[Tensor]


@dataclass(eq=False)
class LayerWork:
    """A layer in a step: its local problem, and where the rule's state goes afterwards.

    Attributes:
        layer: the layer.
        trained: its parameters that this step trains, by kind.
        problem: the local problem.
        rows: how many rows it has; 0 where there is a gradient alone.
        sampling: which of them its local steps take, if they have been chosen already.
        states: the rule's state of each trained parameter.
        wholes: gathered copies of sharded parameters, by kind, if the problem has those.
    """

    layer: CapturedLayer
    trained: Mapping[str, Trained]
    problem: LocalProblem
    rows: int
    sampling: Sampling | None
    states: dict[str, RuleState]
    wholes: dict[str, Tensor]

    def release(self) -> None:
        """Let go of everything that only the local loop needed."""
        self.layer.forget(release=True)
        if isinstance(self.problem.x, ChosenRows):
            give_back(*(g for g in (self.problem.grad_weight, self.problem.grad_bias) if g is not None))
        self.problem.x = self.problem.preactivation = self.problem.weight.new_empty(0)
        self.problem.grad_weight = self.problem.grad_bias = None

    def keep(self, state: dict[Any, Any]) -> None:
        """Put the state of a committed step into the optimiser's, and own rows of whole parameters where they are."""
        for kind in self.trained.keys() & self.wholes.keys():
            keep_own(self.trained[kind].parameter, self.wholes[kind])
        for kind, rule_state in self.states.items():
            if rule_state.slots:
                rule_state.write_back(self.problem.state[kind])
                state[self.trained[kind].parameter] = rule_state.slots


def layer_work(
    layer: CapturedLayer,
    trained: Mapping[str, Trained],
    lr: float,
    transfer: Transfer,
    target: Target,
    activation_lr: float,
    rule: rules.Rule,
    state: Mapping[Any, dict[str, Tensor]],
) -> LayerWork:
    """What a step has to do for a layer with gradients.

    Without rows (an unused layer under a penalty on all weights, an expert without a token) the problem is the rule's
    own step on ``γ · grad``: one row of zeros, which a single local iteration never reads.

    Args:
        layer: the layer.
        trained: its parameters to train.
        lr: the learning rate of the local iterations, of which each parameter has a share.
        transfer: its transfer function.
        target: its target.
        activation_lr: ``γ``.
        rule: the update rule.
        state: the optimiser's state.

    Raises:
        TypeError, ValueError: what was captured does not fit the parameters any more, or see
            :mod:`locoprop_torch.targets`.
    """
    layout = layer.layout
    part = _own_outputs(layer.outputs) if layer.outputs else whole if layer.whole else own_or_zeros
    parameters = {kind: part(parameter) for kind, parameter in layer.parameters.items()}
    weight = layout.weight(parameters["weight"])
    found = layer.rows(weight)
    rows = found or _one_row_of_zeros(weight)
    examples = None if found else 1
    problem = problem_of(layout, parameters, rows, transfer, f"layer {layer.name!r}", examples)
    gradients = starting_gradients(
        layer,
        layout,
        {kind: laid_out(part(one.gradient), parameters[kind]) for kind, one in trained.items()},
        target,
        transfer,
        found[0] if found else None,
        activation_lr,
    )
    states = {}
    for kind, (parameter, _, own_lr, masks) in trained.items():
        stored = state.get(parameter) or {}
        # State that is kept here is that of own outputs alone.
        like, of = (parameters[kind], own) if layer.outputs else (parameter, part)
        states[kind] = give_parameter(problem, layout, kind, like, gradients[kind], rule, stored, of)
        if own_lr != lr:
            setattr(problem, f"rate_{kind}", own_lr / lr)
        if masks:
            mask = _mask(parameter, masks, layer)
            setattr(problem, f"mask_{kind}", layout.view(kind, laid_out(mask, parameters[kind])))
    sampling = layer.sampling if isinstance(rows[0], ChosenRows) else None
    wholes = parameters if layer.whole else {}
    return LayerWork(layer, trained, problem, found[0].shape[-2] if found else 0, sampling, states, wholes)


def _one_row_of_zeros(weight: Tensor) -> tuple[Tensor, Tensor]:
    """An input and a pre-activation for a problem without rows; ``weight`` is the problem's."""
    *lead, n, k = weight.shape
    return weight.new_zeros(*lead, 1, k), weight.new_zeros(*lead, 1, n)


def _own_outputs(outputs: slice) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.detach()[outputs]


def _mask(parameter: nn.Parameter, masks: Sequence[Tensor], layer: CapturedLayer) -> Tensor:
    """All masks of a parameter as one: true where none of them is zero; of own rows, or of all."""
    total = torch.ones((), dtype=torch.bool, device=parameter.device)
    for mask in masks:
        total = total & (mask.detach().to(parameter.device) != 0)
    if layer.outputs:
        return total[layer.outputs]
    if layer.whole or not is_sharded(parameter):
        return total
    return total[own_rows(parameter)] if len(own(parameter)) else total[:1]


def _fitting(stored: Mapping[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """The rule's state in the parameter's strides and device and the dtype of sums: the same tensors if they fit."""
    dtype, device, strides = accumulation_dtype(parameter.dtype), parameter.device, parameter.stride()
    slots = {}
    for slot, value in stored.items():
        if is_sharded(parameter) and not is_sharded(value) and value.shape == parameter.shape:
            value = like(value.to(device, dtype), parameter)
        if value.dtype is not dtype or value.device != device or value.stride() != strides:
            if value.dim() and value.shape == parameter.shape:
                value = laid_out(value.to(device, dtype), parameter)
            else:
                value = value.to(device)
        slots[slot] = value
    return slots
