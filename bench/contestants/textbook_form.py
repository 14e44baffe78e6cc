"""The textbook form of :mod:`bench.textbook`: eager, under ``torch.compile``, as a CUDA graph, and both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import textbook
from bench.contestants.contestant import DTYPES, Contestant, Entry, Parameters, has_compiler, takes_all_rows
from bench.contestants.execution import cuda_graph, with_tf32
from bench.work import Work

__all__ = ["contestants"]


def contestants(gpu: bool) -> list[Contestant]:
    """In float32, eager and compiled; in lower precisions, eager; on a GPU in all of them as a CUDA graph."""
    found = [
        Contestant("textbook", partial(_build, precision="fp32"), takes_all_rows, tolerance=1e-3),
        Contestant(
            "textbook-compiled",
            partial(_build, precision="fp32", compiled=True),
            has_compiler,
            # A compiled convolution rounds unlike the eager one of the forward pass.
            tolerance=1e-2,
            slow_start=True,
        ),
    ]
    for precision, tolerance in (("bf16", 1.0), ("tf32", 0.3)) if gpu else (("bf16", 1.0),):
        build = partial(_build, precision=precision)
        found.append(
            Contestant(f"textbook-{precision}", build, takes_all_rows, tolerance=tolerance, precision=precision)
        )
    for precision, tolerance in (("fp32", 1e-3), ("tf32", 0.3), ("bf16", 1.0)) if gpu else ():
        build = partial(_build, precision=precision, graphed=True)
        options: dict[str, Any] = {"tolerance": tolerance, "precision": precision}
        found.append(Contestant(f"textbook-graph-{precision}", build, takes_all_rows, **options))
        if precision != "tf32":
            compiled = partial(build, compiled=True)
            name = f"textbook-compiled-graph-{precision}"
            found.append(Contestant(name, compiled, takes_all_rows, **options, slow_start=True))
    return found


def _build(work: Work, precision: str, compiled: bool = False, graphed: bool = False) -> Entry:
    operands = DTYPES[precision]
    states = []
    for layer, (weight, bias) in zip(work.case.layers, work.parameters, strict=True):
        c = layer.convolution
        states.append(textbook.LayerState.of(weight, bias, (c.stride, c.padding) if c else (1, 0)))
    rates = torch.tensor(work.rates, device=work.device)
    step: textbook.LocalStep = textbook.local_step
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        step = torch.compile(textbook.local_step, dynamic=False)
    once: Callable[[], None]
    if work.case.scope == "step":
        names, local = work.names, work.local_names
        once = partial(textbook.training_step, states, names, local, work.x, work.y, rates, operands, step)
    else:
        once = partial(_local_loops, work, states, rates, operands, step)
    run = torch.no_grad()(with_tf32(once, precision == "tf32"))

    def parameters() -> Parameters:
        return [(state.weight, state.bias) for state in states]

    if not graphed:
        return Entry(run, parameters)
    replay, keep = cuda_graph(run, [tensor for state in states for tensor in state.tensors()])
    return Entry(replay, parameters, keep=keep)


def _local_loops(
    work: Work,
    states: list[textbook.LayerState],
    rates: Tensor,
    operands: torch.dtype,
    step: textbook.LocalStep,
) -> None:
    for state, x, gradient, name in zip(states, work.inputs, work.gradients, work.local_names, strict=True):
        a0 = F.linear(x, state.weight, state.bias)
        target = textbook.transfer(name, a0) - textbook.ACTIVATION_LR * gradient
        for rate in rates:
            step(x, target, state, rate, name, operands)
