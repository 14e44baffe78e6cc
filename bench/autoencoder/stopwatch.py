"""Training time in two shares: what the model takes and what the optimiser does."""

from __future__ import annotations

import torch

from bench.device import CLOCKS

__all__ = ["Stopwatch"]


class Stopwatch:
    """Adds up the time from ``start`` to ``split`` and from ``split`` to ``stop``.

    On a GPU events mark the three moments, so that nothing waits for the device before :meth:`take`.
    """

    def __init__(self, device: torch.device, clock: str) -> None:
        self._gpu, self._now = device.type == "cuda", CLOCKS[clock]
        self._marks: list[float | torch.cuda.Event] = []

    def _mark(self) -> None:
        if not self._gpu:
            self._marks.append(self._now())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    start = split = stop = _mark

    def take(self) -> tuple[float, float]:
        """Seconds of both shares since the last call."""
        if self._gpu:
            torch.cuda.synchronize()
        marks, self._marks = self._marks, []
        shares = [
            sum(_between(one, two) for one, two in zip(marks[i::3], marks[i + 1 :: 3], strict=True)) for i in (0, 1)
        ]
        return shares[0], shares[1]


def _between(one: float | torch.cuda.Event, two: float | torch.cuda.Event) -> float:
    if isinstance(one, float) and isinstance(two, float):
        return two - one
    assert isinstance(one, torch.cuda.Event)
    assert isinstance(two, torch.cuda.Event)
    return one.elapsed_time(two) / 1e3
