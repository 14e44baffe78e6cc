"""What a ``state_dict`` of ``LocoProp`` has beyond torch's: the part of ``aux``, and what a resume must agree with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

from torch import Tensor

from locoprop_kernels.arguments import shown
from locoprop_kernels.problem import why_no_slot
from locoprop_torch.auxiliary import link_state
from locoprop_torch.checks import checked_hyperparameters
from locoprop_torch.layers import transfer_in_use
from locoprop_torch.sharding import check_placement
from locoprop_torch.unit import PerExample

if TYPE_CHECKING:
    from locoprop_torch.optimizer import LocoProp

__all__ = ["check", "facts", "output_gradient", "own_part", "restore_state", "rows_seed", "save"]

_FACTS = ("rule", "transfers", "local_loss", "reduction", "lr_decay")


def save(
    optimizer: LocoProp, saved: dict[str, Any], whole: Mapping[Tensor, dict[str, Tensor]] | None = None
) -> dict[str, Any]:
    """torch's ``state_dict`` of all groups, completed.

    Args:
        optimizer: the optimiser.
        saved: what torch's own ``state_dict`` made of its groups and of the state of the local rules.
        whole: the state of the local rules, where it had to be gathered.
    """
    for group, packed in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        if not group.get("aux"):
            packed.update(facts(optimizer, group, group["local_iterations"]))
            # What torch.distributed.checkpoint keeps: groups and state, and every entry that a group has.
            packed["transfer"] = "" if group["transfer"] is None else str(group["transfer"])
            packed["rows_seed"] = optimizer.rows_seed
            packed["output_gradient"] = json.dumps(optimizer.output_gradient)
            if isinstance(packed["activation_lr"], PerExample):
                packed["activation_lr"] = str(packed["activation_lr"])
    if whole is not None:
        own = [p for group in optimizer.param_groups if not group.get("aux") for p in group["params"]]
        places = [i for group in saved["param_groups"] if not group.get("aux") for i in group["params"]]
        saved["state"].update({i: whole.get(p, {}) for i, p in zip(places, own, strict=True)})
        saved["state"] = {i: slots for i, slots in saved["state"].items() if slots}
    saved["skipped_steps"] = optimizer.skipped_steps
    saved["rows_seed"] = optimizer.rows_seed
    saved["output_gradient"] = optimizer.output_gradient
    if optimizer.aux is not None:
        theirs = optimizer.aux.state_dict()
        places = [i for g in saved["param_groups"] if g.get("aux") for i in g["params"]]
        saved["state"].update({places[i]: state for i, state in theirs["state"].items()})
        saved["aux"] = {key: value for key, value in theirs.items() if key not in ("state", "param_groups")}
    return saved


def check(optimizer: LocoProp, state_dict: Mapping[str, Any]) -> None:
    """Refuse what the optimiser cannot resume from, before anything is changed.

    Raises:
        ValueError: naming what differs.
    """
    groups = state_dict["param_groups"]
    marks = [[bool(group.get("aux")) for group in some] for some in (groups, optimizer.param_groups)]
    if (any(marks[0]) or state_dict.get("aux") is not None) != (optimizer.aux is not None):
        raise ValueError(f"state_dict must be of an optimiser {'with' if any(marks[1]) else 'without'} aux")
    if marks[0] != marks[1]:
        raise ValueError(
            f"state_dict must have {marks[1].count(False)} groups and {marks[1].count(True)} of aux, in this order, "
            f"got {marks[0].count(False)} and {marks[0].count(True)}"
        )
    own_groups = [group for group in optimizer.param_groups if not group.get("aux")]
    for group, saved in zip(own_groups, own_part(state_dict)["param_groups"], strict=True):
        checked_hyperparameters({**group, **{key: saved[key] for key in saved if key not in ("rule", "transfer")}})
    rows_seed(state_dict, 0)
    output_gradient(state_dict)
    for index, (saved, group) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"group {index} of state_dict must have {len(group['params'])} parameters, got {len(saved['params'])}"
            )
        for place, parameter in zip(saved["params"], group["params"], strict=True):
            _check_slots(place, state_dict["state"].get(place) or {}, parameter, bool(group.get("aux")))
        if group.get("aux"):
            continue
        for name, own in facts(optimizer, group, saved.get("local_iterations", group["local_iterations"])).items():
            if name in saved and saved[name] != own:
                raise ValueError(
                    f"state_dict must be of an optimiser with {name} {own!r}, got {saved[name]!r} in group {index}"
                )


def _check_slots(place: int, slots: Any, parameter: Tensor, aux: bool) -> None:
    """Check the state of a parameter: that of the local rules is tensors of its shape."""
    if not isinstance(slots, Mapping):
        raise ValueError(f"state of parameter {place} of state_dict must be a dict, got {shown(slots)}")
    for slot, value in slots.items():
        check_placement(f"parameter {place}", value, parameter)
        if aux:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"state {slot!r} of parameter {place} of state_dict must be a tensor, got {shown(value)}")
        counts = slot == "step"
        if fault := why_no_slot(value, () if counts else parameter.shape, counts):
            raise ValueError(f"state {slot!r} of parameter {place} of state_dict {fault}")


def facts(optimizer: LocoProp, group: Mapping[str, Any], iterations: int) -> dict[str, str]:
    """What the state of a group depends on and torch does not store, as text; for so many local iterations."""
    ids = {id(p) for p in group["params"]}
    layers = {name: layer for name, layer in optimizer._layers.items() if id(layer.weight) in ids}
    return {
        "rule": repr(group["rule"]),
        "local_loss": optimizer.local_loss,
        "reduction": optimizer.reduction,
        "transfers": ", ".join(
            f"{name}: {transfer_in_use(layer, group['transfer'], optimizer.local_loss)}"
            for name, layer in layers.items()
        ),
        "lr_decay": " ".join(f"{optimizer.lr_decay(t, iterations):.6g}" for t in range(min(iterations, 100))),
    }


def own_part(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The groups of the local rules, and their state, in torch's form."""
    groups = [
        {key: value for key, value in group.items() if key == "rule" or key not in _FACTS}
        for group in state_dict["param_groups"]
        if not group.get("aux")
    ]
    for group in groups:
        if isinstance(group.get("activation_lr"), str):
            group["activation_lr"] = PerExample.parsed(group["activation_lr"])
    ids = {i for group in groups for i in group["params"]}
    return {"state": {i: s for i, s in state_dict["state"].items() if i in ids}, "param_groups": groups}


def rows_seed(state_dict: Mapping[str, Any], otherwise: int) -> int:
    """``rows_seed`` of a checkpoint, ``otherwise`` where it has none.

    Raises:
        ValueError: it is not an integer ``>= 0``.
    """
    seeds = [group["rows_seed"] for group in state_dict["param_groups"] if "rows_seed" in group]
    seed = seeds[0] if seeds else state_dict.get("rows_seed", otherwise)
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"rows_seed of state_dict must be an integer >= 0, got {shown(seed)}")
    return int(seed)


def output_gradient(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """``output_gradient`` of a checkpoint; empty where it has none.

    Raises:
        ValueError: it is not what :meth:`OutputGradient.state` returns.
    """
    texts = [group["output_gradient"] for group in state_dict["param_groups"] if group.get("output_gradient")]
    found = state_dict.get("output_gradient", texts[0] if texts else {})
    try:
        return dict(json.loads(found) if isinstance(found, str) else found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"output_gradient of state_dict must be a dict, got {shown(found)}") from error


def restore_state(optimizer: LocoProp, state_dict: Mapping[str, Any]) -> None:
    """Restore the local rules' state in its dtypes, which torch would cast to the parameters', and all of ``aux``."""
    own = [group for group in optimizer.param_groups if not group.get("aux")]
    parameters = [p for group in own for p in group["params"]]
    groups = state_dict["param_groups"]
    ids = [i for group in groups if not group.get("aux") for i in group["params"]]
    optimizer.state.clear()
    for parameter, i in zip(parameters, ids, strict=True):
        if i in state_dict["state"]:
            slots = state_dict["state"][i].items()
            optimizer.state[parameter] = {slot: value.detach().clone().to(parameter.device) for slot, value in slots}
    if optimizer.aux is None:
        return
    packed: list[dict[str, Any]] = []
    state: dict[int, Any] = {}
    for group in groups:
        if group.get("aux"):
            places = range(len(state), len(state) + len(group["params"]))
            packed.append({**group, "params": list(places)})
            state.update({place: state_dict["state"].get(i) for place, i in zip(places, group["params"], strict=True)})
    known = {place: values for place, values in state.items() if values is not None}
    optimizer.aux.load_state_dict({"state": known, "param_groups": packed, **(state_dict.get("aux") or {})})
    link_state(optimizer.state, optimizer.aux)
