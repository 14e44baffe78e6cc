"""The sections of a run, in the order of what they decide, each with its share of the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench import cases, device, model, report
from bench.contestants import Contestant, all_contestants, with_config
from bench.gpu.numerics import numerics
from bench.gpu.session import Session
from locoprop_kernels.kernels import configs
from locoprop_kernels.kernels.configs import Config

__all__ = ["CASES", "SECTIONS", "Section", "to_compile"]

#: What the section of all contestants times, in order of importance.
CASES = (
    "paper-local",
    "paper",
    "paper-rows-local",
    "paper-rows",
    "square-4096-B8192",
    "tokens-64k-s",
    "tokens-64k-m",
    "gpt2-mlp-x12",
    "paper-s",
    "batch-10000",
    "gpt-block-m-16k",
    "gpt-block-s-64k",
    "width-x2",
    "width-x4",
    "T-2",
    "T-50",
    "batch-100",
    "square-1024-B8192",
    "square-2048-B8192",
    "square-512-B1000",
    "depth-16",
    "convnet-B128",
    "batch-65536",
    "square-8192-B8192",
    "gpt-block-m-64k",
)
#: Local loops whose predictions are held against measurements.
PREDICTED = (
    "width-x2",
    "width-x4",
    "depth-12",
    "T-50",
    "batch-100",
    "batch-10000",
    "square-1024-B8192",
    "square-2048-B8192",
    "gpt2-mlp-x12",
    "tokens-64k-m",
)
_COMPILED_CASES = ("paper-local",)
_TUNED_CASES = ("paper-local", "square-4096-B8192")
# Configurations to compare with the chosen one: k tiles of 64 and 128, one and two programs a multiprocessor.
_CONFIGS = (
    (Config(128, 128, 64, 64, warps=8, stages=4, slices=2), "single"),
    (Config(128, 128, 128, 64, warps=8, stages=4, slices=4), "single"),
    (Config(128, 128, 128, 64, warps=8, stages=3, slices=4), "single"),
    (Config(64, 64, 64, 64, warps=4, stages=4, slices=4), "single"),
    (Config(64, 64, 64, 64, warps=4, stages=4, slices=4, occupancy=2), "single"),
    (Config(128, 128, 128, 64, warps=4, stages=3, slices=8, occupancy=2), "single"),
    (Config(128, 128, 64, 64, warps=8, stages=4, slices=2), "grouped"),
    (Config(128, 128, 128, 64, warps=8, stages=4, slices=4), "grouped"),
    (Config(128, 256, 256, 64, warps=8, stages=4, slices=8, driver="grouped"), "grouped"),
    (Config(128, 256, 256, 64, warps=8, stages=3, slices=8, driver="grouped"), "grouped"),
)
# In the interpreter, where programs run one after another.
_TINY_CONFIGS = ((Config(n=16, b=64, k=128, r=32), "single"), (Config(n=16, b=64, k=64, r=32), "grouped"))


@dataclass(frozen=True)
class Section:
    """Part of a run.

    Attributes:
        name: what ``--section`` takes.
        seconds: its share of eight minutes.
        run: measures, and puts what it finds into the session.
    """

    name: str
    seconds: float
    run: Callable[[Session], None]


def _ours(session: Session) -> Contestant:
    """The kernels as one CUDA graph, as the library would launch them; dry without the graph."""
    if session.dry:
        return with_config(None)
    return next(one for one in all_contestants(session.device) if one.name == "ours-graph-bf16")


def _case(name: str) -> cases.Case:
    """Its local loops."""
    (found,) = cases.select([name], quick=False)[:1]
    return replace(found, scope="local", name=name)


def _predicted(session: Session, case: cases.Case, config: Config | None = None, driver: str = "") -> float:
    """Seconds of the local loops in a CUDA graph, which has no start."""
    if config is None:
        found = model.predict(case, device=session.model)
    else:
        found = model.predict_with(case, config, driver, session.model)
    return found.seconds - session.model.start


def to_compile() -> list[tuple[cases.Case, Config | None, str | None]]:
    """What is compiled ahead, the most important first."""
    chosen: list[tuple[Config | None, str | None]] = [(None, None), *_CONFIGS]
    return [(_case(name), config, driver) for config, driver in chosen for name in _TUNED_CASES]


def _numerics(session: Session) -> None:
    if session.options.skip_numerics:
        session.skip("the tests", "--skip-numerics")
        return
    session.results["numerics"] = numerics(max(10.0, session.left), session.console, session.dry)
    session.save()


def _rates(session: Session) -> None:
    """Products and copies through torch, on which everything else rests."""
    session.results["rates"] = rates = device.rates(session.device, size=64 if session.dry else None)
    report.print_device(session.console, session.results)
    if session.dry:
        # Estimates of what a case takes should leave none out.
        session.results["rates"] = rates | {"fp32_torch_mm": 1e12}
    found = session.model
    for name, predicted in (("bf16", found.flops_bf16), ("tf32", found.flops_tf32), ("fp32", found.flops_ieee)):
        if name in rates:
            session.compare(f"products in {name}", predicted / 1e12, rates[name] / 1e12, "TFLOP/s")
    session.compare("copy, read and written", found.memory_bandwidth / 1e12, rates["copy"] / 1e12, "TB/s")


def _paper(session: Session) -> None:
    """The local loops of the paper's network: ours and the strongest that PyTorch has, each as one CUDA graph."""
    case = _case("paper-local")
    names = ("ours-bf16", "textbook", "textbook-graph-fp32", "textbook-graph-tf32", "textbook-graph-bf16", "floor-bf16")
    others = [one for one in all_contestants(session.device) if one.name in names]
    found = session.time(case.name, case, [_ours(session), *others], _predicted(session, case))
    floor = found.get("floor-bf16")
    if floor is not None:
        predicted = model.predict(case, device=session.model).floor
        session.compare("paper-local, products alone", 1e3 * predicted, 1e3 * floor, "ms")


def _cache(session: Session) -> None:
    """Operands out of the shared cache, by products that share no loads: bytes/s where those are the limit."""
    from bench.gpu.products import read_rate

    found, dtype, size, repeats = session.model, torch.bfloat16, 2048, 32
    tiles = ((128, 128, 64), (128, 256, 64))
    if session.dry:  # whose interpreter takes bfloat16 for integers
        dtype, size, repeats, tiles = torch.float32, 64, 2, ((16, 16, 16), (16, 32, 16))
    for tile in tiles:
        programs = 3 if session.dry else found.multiprocessors
        read, multiplied = read_rate(session.device, size, tile, programs, repeats, dtype)
        most = found.flops_bf16 / multiplied * read
        limit = "the cache" if found.cache_bandwidth < most else "the products"
        session.results.setdefault("cache", []).append({"tile": tile, "bytes": read, "flops": multiplied})
        predicted = min(found.cache_bandwidth, most)
        name = f"reads of {tile[0]}x{tile[1]} tiles, limited by {limit} ({multiplied / 1e12:.3g} TFLOP/s)"
        session.compare(name, predicted / 1e12, read / 1e12, "TB/s")


def _subtraction(session: Session) -> None:
    """What parts of a step cost, by leaving them out."""
    case = _case("paper-local")
    layers, steps = case.layers, case.iterations
    relu = tuple(replace(layer, transfer="relu") for layer in layers)
    changes = [
        ("whole", case),
        ("two local steps", replace(case, iterations=2)),
        ("ReLU, the cheapest transfer with a product", replace(case, layers=relu)),
        ("first half of the layers", replace(case, layers=layers[: len(layers) // 2])),
        ("second half of the layers", replace(case, layers=layers[len(layers) // 2 :])),
    ]
    found = {}
    for name, changed in changes[1:3] if session.dry else changes:
        if session.enough(4, name):
            named = replace(changed, name=f"paper-local: {name}")
            times = session.time(named.name, named, [_ours(session)], _predicted(session, named))
            if times:
                found[name] = min(times.values())
    if {"whole", "two local steps"} <= found.keys() and not session.dry:
        measured = (found["whole"] - found["two local steps"]) / (steps - 2)
        predicted = model.predict(case, device=session.model).step
        session.compare("one more local step", 1e6 * predicted, 1e6 * measured, "µs")


def _configurations(session: Session) -> None:
    """Tile sizes, one and two programs a multiprocessor, drivers: each as one CUDA graph, beside its prediction."""
    for name in _TUNED_CASES[:1] if session.dry else _TUNED_CASES:
        case = _case(name)
        for config, driver in _TINY_CONFIGS if session.dry else _CONFIGS:
            what = f"{name}, {driver}, {config}, {config.occupancy} a multiprocessor"
            if session.enough(6, what):
                contestant = with_config(config, driver=driver, graphed=not session.dry)
                session.time(what, case, [contestant], _predicted(session, case, config, driver))


def _rows(session: Session) -> None:
    """The rows driver: local loops on 32 rows, and a batch of 100 whole."""
    case = _case("paper-rows-local")
    if session.enough(5, case.name):
        session.time(case.name, case, [_ours(session)], _predicted(session, case))
    small = _case("batch-100")
    if session.enough(5, "batch-100 by the rows driver"):
        config = next(one for one in configs.for_rows(session.model.target, "bf16") if one.b >= 100)
        name = "batch-100 by the rows driver"
        if session.dry:
            config = next(one for one in configs.for_rows("interpreter", "bf16") if one.b >= 100)
        contestant = with_config(config, driver="rows", graphed=not session.dry)
        session.time(name, small, [contestant], _predicted(session, small, config, "rows"))


def _predictions(session: Session) -> None:
    """Predictions beside measurements, for sizes that nobody has tuned for."""
    for name in PREDICTED[:2] if session.dry else PREDICTED:
        case = _case(name)
        if session.enough(6, name):
            session.time(name, case, [_ours(session)], _predicted(session, case))


def _processes(session: Session) -> None:
    """A step of two processes with a GPU each."""
    from bench.gpu import exchange

    count = 1 if session.dry else torch.cuda.device_count()
    if count < 2 and not session.dry:
        session.skip("a step of several processes", f"{count} GPU")
    elif session.enough(0 if session.dry else 20, "a step of several processes"):
        ours, adam = exchange.measure(count, session.dry, max(10.0, session.left))
        session.compare(f"{count} processes, 32 rows, a step over Adam's", None, ours / adam, "times")


def _field(session: Session) -> None:
    """All contestants of the cases, for the goals; those that compile first on one case alone."""
    found = [one for one in all_contestants(session.device) if not (session.dry and one.slow_start)]
    chosen = {case.name: case for case in cases.select(session.options.case or list(CASES), quick=False)}
    ordered = [chosen.pop(name) for name in CASES if name in chosen] + [*chosen.values()]
    for case in ordered[:1] if session.dry else ordered:
        slow = case.name in _COMPILED_CASES
        if session.enough(60 if slow and len(session.results.get("cases", {})) > 1 else 12, case.name):
            predicted = None if case.loss == "squared" else model.predict(case, device=session.model).seconds
            ours = [one for one in found if one.name.startswith("ours-bf16")][:1]
            rest = [one for one in found if one not in ours and (slow or not one.slow_start)]
            # The prediction is of the local loops alone.
            session.time(case.name, case, [*ours, *rest], predicted if case.scope == "local" else None)


SECTIONS = (
    Section("numerics", 100, _numerics),
    Section("rates", 20, _rates),
    Section("paper", 40, _paper),
    Section("cache", 20, _cache),
    Section("subtraction", 30, _subtraction),
    Section("configurations", 85, _configurations),
    Section("rows", 15, _rows),
    Section("predictions", 60, _predictions),
    Section("processes", 30, _processes),
    Section("field", 60, _field),
)
