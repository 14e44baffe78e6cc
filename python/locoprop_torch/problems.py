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
from locoprop_torch.layouts import laid_out, state_views, write_back
from locoprop_torch.targets import Target, starting_gradients

__all__ = ["LayerWork", "layer_work", "rule_state_of"]


@dataclass(eq=False)
class LayerWork:
    """A layer in a step: its local problem, and where the rule's state goes afterwards.

    Attributes:
        layer: the layer.
        trained: its parameters that have a gradient, by kind.
        problem: the local problem.
        rows: how many rows it has; 0 where there is a gradient alone.
        states: the rule's state of each trained parameter, in the parameter's shape.
        views: the same tensors in the shapes of the problem.
    """

    layer: CapturedLayer
    trained: dict[str, nn.Parameter]
    problem: LocalProblem
    rows: int
    states: dict[str, dict[str, Tensor]]
    views: dict[str, dict[str, Tensor]]

    def release(self) -> None:
        """Let go of everything that only the local loop needed."""
        self.layer.forget(release=True)
        self.problem.x = self.problem.preactivation = self.problem.weight.new_empty(0)
        self.problem.grad_weight = self.problem.grad_bias = None

    def keep_state(self, state: dict[Any, Any]) -> None:
        """Put the state of a committed step into the optimiser's."""
        for kind, parameter in self.trained.items():
            if self.states[kind]:
                write_back(self.views[kind], self.problem.state[kind])
                state[parameter] = self.states[kind]


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
    found = layer.rows(layout)
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
    states: dict[str, dict[str, Tensor]] = {}
    views: dict[str, dict[str, Tensor]] = {}
    for kind, parameter in trained.items():
        setattr(problem, f"grad_{kind}", gradients[kind])
        setattr(problem, f"rate_{kind}", rates[kind])
        if masks.get(kind):
            setattr(problem, f"mask_{kind}", layout.view(kind, laid_out(_mask(parameter, masks[kind]), parameter)))
        states[kind] = rule_state_of(parameter, rule, state.get(parameter) or {})
        views[kind] = state_views(layout, kind, parameter, states[kind])
        problem.state[kind] = dict(views[kind])
    return LayerWork(layer, trained, problem, 0 if found is None else problem.shape[0], states, views)


def _mask(parameter: nn.Parameter, masks: Sequence[Tensor]) -> Tensor:
    """All masks of a parameter as one: true where none of them is zero."""
    total = torch.ones((), dtype=torch.bool, device=parameter.device)
    for mask in masks:
        total = total & (mask.detach().to(parameter.device) != 0)
    return total


def rule_state_of(parameter: nn.Parameter, rule: rules.Rule, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
