"""The floor: only the products that the work needs, through the fastest of torch's routines on this machine.

On a CPU every product of the local steps is timed by every route when the floor is built, whatever the library chose.
Those of the forward and backward pass are the model's own, and take the routine that the model takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.cases import Layer
from bench.contestants.contestant import DTYPES, Contestant, Entry
from bench.contestants.execution import cuda_graph, with_tf32
from bench.device import clock
from bench.work import Work
from locoprop_kernels import routes
from locoprop_kernels.products import gram, rounded

__all__ = ["contestants"]


def contestants(gpu: bool) -> list[Contestant]:
    """One floor for each precision that a contestant's products may have."""
    precisions = ("fp32", "bf16", "tf32") if gpu else ("fp32", "bf16")
    return [Contestant(f"floor-{one}", partial(_build, precision=one), precision=one) for one in precisions]


@dataclass(frozen=True)
class _Operands:
    """Random matrices of one layer: inputs ``[B, K]``, errors ``[N, B]``, increment ``[N, K]``."""

    x: Tensor
    errors: Tensor
    delta: Tensor

    @classmethod
    def of(cls, layer: Layer, device: torch.device, dtype: torch.dtype) -> _Operands:
        x = torch.randn(layer.batch, layer.inputs, device=device).to(dtype)
        errors = torch.randn(layer.outputs, layer.batch, device=device).to(dtype)
        return cls(x, errors, torch.randn(layer.outputs, layer.inputs, device=device).to(dtype))

    def to(self, dtype: torch.dtype) -> _Operands:
        return _Operands(self.x.to(dtype), self.errors.to(dtype), self.delta.to(dtype))

    def rows(self, count: int) -> _Operands:
        """With so many rows of the batch."""
        return _Operands(self.x[:count], self.errors[:, :count].contiguous(), self.delta)


def _build(work: Work, precision: str) -> Entry:
    case = work.case
    layers = [_Operands.of(layer, work.device, DTYPES[precision]) for layer in case.layers]
    # The forward and backward pass are in float32, as the model is.
    network = [one.to(torch.float32) for one in layers] if case.scope == "step" else []
    sampled = [one.rows(case.local_batch(layer)) for one, layer in zip(layers, case.layers, strict=True)]
    by_gram = [case.takes_gram(layer) for layer in case.layers]
    local = [_local_products(one, case.iterations - 1, by_gram[i]) for i, one in enumerate(sampled)]

    def products() -> None:
        for i, run_local in enumerate(local):
            if network:
                _training_products(network[i], first=i == 0)
            run_local()

    run = torch.no_grad()(with_tf32(products, precision == "tf32"))
    if work.device.type == "cuda":
        replay, keep = cuda_graph(run, [])
        return Entry(replay, keep=keep)
    return Entry(run)


def _training_products(one: _Operands, first: bool) -> None:
    """Those of the forward and backward pass; nothing needs the gradient of the first layer's inputs."""
    torch.mm(one.x, one.delta.t())
    torch.mm(one.errors, one.x)
    if not first:
        torch.mm(one.errors.t(), one.delta)


def _local_products(one: _Operands, steps: int, by_gram: bool) -> Callable[[], None]:
    """Those of the local steps after the first, which needs none."""
    if by_gram:
        square = torch.randn(one.x.shape[1], one.x.shape[1], device=one.x.device).to(one.x.dtype)
        repeated = [_fastest(one.delta, square)]
    else:
        repeated = [_fastest(one.delta, one.x.t()), _fastest(one.errors, one.x)]

    def run() -> None:
        if by_gram:
            gram(rounded(one.x, one.x.dtype), torch.float32)
        for _ in range(steps):
            for multiply in repeated:
                multiply()

    return run


def _fastest(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    """``left @ right`` by the fastest route."""
    if left.device.type != "cpu":
        return partial(torch.mm, left, right)
    found = {}
    for by in routes.available(left.dtype):
        if by == "upcast":
            for name in routes.available(torch.float32):
                found[by, name] = partial(routes.multiply, left.float(), right.float(), name)
        elif routes.runs(left.dtype, by):
            found[by, by] = partial(routes.multiply, left, right, by)
    best = dict.fromkeys(found, float("inf"))
    for _ in range(5):
        for which, run in found.items():
            best[which] = min(best[which], clock(run, left.device))
    return found[min(best, key=lambda which: best[which])]
