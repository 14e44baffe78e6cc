"""CUDA graphs: what is launched in a capture runs whenever the graph is replayed, without the host."""

from __future__ import annotations

import torch

__all__ = ["capturing"]


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured of what is launched on a device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
