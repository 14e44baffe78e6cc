"""Local losses of each layer, for TensorBoard and everything else that takes scalars as its ``SummaryWriter`` does."""

from __future__ import annotations

from numbers import Integral
from typing import Any, Protocol

from torch.utils.hooks import RemovableHandle

from locoprop_kernels.arguments import shown
from locoprop_torch.optimizer import LocoProp

__all__ = ["ScalarWriter", "log_local_losses"]


class ScalarWriter(Protocol):
    """What is asked of a writer; ``torch.utils.tensorboard.SummaryWriter`` has it."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int) -> None:
        """Note a number under a tag."""


def log_local_losses(optimizer: LocoProp, writer: ScalarWriter | None, every: int = 1) -> RemovableHandle:
    """Write how far each layer's local loss has fallen, after every ``every``-th step.

    The number is the local objective after the last local step, relative to its value at the start: below zero where
    the local steps have gained something. Its tag is ``"local loss/"`` and the layer's name; its step counts those of
    the optimiser, also over a resume. It sets ``optimizer.trace`` for the steps that are written, and for no others.

    Args:
        optimizer: the optimiser.
        writer: where to; ``None`` for processes that write nothing: all of them must trace the same steps.
        every: how many steps there are from one that is written to the next.

    Returns:
        A handle whose ``remove()`` ends it; ``optimizer.trace`` then stays as it is.

    Raises:
        TypeError: ``optimizer`` is none of ours, as where an engine has wrapped it.
        ValueError: ``every`` is not a positive integer.
    """
    if not isinstance(optimizer, LocoProp):
        raise TypeError(f"optimizer must be a LocoProp, got {type(optimizer).__name__}")
    if isinstance(every, bool) or not isinstance(every, Integral) or every < 1:
        raise ValueError(f"every must be a positive integer, got {shown(every)}")

    def write(*_: Any) -> None:
        step = optimizer.rows_seed
        if optimizer.trace and writer is not None:
            for problem in (problem for report in optimizer.last_reports for problem in report.problems):
                if problem.trace is not None:
                    writer.add_scalar(f"local loss/{problem.name}", float(problem.trace[-1]), step)
        # Forward passes keep one set of rows more for a step that is traced.
        optimizer.trace = (step + 1) % every == 0

    optimizer.trace = (optimizer.rows_seed + 1) % every == 0
    return optimizer.register_step_post_hook(write)
