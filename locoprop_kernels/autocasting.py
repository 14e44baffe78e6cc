"""Torch's autocast, which is not to choose the dtypes of what a step computes: ``compute_dtype`` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["without_autocast"]


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute as if no ``torch.autocast`` were on, on the CPU and on the accelerator."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    with ExitStack() as stack:
        for kind in sorted(kinds):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
