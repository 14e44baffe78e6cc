"""What a step has to do for each layer: from what hooks have kept to a checked local problem, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from locoprop_kernels import LocalProblem, rules
from locoprop_kernels.chosen import ChosenRows
from locoprop_kernels.patches import Rows
from locoprop_kernels.sampling import Sampling
from locoprop_kernels.transfers import Transfer
from locoprop_torch.capture import CapturedLayer
from locoprop_torch.checks import checked_hyperparameters
from locoprop_torch.layers import transfer_in_use
from locoprop_torch.layouts import Layout, laid_out
from locoprop_torch.problems import RuleState, give_parameter, problem_of
from locoprop_torch.sharding import as_it_is, is_sharded, keep_own, own, own_or_zeros, own_rows, whole
from locoprop_torch.targets import Target, starting_gradients
from locoprop_torch.unit import OutputGradient

__all__ = ["LayerWork", "Place", "Trained", "layer_work", "places", "trained"]

# What the groups of a layer's weight and bias must agree in.
_SHARED = ("activation_lr", "local_iterations", "prox", "rule", "transfer")


class Place(NamedTuple):
    """Where a parameter is among the parameter groups: the number of its group, the group, and its learning rate."""

    number: int
    group: dict[str, Any]
    lr: float


def places(groups: Sequence[dict[str, Any]]) -> dict[int, Place]:
    """The place of every parameter, by its ``id``, once the numbers of its group have been checked.

    Raises:
        TypeError, ValueError: naming a number, what was expected and what came.
    """
    found = {}
    for number, group in enumerate(groups):
        # Schedulers and users may have set anything since the last step.
        group["rule"] = rules.get(group["rule"])
        group.update(checked_hyperparameters(group))
        place = Place(number, group, float(group["lr"]))
        for parameter in group["params"]:
            found[id(parameter)] = place
    return found


@dataclass(eq=False)
class Trained:
    """A parameter of a layer that a step trains.

    Attributes:
        parameter: the parameter.
        gradient: its ``.grad``.
        place: its place among the parameter groups.
        masks: where one of them is zero, the parameter stays as it is.
    """

    parameter: nn.Parameter
    gradient: Tensor
    place: Place
    masks: Sequence[Tensor]


def trained(
    layer: CapturedLayer, where: Mapping[int, Place], masks: Mapping[str, Sequence[Tensor]]
) -> dict[str, Trained]:
    """The parameters of a layer that a step trains, by kind; none where none has a gradient.

    Args:
        layer: the layer.
        where: the place of every parameter, by its ``id``.
        masks: the masks of the layer's parameters, by kind.

    Raises:
        ValueError: weight and bias are in groups that do not agree, or a gradient is sparse.
    """
    parts: dict[str, Trained] = {}
    first: Place | None = None
    for kind, parameter in layer.parameters.items():
        gradient, place = parameter.grad, where.get(id(parameter))
        if gradient is None or place is None or not parameter.requires_grad:
            continue
        if first is None:
            first = place
        elif place is not first:
            _check_agreement(layer, first, place)
        if gradient.layout != torch.strided:
            raise ValueError(f"layer {layer.name!r}: the gradient of its {kind} must be dense, got {gradient.layout}")
        parts[kind] = Trained(parameter, gradient, place, masks.get(kind, ()))
    return parts


def _check_agreement(layer: CapturedLayer, place: Place, other: Place) -> None:
    """Check that the groups of a layer's weight and bias have the hyper-parameters in common that they must."""
    different = [name for name in _SHARED if other.group[name] != place.group[name]]
    if different:
        raise ValueError(
            f"the parameter groups of weight and bias of layer {layer.name!r} must agree in "
            f"{', '.join(_SHARED)}; they differ in {', '.join(different)}"
        )


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
    # Whether the optimiser has the rule's state already.
    _kept: bool = False

    @property
    def place(self) -> Place:
        """Where the layer takes its hyper-parameters from."""
        return next(iter(self.trained.values())).place

    @property
    def lr(self) -> float:
        """The learning rate of the local iterations, of which each parameter has a share."""
        return max([one.place.lr for one in self.trained.values()])

    def lasts(self, trained: Mapping[str, Trained], transfer: Transfer, state: Mapping[Any, Any]) -> bool:
        """Whether a new work for these, the optimiser's state among them, would be of the same tensors."""
        if transfer != self.problem.transfer or trained.keys() != self.states.keys():
            return False
        for kind, one in trained.items():
            is_same = one.place.group["rule"] is self.rule and self.states[kind].is_of(state.get(one.parameter))
            if one.masks or not is_same:
                return False
        return self.forms == [_form(one.parameter) for one in trained.values()]

    def take(self, rows: tuple[Tensor | Rows, Tensor | Rows], gradients: Mapping[str, Tensor]) -> None:
        """Take rows, gradients and learning rates of a step."""
        problem = self.problem
        problem.x, problem.preactivation = rows
        problem.grad_weight, problem.grad_bias = gradients.get("weight"), gradients.get("bias")
        lr = self.lr
        for kind, one in self.trained.items():
            setattr(problem, f"rate_{kind}", 1.0 if one.place.lr == lr else one.place.lr / lr)
        self.rows = rows[0].shape[-2]
        self.sampling = self.layer.sampling if isinstance(rows[0], ChosenRows) else None

    def take_anew(self, rows: tuple[Tensor | Rows, Tensor | Rows], unit: OutputGradient) -> None:
        """Take rows and gradients of another step, which has as many rows, where the work :attr:`repeats`.

        Args:
            rows: inputs and pre-activations.
            unit: of activation learning rates.
        """
        problem, layer = self.problem, self.layer
        problem.x, problem.preactivation = rows
        for kind, one in self.trained.items():
            if kind == "weight":
                problem.grad_weight = one.gradient
            else:
                problem.grad_bias = one.gradient
        problem.grad_scale = unit.activation_lr(one.place.group["activation_lr"], layer)
        if self.sampling is not None:
            self.sampling = layer.sampling

    @property
    def repeats(self) -> bool:
        """Whether the next step may be made with the same problem, which differs in what is in its tensors alone."""
        gradients = [getattr(self.problem, f"grad_{kind}") for kind in self.trained]
        as_they_are = all(map(is_, gradients, [one.gradient for one in self.trained.values()]))
        of_one_group = len({one.place.number for one in self.trained.values()}) == 1
        return bool(self.forms and self.rows) and as_they_are and of_one_group and not self.layer.keep_gradients

    def release(self) -> None:
        """Let go of everything that only the local loop needed."""
        self.layer.forget(release=True)
        problem = self.problem
        problem.x = problem.preactivation = _RELEASED
        problem.grad_weight = problem.grad_bias = None
        for one in self.trained.values():
            one.gradient = _RELEASED

    def keep(self, state: dict[Any, Any]) -> None:
        """Put the state of a committed step into the optimiser's, and own rows of whole parameters where they are."""
        for kind, value in self.wholes.items():
            if kind in self.trained:
                keep_own(self.trained[kind].parameter, value)
        for kind, rule_state in self.states.items():
            if rule_state.slots:
                rule_state.write_back(self.problem.state[kind])
                if not self._kept:
                    state[self.trained[kind].parameter] = rule_state.slots
        self._kept = True


_RELEASED = torch.empty(0, device="cpu")


def _form(parameter: Tensor) -> tuple[Any, ...]:
    """What the state of a parameter has to fit to."""
    return parameter.dtype, parameter.device, parameter.stride()


def layer_work(
    layer: CapturedLayer,
    trained: Mapping[str, Trained],
    local_loss: str,
    target: Target,
    activation_lr: float,
    state: Mapping[Any, dict[str, Tensor]],
) -> LayerWork:
    """What a step has to do for a layer with gradients.

    Without rows (an unused layer under a penalty on all weights, an expert without a token) the problem is the rule's
    own step on ``γ · grad``: one row of zeros, which a single local iteration never reads.

    Args:
        layer: the layer.
        trained: its parameters to train.
        local_loss: of the optimiser.
        target: its target.
        activation_lr: ``γ``.
        state: the optimiser's state.

    Raises:
        TypeError, ValueError: what was captured does not fit the parameters any more, or see
            :mod:`locoprop_torch.targets`.
    """
    transfer = transfer_in_use(layer, next(iter(trained.values())).place.group["transfer"], local_loss)
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
    if not found and layer.spent:
        raise ValueError(
            f"the rows of layer {layer.name!r} were used by a step that raised: call opt.zero_grad(), and repeat the "
            "forward and the backward pass"
        )
    rows = found or _one_row_of_zeros(weight)
    work = layer.work
    if work is None or part is not as_it_is or not work.lasts(trained, transfer, state):
        problem = problem_of(layout, parameters, rows, transfer, f"layer {layer.name!r}")
        work = _new_work(layer, problem, layout, parameters, trained, state, part)
        layer.work = work if work.forms else None
    work.trained = trained
    work.problem.examples = None if found else 1
    if target == "dual" or not found:
        gradients = {}
        for kind, one in trained.items():
            gradients[kind] = layout.view(kind, laid_out(part(one.gradient), parameters[kind]))
        work.problem.grad_scale = activation_lr
    else:
        gradients = starting_gradients(layer, trained, target, transfer, found[0], activation_lr)
        work.problem.grad_scale = 1.0
    work.take(rows, gradients)
    if not found:
        work.rows = 0
    return work


def _new_work(
    layer: CapturedLayer,
    problem: LocalProblem,
    layout: Layout,
    parameters: Mapping[str, Tensor],
    trained: Mapping[str, Trained],
    state: Mapping[Any, dict[str, Tensor]],
    part: Callable[[Any], Tensor],
) -> LayerWork:
    """The work of a layer, once its problem has been given state and masks."""
    states, masked = {}, False
    rule: rules.Rule = next(iter(trained.values())).place.group["rule"]
    for kind, one in trained.items():
        stored = state.get(one.parameter) or {}
        # State that is kept here is that of own outputs alone.
        solved, of = (parameters[kind], own) if layer.outputs else (one.parameter, part)
        states[kind] = give_parameter(problem, layout, kind, solved, one.gradient, rule, stored, of)
        if one.masks:
            mask, masked = _mask(one.parameter, one.masks, layer), True
            setattr(problem, f"mask_{kind}", layout.view(kind, laid_out(mask, parameters[kind])))
    # Where the problem has views of tensors, they might be of others in the next step.
    lasts = part is as_it_is and not layout.reshapes and not masked
    forms = [_form(one.parameter) for one in trained.values()] if lasts else []
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
