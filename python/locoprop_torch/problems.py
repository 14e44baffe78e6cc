"""From a captured layer to its local problem, and back to the optimiser's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import is_
from typing import Any

from torch import Tensor

from locoprop_kernels import LocalProblem, rules
from locoprop_kernels.patches import Rows
from locoprop_kernels.problem import accumulation_dtype, initial_state
from locoprop_kernels.transfers import Transfer
from locoprop_torch.layouts import Layout, laid_out
from locoprop_torch.sharding import as_it_is, is_sharded, keep_own, like, whole

__all__ = ["RuleState", "give_parameter", "problem_of"]


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
        kept = self.kept
        if stored is None or stored.keys() != kept.keys():
            return not (stored or kept)
        return all(map(is_, stored.values(), map(kept.__getitem__, stored)))

    def write_back(self, state: dict[str, Tensor]) -> None:
        """Bring the problem's ``state`` after a committed step into the tensors here, where it is not already."""
        for slot, view in self.views.items():
            if state[slot] is not view:
                view.copy_(state[slot])
                state[slot] = view
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
