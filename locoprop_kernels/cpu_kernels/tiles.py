"""The two products of a local step for some outputs, with rows of the batch where they lie.

Rows are given by where they begin in memory, so nothing is gathered. A tile is of three outputs and four rows: as many
as vector registers hold sums or factors of, and the widest that ran at the speed of a library's products. There is no
other: outputs that are not a multiple of three are filled up, so no output's sums depend on which others there are.
With sixteen vector registers, as x86 has without AVX-512, the sums of two rows are all that fits in the first product.
"""

from __future__ import annotations

import platform

import numpy as np
from llvmlite.binding import get_host_cpu_features

from locoprop_kernels.cpu_kernels.jit import jit, with_whole_registers

__all__ = ["OUTPUTS", "ROWS", "add_gradient", "by_fours", "by_twos", "preactivations"]

#: Outputs of a tile.
OUTPUTS = 3
#: Rows of a tile; there is always a multiple of them.
ROWS = 4
_ZERO = np.float32(0.0)


@jit
def by_fours(d, x, rows, out, n):
    """``out[:, n : n + 3] = X dᵀ`` for the three outputs of a tile, four rows at a time.

    Args:
        d: their increments ``[3, P]``.
        x: memory of the inputs.
        rows: where each row begins in it ``[r]``, a multiple of :data:`ROWS`.
        out: ``[r, n']``.
        n: the column of the first output in it.
    """
    with_whole_registers()
    size = d.shape[1]
    d0, d1, d2 = d[0], d[1], d[2]
    for r in range(0, rows.shape[0], ROWS):
        r0, r1, r2, r3 = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
        x0, x1, x2, x3 = x[r0 : r0 + size], x[r1 : r1 + size], x[r2 : r2 + size], x[r3 : r3 + size]
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = _ZERO
        for k in range(size):
            a0 += d0[k] * x0[k]
            a1 += d0[k] * x1[k]
            a2 += d0[k] * x2[k]
            a3 += d0[k] * x3[k]
            b0 += d1[k] * x0[k]
            b1 += d1[k] * x1[k]
            b2 += d1[k] * x2[k]
            b3 += d1[k] * x3[k]
            c0 += d2[k] * x0[k]
            c1 += d2[k] * x1[k]
            c2 += d2[k] * x2[k]
            c3 += d2[k] * x3[k]
        out[r, n], out[r, n + 1], out[r, n + 2] = a0, b0, c0
        out[r + 1, n], out[r + 1, n + 1], out[r + 1, n + 2] = a1, b1, c1
        out[r + 2, n], out[r + 2, n + 1], out[r + 2, n + 2] = a2, b2, c2
        out[r + 3, n], out[r + 3, n + 1], out[r + 3, n + 2] = a3, b3, c3


@jit
def by_twos(d, x, rows, out, n):
    """:func:`by_fours`, two rows at a time."""
    with_whole_registers()
    size = d.shape[1]
    d0, d1, d2 = d[0], d[1], d[2]
    for r in range(0, rows.shape[0], 2):
        r0, r1 = rows[r], rows[r + 1]
        x0, x1 = x[r0 : r0 + size], x[r1 : r1 + size]
        a0 = a1 = b0 = b1 = c0 = c1 = _ZERO
        for k in range(size):
            a0 += d0[k] * x0[k]
            a1 += d0[k] * x1[k]
            b0 += d1[k] * x0[k]
            b1 += d1[k] * x1[k]
            c0 += d2[k] * x0[k]
            c1 += d2[k] * x1[k]
        out[r, n], out[r, n + 1], out[r, n + 2] = a0, b0, c0
        out[r + 1, n], out[r + 1, n + 1], out[r + 1, n + 2] = a1, b1, c1


_FEW_REGISTERS = platform.machine().lower() in ("x86_64", "amd64") and not get_host_cpu_features().get("avx512f", False)
#: The one of the two for this processor.
preactivations = by_twos if _FEW_REGISTERS else by_fours


@jit
def add_gradient(g, e, n, x, rows):
    """``g += e[:, n : n + 3]ᵀ X`` for the three outputs of a tile.

    Args:
        g: their gradients ``[3, P]``.
        e: activation differences ``[r, n']``.
        n: the column of the first output in them.
        x: memory of the inputs.
        rows: where each row begins in it ``[r]``, a multiple of :data:`ROWS`.
    """
    with_whole_registers()
    size = g.shape[1]
    g0, g1, g2 = g[0], g[1], g[2]
    for r in range(0, rows.shape[0], ROWS):
        r0, r1, r2, r3 = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
        x0, x1, x2, x3 = x[r0 : r0 + size], x[r1 : r1 + size], x[r2 : r2 + size], x[r3 : r3 + size]
        a0, b0, c0 = e[r, n], e[r, n + 1], e[r, n + 2]
        a1, b1, c1 = e[r + 1, n], e[r + 1, n + 1], e[r + 1, n + 2]
        a2, b2, c2 = e[r + 2, n], e[r + 2, n + 1], e[r + 2, n + 2]
        a3, b3, c3 = e[r + 3, n], e[r + 3, n + 1], e[r + 3, n + 2]
        for k in range(size):
            # Read before anything is written, which might be in the same place for all that the compiler knows.
            y0, y1, y2, y3 = x0[k], x1[k], x2[k], x3[k]
            g0[k] += a0 * y0 + a1 * y1 + a2 * y2 + a3 * y3
            g1[k] += b0 * y0 + b1 * y1 + b2 * y2 + b3 * y3
            g2[k] += c0 * y0 + c1 * y1 + c2 * y2 + c3 * y3
