"""``aux``, the optimiser of the parameters that no captured layer owns, and the parameter groups around it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from locoprop_kernels.arguments import check_choice, shown
from locoprop_torch.checks import as_list, clean_name, is_named

__all__ = [
    "Aux",
    "check_aux",
    "check_coverage",
    "complete_groups",
    "frozen_outside",
    "link_groups",
    "link_state",
    "made_aux",
    "own_groups",
    "tell_thawed",
    "trained_ids",
]

Aux = Optimizer | str | Callable[[list[nn.Parameter]], Optimizer] | None
_BY_NAME: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {"adamw": torch.optim.AdamW}
Group = dict[str, Any]
_log = logging.getLogger("locoprop_torch")


def check_aux(aux: Any) -> None:
    """Check the user's ``aux``.

    Raises:
        TypeError, ValueError: it is neither an optimiser, the name of one, a function nor ``None``.
    """
    if isinstance(aux, str):
        check_choice("aux", aux, tuple(_BY_NAME))
    elif not (aux is None or isinstance(aux, Optimizer) or callable(aux)):
        raise TypeError(
            f"aux must be a torch.optim.Optimizer, 'adamw', a function of parameters or None, got {shown(aux)}"
        )


def made_aux(aux: Aux, model: nn.Module, owned: Mapping[int, Tensor]) -> Optimizer | None:
    """The optimiser of the parameters that no captured layer owns.

    Args:
        aux: the user's.
        model: the model.
        owned: the parameters of captured layers, by ``id``.

    Returns:
        The optimiser; ``None`` if none was asked for, or if it would have no parameters.

    Raises:
        TypeError, ValueError: the user's function does not return an optimiser of the parameters it was given.
    """
    if aux is None or isinstance(aux, Optimizer):
        return aux
    left = [p for p in model.parameters() if id(p) not in owned]
    if not left:
        return None
    made = (_BY_NAME[aux] if isinstance(aux, str) else aux)(left)
    if not isinstance(made, Optimizer):
        raise TypeError(f"aux must return a torch.optim.Optimizer, got {shown(made)}")
    if any(key in owned for key in trained_ids(made)):
        raise ValueError("aux must return an optimiser of the parameters that it was given, got one with others")
    return made


def trained_ids(optimizer: Any) -> set[int]:
    """The ``id`` of every parameter of an optimiser; none where it is not an optimiser."""
    if not isinstance(optimizer, Optimizer):
        return set()
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def check_coverage(model: nn.Module, covered: set[int]) -> None:
    """Refuse a model with trainable parameters whose ``id`` is not among those ``covered``.

    Raises:
        ValueError: naming them.
    """
    left = [clean_name(name) for name, p in model.named_parameters() if p.requires_grad and id(p) not in covered]
    if left:
        attention = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
        raise ValueError(
            "no captured layer owns these trainable parameters; give them to an optimiser and pass it as aux "
            f"(aux='adamw' makes one), or freeze them: {', '.join(left)}"
            + ("; expose_projections(model) makes those of nn.MultiheadAttention layers" if attention else "")
        )


def frozen_outside(model: nn.Module, covered: set[int]) -> dict[str, nn.Parameter]:
    """The frozen parameters by name that neither a captured layer nor ``aux`` has; ``covered`` are those by ``id``."""
    return {clean_name(name): p for name, p in model.named_parameters() if not p.requires_grad and id(p) not in covered}


def tell_thawed(frozen: Mapping[str, nn.Parameter], groups: Iterable[Group], told: set[str]) -> None:
    """Say once of each parameter that was frozen when the optimiser was built, and has a gradient by now.

    Args:
        frozen: see :func:`frozen_outside`.
        groups: all parameter groups, which may have got some of them since.
        told: the names that it was said of; these are added.
    """
    thawed = [name for name, p in frozen.items() if p.grad is not None and name not in told]
    if not thawed:
        return
    ids = {id(p) for group in groups for p in group["params"]}
    left = [name for name in thawed if id(frozen[name]) not in ids]
    told.update(thawed)
    if left:
        _log.warning(
            "this optimiser does not train %s: they were frozen when it was built, without an aux to have them. "
            "Build it with an aux, or before they are frozen",
            ", ".join(left),
        )


def complete_groups(model: nn.Module, owned: Mapping[int, nn.Parameter], given: Iterable[Group]) -> list[Group]:
    """The parameter groups as torch wants them: the user's, before them one with what is in none of those.

    Args:
        model: the model.
        owned: the parameters of captured layers, by ``id``.
        given: the user's groups.
    """
    groups = [{**group, "params": as_list(group["params"])} for group in given]
    named = any(is_named(group["params"]) for group in groups)
    grouped = {id(p[1] if isinstance(p, tuple) else p) for group in groups for p in group["params"]}
    rest = [p for key, p in owned.items() if key not in grouped]
    groups = [*([{"params": rest}] if rest else []), *groups]
    # torch wants names for all parameters or for none.
    if named:
        names = {id(p): clean_name(name) for name, p in model.named_parameters()}
        for group in groups:
            group["params"] = [p if isinstance(p, tuple) else (names.get(id(p), ""), p) for p in group["params"]]
    return groups


def own_groups(groups: Iterable[Group]) -> list[Group]:
    """The groups that are not those of ``aux``."""
    return [group for group in groups if not group.get("aux")]


def link_groups(groups: list[Group], aux: Optimizer | None) -> None:
    """Show the groups of ``aux`` among ``groups``: the same dictionaries, so that both see what is set in one."""
    if aux is None:
        return
    wanted = [*own_groups(groups), *aux.param_groups]
    if [id(group) for group in wanted] != [id(group) for group in groups]:
        for group in aux.param_groups:
            group["aux"] = True
        groups[:] = wanted


def link_state(state: MutableMapping[Any, Any], aux: Optimizer) -> None:
    """Show the state of ``aux`` in ``state``, too, where ``torch.distributed.checkpoint`` looks for it."""
    state.update({p: aux.state[p] for group in aux.param_groups for p in group["params"] if p in aux.state})
