"""A part of a weight or bias in an epilogue: reading and writing it, one step of the update rule, and the last check.

A part lies at a ``place``: ``(rows, columns, n, width)``, where ``n`` and ``width`` are the parameter's sizes; a bias
is a matrix of one column. The first local step reads what is the caller's, an element at a time, and leaves aligned,
padded copies of ``G_0`` and of the state; all others read these, in whole vectors and without masks.
"""

import triton
import triton.language as tl

from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.device.memory import address, bits_to_float, callers_address, is_finite, to_dtype


@triton.jit
def within(place):
    """Which elements of a tile the parameter has."""
    rows, columns, n, width = place
    return (rows < n)[:, None] & (columns < width)[None, :]


@triton.jit
def own_pointers(parameter_ptr, first, U: tl.constexpr):
    """Where ``G_0``, Δ and the slots begin, ``first`` elements behind; a loop would load them again and again."""
    start_ptr = address(parameter_ptr, c.START, tl.float32) + first
    delta_ptr = address(parameter_ptr, c.DELTA, tl.float32) + first
    s0_ptr, s1_ptr, s2_ptr = delta_ptr, delta_ptr, delta_ptr
    if U.slots > 0:
        s0_ptr = address(parameter_ptr, c.NEW, tl.float32) + first
    if U.slots > 1:
        s1_ptr = address(parameter_ptr, c.NEW + 1, tl.float32) + first
    if U.slots > 2:
        s2_ptr = address(parameter_ptr, c.NEW + 2, tl.float32) + first
    return start_ptr, delta_ptr, s0_ptr, s1_ptr, s2_ptr


@triton.jit
def _callers_gradient(parameter_ptr, place, U: tl.constexpr):
    """``G_0`` in float32, zero outside the parameter."""
    rows, columns, _, _ = place
    offsets = rows.to(tl.int64)[:, None] * tl.load(parameter_ptr + c.GRAD_ROW) + columns[None, :]
    grad = tl.load(callers_address(parameter_ptr, c.GRAD, U.parameter) + offsets, within(place), 0.0).to(tl.float32)
    return grad * bits_to_float(tl.load(parameter_ptr + c.GRAD_SCALE))


@triton.jit
def _callers_slot(parameter_ptr, i: tl.constexpr, place):
    """A state slot as it was before the step."""
    rows, columns, _, width = place
    offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
    return tl.load(callers_address(parameter_ptr, c.OLD + i, tl.float32) + offsets, within(place), 0.0)


@triton.jit
def _callers_value(parameter_ptr, place, U: tl.constexpr):
    """The parameter at the start of the step, in float32."""
    rows, columns, _, _ = place
    offsets = rows.to(tl.int64)[:, None] * tl.load(parameter_ptr + c.VALUE_ROW)
    offsets += columns.to(tl.int64)[None, :] * tl.load(parameter_ptr + c.VALUE_COLUMN)
    return tl.load(callers_address(parameter_ptr, c.VALUE, U.parameter) + offsets, within(place), 0.0).to(tl.float32)


@triton.jit
def load(parameter_ptr, own, offsets, place, FIRST: tl.constexpr, U: tl.constexpr):
    """``G_0``, Δ and the slots: the caller's at the first local step, then ours, from ``own`` pointers."""
    SLOTS: tl.constexpr = U.slots
    if FIRST:
        start = _callers_gradient(parameter_ptr, place, U)
        delta = tl.zeros_like(start)
    else:
        start, delta = tl.load(own[0] + offsets), tl.load(own[1] + offsets)
    s0, s1, s2 = delta, delta, delta
    if FIRST:
        if SLOTS > 0:
            s0 = _callers_slot(parameter_ptr, 0, place)
        if SLOTS > 1:
            s1 = _callers_slot(parameter_ptr, 1, place)
        if SLOTS > 2:
            s2 = _callers_slot(parameter_ptr, 2, place)
    else:
        if SLOTS > 0:
            s0 = tl.load(own[2] + offsets)
        if SLOTS > 1:
            s1 = tl.load(own[3] + offsets)
        if SLOTS > 2:
            s2 = tl.load(own[4] + offsets)
    return start, delta, s0, s1, s2


@triton.jit
def store(own, offsets, start, delta, slots, FIRST: tl.constexpr, U: tl.constexpr):
    """What the next local step loads."""
    SLOTS: tl.constexpr = U.slots
    if FIRST:
        tl.store(own[0] + offsets, start)
    tl.store(own[1] + offsets, delta)
    if SLOTS > 0:
        tl.store(own[2] + offsets, slots[0])
    if SLOTS > 1:
        tl.store(own[3] + offsets, slots[1])
    if SLOTS > 2:
        tl.store(own[4] + offsets, slots[2])


@triton.jit
def _moving(parameter_ptr, place):
    """Where the parameter's mask is not 0; everywhere if it has none."""
    rows, columns, _, width = place
    offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
    masked = tl.load(parameter_ptr + c.MASK) != 0
    return tl.load(callers_address(parameter_ptr, c.MASK, tl.uint8) + offsets, within(place) & masked, 1) != 0


@triton.jit
def rule_at(parameter_ptr, t, rate, U: tl.constexpr):
    """What the rule is told of local step ``t``: the parameter's own learning rate, and its number of steps so far."""
    step = t + 1.0
    if U.counts_steps:
        step += tl.load(callers_address(parameter_ptr, c.STEP, tl.int64)).to(tl.float32)
    return rate * bits_to_float(tl.load(parameter_ptr + c.RATE)), step


@triton.jit
def _apply_rule(delta, grad, slots, rate, step, U: tl.constexpr):
    HYPER: tl.constexpr = U.hyper
    if U.ptx:
        return U.rule(delta, grad, slots[0], slots[1], slots[2], rate, step, HYPER, True)
    else:
        return U.rule(delta, grad, slots[0], slots[1], slots[2], rate, step, HYPER)


@triton.jit
def step(parameter_ptr, own, offsets, before, change, place, when, loss_scale, FIRST: tl.constexpr, U: tl.constexpr):
    """One step of the update rule, where the gradient has changed by ``change``; ``when`` is ``(rate, step, prox)``.

    ``before`` is what :func:`load` found. Returns the new increment and the gradient at the start, both zero outside
    the parameter and where its mask is 0.
    """
    rate, count, prox = when
    start, delta, s0, s1, s2 = before
    grad = (start + change) * loss_scale + prox * delta
    if U.regulariser is not None:
        value = _callers_value(parameter_ptr, place, U)
        grad += U.regulariser(value + delta, value)
    if U.masked:
        moving = _moving(parameter_ptr, place)
        start = tl.where(moving, start, 0.0)
        grad = tl.where(moving, grad, 0.0)
    delta, s0, s1, s2 = _apply_rule(delta, grad, (s0, s1, s2), rate, count, U)
    delta = tl.where(within(place), delta, 0.0)
    if U.masked:  # momentum may have moved what has no gradient; the mask is read again to save registers
        delta = tl.where(_moving(parameter_ptr, place), delta, 0.0)
    store(own, offsets, start, delta, (s0, s1, s2), FIRST, U)
    return delta, start * loss_scale


@triton.jit
def _note_infinite(value, valid, bad_ptr):
    """Set ``bad`` if a number of ``value`` is not finite."""
    tl.store(bad_ptr + tl.zeros_like(value).to(tl.int32), 1, valid & (is_finite(value) == 0))


@triton.jit
def check(parameter_ptr, own, offsets, place, bad_ptr, P: tl.constexpr, U: tl.constexpr):
    """Set ``bad`` if a commit would write a number that is not finite; after the last local step."""
    SLOTS: tl.constexpr = U.slots
    valid = within(place)
    value = _callers_value(parameter_ptr, place, U) + tl.load(own[1] + offsets)
    _note_infinite(to_dtype(value, U.parameter, P.interpreted).to(tl.float32), valid, bad_ptr)
    for i in tl.static_range(SLOTS):
        _note_infinite(tl.load(own[2 + i] + offsets), valid, bad_ptr)


@triton.jit
def objective(delta, start, prox):
    """Sum of ``Δ · G_0 + λ/2 Δ²``."""
    delta = delta.to(tl.float64)
    return tl.sum(tl.sum(delta * start.to(tl.float64) + (0.5 * prox) * delta * delta, 1), 0)
