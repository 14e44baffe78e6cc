"""Parameters that are spread over processes by their rows, as FSDP2 does (``fully_shard``), and ``ColwiseParallel``.

Output rows of a weight, with their biases, gradients and state, never need another output row in the local loop. So
each process solves the local problems of the rows that it holds, with the inputs of all processes. Where outputs are
not independent (a softmax, groups, a rule or a regulariser of the user's own) each of them solves the whole problem, on
gathered copies, and keeps its rows.

With FSDP2 every process has a batch of its own. Where a model is tensor-parallel all of them have the same one: layers
have whole inputs and own outputs, and rows need not be gathered.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from locoprop_torch.layouts import Layout

__all__ = [
    "as_it_is",
    "check_layer",
    "check_placement",
    "group_of",
    "is_sharded",
    "is_tensor_parallel",
    "keep_own",
    "leaves_none_out",
    "like",
    "own",
    "own_or_zeros",
    "own_rows",
    "own_tensor",
    "shape_of",
    "whole",
]


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is spread over processes: a ``DTensor``."""
    # Importing it takes long, and as long as nobody has, there is none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether parameters of the model are spread over processes that all have the same batch: not by FSDP2."""
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return False
    return not any(type(module).__name__.startswith("FSDP") for module in model.modules())


def own_tensor(name: str, what: str, tensor: Any) -> Tensor:
    """The part of a layer's input or output that this process has: all of an input, own features of an output.

    Raises:
        ValueError: naming the layer: a ``DTensor`` is placed otherwise.
    """
    if is_sharded(tensor):
        allowed = [place.is_replicate() or (what == "output" and place.is_shard(tensor.dim() - 1))
                   for place in tensor.placements]  # fmt: skip
        if not all(allowed):
            raise ValueError(
                f"layer {name!r}: in every process of a tensor-parallel layer the input must be whole and the output "
                f"sharded by features, as with ColwiseParallel, got {tensor.placements} of the {what}"
            )
    return own(tensor)


def own(tensor: Any) -> Tensor:
    """The part of a tensor that this process holds, which may be all of it; the same memory."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor


def own_or_zeros(tensor: Any) -> Tensor:
    """:func:`own`, or one row of zeros in a process that holds none, as where there are fewer rows than processes.

    It then solves a problem of one output that is zero, so that everything is as it is elsewhere.
    """
    part = own(tensor)
    return part.new_zeros(1, *part.shape[1:]) if is_sharded(tensor) and not len(part) else part


def as_it_is(tensor: Any) -> Tensor:
    """All of a tensor that is not spread."""
    return tensor


def own_rows(tensor: Any) -> slice:
    """Which rows of a tensor this process holds."""
    if not is_sharded(tensor):
        return slice(0, len(tensor))
    rows = len(tensor)
    for dim, placement in enumerate(tensor.placements):
        if placement.is_shard():
            each = -(-rows // tensor.device_mesh.size(dim))
            start = min(tensor.device_mesh.get_local_rank(dim) * each, rows)
            return slice(start, min(start + each, rows))
    return slice(0, rows)


def leaves_none_out(tensor: Any) -> bool:
    """Whether every process holds a row of a tensor."""
    sizes = (
        [tensor.device_mesh.size(i) for i, p in enumerate(tensor.placements) if p.is_shard()]
        if is_sharded(tensor)
        else []
    )
    return all(-(-len(tensor) // size) * (size - 1) < len(tensor) for size in sizes)


def whole(tensor: Any) -> Tensor:
    """All of a tensor: a gathered copy where it is spread; all processes must come here."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor


def keep_own(sharded: Any, value: Tensor) -> None:
    """Write the rows that this process holds, out of a whole tensor."""
    own(sharded).copy_(value[own_rows(sharded)])


def like(value: Tensor, parameter: Any) -> Tensor:
    """A whole tensor as a ``DTensor`` with the placements of ``parameter``."""
    part = value[own_rows(parameter)].clone()
    return type(parameter).from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def group_of(parameters: Mapping[str, nn.Parameter]) -> Any:
    """The process group that sharded parameters, given by name, are spread over; ``None`` where none is sharded.

    Raises:
        ValueError: they are spread over several.
    """
    meshes: dict[Any, str] = {}
    for name, parameter in parameters.items():
        if is_sharded(parameter):
            meshes.setdefault(parameter.device_mesh, name)  # type: ignore[attr-defined]
    if len(meshes) > 1:
        raise ValueError(
            "all sharded layers must be on one device mesh, got "
            + " and ".join(f"{name!r} on {mesh}" for mesh, name in meshes.items())
        )
    for mesh, name in meshes.items():
        if mesh.size() == torch.distributed.get_world_size():
            return torch.distributed.group.WORLD
        if mesh.ndim > 1:
            raise ValueError(f"a device mesh of several dimensions must have all processes, got {name!r} on {mesh}")
        return mesh.get_group()
    return None


def shape_of(layout: Layout, weight: Any) -> list[int]:
    """``[N, K]`` or ``[G, N, K]``, what a whole weight is in the local problem."""
    return list(layout.weight(torch.empty_strided(weight.shape, weight.stride(), device="meta")).shape)


def check_placement(name: str, value: Any, parameter: Any) -> None:
    """Refuse the state of a parameter that was spread over processes otherwise than it is now.

    Raises:
        ValueError: naming what would work.
    """
    if not is_sharded(value):
        return
    there = value.device_mesh.size()
    here = parameter.device_mesh.size() if is_sharded(parameter) else 1
    if here != there or value.placements != parameter.placements:
        raise ValueError(
            f"the state of {name} in state_dict must be spread over {here} processes, as the parameter is, got a "
            f"part of what {there} had: save and load it with torch.distributed.checkpoint, get_state_dict and "
            "set_state_dict, which give every process its part"
        )


def check_layer(name: str, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse a layer whose parameters are spread over processes otherwise than by whole rows.

    Raises:
        ValueError: naming it, and what would work.
    """
    for kind, parameter in parameters.items():
        if not is_sharded(parameter):
            continue
        placements = parameter.placements  # type: ignore[attr-defined]
        sharded = [placement for placement in placements if not placement.is_replicate()]
        if not all(placement.is_shard(0) for placement in sharded) or len(sharded) > 1:
            raise ValueError(
                f"layer {name!r}: its {kind} must be sharded by output rows, once, as fully_shard or ColwiseParallel "
                f"does, got {placements}; where inputs are sharded (RowwiseParallel), every local step would need a "
                "reduction: leave the layer to aux"
            )
