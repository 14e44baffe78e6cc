"""What all parts of an experiment are given: the protocol, who takes part, where results go, when to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.autoencoder.optimisers import Contestant
from bench.autoencoder.protocol import Protocol
from bench.autoencoder.runs import Deadline

__all__ = ["Context"]


@dataclass(frozen=True)
class Context:
    """Everything but the data.

    Attributes:
        protocol: what is held fixed.
        contestants: who takes part.
        seeds: of the reported runs.
        out: folder of results.
        chosen: file with the chosen hyper-parameters.
        clock: of the training times, a key of :data:`bench.device.CLOCKS`.
        deadline: ends the piece of work.
        search_seed: of the search, not among those reported.
        console: for messages and bars.
    """

    protocol: Protocol
    contestants: list[Contestant]
    seeds: range
    out: Path
    chosen: Path
    clock: str
    deadline: Deadline
    search_seed: int = 1000
    console: Console = field(default_factory=lambda: Console(stderr=True))

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[[], object]]:
        """A progress bar of ``total`` epochs; gives the function that advances it by one."""
        columns = (
            TextColumn("{task.description}", justify="left"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, refresh_per_second=2) as progress:
            task = progress.add_task(description, total=total)
            yield lambda: progress.advance(task)
