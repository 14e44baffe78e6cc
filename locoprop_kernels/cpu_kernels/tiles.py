"""The two products of a local step for some outputs, with rows of the batch where they lie.

Rows are given by where they begin in memory, so nothing is gathered. A tile is of three outputs and four rows: as many
as vector registers hold sums of, and the widest that ran at the speed of a library's products. In the second product it
is of three outputs and four vectors, and goes through all rows. There is no other: outputs that are not a multiple of
three are filled up, so no output's sums depend on which others there are.
With sixteen vector registers, as x86 has without AVX-512, the sums of two rows are all that fits in the first product.
"""

from __future__ import annotations

import numpy as np

from locoprop_kernels.cpu_kernels.jit import jit, with_whole_registers
from locoprop_kernels.cpu_kernels.updates import update
from locoprop_kernels.cpu_kernels.vectors import BYTES, FEW_REGISTERS, NUMBER, load, spread

__all__ = ["OUTPUTS", "ROWS", "by_fours", "by_twos", "descend", "preactivations"]

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


#: The one of the two for this processor.
preactivations = by_twos if FEW_REGISTERS else by_fours


@jit
def descend(own, outputs, e, x, rows, prox, rule):
    """A local step of the weights of some outputs: ``G = Eᵀ X + λ Δ + start``, and the update.

    A gradient is summed up in registers, and is never written to memory. While the roots and quotients of some are
    taken, which is what processors are slow at, the products of the next ones go on. What four vectors of each row
    need of ``X`` stays in the first cache for all outputs.

    Args:
        own: what belongs to a block of outputs, of rows of whole vectors ``[n', P]``: increments, gradients at the
            start, and the rule's two slots, without rows where the rule does not have it.
        outputs: how many there are; the block ends with a whole tile.
        e: activation differences ``[r, n']``; without rows in the first local step.
        x: memory of the inputs.
        rows: where each row begins in it ``[r']``, a multiple of :data:`ROWS`.
        prox: proximal coefficient ``λ``, a vector.
        rule: see :func:`~locoprop_kernels.cpu_kernels.updates.vectors_of`.
    """
    d, start, squares, buffer = own
    count, row = e.shape[0], NUMBER * d.shape[1]
    d_all, t_all, s_all, m_all = d.ctypes.data, start.ctypes.data, squares.ctypes.data, buffer.ctypes.data
    x0 = x.ctypes.data
    whole = row - row % (4 * BYTES)
    for k in range(0, whole, 4 * BYTES):
        k1, k2, k3 = k + BYTES, k + 2 * BYTES, k + 3 * BYTES
        for n in range(0, outputs, OUTPUTS):
            d0, t0, s0, m0 = d_all + n * row, t_all + n * row, s_all + n * row, m_all + n * row
            d1, t1, s1, m1 = d0 + row, t0 + row, s0 + row, m0 + row
            d2, t2, s2, m2 = d1 + row, t1 + row, s1 + row, m1 + row
            a0, a1 = load(t0 + k) + prox * load(d0 + k), load(t0 + k1) + prox * load(d0 + k1)
            a2, a3 = load(t0 + k2) + prox * load(d0 + k2), load(t0 + k3) + prox * load(d0 + k3)
            b0, b1 = load(t1 + k) + prox * load(d1 + k), load(t1 + k1) + prox * load(d1 + k1)
            b2, b3 = load(t1 + k2) + prox * load(d1 + k2), load(t1 + k3) + prox * load(d1 + k3)
            c0, c1 = load(t2 + k) + prox * load(d2 + k), load(t2 + k1) + prox * load(d2 + k1)
            c2, c3 = load(t2 + k2) + prox * load(d2 + k2), load(t2 + k3) + prox * load(d2 + k3)
            for r in range(count):
                place = x0 + NUMBER * rows[r] + k
                u, v, w = spread(e[r, n]), spread(e[r, n + 1]), spread(e[r, n + 2])
                y = load(place)
                a0, b0, c0 = a0 + u * y, b0 + v * y, c0 + w * y
                y = load(place + BYTES)
                a1, b1, c1 = a1 + u * y, b1 + v * y, c1 + w * y
                y = load(place + 2 * BYTES)
                a2, b2, c2 = a2 + u * y, b2 + v * y, c2 + w * y
                y = load(place + 3 * BYTES)
                a3, b3, c3 = a3 + u * y, b3 + v * y, c3 + w * y
            update(rule, d0 + k, s0 + k, m0 + k, a0)
            update(rule, d0 + k1, s0 + k1, m0 + k1, a1)
            update(rule, d0 + k2, s0 + k2, m0 + k2, a2)
            update(rule, d0 + k3, s0 + k3, m0 + k3, a3)
            update(rule, d1 + k, s1 + k, m1 + k, b0)
            update(rule, d1 + k1, s1 + k1, m1 + k1, b1)
            update(rule, d1 + k2, s1 + k2, m1 + k2, b2)
            update(rule, d1 + k3, s1 + k3, m1 + k3, b3)
            update(rule, d2 + k, s2 + k, m2 + k, c0)
            update(rule, d2 + k1, s2 + k1, m2 + k1, c1)
            update(rule, d2 + k2, s2 + k2, m2 + k2, c2)
            update(rule, d2 + k3, s2 + k3, m2 + k3, c3)
    zero = spread(_ZERO)
    for k in range(whole, row, BYTES):
        for n in range(0, outputs, OUTPUTS):
            d0, t0, s0, m0 = d_all + n * row, t_all + n * row, s_all + n * row, m_all + n * row
            d1, t1, s1, m1 = d0 + row, t0 + row, s0 + row, m0 + row
            d2, t2, s2, m2 = d1 + row, t1 + row, s1 + row, m1 + row
            # The sums of one vector would wait for each other: four of them, over a fourth of the rows each.
            a0, b0 = load(t0 + k) + prox * load(d0 + k), load(t1 + k) + prox * load(d1 + k)
            c0 = load(t2 + k) + prox * load(d2 + k)
            a1 = a2 = a3 = b1 = b2 = b3 = c1 = c2 = c3 = zero
            for r in range(0, count, ROWS):
                y, q = load(x0 + NUMBER * rows[r] + k), r
                a0, b0, c0 = a0 + spread(e[q, n]) * y, b0 + spread(e[q, n + 1]) * y, c0 + spread(e[q, n + 2]) * y
                y, q = load(x0 + NUMBER * rows[r + 1] + k), r + 1
                a1, b1, c1 = a1 + spread(e[q, n]) * y, b1 + spread(e[q, n + 1]) * y, c1 + spread(e[q, n + 2]) * y
                y, q = load(x0 + NUMBER * rows[r + 2] + k), r + 2
                a2, b2, c2 = a2 + spread(e[q, n]) * y, b2 + spread(e[q, n + 1]) * y, c2 + spread(e[q, n + 2]) * y
                y, q = load(x0 + NUMBER * rows[r + 3] + k), r + 3
                a3, b3, c3 = a3 + spread(e[q, n]) * y, b3 + spread(e[q, n + 1]) * y, c3 + spread(e[q, n + 2]) * y
            update(rule, d0 + k, s0 + k, m0 + k, (a0 + a1) + (a2 + a3))
            update(rule, d1 + k, s1 + k, m1 + k, (b0 + b1) + (b2 + b3))
            update(rule, d2 + k, s2 + k, m2 + k, (c0 + c1) + (c2 + c3))
