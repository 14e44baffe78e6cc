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
    "sm_80": {"activation": Issued(21.1, 2.0), "update": Issued(26.8, 2.0)},
    "sm_86": {"activation": Issued(21.1, 2.0), "update": Issued(27.8, 2.0)},
    "sm_89": {"activation": Issued(21.1, 2.0), "update": Issued(27.8, 2.0)},
    "sm_90": {"activation": Issued(21.3, 2.0), "update": Issued(23.4, 2.0)},
    "sm_100": {"activation": Issued(22.0, 2.0), "update": Issued(26.9, 2.0)},
    "sm_103": {"activation": Issued(22.1, 2.0), "update": Issued(26.9, 2.0)},
    "sm_120": {"activation": Issued(21.6, 2.0), "update": Issued(26.4, 2.0)},
    "gfx90a": {"activation": Issued(40.9, 2.0), "update": Issued(43.2, 2.0)},
    "gfx942": {"activation": Issued(39.4, 2.0), "update": Issued(41.4, 2.0)},
    "gfx950": {"activation": Issued(33.8, 2.0), "update": Issued(48.2, 2.0)},
}
