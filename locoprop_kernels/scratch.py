"""Memory that local loops work in, kept for the next step.

A step writes increments and new state beside the old ones, and drops them when they are committed. Memory that the
process hands back to the system and takes again is filled with zeros by the system each time, page by page. With few
rows in a local step that takes longer than all updates of the weights do, so up to ``LIMIT`` bytes of it are kept:
enough for 22 million weights.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["LIMIT", "copy_of", "give_back", "release", "take"]

LIMIT = 256 * 2**20
_lock = threading.Lock()
# By number of elements and dtype; the ones that were used last are at the end.
_kept: dict[tuple[int, torch.dtype], list[Tensor]] = {}
_kept_bytes = 0


def take(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of any content, contiguous; one that was given back where there is one. Only CPUs need this."""
    count = 1
    for size in shape:
        count *= size
    if device.type == "cpu":
        with _lock:
            if (count, dtype) in _kept:
                return _let_go((count, dtype)).view(tuple(shape))
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def copy_of(tensor: Tensor) -> Tensor:
    """A copy of a tensor in memory from :func:`take`; contiguous."""
    return take(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def give_back(*tensors: Tensor) -> None:
    """Keep the memory of tensors for the next :func:`take`; nobody may use them, or views of them, any more."""
    for tensor in tensors:
        size = tensor.numel() * tensor.itemsize
        ours = tensor.device.type == "cpu" and type(tensor) is Tensor and not tensor.is_inference()
        if ours and tensor.is_contiguous() and size <= LIMIT:
            with _lock:
                _keep(tensor, size)


def release() -> None:
    """Hand all memory that is kept back to the system."""
    global _kept_bytes
    with _lock:
        _kept.clear()
        _kept_bytes = 0


def _keep(tensor: Tensor, size: int) -> None:
    global _kept_bytes
    key = (tensor.numel(), tensor.dtype)
    # The kind that was used last goes to the end.
    _kept[key] = [*_kept.pop(key, []), tensor]
    _kept_bytes += size
    while _kept_bytes > LIMIT:
        _let_go(next(iter(_kept)))


def _let_go(key: tuple[int, torch.dtype]) -> Tensor:
    global _kept_bytes
    tensor = _kept[key].pop()
    _kept_bytes -= tensor.numel() * tensor.itemsize
    if not _kept[key]:
        del _kept[key]
    return tensor
