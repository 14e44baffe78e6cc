"""Tile sizes per architecture and operand precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Config", "default", "use"]


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
        split: run the epilogues on half tiles, to save registers.
    """

    n: int
    b: int
    k: int
    r: int
    warps: int = 8
    stages: int = 3
    split: bool = False

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# In the interpreter an operation costs the same for any tile; different sizes catch swapped dimensions.
_INTERPRETER = Config(n=16, b=64, k=128, r=32)
_DEFAULTS = {
    ("cuda:90", "bf16"): Config(n=128, b=128, k=128, r=64, split=True),
    ("cuda:90", "fp16"): Config(n=128, b=128, k=128, r=64, split=True),
    ("cuda:90", "tf32"): Config(n=128, b=128, k=128, r=32, split=True),
    ("cuda:90", "ieee"): Config(n=64, b=64, k=64, r=16, warps=4, stages=2),
}
_override: Config | None = None


def default(target: str, precision: str) -> Config:
    """The configuration for a target (``"cuda:90"``, ``"hip:gfx942"``, ``"interpreter"``).

    Args:
        target: backend and architecture.
        precision: ``"bf16"``, ``"fp16"``, ``"tf32"`` or ``"ieee"`` (float32).
    """
    if _override is not None:
        return _override
    if target == "interpreter":
        return _INTERPRETER
    return _DEFAULTS.get((target, precision), _DEFAULTS["cuda:90", precision])


@contextmanager
def use(config: Config) -> Iterator[None]:
    """Run with ``config`` instead of the default: for tests, and for measuring configurations."""
    global _override
    before, _override = _override, config
    try:
        yield
    finally:
        _override = before
