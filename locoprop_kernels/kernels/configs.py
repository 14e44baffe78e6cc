"""Tile sizes per architecture and operand precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from locoprop_kernels.kernels.inspection import Variant

__all__ = ["Config", "default", "driver", "programs", "use", "variants"]


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of the tile kernels.

    Attributes:
        n: rows of the weight in a tile.
        b: examples in an activation tile.
        k: columns of the weight in an update tile.
        r: length of a step along the reduction.
        warps: warps per program.
        stages: depth of the load pipeline.
        parts: into how many parts (1, 2, 4) the epilogues cut a tile, to save registers.
    """

    n: int
    b: int
    k: int
    r: int
    warps: int = 8
    stages: int = 3
    parts: int = 1

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# In the interpreter an operation costs the same for any tile; different sizes catch swapped dimensions.
_INTERPRETER = Config(n=16, b=64, k=128, r=32)

# Chosen from compile reports: the largest tiles that neither spill nor exceed the shared memory. Nothing is measured.
_EXACT = Config(n=64, b=64, k=64, r=16, warps=4, stages=2, parts=4)
_SMALL = Config(n=128, b=128, k=64, r=32, warps=8, stages=3, parts=4)
_SIXTEEN_BITS = {
    "sm_80": Config(n=128, b=128, k=128, r=32, warps=8, stages=3, parts=4),
    "sm_90": Config(n=128, b=128, k=128, r=64, warps=8, stages=3, parts=4),
    "sm_100": Config(n=128, b=128, k=64, r=64, warps=8, stages=3, parts=4),
    "gfx90a": Config(n=128, b=128, k=128, r=32, warps=8, stages=2, parts=4),
    "gfx942": Config(n=128, b=128, k=128, r=32, warps=8, stages=2, parts=4),
}
_TF32 = {
    target: Config(n=128, b=128, k=128, r=32, warps=8, stages=3, parts=4)
    for target in ("sm_80", "sm_90", "sm_100", "sm_120")
}


# Where the table of the target or precision spills: (target, precision).
_EXCEPTIONS = {
    ("sm_100", "fp16"): Config(n=128, b=128, k=64, r=64, warps=4, stages=3, parts=4),
    ("sm_100", "ieee"): Config(n=64, b=64, k=32, r=16, warps=4, stages=2, parts=4),
}


@dataclass
class _Override:
    config: Config | None = None
    driver: str | None = None
    programs: int | None = None


_override = _Override()


def default(target: str, precision: str) -> Config:
    """The configuration for a target (``"sm_90"``, ``"gfx942"``, ``"interpreter"``).

    Args:
        target: backend and architecture.
        precision: ``"bf16"``, ``"fp16"``, ``"tf32"`` or ``"ieee"`` (float32).
    """
    if _override.config is not None:
        return _override.config
    if target == "interpreter":
        return _INTERPRETER
    if (target, precision) in _EXCEPTIONS:
        return _EXCEPTIONS[target, precision]
    if precision == "ieee":
        return _EXACT
    table = _TF32 if precision == "tf32" else _SIXTEEN_BITS
    return table.get(target, _SMALL)


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
        programs: programs of the single launch; the caller answers for their being resident at once.
    """
    global _override
    before, _override = _override, _Override(config, driver, programs)
    try:
        yield
    finally:
        _override = before


def variants(target: str) -> list[Variant]:
    """Every kernel in its default configurations for ``target``, as it would be launched."""
    from locoprop_kernels.kernels.variants import variants

    return variants(target)
