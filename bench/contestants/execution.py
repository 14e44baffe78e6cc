"""How a contestant is executed: in which precision torch multiplies, and as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["cuda_graph", "with_tf32"]


def with_tf32(run: Callable[[], object], enabled: bool) -> Callable[[], object]:
    """``run`` with torch's float32 products and convolutions in TF32, or with those of the highest precision."""

    def wrapped() -> object:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("high" if enabled else "highest")
        torch.backends.cudnn.allow_tf32 = enabled
        try:
            return run()
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]

    return wrapped


def cuda_graph(run: Callable[[], object], mutable: list[Tensor]) -> tuple[Callable[[], None], torch.cuda.CUDAGraph]:
    """``run`` as one CUDA graph: its replay and the graph. The ``mutable`` tensors are as before after the capture."""
    saved = [tensor.clone() for tensor in mutable]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for tensor, value in zip(mutable, saved, strict=True):
        tensor.copy_(value)
    return graph.replay, graph
