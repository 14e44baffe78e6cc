"""Tile sizes per architecture and operand precision, and how to run with others for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from locoprop_kernels import schedule

__all__ = [
    "PRECISIONS",
    "Asked",
    "Config",
    "asked",
    "candidates",
    "for_rows",
    "use",
]


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
        slices: into how many slices (1, 2, 4, 8) the epilogues cut a tile, to save registers.
        occupancy: programs of the single launch that a multiprocessor holds at once: while one waits for its loads or
            writes a tile, another multiplies.
        driver: the only driver that takes it, ``"single"`` or ``"grouped"``, for problems in product form without masks
            and rules of at most two slots, because other kernels would spill; ``None`` where every kernel may use it.
    """

    n: int
    b: int
    k: int
    r: int
    warps: int = 8
    stages: int = 3
    slices: int = 1
    occupancy: int = 1
    driver: str | None = None

    def __post_init__(self) -> None:
        if self.r < 1 or self.b % self.r or self.k % self.r:  # the padding up to r would be read, but never written
            raise ValueError(f"r must divide b and k, got r={self.r}, b={self.b}, k={self.k}")

    @property
    def general(self) -> bool:
        """Whether every kernel may use it."""
        return self.driver is None

    @property
    def tiles(self) -> schedule.Tiles:
        """For the schedule."""
        return schedule.Tiles(self.n, self.b, self.k)

    def __str__(self) -> str:
        slices = f", epilogues in {self.slices} slices" if self.slices > 1 else ""
        return (
            f"tiles of {self.n} x {self.b} x {self.k} in steps of {self.r}, "
            f"{self.warps} warps, {self.stages} stages{slices}"
        )

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}
"""What the tables call the precision of products, by the dtype of their operands; float32 has two."""

# In the interpreter an operation costs the same for any tile; different sizes catch swapped dimensions.
_INTERPRETER = Config(n=16, b=64, k=128, r=32)

# Chosen with `python -m bench.tune` for their predicted times, among those that neither spill nor exceed the shared
# memory. Nothing is measured.
_EXACT = Config(n=64, b=64, k=64, r=16, warps=4, stages=2, slices=8)
_SMALL = Config(n=128, b=128, k=64, r=32, warps=8, stages=3, slices=8)
_FLOAT8 = Config(n=128, b=128, k=64, r=64, warps=8, stages=3, slices=8)
_SQUARE = Config(n=128, b=128, k=128, r=32, warps=8, stages=3, slices=8)
_QUARTERED = Config(n=128, b=128, k=64, r=32, warps=8, stages=3, slices=4)
_QUARTERED_SQUARE = Config(n=128, b=128, k=128, r=32, warps=8, stages=3, slices=4)
# Two programs on a multiprocessor: a thread of four warps has at most 255 registers, so that both always fit.
_PAIR = Config(n=128, b=128, k=128, r=64, warps=4, stages=3, slices=8, occupancy=2, driver="single")
_AMD = Config(n=128, b=128, k=128, r=32, warps=8, stages=2, slices=8)
_TABLE: dict[tuple[str, str], tuple[Config, ...]] = {
    ("sm_80", "bf16"): (_QUARTERED_SQUARE,),
    ("sm_80", "fp16"): (_QUARTERED_SQUARE,),
    ("sm_80", "tf32"): (_SQUARE,),
    ("sm_90", "bf16"): (
        Config(n=128, b=128, k=128, r=64, warps=8, stages=4, slices=4),
        Config(n=64, b=64, k=64, r=64, warps=4, stages=4, slices=4, occupancy=2),
        Config(n=128, b=256, k=256, r=64, warps=8, stages=4, slices=8, driver="grouped"),
        _PAIR,
    ),
    ("sm_90", "fp16"): (
        Config(n=128, b=128, k=64, r=64, warps=8, stages=4, slices=2),
        Config(n=64, b=64, k=64, r=64, warps=4, stages=4, slices=4, occupancy=2),
    ),
    ("sm_90", "tf32"): (
        Config(n=128, b=128, k=64, r=32, warps=8, stages=4, slices=2),
        Config(n=64, b=64, k=64, r=32, warps=4, stages=4, slices=4, occupancy=2),
        Config(n=128, b=256, k=256, r=32, warps=8, stages=4, slices=8, driver="grouped"),
    ),
    ("sm_100", "bf16"): (Config(n=128, b=128, k=64, r=64, warps=8, stages=3, slices=8),),
    ("sm_100", "fp16"): (Config(n=128, b=128, k=64, r=64, warps=8, stages=3, slices=8),),
    ("sm_100", "tf32"): (_QUARTERED,),
    ("sm_103", "tf32"): (_QUARTERED,),
    ("sm_120", "tf32"): (_SQUARE,),
    ("sm_120", "ieee"): (Config(n=64, b=64, k=32, r=16, warps=8, stages=2, slices=4),),
    ("sm_90", "fp8"): (
        Config(n=128, b=128, k=128, r=128, warps=8, stages=3, slices=8),
        Config(n=64, b=64, k=64, r=64, warps=4, stages=4, slices=4, occupancy=2),
        Config(n=128, b=128, k=256, r=128, warps=8, stages=4, slices=8, driver="grouped"),
    ),
    ("gfx90a", "bf16"): (_AMD,),
    ("gfx90a", "fp16"): (_AMD,),
    ("gfx942", "bf16"): (_AMD,),
    ("gfx942", "fp16"): (_AMD,),
}
_OTHERS = {"fp8": (_FLOAT8,), "bf16": (_SMALL,), "fp16": (_SMALL,), "tf32": (_SMALL,), "ieee": (_EXACT,)}


# Of the rows driver, whose programs hold all rows of a local step.
_ROWS_INTERPRETER = (
    Config(n=8, b=16, k=32, r=16),
    Config(n=16, b=32, k=64, r=32),
    Config(n=16, b=128, k=64, r=64),
)
_ROWS_NARROW = (
    Config(n=16, b=32, k=32, r=32, warps=4, stages=3, occupancy=2),
    Config(n=16, b=64, k=64, r=64, warps=4, stages=3, occupancy=2),
    Config(n=16, b=128, k=32, r=32, warps=4, stages=3, occupancy=2),
)
# More rows of the weight for each read of X, where that does not spill registers.
_ROWS_TALL = (
    Config(n=32, b=32, k=32, r=32, warps=4, stages=3, occupancy=2),
    Config(n=32, b=64, k=32, r=32, warps=4, stages=3, occupancy=2),
    _ROWS_NARROW[2],
)
# Operands of four bytes, within the shared memory of the smallest chips.
_ROWS_WIDE = (
    Config(n=16, b=32, k=32, r=32, warps=4, stages=2, occupancy=2),
    Config(n=16, b=64, k=32, r=32, warps=4, stages=2, occupancy=2),
    Config(n=16, b=128, k=32, r=32, warps=4, stages=2, occupancy=2),
)
_ROWS = {
    ("sm_90", "bf16"): _ROWS_TALL,
    ("sm_120", "bf16"): _ROWS_TALL,
    ("sm_90", "fp16"): _ROWS_NARROW[:1],
    ("sm_120", "ieee"): _ROWS_WIDE[1:-1],
    ("sm_80", "bf16"): _ROWS_NARROW[:-1],
    ("sm_100", "ieee"): _ROWS_WIDE[:1],
}
# Configurations that would spill registers are left out, above and here. What is left holds these rows of a local step:
# * bfloat16: up to 128; on sm_80 up to 64.
# * float16: none, and on sm_90 up to 32.
# * TF32: up to 64, all in the configuration for 64, as that for 32 would spill.
# * IEEE float32: up to 64; on sm_120 all in the configuration for 64, on sm_100 up to 32.
# With more rows, and with float8, which has no kernels of this driver, other drivers run.
_ROWS_OTHERS: dict[str, tuple[Config, ...]] = {
    "bf16": _ROWS_NARROW,
    "fp16": (),
    "fp8": (),
    "tf32": _ROWS_WIDE[1:-1],
    "ieee": _ROWS_WIDE[:-1],
}


@dataclass(frozen=True)
class Asked:
    """What to take instead of the defaults, see :func:`use`; ``None`` for the default."""

    config: Config | None = None
    driver: str | None = None
    programs: int | None = None


_asked = Asked()


def candidates(target: str, precision: str, lean: bool = False) -> tuple[Config, ...]:
    """The configurations for a target (``"sm_90"``, ``"gfx942"``, ``"interpreter"``), to choose from by size.

    Args:
        target: backend and architecture.
        precision: ``"fp8"``, ``"bf16"``, ``"fp16"``, ``"tf32"`` or ``"ieee"`` (float32).
        lean: those that leave registers for a mask, or for rows that a local step has to itself.
    """
    others = (_INTERPRETER,) if target == "interpreter" else _OTHERS[precision]
    found = _TABLE.get((target, precision), others)
    return tuple(config for config in found if config.general) if lean else found


def for_rows(target: str, precision: str) -> tuple[Config, ...]:
    """The configurations of the rows driver; ``b`` is the most rows of a local step. Arguments as above."""
    if target == "interpreter":
        return _ROWS_INTERPRETER
    return _ROWS.get((target, precision), _ROWS_OTHERS[precision])


def asked() -> Asked:
    """What :func:`use` asks for at present."""
    return _asked


@contextmanager
def use(config: Config | None = None, driver: str | None = None, programs: int | None = None) -> Iterator[None]:
    """Run with these instead of the defaults: for tests, and for measuring configurations.

    Args:
        config: tile sizes and launch options.
        driver: ``"single"``, ``"grouped"`` or ``"rows"``, for problems that take it. Without it, a ``config`` is for
            the first two.
        programs: multiprocessors to assume, so of the single launch's programs; no more than the device has. In the
            interpreter the caller answers for their running at once.
    """
    global _asked
    before, _asked = _asked, Asked(config, driver, programs)
    try:
        yield
    finally:
        _asked = before
