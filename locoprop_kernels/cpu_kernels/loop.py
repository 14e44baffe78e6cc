"""All local steps of some outputs of a layer in one kernel: increments and state stay in the caches."""

from __future__ import annotations

import numpy as np

from locoprop_kernels.cpu_kernels.functions import SOFTMAX, differences
from locoprop_kernels.cpu_kernels.jit import jit, with_whole_registers
from locoprop_kernels.cpu_kernels.table import aligned, integers, matrix, vector
from locoprop_kernels.cpu_kernels.tiles import OUTPUTS, ROWS, add_gradient, preactivations
from locoprop_kernels.cpu_kernels.updates import HYPERPARAMETERS, update

__all__ = ["BLOCK", "commit", "local_steps"]

#: Outputs that go through a local step together: their increments, state and rows fit into a core's own cache.
BLOCK = 8 * OUTPUTS
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@jit
def _rounded(value):
    """``value`` rounded to bfloat16, the nearest or else the even one: it has the upper half of the bits."""
    bits = np.float32(value).view(np.int32)
    odd = (bits >> np.int32(16)) & np.int32(1)
    found = np.int32((bits + np.int32(0x7FFF) + odd) & np.int32(-0x10000)).view(np.float32)
    return found if value == value else value


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
            own, other = e[r], a[r]
            for n in range(own.shape[0]):
                other[n] = scale * _rounded(own[n])
        a[count:] = _ZERO
    e[:count] *= scale
    e[count:] = _ZERO


@jit
def _total(values):
    """The sum of the absolute values of some numbers: more than any of them, and NaN if one is."""
    total = _ZERO
    for k in range(values.shape[0]):
        total += abs(values[k])
    return total


@jit
def _update_weight(own, outputs, e, x, rows, step, factors, rule, prox):
    """The local step ``step`` of the weights of some outputs.

    Args:
        own: what belongs to these outputs, of rows that begin at lines of the caches and have zeros behind the ``K``
            inputs ``[n, P]``: increments, memory for gradients, the gradients at the start, and the rule's two slots,
            without rows where the rule does not have it. They end with a whole tile.
        outputs: how many there are.
        e: activation differences ``[r, n]``; not read in the first local step.
        x: memory of the inputs.
        rows: where each row begins in it ``[r]``.
        step: the number of the local step.
        factors: of each local step, see :func:`~locoprop_kernels.cpu_kernels.updates.factors`.
        rule: the family's code and hyper-parameters.
        prox: proximal coefficient ``λ``.
    """
    with_whole_registers()
    code, hyper = rule
    d, g, start, squares, buffer = own
    tile = OUTPUTS * d.shape[1]
    # In memory a tile is one row: loops over all of it need not begin anew with each output.
    flat_d, flat_g, flat_start = d.reshape(-1), g.reshape(-1), start.reshape(-1)
    flat_squares, flat_buffer = squares.reshape(-1), buffer.reshape(-1)
    for n in range(0, outputs, OUTPUTS):
        first = n * d.shape[1]
        delta, gradient, constant = flat_d[first:][:tile], flat_g[first:][:tile], flat_start[first:][:tile]
        for k in range(tile):
            gradient[k] = constant[k] + prox * delta[k]
        if step > 0:
            add_gradient(g[n : n + OUTPUTS], e, n, x, rows)
        s = flat_squares[first:][:tile] if squares.shape[0] else gradient
        b = flat_buffer[first:][:tile] if buffer.shape[0] else gradient
        update(code, delta, gradient, s, b, factors[step], hyper)


@jit
def _update_bias(bias, first, last, e, step, rule, prox, g):
    """The same of the biases."""
    grad, _, delta, _, (squares, buffer), factors, scale = bias
    code, hyper = rule
    g, gradient, own = g[: last - first], grad[first:last], delta[first:last]
    for n in range(g.shape[0]):
        g[n] = scale * gradient[n] + prox * own[n]
    if step > 0:
        for r in range(e.shape[0]):
            row = e[r]
            for n in range(g.shape[0]):
                g[n] += row[n]
    s = squares[first:last] if squares.shape[0] else g
    b = buffer[first:last] if buffer.shape[0] else g
    update(code, delta[first:last], g, s, b, factors[step], hyper)


@jit
def _weight(given, outputs, inputs, steps):
    """The tensors of a weight: gradient, parameter, increment, slots before and after, and factors; and its scale."""
    before = matrix(given.old_squares, outputs, inputs), matrix(given.old_buffer, outputs, inputs)
    after = matrix(given.new_squares, outputs, inputs), matrix(given.new_buffer, outputs, inputs)
    gradient, parameter = matrix(given.gradient, outputs, inputs), matrix(given.parameter, outputs, inputs)
    delta, factors = matrix(given.delta, outputs, inputs), matrix(given.factors, steps, 2)
    return gradient, parameter, delta, before, after, factors, given.scale


@jit
def _bias(given, outputs, steps):
    """The same of a bias."""
    before = vector(given.old_squares, outputs), vector(given.old_buffer, outputs)
    after = vector(given.new_squares, outputs), vector(given.new_buffer, outputs)
    gradient, parameter = vector(given.gradient, outputs), vector(given.parameter, outputs)
    factors = matrix(given.factors, steps, 2)
    return gradient, parameter, vector(given.delta, outputs), before, after, factors, given.scale


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
    weight = _weight(weight, problem.outputs, inputs, steps)
    bias = _bias(bias, problem.outputs, steps)
    gradient, parameter, delta, old, new, weight_factors, weight_scale = weight
    grad_b, parameter_b, delta_b, old_b, new_b, _, _ = bias
    trains_bias = grad_b.shape[0] > 0
    if not trains_bias:
        delta_b = np.empty(problem.outputs, np.float32)
    rule = problem.family, vector(problem.hyper, HYPERPARAMETERS)
    counts, width = integers(problem.counts, steps - 1), -(-problem.most // ROWS) * ROWS
    places_x = _places(integers(problem.x_firsts, steps - 1), problem.x_step, counts, problem.x_stride, width)
    places_a0 = _places(integers(problem.a0_firsts, steps - 1), problem.a0_step, counts, problem.a0_stride, width)
    # To the end of the last row that is read.
    x, a0 = vector(problem.x, places_x.max() + padded), vector(problem.a0, places_a0.max() + problem.outputs)
    rounds, scale, prox, p0, p1 = problem.rounds != 0, problem.scale, problem.prox, problem.p0, problem.p1
    outputs = last - first if code == SOFTMAX else min(BLOCK, last - first)
    block = -(-outputs // OUTPUTS) * OUTPUTS
    e, a = np.empty((width, block), np.float32), np.zeros((width, block), np.float32)
    d, g, start = aligned(block, padded), aligned(block, padded), aligned(block, padded)
    slots = aligned(block if old[0].shape[0] else 0, padded), aligned(block if old[1].shape[0] else 0, padded)
    factor = aligned(block if rounds else 0, padded)
    gb = np.empty(outputs, np.float32)
    total = _ZERO
    for n in range(first, last, outputs):
        m = min(n + outputs, last)
        # Behind the inputs and the outputs no gradient is anything but zero, and no root of a mean of squares is.
        d[:] = _ZERO
        start[:] = _ZERO
        slots[0][:] = _ONE
        slots[1][:] = _ZERO
        for i in range(n, m):
            start[i - n, :inputs] = weight_scale * gradient[i]
            for slot in range(2):
                if old[slot].shape[0]:
                    slots[slot][i - n, :inputs] = old[slot][i]
        delta_b[n:m] = _ZERO
        for slot in range(2):
            if trains_bias and new_b[slot].shape[0]:
                new_b[slot][n:m] = old_b[slot][n:m]
        for t in range(steps):
            places = places_x[max(t - 1, 0)]
            if t > 0:
                for i in range(0, m - n if rounds else 0):
                    own, other = d[i], factor[i]
                    for k in range(padded):
                        other[k] = _rounded(own[k])
                left = factor if rounds else d
                for i in range(0, m - n, OUTPUTS):
                    preactivations(left[i : i + OUTPUTS], x, places, e, i)
                _difference(e, a, delta_b[n:m], n, a0, places_a0[t - 1], counts[t - 1], code, p0, p1, scale, rounds)
            own = d, g, start, slots[0], slots[1]
            _update_weight(own, m - n, a if rounds else e, x, places, t, weight_factors, rule, prox)
            if trains_bias:
                _update_bias(bias, n, m, e, t, rule, prox, gb)
        for i in range(n, m):
            found, written, before = d[i - n], delta[i], parameter[i]
            for k in range(inputs):
                written[k] = found[k]
                total += abs(before[k] + found[k])
            for slot in range(2):
                if new[slot].shape[0]:
                    new[slot][i] = slots[slot][i - n, :inputs]
                    total += _total(new[slot][i])
            if trains_bias:
                total += abs(parameter_b[i] + delta_b[i])
        for slot in range(2):
            if trains_bias and new_b[slot].shape[0]:
                total += _total(new_b[slot][n:m])
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
    """The same of the elements of a parameter from ``first`` to ``last``."""
    parameter, delta = vector(given.parameter, last)[first:], vector(given.delta, last)[first:]
    for k in range(parameter.shape[0]):
        parameter[k] += delta[k]
    if given.old_squares:
        vector(given.old_squares, last)[first:] = vector(given.new_squares, last)[first:]
    if given.old_buffer:
        vector(given.old_buffer, last)[first:] = vector(given.new_buffer, last)[first:]
