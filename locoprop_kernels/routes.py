"""Which of torch's routines multiplies matrices on this processor: a short measurement, kept in a cache file.

No routine is the fastest everywhere: in float32 oneDNN beats MKL on AMD's processors and MKL beats oneDNN on some of
Intel's, and bfloat16 is slower than float32 where a processor has no instructions for it. So the routes are timed on
the two products of a local step, once for a processor and a version of torch, when the first product needs it: in one
thread, as routes differ in the instructions that they use, and other processes disturb one thread least. A route
displaces the default one only if it is clearly faster, so that noise does not decide.

Environment variables:
    LOCOPROP_CPU_PRODUCTS: forces routes, and nothing is measured: ``"onednn"`` for all operands that have this route,
        or ``"float32=mm,bfloat16=upcast"``.
    LOCOPROP_CACHE_DIR: the folder of the cache file; empty for none. By default ``locoprop`` in ``$XDG_CACHE_HOME`` or
        in ``~/.cache``.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from locoprop_kernels import route_cache

__all__ = ["CLEARLY", "Choice", "adopt", "available", "choose", "multiply", "route", "runs"]

#: How much faster than the default route another one has to be.
CLEARLY = 1.15
_SURELY = 1.5  # the same on a busy machine
_FORCE = "LOCOPROP_CPU_PRODUCTS"
# Outputs, examples and inputs of the layer that is timed: less than a millisecond a product.
_LAYER = (256, 256, 512)
_ROUNDS = 8  # at least
_SECONDS = 0.1  # after which no round begins
# Settings of the libraries that change what they do, and so what is fastest.
_SETTINGS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ATEN_CPU_CAPABILITY")

# Time of this thread alone, where it is known finely enough: other processes then count for little.
_now = time.thread_time if sys.platform.startswith(("linux", "darwin")) else time.perf_counter
_log = logging.getLogger("locoprop_kernels")


class Choice(NamedTuple):
    """A route, and why it was taken.

    Attributes:
        route: ``"mm"``: ``torch.mm``, which takes MKL in float32 where torch was built with it. ``"onednn"``: oneDNN's
            operator for linear layers. ``"upcast"``: operands are rounded, kept in float32 and multiplied by its route.
        why: a few words for people.
    """

    route: str
    why: str


_chosen: dict[torch.dtype, Choice] = {}


def route(operands: torch.dtype) -> str:
    """The route of products with such operands on CPUs, the same one for the life of the process; see :class:`Choice`.

    Raises:
        ValueError: ``LOCOPROP_CPU_PRODUCTS`` asks for a route that there is not.
    """
    return choose(operands).route


def choose(operands: torch.dtype) -> Choice:
    """The route of products with such operands on CPUs and the reason; chosen, and logged, at the first call.

    Raises:
        ValueError: ``LOCOPROP_CPU_PRODUCTS`` asks for a route that there is not.
    """
    if operands not in _chosen:
        # Of several threads that got here, the first decides.
        choice = _chosen.setdefault(operands, _forced(operands) or _found(operands))
        _log.info("products with %s operands on this CPU: route %r (%s)", _name(operands), *choice)
    return _chosen[operands]


def adopt(operands: torch.dtype, by: str) -> None:
    """Take a route from now on, so that this process computes the same as another one.

    Raises:
        ValueError: this processor cannot take it.
    """
    if by not in available(operands) or (by != "upcast" and not runs(operands, by)):
        raise ValueError(f"this processor cannot multiply {_name(operands)} operands by route {by!r}: set {_FORCE}")
    _chosen[operands] = Choice(by, "as another process does")


def available(operands: torch.dtype) -> tuple[str, ...]:
    """The routes that products with such operands may take on CPUs, the default one first."""
    if operands in (torch.float16, torch.float8_e4m3fn):
        # The others round the result to float16 too, which has no room for sums over a batch; float8 has no others.
        return ("upcast",)
    routes = ("mm", "onednn") if _onednn_linear is not None else ("mm",)
    if operands == torch.float32:
        # MKL is Intel's, and takes slower paths on the processors of others.
        return routes if "Intel" in route_cache.processor() else tuple(reversed(routes))
    if operands == torch.bfloat16:
        return (*routes, "upcast") if _multiplies_bfloat16() else ("upcast", *routes)
    return ("mm",)


def multiply(left: Tensor, right: Tensor, by: str, out: Tensor | None = None) -> Tensor:
    """``left @ right`` of two matrices of one dtype, ``by`` route ``"mm"`` or ``"onednn"``.

    The result is in ``out`` where there is such memory and the routine can write to it, and else in a new tensor.
    """
    # oneDNN takes no empty matrix.
    if by == "mm" or not left.numel() or not right.numel():
        return torch.mm(left, right, out=out)
    assert _onednn_linear is not None
    if not (right.is_contiguous() or right.t().is_contiguous()):
        right = right.contiguous()  # oneDNN would take a routine a thousand times slower
    return _onednn_linear(left, right.t(), None, "none", [], "")


def _find_onednn_linear() -> Callable[..., Tensor] | None:
    """The operator that torch.compile uses for linear layers on CPUs, or ``None`` in a build of torch without it."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_onednn_linear = _find_onednn_linear()


def _multiplies_bfloat16() -> bool:
    """Whether the processor says that it has instructions for it. The names are not in every version of torch."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _forced(operands: torch.dtype) -> Choice | None:
    """What ``LOCOPROP_CPU_PRODUCTS`` says about such operands."""
    text = os.environ.get(_FORCE, "").strip()
    asked: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, _, by = part.rpartition("=")
        asked[name.strip()] = by.strip()
    dtypes = {_name(dtype): available(dtype) for dtype in (torch.float32, torch.bfloat16)}
    for name, by in asked.items():
        known = dtypes.get(name, ()) if name else {by for routes in dtypes.values() for by in routes}
        if by not in known:
            what = "; ".join(f"{dtype}={' or '.join(routes)}" for dtype, routes in dtypes.items())
            raise ValueError(f"{_FORCE} must name routes that there are ({what}), got {text!r}")
    by = asked.get(_name(operands), asked.get("", ""))
    if by not in available(operands) or len(available(operands)) == 1:
        return None
    if by != "upcast" and not runs(operands, by):
        others = " or ".join(other for other in available(operands) if other != by)
        raise ValueError(f"{_FORCE}: this processor cannot take {_name(operands)}={by}, take {others}, got {text!r}")
    return Choice(by, f"{_FORCE}={text}")


def _found(operands: torch.dtype) -> Choice:
    """The clearly fastest route, from the cache file or by measurement."""
    routes = available(operands)
    if len(routes) == 1:
        return Choice(routes[0], "the only one")
    key = {
        "processor": route_cache.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "operands": _name(operands),
        "routes": list(routes),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }
    if operands == torch.bfloat16:
        key["float32"] = route(torch.float32)
    if (kept := route_cache.read(key)) is not None:
        return Choice(kept, "measured before, kept in a cache file")
    with torch.no_grad(), _without_modes(), _one_thread():
        seconds, medians, settled = _measure(operands, [by for by in routes if by == "upcast" or runs(operands, by)])
    best = min(seconds, key=lambda by: seconds[by])
    margin, default = CLEARLY if settled else _SURELY, routes[0]
    if default in seconds and any(times[default] <= margin * times[best] for times in (seconds, medians)):
        best = default
    if not settled:
        return Choice(best, "measured on a busy machine, and not kept")
    # Processes that measure at the same time take what the first of them has found.
    return Choice(route_cache.keep(key, best, seconds), "measured")


def runs(operands: torch.dtype, by: str) -> bool:
    """Whether the route has a routine for this processor at all."""
    one = torch.ones(16, 16, dtype=operands, device="cpu")
    try:
        multiply(one, one, by)
    except RuntimeError:
        return False
    return True


def _without_modes() -> AbstractContextManager[object]:
    """Out of reach of what counts or rewrites torch's operations in this thread, if torch lets us."""
    try:
        from torch.utils._python_dispatch import _disable_current_modes
    except ImportError:
        return nullcontext()
    return _disable_current_modes()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _measure(operands: torch.dtype, routes: list[str]) -> tuple[dict[str, float], dict[str, float], bool]:
    """Least and median seconds of the two products of a local step by each route, and whether the samples agree.

    Routes that a small layer shows to be far slower than another are left out: one sample of them may take as long as
    all others.
    """
    trial = {by: min(_samples(operands, by, (64, 64, 64), 3)) for by in routes}
    works = {by: _products(operands, by, _LAYER) for by in routes if trial[by] < 4 * min(trial.values())}
    runs = {(by, i): run for by, work in works.items() for i, run in enumerate(work)}
    for run in runs.values():
        run()
    samples: dict[tuple[str, int], list[float]] = {which: [] for which in runs}
    begin = _now()
    while not (settled := _settled(samples)) and _now() - begin < _SECONDS:
        for which, run in runs.items():
            samples[which].append(_clock(run))
    least, medians = ({by: f(samples[by, 0]) + f(samples[by, 1]) for by in works} for f in (min, median))
    return least, medians, settled


def _settled(samples: dict[tuple[str, int], list[float]]) -> bool:
    """Whether there are enough samples, and the third best of everything is about as good as the best."""
    return all(len(times) >= _ROUNDS and sorted(times)[2] <= CLEARLY * min(times) for times in samples.values())


def _samples(operands: torch.dtype, by: str, layer: tuple[int, int, int], count: int) -> list[float]:
    forward, back = _products(operands, by, layer)
    return [_clock(forward) + _clock(back) for _ in range(count)]


def _clock(run: Callable[[], object]) -> float:
    begin = _now()
    run()
    return _now() - begin


def _products(operands: torch.dtype, by: str, layer: tuple[int, int, int]) -> list[Callable[[], Tensor]]:
    """``Δ Xᵀ`` and ``E X`` as a local step has them: ``Δ`` and ``E`` are rounded each time, ``X`` has been already."""
    n, b, k = layer
    held = torch.float32 if by == "upcast" else operands
    by = route(torch.float32) if by == "upcast" else by

    def matrix(rows: int, columns: int) -> Tensor:
        values = torch.linspace(-1, 1, rows * columns, dtype=torch.float32, device="cpu")
        return values.view(rows, columns)

    def product(left: Tensor, right: Tensor) -> Tensor:
        return multiply(left.to(operands).to(held), right, by).to(torch.float32)

    x, delta, errors = matrix(b, k).to(operands).to(held), matrix(n, k), matrix(n, b)
    return [lambda: product(delta, x.t()), lambda: product(errors, x)]
