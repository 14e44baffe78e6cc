"""An ordinary training step with one of torch's optimisers, which shows what a step of LocoProp costs beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from bench.contestants.contestant import Contestant, Entry, only_steps
from bench.contestants.execution import cuda_graph, with_tf32
from bench.work import LR, Work

__all__ = ["contestants"]


def contestants(gpu: bool) -> list[Contestant]:
    """Adam, fused and as it comes, on a GPU as a CUDA graph too, and the RMSprop that the local problems take."""
    adam = partial(torch.optim.Adam, lr=1e-3, fused=True)
    rmsprop = partial(torch.optim.RMSprop, lr=LR, eps=1e-6, momentum=0.999, alpha=0.9)
    graphed = Contestant(
        "adam-fused-graph", partial(_build, make=partial(adam, capturable=True), graphed=True), only_steps
    )
    return [
        Contestant("adam-fused", partial(_build, make=adam), only_steps),
        Contestant("adam", partial(_build, make=partial(torch.optim.Adam, lr=1e-3)), only_steps),
        *([graphed] if gpu else []),
        Contestant("rmsprop", partial(_build, make=rmsprop), only_steps),
    ]


def _build(work: Work, make: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer], graphed: bool = False) -> Entry:
    model = work.model()
    optimizer = make(model.parameters())

    def run() -> None:
        optimizer.zero_grad()
        work.loss(model(work.x), work.y).backward()
        optimizer.step()

    if graphed:
        replay, keep = cuda_graph(with_tf32(run, False), [])
        return Entry(replay, keep=(keep, model, optimizer))
    return Entry(with_tf32(run, False))
