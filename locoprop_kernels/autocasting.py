"""Torch's autocast, which is not to choose the dtypes of what a step computes: ``compute_dtype`` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["without_autocast"]

# Each has a switch of its own; ROCm's devices are called cuda.
_DEVICES = ("cpu", "cuda", "xpu", "mps")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute as if no ``torch.autocast`` were on."""
    with ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
