"""What processes send each other in a step: a few numbers, flags, objects on the way to an error, and tensors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Shape", "Wire"]

Shape = tuple[tuple[int, ...], torch.dtype]
"""Of a tensor on its way: sizes and dtype."""
# Every tensor begins at a multiple of this many bytes, so that it can be looked at in its dtype.
_ALIGNED = 16
# The second is its name before torch 2.13.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class Wire:
    """A process group, and where its tensors have to be.

    Args:
        group: the process group.
        device: of the parameters.

    Attributes:
        rank: the number of this process in the group.
        size: how many processes there are.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group, self.parameter_device = group, device
        # gloo takes tensors of the host alone.
        self.device = torch.device("cpu") if dist.get_backend(group) == "gloo" else device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def numbers(self, own: Sequence[int] | Tensor) -> list[list[int]]:
        """The integers of every process, of which all have equally many; waits for the device."""
        mine = torch.as_tensor(own, dtype=torch.int64, device=self.device)
        return self._gathered(mine).tolist() if len(mine) else [[] for _ in range(self.size)]

    def objects(self, own: Any) -> list[Any]:
        """Any object of every process: slow, for what happens rarely."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, group=self.group)
        return found

    def meet(self, place: str) -> None:
        """Wait until all processes have come to a place, without an exchange that others could take for theirs.

        Args:
            place: its name; all come to it equally often.

        Raises:
            RuntimeError: they have not come within the timeout of the process group.
        """
        # Not in every version of torch.
        store: Any = getattr(self.group, "get_group_store", lambda: None)()
        if store is None:
            return
        place = f"locoprop {place}"
        turn, last = divmod(store.add(place, 1) - 1, self.size)
        if last == self.size - 1:
            store.set(f"{place} {turn}", "all")
        try:
            store.wait([f"{place} {turn}"])
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.rank} of {self.size} waits for others that do not come: with shard_state=True "
                "state_dict() gathers the state, so call it in every process and let one of them save what it returns"
            ) from error

    def least(self, own: Tensor) -> Tensor:
        """The least of an integer tensor ``[]`` over all processes, on the parameters' device."""
        # A copy, as it is written to.
        flag = own.to(self.device, copy=True)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
        _wait_until_let_go(flag)
        return flag.to(self.parameter_device)

    def tensors(self, own: Sequence[Tensor], shapes: Sequence[Sequence[Shape]]) -> list[list[Tensor]]:
        """The tensors of every process, in one exchange.

        Args:
            own: those of this process.
            shapes: for every process, sizes and dtypes of what it sends.
        """
        most = max(sum(map(_bytes, some)) for some in shapes)
        if not most:
            return [
                [torch.empty(size, dtype=dtype, device=self.parameter_device) for size, dtype in some]
                for some in shapes
            ]
        mine = torch.zeros(most, dtype=torch.uint8, device=self.device)
        for part, tensor in zip(_parts(mine, shapes[self.rank]), own, strict=True):
            part.copy_(tensor)
        everything = self._gathered(mine).to(self.parameter_device)
        return [_parts(row, some) for row, some in zip(everything, shapes, strict=True)]

    def _gathered(self, own: Tensor) -> Tensor:
        """``[size, n]`` of tensors ``[n]``."""
        everything = own.new_empty(self.size * len(own))
        _all_gather(everything, own, group=self.group)
        _wait_until_let_go(everything, own)
        return everything.view(self.size, -1)


def _wait_until_let_go(*tensors: Tensor) -> None:
    """Wait until the threads of gloo have let go of tensors that they have sent: mostly no time at all.

    They need the interpreter for it. A process that destroys its process group before, as at the end of a script, would
    wait for these threads while they wait for the interpreter, which it holds.
    """
    deadline = time.monotonic() + 0.1
    for tensor in tensors:
        # Not in every version of torch.
        uses: Any = getattr(tensor, "_use_count", lambda: 1)
        while uses() > 1 and time.monotonic() < deadline:
            time.sleep(1e-4)


def _bytes(shape: Shape) -> int:
    """How many bytes a tensor takes on the way."""
    size, dtype = shape
    count = dtype.itemsize
    for length in size:
        count *= length
    return -(-count // _ALIGNED) * _ALIGNED


def _parts(buffer: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """The tensors that a buffer of bytes has."""
    found, start = [], 0
    for shape in shapes:
        size, dtype = shape
        stop = start + torch.Size(size).numel() * dtype.itemsize
        found.append(buffer[start:stop].view(dtype).view(size))
        start += _bytes(shape)
    return found
