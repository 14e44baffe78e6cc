"""Copies of small tables to the device, for which the host does not wait, in the capture of a CUDA graph either."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Upload", "Uploader"]

_SPARES = 4
"""So many captures may follow each other without a step outside of one."""


class Upload(NamedTuple):
    """What a step reads on the device, and the memory of the host that it is copied from."""

    found: Tensor
    host: Tensor


class Uploader:
    """Uploads arrays to a device.

    A copy without waiting needs page-locked memory, which cannot be had while a CUDA graph is captured, and which the
    graph reads whenever it runs. So blocks of it are taken in advance, and those that a graph reads are never written
    to again.

    Args:
        device: the device; on a CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Page-locked blocks by their size in bytes.
        self._spares: dict[int, list[Tensor]] = {}

    def upload(self, values: NDArray[Any], captured: bool) -> Upload:
        """``values`` on the device.

        Args:
            values: not empty, and never written to again.
            captured: whether a CUDA graph is being captured.

        Raises:
            RuntimeError: there is no block left for the capture.
        """
        own = torch.from_numpy(values)
        if self._device.type == "cpu":
            return Upload(own, own)
        spares = self._spares.setdefault(values.nbytes, [])
        if not captured:
            _fill(spares, values.nbytes, _SPARES + 1)
        if not spares:
            raise RuntimeError(
                "no page-locked memory is left for the capture of a CUDA graph: make a step of the same shapes and "
                f"settings outside of a capture first, and again after every {_SPARES} captures"
            )
        host = spares.pop().view(own.dtype).view(own.shape)
        host.copy_(own)
        return Upload(host.to(self._device, non_blocking=True), host)

    def refill(self) -> None:
        """Take page-locked memory anew for as many captures as may follow each other."""
        for size, spares in self._spares.items():
            _fill(spares, size, _SPARES)


def _fill(blocks: list[Tensor], size: int, count: int) -> None:
    """Add blocks of ``size`` bytes of page-locked memory until there are ``count``."""
    if len(blocks) < count:
        blocks += torch.empty(count - len(blocks), size, dtype=torch.uint8, device="cpu", pin_memory=True).unbind()
