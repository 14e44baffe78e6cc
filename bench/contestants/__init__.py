"""Everything that a user could run for the same work, and the limits to compare with: a file per family."""

from __future__ import annotations

import torch

from bench.contestants import floor, ordinary, ours, package, textbook_form
from bench.contestants.contestant import Contestant, Entry
from bench.contestants.ours import with_config

__all__ = ["Contestant", "Entry", "all_contestants", "with_config"]


def all_contestants(device: torch.device) -> list[Contestant]:
    """Everything that can take part on ``device``; the first that is available is the baseline of the ratios."""
    gpu = device.type == "cuda"
    return [
        *package.contestants(),
        *textbook_form.contestants(gpu),
        *ours.contestants(gpu),
        *floor.contestants(gpu),
        *ordinary.contestants(gpu),
    ]
