"""From a captured layer to its local problem, and back to the optimiser's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locoprop_kernels import LocalProblem, rules
from locoprop_kernels.problem import accumulation_dtype
from locoprop_kernels.transfers import Transfer
from locoprop_torch.capture import CapturedLayer
from locoprop_torch.layouts import Layout, laid_out
from locoprop_torch.targets import Target, starting_gradients

__all__ = ["LayerWork", "RuleState", "give_parameter", "layer_work"]


@dataclass(eq=False)
class RuleState:
    """The rule's state of one parameter.

    Attributes:
        slots: in the parameter's shape, as an optimiser stores it.
        views: the same tensors in the shape of the local problem.
    """

    slots: dict[str, Tensor]
    views: dict[str, Tensor]

    def write_back(self, state: Mapping[str, Tensor]) -> None:
        """Bring the problem's ``state`` after a committed step into the tensors here, where it is not already."""
        for slot, view in self.views.items():
            if state[slot] is not view:
                view.copy_(state[slot])


def give_parameter(
    problem: LocalProblem,
    layout: Layout,
    kind: str,
    parameter: nn.Parameter,
    gradient: Tensor,
    rule: rules.Rule,
    stored: Mapping[str, Tensor],
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
    """
    slots = _slots(parameter, rule, stored)
    views = {
        slot: layout.view(kind, value) if value.dim() and value.shape == parameter.shape else value
        for slot, value in slots.items()
    }
    setattr(problem, f"grad_{kind}", gradient)
    problem.state[kind] = dict(views)
    return RuleState(slots, views)


@dataclass(eq=False)
class LayerWork:
    """A layer in a step: its local problem, and where the rule's state goes afterwards.

    Attributes:
        layer: the layer.
        trained: its parameters that have a gradient, by kind.
        problem: the local problem.
        rows: how many rows it has; 0 where there is a gradient alone.
        states: the rule's state of each trained parameter.
    """

    layer: CapturedLayer
    trained: dict[str, nn.Parameter]
    problem: LocalProblem
    rows: int
    states: dict[str, RuleState]

    def release(self) -> None:
        """Let go of everything that only the local loop needed."""
        self.layer.forget(release=True)
        self.problem.x = self.problem.preactivation = self.problem.weight.new_empty(0)
        self.problem.grad_weight = self.problem.grad_bias = None

    def keep_state(self, state: dict[Any, Any]) -> None:
        """Put the state of a committed step into the optimiser's."""
        for kind, parameter in self.trained.items():
            if self.states[kind].slots:
                self.states[kind].write_back(self.problem.state[kind])
                state[parameter] = self.states[kind].slots


def layer_work(
    layer: CapturedLayer,
    trained: dict[str, nn.Parameter],
    transfer: Transfer,
    target: Target,
    rule: rules.Rule,
    activation_lr: float,
    rates: Mapping[str, float],
    masks: Mapping[str, Sequence[Tensor]],
    state: Mapping[Any, dict[str, Tensor]],
) -> LayerWork:
    """What a step has to do for a layer with gradients.

    Without rows (an unused layer under a penalty on all weights, an expert without a token) the problem is the rule's
    own step on ``γ · grad``: one row of zeros, which a single local iteration never reads.

    Args:
        layer: the layer.
        trained: its parameters to train.
        transfer: its transfer function.
        target: its target.
        rule: the update rule.
        activation_lr: ``γ``.
        rates: factor of the learning rate for each of ``trained``.
        masks: the masks of each of its parameters.
        state: the optimiser's state.

    Raises:
        TypeError, ValueError: what was captured does not fit the parameters any more, or see
            :mod:`locoprop_torch.targets`.
    """
    layout, name = layer.layout, f"layer {layer.name!r}"
    weight = layout.weight(layer.weight)
    found = layer.rows(layout, weight)
    x, preactivation = (None, None) if found is None else found
    gradients = starting_gradients(layer, layout, trained, target, transfer, x, activation_lr)
    examples = None
    if x is None or preactivation is None:
        *lead, n, k = weight.shape
        x, preactivation, examples = weight.new_zeros(*lead, 1, k), weight.new_zeros(*lead, 1, n), 1
    bias = layer.parameters.get("bias")
    problem = LocalProblem(
        x,
        preactivation,
        weight,
        None if bias is None else layout.bias(bias),
        transfer=transfer,
        name=name,
        examples=examples,
    )
    states = {}
    for kind, parameter in trained.items():
        stored = state.get(parameter) or {}
        states[kind] = give_parameter(problem, layout, kind, parameter, gradients[kind], rule, stored)
        setattr(problem, f"rate_{kind}", rates[kind])
        if masks.get(kind):
            setattr(problem, f"mask_{kind}", layout.view(kind, laid_out(_mask(parameter, masks[kind]), parameter)))
    return LayerWork(layer, trained, problem, 0 if found is None else problem.shape[0], states)


def _mask(parameter: nn.Parameter, masks: Sequence[Tensor]) -> Tensor:
    """All masks of a parameter as one: true where none of them is zero."""
    total = torch.ones((), dtype=torch.bool, device=parameter.device)
    for mask in masks:
        total = total & (mask.detach().to(parameter.device) != 0)
    return total


def _slots(parameter: nn.Parameter, rule: rules.Rule, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rule's state in the parameter's shape, strides and device and the dtype of sums; new where there is none."""
    dtype = accumulation_dtype(parameter.dtype)
    if not stored:
        state = {slot: torch.full_like(parameter, start, dtype=dtype) for slot, start in rule.slots.items()}
        if rule.counts_steps:
            state["step"] = torch.zeros((), dtype=torch.int64, device=parameter.device)
        return state
    return {
        slot: value.to(parameter.device)
        if not value.dim() or value.shape != parameter.shape
        else laid_out(value.to(parameter.device, dtype), parameter)
        for slot, value in stored.items()
    }
