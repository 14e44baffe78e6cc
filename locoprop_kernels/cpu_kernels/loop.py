"""All local steps of some outputs of a layer in one kernel: increments and state stay in the caches."""

from __future__ import annotations

import numpy as np

from locoprop_kernels.cpu_kernels import arrays
from locoprop_kernels.cpu_kernels.functions import SOFTMAX, differences
from locoprop_kernels.cpu_kernels.jit import jit, with_whole_registers
from locoprop_kernels.cpu_kernels.table import aligned, integers, matrix, vector
from locoprop_kernels.cpu_kernels.tiles import OUTPUTS, ROWS, descend, preactivations
from locoprop_kernels.cpu_kernels.updates import HYPERPARAMETERS, update, vectors_of
from locoprop_kernels.cpu_kernels.vectors import BYTES, LANES, NUMBER, load, spread

__all__ = ["BLOCK", "commit", "local_steps"]

#: Outputs that go through a local step together: their increments, state and rows fit into a core's own cache.
BLOCK = 8 * OUTPUTS
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@jit
def _difference(e, a, bias, first, a0, places, count, transfer, p0, p1, scale, rounds):
    """``E = scale · (f(A0 + P + δ) - f(A0))`` in place of ``P``; zero in rows that do not count.

    With ``rounds``, ``a`` is then the same of differences that are rounded to bfloat16.

    Args:
        e: ``P`` ``[r, n]``, of which the outputs that ``bias`` has count.
        a: memory for as much.
        bias: ``δ`` of these outputs ``[n]``.
        first: the number of the first output.
        a0: memory of the pre-activations; ``places`` says where the rows begin in it ``[r]``.
        count: how many rows count.
        transfer: the function's code; ``p0`` and ``p1`` are its parameters.
        scale: see above.
        rounds: likewise.
    """
    outputs = bias.shape[0]
    for r in range(count):
        row, own, old = a0[places[r] + first : places[r] + first + outputs], e[r], a[r]
        for n in range(outputs):
            old[n] = row[n]
            own[n] += bias[n]
    differences(transfer, e[:count], a[:count], outputs, p0, p1)
    if rounds:
        for r in range(count):
            arrays.round_to_bfloat16(e[r], a[r])
            arrays.multiply(a[r], scale)
    for r in range(count):
        arrays.multiply(e[r], scale)
    for r in range(count, e.shape[0]):
        arrays.fill(e[r], _ZERO)
        arrays.fill(a[r], _ZERO)


@jit
def _begin(own, gradient, squares, buffer, scale):
    """Lay out what belongs to some rows of a parameter before the first local step.

    Args:
        own: memory for their increments, gradients at the start and the rule's two slots, of rows of whole vectors
            ``[n', P]``; a slot is without rows where the rule does not have it.
        gradient: of these rows ``[n, K]``.
        squares: the first slot of these rows, likewise.
        buffer: the second.
        scale: of the gradient.
    """
    delta, start, own_squares, own_buffer = own
    delta[:] = _ZERO
    # Behind the rows and their ends gradients are zero, and mean squares are not, lest zero be divided by zero.
    start[:] = _ZERO
    own_squares[:] = _ONE
    own_buffer[:] = _ZERO
    for i in range(gradient.shape[0]):
        arrays.scale(scale, gradient[i], start[i])
        if own_squares.shape[0]:
            arrays.copy(squares[i], own_squares[i])
        if own_buffer.shape[0]:
            arrays.copy(buffer[i], own_buffer[i])


@jit
def _end(own, parameter, delta, squares, buffer):
    """Bring increments and state of some rows to memory after the last local step.

    Args:
        own: see :func:`_begin`.
        parameter: the parameter's rows ``[n, K]``.
        delta: memory for their increments, likewise.
        squares: memory for the first slot.
        buffer: memory for the second.

    Returns:
        the sum of the absolute values of what a commit would write; NaN if one is.
    """
    with_whole_registers()
    own_delta, _, own_squares, own_buffer = own
    total = _ZERO
    for i in range(parameter.shape[0]):
        found, written, before = own_delta[i], delta[i], parameter[i]
        for k in range(before.shape[0]):
            written[k] = found[k]
            total += abs(before[k] + found[k])
        if own_squares.shape[0]:
            total += _copy(own_squares[i], squares[i])
        if own_buffer.shape[0]:
            total += _copy(own_buffer[i], buffer[i])
    return total


@jit
def _copy(source, target):
    """Fill ``target`` from ``source``; returns the sum of the absolute values."""
    with_whole_registers()
    total = _ZERO
    for k in range(target.shape[0]):
        target[k] = source[k]
        total += abs(source[k])
    return total


@jit
def _update_bias(own, e, prox, rule):
    """A local step of some biases: what :func:`~locoprop_kernels.cpu_kernels.tiles.descend` is for weights.

    Args:
        own: see :func:`_begin`, of one row.
        e: activation differences ``[r, P]``; without rows in the first local step.
        prox: proximal coefficient ``λ``, a vector.
        rule: see :func:`~locoprop_kernels.cpu_kernels.updates.vectors_of`.
    """
    delta, start, squares, buffer = own
    d, t, s, m, first = delta.ctypes.data, start.ctypes.data, squares.ctypes.data, buffer.ctypes.data, e.ctypes.data
    row = NUMBER * e.shape[1]
    for k in range(0, NUMBER * delta.shape[1], BYTES):
        g = load(t + k) + prox * load(d + k)
        for r in range(e.shape[0]):
            g = g + load(first + r * row + k)
        update(rule, d + k, s + k, m + k, g)


@jit
def _parameter(given, outputs, inputs, steps):
    """A parameter ``[N, K]``: gradient, parameter, increment, slots before and after, and factors; and its scale."""
    before = matrix(given.old_squares, outputs, inputs), matrix(given.old_buffer, outputs, inputs)
    after = matrix(given.new_squares, outputs, inputs), matrix(given.new_buffer, outputs, inputs)
    gradient, parameter = matrix(given.gradient, outputs, inputs), matrix(given.parameter, outputs, inputs)
    delta, factors = matrix(given.delta, outputs, inputs), matrix(given.factors, steps, 2)
    return gradient, parameter, delta, before, after, factors, given.scale


@jit
def _own(rows, columns, slots):
    """Memory for :func:`_begin`, with the slots that a parameter's tensors ``slots`` have rows of."""
    squares = aligned(rows if slots[0].shape[0] else 0, columns)
    buffer = aligned(rows if slots[1].shape[0] else 0, columns)
    return aligned(rows, columns), aligned(rows, columns), squares, buffer


@jit
def _places(firsts, step, counts, stride, width):
    """Where each row of each local step begins in memory ``[T - 1, width]``; behind those that count, the first."""
    places = np.empty((counts.shape[0], width), np.int64)
    for t in range(places.shape[0]):
        for r in range(width):
            places[t, r] = stride * (firsts[t] + (step * r if r < counts[t] else 0))
    return places


@jit
def local_steps(problem, weight, bias, first, last):
    """All local steps of the outputs of a problem from ``first`` to ``last``.

    Args:
        problem: a row of the table, see :data:`~locoprop_kernels.cpu_kernels.table.PROBLEM`.
        weight: see :data:`~locoprop_kernels.cpu_kernels.table.PARAMETER`.
        bias: likewise.
        first: the first output.
        last: the one behind the last.

    Returns:
        a number that is no less than the absolute value of any that a commit would write; NaN if one of them is.
    """
    steps, inputs, padded, code = problem.steps, problem.inputs, problem.x_length, problem.function
    gradient, parameter, delta, old, new, factors, weight_scale = _parameter(weight, problem.outputs, inputs, steps)
    # A bias is a matrix of one row.
    gradient_b, parameter_b, delta_b, old_b, new_b, factors_b, bias_scale = _parameter(bias, 1, problem.outputs, steps)
    hyper, prox = vector(problem.hyper, HYPERPARAMETERS), spread(problem.prox)
    counts, width = integers(problem.counts, steps - 1), -(-problem.most // ROWS) * ROWS
    places_x = _places(integers(problem.x_firsts, steps - 1), problem.x_step, counts, problem.x_stride, width)
    places_a0 = _places(integers(problem.a0_firsts, steps - 1), problem.a0_step, counts, problem.a0_stride, width)
    # To the end of the last row that is read.
    x, a0 = vector(problem.x, places_x.max() + padded), vector(problem.a0, places_a0.max() + problem.outputs)
    rounds, scale, p0, p1 = problem.rounds != 0, problem.scale, problem.p0, problem.p1
    outputs = last - first if code == SOFTMAX else min(BLOCK, last - first)
    block = -(-outputs // OUTPUTS) * OUTPUTS
    columns = -(-block // LANES) * LANES
    e, a = aligned(width, columns), aligned(width, columns)
    e[:] = _ZERO
    a[:] = _ZERO
    own, own_b = _own(block, padded, old), _own(1, columns, old_b)
    d, delta_bias = own[0], own_b[0][0]
    delta_bias[:] = _ZERO
    factor = aligned(block if rounds else 0, padded)
    total = _ZERO
    for n in range(first, last, outputs):
        m = min(n + outputs, last)
        _begin(own, gradient[n:m], old[0][n:m], old[1][n:m], weight_scale)
        if gradient_b.shape[0]:
            _begin(own_b, gradient_b[:, n:m], old_b[0][:, n:m], old_b[1][:, n:m], bias_scale)
        for t in range(steps):
            places, taken = places_x[max(t - 1, 0)], width if t > 0 else 0
            if t > 0:
                for i in range(factor.shape[0]):
                    arrays.round_to_bfloat16(d[i], factor[i])
                left = factor if rounds else d
                for i in range(0, m - n, OUTPUTS):
                    preactivations(left[i : i + OUTPUTS], x, places, e, i)
                places_of_a0 = places_a0[t - 1]
                _difference(e, a, delta_bias[: m - n], n, a0, places_of_a0, counts[t - 1], code, p0, p1, scale, rounds)
            rule = vectors_of(problem.family, factors[t], hyper)
            differences = a[:taken] if rounds else e[:taken]
            descend(own, m - n, differences, x, places, prox, rule)
            if gradient_b.shape[0]:
                _update_bias(own_b, e[:taken], prox, vectors_of(problem.family, factors_b[t], hyper))
        total += _end(own, parameter[n:m], delta[n:m], new[0][n:m], new[1][n:m])
        if gradient_b.shape[0]:
            total += _end(own_b, parameter_b[:, n:m], delta_b[:, n:m], new_b[0][:, n:m], new_b[1][:, n:m])
    return total


@jit
def commit(problem, weight, bias, first, last):
    """Add the increments that local steps have found for some outputs, and bring the state to its place.

    Args:
        problem: see :func:`local_steps`.
        weight: likewise.
        bias: likewise.
        first: the first output.
        last: the one behind the last.
    """
    _commit(weight, first * problem.inputs, last * problem.inputs)
    _commit(bias, first, last)


@jit
def _commit(given, first, last):
    """Add the increments of a parameter's elements from ``first`` to ``last``, and bring their state to its place."""
    parameter, delta = vector(given.parameter, last)[first:], vector(given.delta, last)[first:]
    arrays.add_multiple(parameter, _ONE, delta)
    arrays.copy(vector(given.new_squares, last)[first:], vector(given.old_squares, last)[first:])
    arrays.copy(vector(given.new_buffer, last)[first:], vector(given.old_buffer, last)[first:])
