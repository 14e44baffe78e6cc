"""The two products of a local step for some outputs, with rows of the batch where they lie.

Rows are given by where they begin in memory, so nothing is gathered. A tile is of three outputs and four rows: as many
as vector registers hold sums or factors of, and the widest that ran at the speed of a library's products.
"""

from __future__ import annotations

import numpy as np

from locoprop_kernels.cpu_kernels.jit import jit

__all__ = ["OUTPUTS", "ROWS", "add_gradient", "preactivations"]

#: Outputs of a tile; others come one by one.
OUTPUTS = 3
#: Rows of a tile; there is always a multiple of them.
ROWS = 4
_ZERO = np.float32(0.0)


@jit
def _dot_3(d, x, rows, out):
    """``out = d Xᵀ`` for three outputs."""
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
        out[0, r], out[0, r + 1], out[0, r + 2], out[0, r + 3] = a0, a1, a2, a3
        out[1, r], out[1, r + 1], out[1, r + 2], out[1, r + 3] = b0, b1, b2, b3
        out[2, r], out[2, r + 1], out[2, r + 2], out[2, r + 3] = c0, c1, c2, c3


@jit
def _dot_1(d, x, rows, out):
    """``out = d Xᵀ`` for one output."""
    size = d.shape[0]
    for r in range(0, rows.shape[0], ROWS):
        r0, r1, r2, r3 = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
        x0, x1, x2, x3 = x[r0 : r0 + size], x[r1 : r1 + size], x[r2 : r2 + size], x[r3 : r3 + size]
        a0 = a1 = a2 = a3 = _ZERO
        for k in range(size):
            a0 += d[k] * x0[k]
            a1 += d[k] * x1[k]
            a2 += d[k] * x2[k]
            a3 += d[k] * x3[k]
        out[r], out[r + 1], out[r + 2], out[r + 3] = a0, a1, a2, a3


@jit
def _add_3(g, e, x, rows):
    """``g += e X`` for three outputs."""
    size = g.shape[1]
    g0, g1, g2 = g[0], g[1], g[2]
    for r in range(0, rows.shape[0], ROWS):
        r0, r1, r2, r3 = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
        x0, x1, x2, x3 = x[r0 : r0 + size], x[r1 : r1 + size], x[r2 : r2 + size], x[r3 : r3 + size]
        a0, a1, a2, a3 = e[0, r], e[0, r + 1], e[0, r + 2], e[0, r + 3]
        b0, b1, b2, b3 = e[1, r], e[1, r + 1], e[1, r + 2], e[1, r + 3]
        c0, c1, c2, c3 = e[2, r], e[2, r + 1], e[2, r + 2], e[2, r + 3]
        for k in range(size):
            g0[k] += a0 * x0[k] + a1 * x1[k] + a2 * x2[k] + a3 * x3[k]
            g1[k] += b0 * x0[k] + b1 * x1[k] + b2 * x2[k] + b3 * x3[k]
            g2[k] += c0 * x0[k] + c1 * x1[k] + c2 * x2[k] + c3 * x3[k]


@jit
def _add_1(g, e, x, rows):
    """``g += e X`` for one output."""
    size = g.shape[0]
    for r in range(0, rows.shape[0], ROWS):
        r0, r1, r2, r3 = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
        x0, x1, x2, x3 = x[r0 : r0 + size], x[r1 : r1 + size], x[r2 : r2 + size], x[r3 : r3 + size]
        a0, a1, a2, a3 = e[r], e[r + 1], e[r + 2], e[r + 3]
        for k in range(size):
            g[k] += a0 * x0[k] + a1 * x1[k] + a2 * x2[k] + a3 * x3[k]


@jit
def preactivations(delta, x, rows, out):
    """``out = Δ Xᵀ``.

    Args:
        delta: ``Δ`` of some outputs ``[n, K]``.
        x: memory of the inputs.
        rows: where each row begins in it ``[r]``, a multiple of :data:`ROWS`.
        out: ``[n, r]``.
    """
    outputs = delta.shape[0]
    tiled = outputs - outputs % OUTPUTS
    for i in range(0, tiled, OUTPUTS):
        _dot_3(delta[i : i + OUTPUTS], x, rows, out[i : i + OUTPUTS])
    for i in range(tiled, outputs):
        _dot_1(delta[i], x, rows, out[i])


@jit
def add_gradient(g, e, x, rows):
    """``g += E X``, of no more outputs than a tile has.

    Args:
        g: ``[n, K]``.
        e: activation differences ``[n, r]``.
        x: memory of the inputs.
        rows: where each row begins in it ``[r]``, a multiple of :data:`ROWS`.
    """
    if g.shape[0] == OUTPUTS:
        _add_3(g, e, x, rows)
    else:
        for i in range(g.shape[0]):
            _add_1(g[i], e[i], x, rows)
