"""Ours: both backends in all precisions, and the Triton kernels with a driver or a configuration that one asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import locoprop_kernels as lk
from bench.contestants.contestant import DTYPES, Contestant, Entry, Parameters
from bench.contestants.execution import cuda_graph, with_tf32
from bench.work import Work

if TYPE_CHECKING:
    from locoprop_kernels.kernels.configs import Config

__all__ = ["contestants", "with_config"]


def contestants(gpu: bool) -> list[Contestant]:
    """The backend that is taken unasked, and PyTorch alone; on a GPU each driver, and all of it as one CUDA graph."""
    if not gpu:
        found = [_contestant(f"ours-{precision}", precision, "auto") for precision in ("fp32", "bf16")]
        return [*found, _contestant("ours-reference-fp32", "fp32", "reference")]
    found = [_contestant(f"ours-{precision}", precision, "triton") for precision in ("fp32", "bf16", "tf32", "fp16")]
    found += [_contestant(f"ours-reference-{precision}", precision, "reference") for precision in ("fp32", "bf16")]
    found += [
        _contestant(f"ours-bf16-{driver}", "bf16", "triton", driver=driver) for driver in ("single", "grouped", "rows")
    ]
    return [*found, Contestant("ours-graph-bf16", partial(_build_graph, precision="bf16"), precision="bf16")]


def with_config(
    config: Config | None, precision: str = "bf16", driver: str | None = None, graphed: bool = False
) -> Contestant:
    """Ours with a configuration of the Triton kernels, to tune them; ``graphed`` as one CUDA graph."""
    shape = "chosen"
    if config is not None:
        shape = f"{config.n}x{config.b}x{config.k}-r{config.r}-w{config.warps}-s{config.stages}-p{config.slices}"
        shape += f"-o{config.occupancy}" * (config.occupancy > 1)
    use = {"config": config, "driver": driver}
    name = f"ours-{'graph-' * graphed}{precision}-{driver or 'auto'}-{shape}"
    if graphed:
        return Contestant(name, partial(_build_graph, precision=precision, use=use), precision=precision)
    return Contestant(name, partial(_build, precision=precision, backend="triton", use=use), precision=precision)


def _contestant(name: str, precision: str, backend: str, **use: Any) -> Contestant:
    tolerance = {"fp32": 1e-4, "bf16": 1e-2, "tf32": 3e-3, "fp16": 1e-2}[precision]
    build = partial(_build, precision=precision, backend=backend, use=use)
    return Contestant(name, build, tolerance=tolerance, precision=precision)


@dataclass(frozen=True)
class _Loop:
    """What is run, and where to find what it has done.

    Attributes:
        run: does the work once.
        parameters: the updated weights and biases.
        state: the state of the update rule.
        report: the report of the latest run.
    """

    run: Callable[[], object]
    parameters: Callable[[], Parameters]
    state: Callable[[], list[Tensor]]
    report: Callable[[], lk.StepReport]


def _loop(work: Work, compute_dtype: torch.dtype | None, backend: str) -> _Loop:
    make = _training_step if work.case.scope == "step" else _local_loops
    return make(work, compute_dtype, backend)


def _training_step(work: Work, compute_dtype: torch.dtype | None, backend: str) -> _Loop:
    model = work.model()
    optimizer = work.optimizer(model, backend=backend, compute_dtype=compute_dtype)
    trained = work.trained(model)

    def run() -> None:
        # The same rows in every run, as in the check.
        optimizer.rows_seed = 0
        optimizer.zero_grad()
        work.loss(model(work.x), work.y).backward()
        optimizer.step()

    return _Loop(
        run,
        parameters=lambda: [(module.weight, module.bias) for module in trained],
        state=lambda: [slot for slots in optimizer.state.values() for slot in slots.values()],
        report=lambda: optimizer.last_reports[0],
    )


def _local_loops(work: Work, compute_dtype: torch.dtype | None, backend: str) -> _Loop:
    problems, rows = work.problems(), work.case.rows
    reports: list[lk.StepReport] = []

    def run() -> None:
        reports[:] = [lk.local_steps_(problems, lr=work.rates, rows=rows, backend=backend, compute_dtype=compute_dtype)]

    return _Loop(
        run,
        parameters=lambda: [(problem.weight, problem.bias) for problem in problems],
        state=lambda: [slot for problem in problems for slots in problem.state.values() for slot in slots.values()],
        report=lambda: reports[-1],
    )


def _build(work: Work, precision: str, backend: str, use: dict[str, Any]) -> Entry:
    compute_dtype = None if precision in ("fp32", "tf32") else DTYPES[precision]
    loop = _loop(work, compute_dtype, backend)

    def details() -> dict[str, Any]:
        report = loop.report()
        return {"backend": report.backend, "driver": report.driver}

    run = _with_kernels(loop.run, use) if use else loop.run
    return Entry(with_tf32(run, precision == "tf32"), loop.parameters, details)


def _with_kernels(run: Callable[[], object], use: dict[str, Any]) -> Callable[[], object]:
    """``run`` with a driver or a configuration of the Triton kernels that is not the default one."""
    from locoprop_kernels.kernels import configs

    def wrapped() -> object:
        with configs.use(**use):
            return run()

    return wrapped


def _build_graph(work: Work, precision: str, use: dict[str, Any] | None = None) -> Entry:
    """The whole of ours as one CUDA graph, with the state made before the capture."""
    loop = _loop(work, DTYPES[precision], "triton")
    run = _with_kernels(loop.run, use) if use else loop.run
    run()
    with torch.no_grad():
        for changed, start in zip(loop.parameters(), work.parameters, strict=True):
            for tensor, value in zip(changed, start, strict=True):
                if tensor is not None and value is not None:
                    tensor.copy_(value)
        # RMSprop starts with zeros.
        for slot in loop.state():
            slot.zero_()
        weights = [tensor for pair in loop.parameters() for tensor in pair if tensor is not None]
    replay, keep = cuda_graph(run, [*weights, *loop.state()])
    return Entry(replay, loop.parameters, keep=(keep, loop))
