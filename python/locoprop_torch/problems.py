"""From a captured layer to its local problem, and back to the optimiser's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from locoprop_kernels import LocalProblem, rules
from locoprop_kernels.chosen import ChosenRows
from locoprop_kernels.patches import Rows
from locoprop_kernels.problem import accumulation_dtype, initial_state
from locoprop_kernels.sampling import Sampling
from locoprop_kernels.transfers import Transfer
from locoprop_torch.capture import CapturedLayer
from locoprop_torch.layouts import Layout, laid_out
from locoprop_torch.sharding import as_it_is, is_sharded, keep_own, like, own, own_or_zeros, own_rows, whole
from locoprop_torch.targets import Target, starting_gradients

__all__ = ["LayerWork", "RuleState", "Trained", "give_parameter", "layer_work", "problem_of"]


@dataclass(eq=False)
class RuleState:
    """The rule's state of one parameter.

    Attributes:
        slots: in the parameter's shape, as an optimiser stores it.
        views: the same tensors in the shape of the local problem.
        wholes: gathered copies of sharded slots, if the views are of them.
        kept: ``slots`` as they were: the optimiser's own dictionary is anybody's, who may put other tensors into it.
    """

    slots: Mapping[str, Tensor]
    views: Mapping[str, Tensor]
    wholes: Mapping[str, Tensor]
    kept: Mapping[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = dict(self.slots)

    def is_of(self, stored: Mapping[str, Tensor] | None) -> bool:
        """Whether this is what the optimiser has stored for the parameter, tensor by tensor."""
        if stored is None or stored.keys() != self.kept.keys():
            return not (stored or self.kept)
        return all(value is self.kept[slot] for slot, value in stored.items())

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
    part: Callable[[Any], Tensor] = as_it_is,
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
        part: what the problem has of the parameter's tensors.
    """
    slots = _fitting(stored, parameter) if stored else initial_state(rule, parameter)
    views = slots
    if part is not as_it_is:
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

    What does not change from step to step is made once: a layer has the same work again as long as :meth:`lasts`.

    Attributes:
        layer: the layer.
        problem: the local problem.
        rule: the update rule.
        states: the rule's state of each trained parameter.
        wholes: gathered copies of sharded parameters, by kind, if the problem has those.
        forms: dtype, device and strides of each trained parameter, if the work may be that of another step; else empty.
        trained: the parameters that this step trains, by kind.
        rows: how many rows the problem has; 0 where there is a gradient alone.
        sampling: which of them its local steps take, if they have been chosen already.
    """

    layer: CapturedLayer
    problem: LocalProblem
    rule: rules.Rule
    states: dict[str, RuleState]
    wholes: Mapping[str, Tensor]
    forms: list[tuple[Any, ...]]
    trained: Mapping[str, Trained]
    rows: int = 0
    sampling: Sampling | None = None

    def lasts(
        self, trained: Mapping[str, Trained], transfer: Transfer, rule: rules.Rule, state: Mapping[Any, Any]
    ) -> bool:
        """Whether a new work for these, the optimiser's state among them, would be the same.

        But for its rows, gradients and rates, which :func:`layer_work` sets.
        """
        return (
            rule is self.rule
            and transfer == self.problem.transfer
            and trained.keys() == self.states.keys()
            and self.forms == [_form(parameter) for parameter, _, _, _ in trained.values()]
            and all(self.states[kind].is_of(state.get(one.parameter)) for kind, one in trained.items())
            and not any(one.masks for one in trained.values())
        )

    def release(self) -> None:
        """Let go of everything that only the local loop needed."""
        self.layer.forget(release=True)
        problem = self.problem
        problem.x = problem.preactivation = _RELEASED
        problem.grad_weight = problem.grad_bias = None

    def keep(self, state: dict[Any, Any]) -> None:
        """Put the state of a committed step into the optimiser's, and own rows of whole parameters where they are."""
        for kind, value in self.wholes.items():
            if kind in self.trained:
                keep_own(self.trained[kind].parameter, value)
        for kind, rule_state in self.states.items():
            if rule_state.slots:
                rule_state.write_back(self.problem.state[kind])
                state[self.trained[kind].parameter] = rule_state.slots


_RELEASED = torch.empty(0, device="cpu")


def _form(parameter: Tensor) -> tuple[Any, ...]:
    """What the state of a parameter has to fit to."""
    return parameter.dtype, parameter.device, parameter.stride()


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
    part: Callable[[Any], Tensor] = as_it_is
    parameters: Mapping[str, Tensor] = layer.parameters
    if layer.outputs:
        part = _own_outputs(layer.outputs)
    elif layer.sharded:
        part = whole if layer.whole else own_or_zeros
    if part is not as_it_is:
        parameters = {kind: part(parameter) for kind, parameter in parameters.items()}
    weight = layout.weight(parameters["weight"])
    found = layer.rows(weight)
    x, preactivation = found or _one_row_of_zeros(weight)
    work = layer.work
    if work is None or not work.lasts(trained, transfer, rule, state):
        problem = problem_of(layout, parameters, (x, preactivation), transfer, f"layer {layer.name!r}")
        work = _new_work(layer, problem, layout, parameters, trained, rule, state, part)
        layer.work = work if work.forms else None
    problem = work.problem
    problem.x, problem.preactivation, problem.examples = x, preactivation, None if found else 1
    if target == "dual" or not found:
        gradients = {}
        for kind, one in trained.items():
            gradients[kind] = layout.view(kind, laid_out(part(one.gradient), parameters[kind]))
        problem.grad_scale = activation_lr
    else:
        gradients = starting_gradients(layer, trained, target, transfer, found[0], activation_lr)
        problem.grad_scale = 1.0
    problem.grad_weight, problem.grad_bias = gradients.get("weight"), gradients.get("bias")
    for kind, one in trained.items():
        setattr(problem, f"rate_{kind}", 1.0 if one.lr == lr else one.lr / lr)
    work.trained, work.rows = trained, x.shape[-2] if found else 0
    work.sampling = layer.sampling if isinstance(x, ChosenRows) else None
    return work


def _new_work(
    layer: CapturedLayer,
    problem: LocalProblem,
    layout: Layout,
    parameters: Mapping[str, Tensor],
    trained: Mapping[str, Trained],
    rule: rules.Rule,
    state: Mapping[Any, dict[str, Tensor]],
    part: Callable[[Any], Tensor],
) -> LayerWork:
    """The work of a layer, once its problem has been given state and masks."""
    states, masked = {}, False
    for kind, (parameter, gradient, _, masks) in trained.items():
        stored = state.get(parameter) or {}
        # State that is kept here is that of own outputs alone.
        solved, of = (parameters[kind], own) if layer.outputs else (parameter, part)
        states[kind] = give_parameter(problem, layout, kind, solved, gradient, rule, stored, of)
        if masks:
            mask, masked = _mask(parameter, masks, layer), True
            setattr(problem, f"mask_{kind}", layout.view(kind, laid_out(mask, parameters[kind])))
    # Where the problem has views of tensors, they might be of others in the next step.
    lasts = part is as_it_is and not layout.reshapes and not masked
    forms = [_form(parameter) for parameter, _, _, _ in trained.values()] if lasts else []
    return LayerWork(layer, problem, rule, states, parameters if layer.whole else {}, forms, trained)


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


def _fitting(stored: Mapping[str, Tensor], parameter: Tensor) -> Mapping[str, Tensor]:
    """The rule's state in the parameter's strides and device and the dtype of sums: the same tensors if they fit."""
    dtype, device, strides = accumulation_dtype(parameter.dtype), parameter.device, parameter.stride()
    sharded = is_sharded(parameter)
    slots = stored
    for slot, value in stored.items():
        dims = value.dim()
        fits = value.device == device and (not dims or (value.dtype is dtype and value.stride() == strides))
        if sharded and not is_sharded(value) and value.shape == parameter.shape:
            slots = {**slots, slot: like(value.to(device, dtype), parameter)}
        elif not fits:
            moved = value.to(device)
            if dims and value.shape == parameter.shape:
                moved = laid_out(moved.to(dtype), parameter)
            slots = {**slots, slot: moved}
    return slots
