"""What epilogues of the tile kernels issue, counted in their machine code: by ``python -m bench.epilogues --write``.

Per target and phase, instructions and special functions for an element of a tile: of tanh in the activation, of RMSprop
in the update, with bfloat16 operands and the target's first configuration.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["EPILOGUES", "Issued"]


class Issued(NamedTuple):
    """What a warp issues for an element that each of its lanes has."""

    instructions: float
    special: float


EPILOGUES = {
    "sm_80": {"activation": Issued(64.3, 4.0), "update": Issued(44.9, 2.0)},
    "sm_86": {"activation": Issued(64.6, 4.0), "update": Issued(43.4, 2.0)},
    "sm_89": {"activation": Issued(64.6, 4.0), "update": Issued(43.4, 2.0)},
    "sm_90": {"activation": Issued(63.2, 4.0), "update": Issued(45.2, 2.0)},
    "sm_100": {"activation": Issued(57.0, 4.0), "update": Issued(48.8, 2.0)},
    "sm_103": {"activation": Issued(57.9, 4.0), "update": Issued(46.5, 2.0)},
    "sm_120": {"activation": Issued(64.3, 4.0), "update": Issued(44.4, 2.0)},
    "gfx90a": {"activation": Issued(81.5, 4.0), "update": Issued(57.0, 2.0)},
    "gfx942": {"activation": Issued(82.9, 4.0), "update": Issued(53.3, 2.0)},
    "gfx950": {"activation": Issued(83.4, 4.0), "update": Issued(65.4, 2.0)},
}
