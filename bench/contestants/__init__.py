"""Everything that a user could run for the same work, and the limits to compare with."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locoprop_kernels as lk
from bench import textbook
from bench.cases import Case
from bench.work import LR, Work
from locoprop_kernels import products
from locoprop_kernels.products import product, rounded

__all__ = ["Contestant", "Entry", "all_contestants", "with_config"]

Parameters = list[tuple[Tensor, Tensor | None]]


@dataclass(eq=False)
class Entry:
    """A contestant that is set up for one case.

    Attributes:
        run: does the work once.
        parameters: where the updated weights and biases are; ``None`` if the result is not LocoProp's.
        details: facts for the report, read after the timing.
        keep: objects that must live as long as the entry.
    """

    run: Callable[[], Any]
    parameters: Callable[[], Parameters] | None = None
    details: Callable[[], dict[str, Any]] = dict
    keep: Any = None


@dataclass(frozen=True)
class Contestant:
    """A way to do the work.

    Attributes:
        name: what ``--contestant`` matches.
        build: sets it up; may raise.
        unavailable: why it cannot do a case on a device, or ``None``.
        tolerance: largest relative error of the step, against float64, with which its time is reported.
        precision: dtype of the products' operands; picks the floor to compare with.
        slow_start: compiles first; left out of ``--quick``.
    """

    name: str
    build: Callable[[Work], Entry]
    unavailable: Callable[[Case, torch.device], str | None] = field(default=lambda case, device: None)
    tolerance: float = 1e-2
    precision: str = "fp32"
    slow_start: bool = False


_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _first(*checks: Callable[[Case, torch.device], str | None]) -> Callable[[Case, torch.device], str | None]:
    def unavailable(case: Case, device: torch.device) -> str | None:
        return next((reason for check in checks if (reason := check(case, device))), None)

    return unavailable


def _only_steps(case: Case, device: torch.device) -> str | None:
    return None if case.scope == "step" else "trains networks, and this case is local loops alone"


def _only_gpu(case: Case, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a GPU"


def _compiler(case: Case, device: torch.device) -> str | None:
    return "no C++ compiler" if device.type == "cpu" and shutil.which("g++") is None else None


def _has_package(case: Case, device: torch.device) -> str | None:
    return None if importlib.util.find_spec("locoprop") else "the PyPI package locoprop is not installed"


def _with_tf32(run: Callable[[], Any], enabled: bool) -> Callable[[], Any]:
    """``run`` with torch's float32 products and convolutions in TF32, or with those of the highest precision."""

    def wrapped() -> Any:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("high" if enabled else "highest")
        torch.backends.cudnn.allow_tf32 = enabled
        try:
            return run()
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]

    return wrapped


# --- (a) the PyPI package


def _package(work: Work) -> Entry:
    from locoprop import LocoLayer, LocopropTrainer

    model = work.model()
    trained = work.trained(model)
    activations = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "identity": nn.Identity}
    layers: list[nn.Module] = []
    for module, name, local in zip(trained, work.names, work.local_names, strict=True):
        last = module is trained[-1]
        if work.x.dim() == 4 and isinstance(module, nn.Linear):
            layers.append(nn.Flatten())
        layers.append(LocoLayer(module, activations[local](), implicit=last))
        if local != name and not last:
            layers.append(activations[name]())
    network = nn.Sequential(*layers)
    trainer = LocopropTrainer(network, work.loss, local_iterations=work.case.iterations, correction=0.0)

    def run() -> None:
        network.zero_grad()
        trainer.step(work.x, work.y)

    return Entry(_with_tf32(run, False), lambda: [(m.weight, m.bias) for m in trained])


# --- (b), (c), (d) the textbook form in PyTorch


def _textbook(work: Work, precision: str, compiled: bool, graphed: bool) -> Entry:
    operands = _DTYPES[precision]
    states = []
    for layer, (weight, bias) in zip(work.case.layers, work.parameters, strict=True):
        c = layer.convolution
        states.append(textbook.LayerState.of(weight, bias, (c.stride, c.padding) if c else (1, 0)))
    rates = torch.tensor(work.rates, device=work.device)
    step = textbook.local_step
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        step = torch.compile(textbook.local_step, dynamic=False)
    if work.case.scope == "step":
        names, local = work.names, work.local_names
        once: Callable[[], Any] = partial(
            textbook.training_step, states, names, local, work.x, work.y, rates, operands, step
        )
    else:
        once = partial(_textbook_local, work, states, rates, operands, step)
    run = torch.no_grad()(_with_tf32(once, precision == "tf32"))
    if not graphed:
        return Entry(run, lambda: [(state.weight, state.bias) for state in states])
    replay, keep = _graph(run, [tensor for state in states for tensor in state.tensors()])
    return Entry(replay, lambda: [(state.weight, state.bias) for state in states], keep=keep)


def _textbook_local(
    work: Work,
    states: list[textbook.LayerState],
    rates: Tensor,
    operands: torch.dtype,
    step: textbook.LocalStep,
) -> None:
    for state, x, gradient, name in zip(states, work.inputs, work.gradients, work.local_names, strict=True):
        a0 = F.linear(x, state.weight, state.bias)
        target = textbook.transfer(name, a0) - textbook.ACTIVATION_LR * gradient
        for t in range(len(rates)):
            step(x, target, *state.tensors(), rates[t], name, operands)


def _graph(run: Callable[[], Any], mutable: list[Tensor]) -> tuple[Callable[[], None], Any]:
    """``run`` as one CUDA graph; ``mutable`` tensors are as before after the capture."""
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


# --- (e) ours


def _ours(work: Work, precision: str, backend: str, use: dict[str, Any] | None = None) -> Entry:
    compute_dtype = None if precision in ("fp32", "tf32") else _DTYPES[precision]
    if work.case.scope == "step":
        run, parameters, reports, _ = _ours_step(work, compute_dtype, backend)
    else:
        run, parameters, reports, _ = _ours_local(work, compute_dtype, backend)

    def details() -> dict[str, Any]:
        report = reports()
        return {"backend": report.backend, "driver": report.driver}

    if use is not None:
        run = _with_kernels(run, use)
    return Entry(_with_tf32(run, precision == "tf32"), parameters, details)


def _ours_graph(work: Work, precision: str) -> Entry:
    """The whole of ours as one CUDA graph, with the state made before the capture."""
    compute_dtype = _DTYPES[precision]
    if work.case.scope == "step":
        run, parameters, _, state = _ours_step(work, compute_dtype, "triton")
    else:
        run, parameters, _, state = _ours_local(work, compute_dtype, "triton")
    run()
    with torch.no_grad():
        for changed, start in zip(parameters(), work.parameters, strict=True):
            for tensor, value in zip(changed, start, strict=True):
                if tensor is not None and value is not None:
                    tensor.copy_(value)
        for slot in state():
            slot.zero_()  # where RMSprop starts
        mutable = [*(tensor for pair in parameters() for tensor in pair if tensor is not None), *state()]
    replay, keep = _graph(run, mutable)
    return Entry(replay, parameters, keep=(keep, run))


def _with_kernels(run: Callable[[], Any], use: dict[str, Any]) -> Callable[[], Any]:
    """``run`` with a driver or a configuration of the Triton kernels that is not the default one."""
    from locoprop_kernels.kernels import configs

    def wrapped() -> Any:
        with configs.use(**use):
            return run()

    return wrapped


def _ours_step(work: Work, compute_dtype: torch.dtype | None, backend: str) -> tuple[Any, Any, Any, Any]:
    model = work.model()
    optimizer = work.optimizer(model, backend=backend, compute_dtype=compute_dtype)

    def run() -> None:
        optimizer.zero_grad()
        work.loss(model(work.x), work.y).backward()
        optimizer.step()

    trained = work.trained(model)

    def state() -> list[Tensor]:
        return [slot for slots in optimizer.state.values() for slot in slots.values()]

    return run, lambda: [(m.weight, m.bias) for m in trained], lambda: optimizer.last_reports[0], state


def _ours_local(work: Work, compute_dtype: torch.dtype | None, backend: str) -> tuple[Any, Any, Any, Any]:
    problems = work.problems()
    reports: list[lk.StepReport] = []

    def run() -> None:
        reports[:] = [lk.local_steps_(problems, lr=work.rates, backend=backend, compute_dtype=compute_dtype)]

    def state() -> list[Tensor]:
        return [slot for p in problems for slots in p.state.values() for slot in slots.values()]

    return run, lambda: [(p.weight, p.bias) for p in problems], lambda: reports[-1], state


# --- (f) the floor: only the necessary products, through the routine of torch that ours takes


def _floor(work: Work, precision: str) -> Entry:
    dtype = _DTYPES[precision]
    operands = []
    for layer, local in zip(work.case.layers, work.local_names, strict=True):
        x = torch.randn(layer.batch, layer.inputs, device=work.device).to(dtype)
        gram = local == "identity" and layer.inputs**2 * (
            layer.batch + layer.outputs * (work.case.iterations - 1)
        ) < 2 * layer.macs * (work.case.iterations - 1)
        e = torch.randn(layer.outputs, layer.batch, device=work.device).to(dtype)
        delta = torch.randn(layer.outputs, layer.inputs, device=work.device).to(dtype)
        operands.append((layer, x, e, delta, gram))

    def mm(left: Tensor, right: Tensor) -> Tensor:
        if left.is_cuda:
            return torch.mm(left, right)
        return product(rounded(left, left.dtype), rounded(right, right.dtype), left.dtype)

    def x_gram(x: Tensor) -> Tensor:
        return products.gram(rounded(x, x.dtype), torch.float32).to(x.dtype)

    def run() -> None:
        for i, (_, x, e, delta, gram) in enumerate(operands):
            if work.case.scope == "step":  # forward and backward pass, in float32 as the model's
                wide, back, weight = full[i]
                torch.mm(wide, weight.t())
                torch.mm(back, wide)
                if i > 0:
                    torch.mm(back.t(), weight)
            c = x_gram(x) if gram and work.case.iterations > 1 else x
            for _ in range(work.case.iterations - 1):
                if gram:
                    mm(delta, c)
                else:
                    mm(delta, x.t())
                    mm(e, x)

    full = [(x.float(), e.float(), delta.float()) for _, x, e, delta, _ in operands]
    run = torch.no_grad()(_with_tf32(run, precision == "tf32"))
    if work.device.type == "cuda":
        replay, keep = _graph(run, [])
        return Entry(replay, keep=keep)
    return Entry(run)


# --- (g) an ordinary training step


def _ordinary(work: Work, make: Callable[[Any], torch.optim.Optimizer]) -> Entry:
    model = work.model()
    optimizer = make(model.parameters())

    def run() -> None:
        optimizer.zero_grad()
        work.loss(model(work.x), work.y).backward()
        optimizer.step()

    return Entry(_with_tf32(run, False))


def with_config(config: Any, precision: str = "bf16", driver: str | None = None) -> Contestant:
    """Ours with a configuration of the Triton kernels (``locoprop_kernels.kernels.configs.Config``), to tune them."""
    name = f"{config.n}x{config.b}x{config.k}-r{config.r}-w{config.warps}-s{config.stages}-p{config.parts}"
    use = {"config": config, "driver": driver}
    build = partial(_ours, precision=precision, backend="triton", use=use)
    return Contestant(f"ours-{precision}-{driver or 'auto'}-{name}", build, precision=precision)


def all_contestants(device: torch.device) -> list[Contestant]:
    """Everything that can take part on ``device``; the first that is available is the baseline of the ratios."""
    gpu = device.type == "cuda"
    found = [
        Contestant("package", _package, _first(_only_steps, _has_package), tolerance=1e-3),
        Contestant("textbook", partial(_textbook, precision="fp32", compiled=False, graphed=False), tolerance=1e-3),
        Contestant(
            "textbook-compiled",
            partial(_textbook, precision="fp32", compiled=True, graphed=False),
            _compiler,
            tolerance=1e-2,  # a compiled convolution rounds unlike the eager one of the forward pass
            slow_start=True,
        ),
    ]
    for precision, tolerance in (("bf16", 1.0), ("tf32", 0.3)) if gpu else (("bf16", 1.0),):
        make = partial(_textbook, precision=precision)
        options: dict[str, Any] = {"tolerance": tolerance, "precision": precision}
        found.append(Contestant(f"textbook-{precision}", partial(make, compiled=False, graphed=False), **options))
    for precision, tolerance in (("fp32", 1e-3), ("tf32", 0.3), ("bf16", 1.0)) if gpu else ():
        make = partial(_textbook, precision=precision, graphed=True)
        options = {"unavailable": _only_gpu, "tolerance": tolerance, "precision": precision}
        found.append(Contestant(f"textbook-graph-{precision}", partial(make, compiled=False), **options))
        if precision != "tf32":
            compiled = partial(make, compiled=True)
            found.append(Contestant(f"textbook-compiled-graph-{precision}", compiled, **options, slow_start=True))
    precisions = {"fp32": 1e-4, "bf16": 1e-2, **({"tf32": 3e-3, "fp16": 1e-2} if gpu else {})}
    for backend in ("triton", "reference") if gpu else ("reference",):
        for precision, tolerance in precisions.items():
            if backend == "reference" and gpu and precision not in ("fp32", "bf16"):
                continue
            name = f"ours-{precision}" if backend == "triton" or not gpu else f"ours-reference-{precision}"
            build = partial(_ours, precision=precision, backend=backend)
            found.append(Contestant(name, build, tolerance=tolerance, precision=precision))
    for driver in ("single", "grouped") if gpu else ():
        build = partial(_ours, precision="bf16", backend="triton", use={"driver": driver})
        found.append(Contestant(f"ours-bf16-{driver}", build, precision="bf16"))
    if gpu:
        found.append(Contestant("ours-graph-bf16", partial(_ours_graph, precision="bf16"), precision="bf16"))
    for precision in ("fp32", "bf16", "tf32") if gpu else ("fp32", "bf16"):
        found.append(Contestant(f"floor-{precision}", partial(_floor, precision=precision), precision=precision))
    fused = partial(torch.optim.Adam, lr=1e-3, fused=True)
    found.append(Contestant("adam-fused", partial(_ordinary, make=fused), _only_steps))
    rmsprop = partial(torch.optim.RMSprop, lr=LR, eps=1e-6, momentum=0.999, alpha=0.9)
    found.append(Contestant("rmsprop", partial(_ordinary, make=rmsprop), _only_steps))
    return found
