"""Checks of what a user gives to the optimiser; every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from locoprop_kernels.arguments import check_choice, is_finite, is_number, shown
from locoprop_kernels.problem import COMPUTE_DTYPES, REDUCTIONS
from locoprop_kernels.steps import BACKENDS, triton_unavailable
from locoprop_torch.unit import PerExample

__all__ = [
    "LOCAL_LOSSES",
    "as_list",
    "check_arguments",
    "check_model",
    "check_number",
    "checked_hyperparameters",
    "clean_name",
    "is_compiled",
    "is_named",
]


LOCAL_LOSSES = ("matching", "squared")


def check_arguments(
    model: Any, local_loss: Any, reduction: Any, backend: Any, compute_dtype: Any, lr_decay: Any, shard_state: Any
) -> None:
    """Check the arguments of ``LocoProp`` that hold for the whole optimiser and can be checked by themselves.

    Raises:
        TypeError, ValueError: one of them is out of range, the Triton backend cannot run, or the model is sharded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("local_loss", local_loss, LOCAL_LOSSES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("backend", backend, BACKENDS)
    check_choice("compute_dtype", compute_dtype, (None, *COMPUTE_DTYPES))
    if not isinstance(shard_state, bool):
        raise TypeError(f"shard_state must be True or False, got {shown(shard_state)}")
    if lr_decay is not None and not callable(lr_decay):
        raise TypeError(f"lr_decay must be callable or None, got {shown(lr_decay)}")
    if backend == "triton" and (reason := triton_unavailable()):
        raise ValueError(f"backend 'triton' cannot run: {reason}; backend='reference' would work")
    check_model(model)


def check_number(name: str, value: Any, *, zero: bool = True) -> Any:
    """``value`` as a float, checked; a tensor of one element, which torch takes for learning rates, stays one."""
    # The usual case, in a fraction of the time.
    if type(value) is float and (0 < value < math.inf or (value == 0 and zero)):
        return value
    number = value
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got {shown(value)}")
        number = value.item()
    if not is_number(number):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if not is_finite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name} must be finite and {'>= 0' if zero else '> 0'}, got {shown(value)}")
    return value if isinstance(value, Tensor) else float(number)


def checked_hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a parameter group, checked, as Python's own; a learning rate in a tensor stays one.

    Raises:
        TypeError, ValueError: naming the number, what was expected and what came.
    """
    iterations = group["local_iterations"]
    if type(iterations) is not int and (isinstance(iterations, bool) or not isinstance(iterations, Integral)):
        raise TypeError(f"local_iterations must be an integer, got {shown(iterations)}")
    if iterations < 1:
        raise ValueError(f"local_iterations must be >= 1, got {shown(iterations)}")
    return {
        "lr": check_number("lr", group["lr"]),
        "activation_lr": _checked_activation_lr(group["activation_lr"]),
        "prox": float(check_number("prox", group["prox"])),
        "weight_decay": float(check_number("weight_decay", group["weight_decay"])),
        "local_iterations": int(iterations),
    }


def _checked_activation_lr(value: Any) -> Any:
    """A positive number, or a :class:`PerExample`, which has been checked where it was made."""
    if isinstance(value, PerExample):
        return value
    if not is_number(value) and not isinstance(value, Tensor):
        raise TypeError(f"activation_lr must be a number or locoprop_torch.PerExample, got {shown(value)}")
    return check_number("activation_lr", value, zero=False)


def as_list(params: Any) -> list[Any]:
    """The parameters of a group, as given by the user, as a list; of pairs ``(name, parameter)`` if they are named."""
    if isinstance(params, set):
        raise TypeError("params must be in an order, which a set has not: give a list")
    return [params] if isinstance(params, Tensor) else list(params)


def is_named(params: list[Any]) -> bool:
    """Whether these are pairs ``(name, parameter)``, as ``named_parameters()`` gives them."""
    return bool(params) and all(isinstance(p, tuple) for p in params)


def clean_name(path: str) -> str:
    """The name of a submodule or parameter as if the model were not compiled."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to the model or a part of it."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def check_model(model: nn.Module) -> None:
    """Refuse models that are distributed over processes in a way that is not supported.

    Raises:
        ValueError: naming the parameter or module, and what would work.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                "LocoProp does not support FullyShardedDataParallel, whose flat parameters have no rows, got "
                f"{name or 'the model'!r}; fully_shard (FSDP2) and DistributedDataParallel would work"
            )
        if _offloads(module):
            raise ValueError(
                "LocoProp does not support CPUOffloadPolicy, as rows and weights must be on one device, got it of "
                f"{name or 'the model'!r}; fully_shard without an offload_policy would work"
            )


def _offloads(module: Any) -> bool:
    """Whether FSDP2 keeps the parameters of a module on the host; torch has no public way to know."""
    state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return any(type(getattr(group, "offload_policy", None)).__name__ == "CPUOffloadPolicy" for group in groups)
