"""What kind of tensors some are, compared in one call with what they were in the step before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Metadata"]


class Metadata:
    """Class, dtype, device, layout, shape, strides and ``requires_grad`` of some tensors, in order.

    They are compared by what ``torch.compile`` looks at before it runs what it has compiled. That is no public part of
    torch, so where it is missing or works otherwise, Python compares, which takes five times as long.

    Args:
        tensors: the tensors, which are not kept alive.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        self._described: list[tuple[Any, ...]] = []
        self._guards: Any = None
        if _guards_work():
            self._guards = _guards_of(tensors)
        else:
            self._described = [_described(tensor) for tensor in tensors]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these have it too; false also where one of them comes twice, or autocasting or the like is on."""
        if len(tensors) != self._count:
            return False
        if self._guards is not None:
            return bool(self._guards.check(*tensors))
        return [_described(tensor) for tensor in tensors] == self._described


def _described(tensor: Tensor) -> tuple[Any, ...]:
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return type(tensor), tensor.dtype, tensor.device, tensor.layout, tensor.shape, strides, tensor.requires_grad


def _guards_of(tensors: Sequence[Tensor]) -> Any:
    """torch's guards, for no other sizes and strides than those of these tensors."""
    from torch._C._dynamo.guards import TensorGuards

    return TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],  # type: ignore[misc]
        dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],  # type: ignore[misc]
    )


_works: bool | None = None


def _guards_work() -> bool:
    """Whether torch's guards are there and tell apart what they have to, found out once."""
    global _works
    if _works is None:
        try:
            _works = _tell_apart()
        except Exception:  # another version of torch, in which they are elsewhere or take other arguments
            _works = False
    return _works


def _tell_apart() -> bool:
    one = torch.zeros(2, 2, device="cpu")
    others = [one.double(), one.mT, one[:1], one[0], one.clone().requires_grad_(), torch.nn.Parameter(one)]
    others += [one.to("meta"), one.to_sparse()]
    guards = _guards_of([one])
    return bool(guards.check(one.clone())) and not any(guards.check(other) for other in others)
