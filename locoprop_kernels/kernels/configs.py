"""Tile sizes per architecture and operand precision, and the choice among them and between drivers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from locoprop_kernels import schedule

__all__ = [
    "Choice",
    "Config",
    "candidates",
    "choose",
    "driver",
    "gram_pays",
    "predicted",
    "programs",
    "use",
]

Layers = tuple[tuple[int, int, int], ...]

# Beyond this a local step takes so long that two launches cost nothing, and the hardware's own queue balances better.
_MOST_TILES_PER_PROGRAM = 64


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of the tile kernels.

    Attributes:
        n: rows of the weight in a tile.
        b: examples in an activation tile.
        k: columns of the weight in an update tile.
        r: length of a step along the reduction; divides ``b`` and ``k``, so that whole tiles are whole steps.
        warps: warps per program.
        stages: depth of the load pipeline.
        parts: into how many parts (1, 2, 4, 8) the epilogues cut a tile, to save registers.
        occupancy: programs of the single launch that a multiprocessor holds at once: while one waits for its loads or
            writes a tile, another multiplies.
        general: whether every kernel may use it. Where some would spill, only the launches per phase of the product
            form do, without masks and with rules of at most two slots.
    """

    n: int
    b: int
    k: int
    r: int
    warps: int = 8
    stages: int = 3
    parts: int = 1
    occupancy: int = 1
    general: bool = True

    def __post_init__(self) -> None:
        if self.r < 1 or self.b % self.r or self.k % self.r:  # the padding up to r would be read, but never written
            raise ValueError(f"r must divide b and k, got r={self.r}, b={self.b}, k={self.k}")

    @property
    def tiles(self) -> schedule.Tiles:
        """For the schedule."""
        return schedule.Tiles(self.n, self.b, self.k)

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# In the interpreter an operation costs the same for any tile; different sizes catch swapped dimensions.
_INTERPRETER = Config(n=16, b=64, k=128, r=32)

# Chosen with `python -m bench.tune` for their predicted times, among those that neither spill nor exceed the shared
# memory. Nothing is measured.
_EXACT = Config(n=64, b=64, k=64, r=16, warps=8, stages=2, parts=4)
_SMALL = Config(n=128, b=128, k=64, r=32, warps=8, stages=3, parts=8)
_SQUARE = Config(n=128, b=128, k=128, r=32, warps=8, stages=3, parts=8)
_AMD = Config(n=128, b=128, k=128, r=32, warps=8, stages=2, parts=4)
_TABLE: dict[tuple[str, str], tuple[Config, ...]] = {
    ("sm_80", "bf16"): (_SQUARE,),
    ("sm_80", "fp16"): (_SQUARE,),
    ("sm_80", "tf32"): (_SQUARE,),
    ("sm_90", "bf16"): (
        Config(n=128, b=128, k=64, r=64, warps=8, stages=4, parts=2),
        Config(n=64, b=64, k=64, r=64, warps=4, stages=4, parts=4, occupancy=2),
        Config(n=128, b=256, k=256, r=64, warps=8, stages=4, parts=8, general=False),
    ),
    ("sm_90", "fp16"): (
        Config(n=128, b=128, k=64, r=64, warps=8, stages=4, parts=2),
        Config(n=64, b=64, k=64, r=64, warps=4, stages=4, parts=4, occupancy=2),
    ),
    ("sm_90", "tf32"): (
        Config(n=128, b=128, k=64, r=32, warps=8, stages=4, parts=2),
        Config(n=64, b=64, k=64, r=32, warps=4, stages=4, parts=4, occupancy=2),
        Config(n=128, b=256, k=256, r=32, warps=8, stages=4, parts=8, general=False),
    ),
    ("sm_100", "bf16"): (Config(n=128, b=128, k=64, r=64, warps=8, stages=3, parts=4),),
    ("sm_100", "fp16"): (Config(n=128, b=128, k=64, r=64, warps=4, stages=3, parts=4),),
    ("sm_100", "tf32"): (_SQUARE,),
    ("sm_100", "ieee"): (Config(n=64, b=64, k=32, r=16, warps=4, stages=2, parts=4),),
    ("sm_120", "tf32"): (_SQUARE,),
    ("gfx90a", "bf16"): (_AMD,),
    ("gfx90a", "fp16"): (_AMD,),
    ("gfx942", "bf16"): (_AMD,),
    ("gfx942", "fp16"): (_AMD,),
}
# Where the above would spill registers with a mask.
_MASKED: dict[tuple[str, str], tuple[Config, ...]] = {
    ("sm_100", "fp16"): (Config(n=128, b=128, k=64, r=64, warps=8, stages=3, parts=8),),
}
_OTHERS = {"bf16": (_SMALL,), "fp16": (_SMALL,), "tf32": (_SMALL,), "ieee": (_EXACT,)}


@dataclass
class _Override:
    config: Config | None = None
    driver: str | None = None
    programs: int | None = None


_override = _Override()


def candidates(target: str, precision: str, masked: bool = False) -> tuple[Config, ...]:
    """The configurations for a target (``"sm_90"``, ``"gfx942"``, ``"interpreter"``), to choose from by size.

    Args:
        target: backend and architecture.
        precision: ``"bf16"``, ``"fp16"``, ``"tf32"`` or ``"ieee"`` (float32).
        masked: those that do not spill registers where a parameter has a mask.
    """
    if _override.config is not None:
        return (_override.config,)
    others = (_INTERPRETER,) if target == "interpreter" else _OTHERS[precision]
    found = _TABLE.get((target, precision), others)
    if masked:
        return _MASKED.get((target, precision), tuple(config for config in found if config.general))
    return found


def predicted(config: Config, driver: str, layers: Layers, form: str, multiprocessors: int) -> float:
    """Cost of a local step in multiply-accumulates of one program, waits included; a pure function.

    Args:
        config: tile sizes.
        driver: ``"single"`` or ``"grouped"``.
        layers: ``(B, K, N)`` of each layer.
        form: ``"gram"`` has no activation phase.
        multiprocessors: of the device.
    """
    if driver == "single":
        plan = schedule.build(layers, config.tiles, multiprocessors * config.occupancy)
        queues = plan.activation_queues + plan.update_queues
        together = queues.reshape(config.occupancy, multiprocessors).sum(0)  # those of a multiprocessor share its rates
        return float(together.max() / queues.max()) * plan.makespan(3) / 3 + 2 * schedule.WAIT
    activation, update = schedule.phase_bounds(layers, config.tiles, multiprocessors)
    if form == "gram":
        return max(update + schedule.LAUNCH, schedule.HOST_LAUNCH)
    return max(activation + update + 2 * schedule.LAUNCH, 2 * schedule.HOST_LAUNCH)


class Choice(NamedTuple):
    """How to run a group of layers.

    Attributes:
        config: tile sizes.
        programs: of the single launch; 0 for launches per phase.
        splits: parts of the batch in the products of each layer's update tiles.
    """

    config: Config
    programs: int
    splits: tuple[int, ...]


def _best(
    found: tuple[Config, ...], layers: Layers, form: str, slots: int, multiprocessors: int, driver: str | None
) -> tuple[float, str, Config]:
    """The lowest predicted cost of a local step, and the driver and configuration that have it."""
    if form != "product":
        driver = "grouped"
    options = []
    for config in found:
        if not config.general and (form != "product" or slots > 2 or driver == "single"):
            continue
        few = sum(schedule.count_tiles(layers, config.tiles)) <= _MOST_TILES_PER_PROGRAM * multiprocessors
        if driver == "single" or (driver is None and config.general and few):
            options.append(("single", config))
        if driver != "single":
            options.append(("grouped", config))
    if not options:
        raise ValueError(f"found must hold a configuration that every kernel may use (general=True), got {found}")
    costs = [predicted(config, name, layers, form, multiprocessors) for name, config in options]
    best = costs.index(min(costs))
    return costs[best], *options[best]


@lru_cache(maxsize=1024)
def choose(
    found: tuple[Config, ...], layers: Layers, form: str, slots: int, multiprocessors: int, driver: str | None = None
) -> Choice:
    """The configuration and driver with the lowest predicted cost; a pure function.

    Args:
        found: the configurations to choose from; the first of equals is taken.
        layers: ``(B, K, N)`` of each layer.
        form: ``"product"``, which has a single launch, or another.
        slots: tensors of the rule's state.
        multiprocessors: of the device.
        driver: ``"single"`` or ``"grouped"`` to have only that, where the form has both.
    """
    _, best, config = _best(found, layers, form, slots, multiprocessors, driver)
    if best == "single":
        return Choice(config, multiprocessors * config.occupancy, (1,) * len(layers))
    return Choice(
        config, 0, (1,) * len(layers) if form == "gram" else schedule.splits(layers, config.tiles, multiprocessors)
    )


@lru_cache(maxsize=1024)
def gram_pays(found: tuple[Config, ...], layers: Layers, iterations: int, slots: int, multiprocessors: int) -> bool:
    """Whether the Gram form of these layers is predicted to take less time, launches included; a pure function.

    A small layer with an identity transfer is better off in the launches of the others. Arguments as of
    :func:`choose`; ``iterations`` is ``T``.
    """
    grams = tuple((k, k, n) for _, k, n in layers)
    products = sum(b * k * k for b, k, _ in layers) / multiprocessors
    gram, *_ = _best(found, grams, "gram", slots, multiprocessors, None)
    product, *_ = _best(found, layers, "product", slots, multiprocessors, None)
    return products + iterations * gram < (iterations - 1) * product


def driver() -> str | None:
    """The driver asked for by :func:`use`, or ``None``."""
    return _override.driver


def programs() -> int | None:
    """The number of programs of the single launch asked for by :func:`use`, or ``None``."""
    return _override.programs


@contextmanager
def use(config: Config | None = None, driver: str | None = None, programs: int | None = None) -> Iterator[None]:
    """Run with these instead of the defaults: for tests, and for measuring configurations.

    Args:
        config: tile sizes and launch options.
        driver: ``"single"`` or ``"grouped"``, for layers that take either.
        programs: multiprocessors to assume, so of the single launch's programs; no more than the device has. In the
            interpreter the caller answers for their running at once.
    """
    global _override
    before, _override = _override, _Override(config, driver, programs)
    try:
        yield
    finally:
        _override = before
