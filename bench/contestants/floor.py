"""The floor: only the products that the work needs, through the routine of torch that ours takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.cases import Layer
from bench.contestants.contestant import DTYPES, Contestant, Entry
from bench.contestants.execution import cuda_graph, with_tf32
from bench.device import multiply
from bench.work import Work
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
    local = [one.rows(case.local_batch(layer)) for one, layer in zip(layers, case.layers, strict=True)]
    by_gram = [case.takes_gram(layer) for layer in case.layers]

    def products() -> None:
        for i, one in enumerate(local):
            if network:
                _training_products(network[i], first=i == 0)
            _local_products(one, case.iterations - 1, by_gram[i])

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


def _local_products(one: _Operands, steps: int, by_gram: bool) -> None:
    """Those of the local steps after the first, which needs none."""
    if by_gram:
        matrix = gram(rounded(one.x, one.x.dtype), torch.float32).to(one.x.dtype)
        for _ in range(steps):
            multiply(one.delta, matrix)
        return
    for _ in range(steps):
        multiply(one.delta, one.x.t())
        multiply(one.errors, one.x)
