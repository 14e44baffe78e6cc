"""All local steps of some outputs of a layer on few rows, in one kernel: increments and state never leave the caches."""

from __future__ import annotations

import numpy as np

from locoprop_kernels.cpu_kernels.functions import SOFTMAX, apply
from locoprop_kernels.cpu_kernels.jit import jit
from locoprop_kernels.cpu_kernels.tiles import OUTPUTS, add_gradient, preactivations
from locoprop_kernels.cpu_kernels.updates import update

__all__ = ["BLOCK", "local_steps"]

#: Outputs that go through a local step together: their increments, state and rows fit into a core's own cache.
BLOCK = 8 * OUTPUTS
_ZERO = np.float32(0.0)


@jit
def _difference(e, f0, bias, first, a0, places, count, transfer, p0, p1, scale):
    """``E = scale · (f(A0 + P) - f(A0))`` in place of ``P``; zero in rows that do not count.

    Args:
        e: ``P`` ``[n, r]``.
        f0: memory for as much.
        bias: ``δ`` of these outputs ``[n]``.
        first: the number of the first output.
        a0: memory of the pre-activations; ``places`` says where the rows begin in it ``[r]``.
        count: how many rows count.
        transfer: the function's code; ``p0`` and ``p1`` are its parameters.
        scale: see above.
    """
    outputs, rows = e.shape
    for r in range(rows):
        place = places[r] + first
        row = a0[place : place + outputs]
        for i in range(outputs):
            f0[i, r] = row[i]
            e[i, r] += row[i] + bias[i]
    apply(transfer, f0, p0, p1)
    apply(transfer, e, p0, p1)
    for i in range(outputs):
        for r in range(rows):
            e[i, r] = scale * (e[i, r] - f0[i, r]) if r < count else _ZERO


@jit
def _total(values):
    """The sum of the absolute values of some numbers: more than any of them, and NaN if one is."""
    total = _ZERO
    for k in range(values.shape[0]):
        total += abs(values[k])
    return total


@jit
def _update_weight(weight, first, last, e, x, rows, step, rule, prox, g):
    """The local step ``step`` of the weights of some outputs; ``e`` and ``rows`` are empty in the first one."""
    grad, _, delta, _, (squares, buffer), factors, scale = weight
    code, hyper = rule
    for i in range(first, last, OUTPUTS):
        some = min(OUTPUTS, last - i)
        for j in range(some):
            gradient, own, target = grad[i + j], delta[i + j], g[i - first + j]
            for k in range(target.shape[0]):
                target[k] = scale * gradient[k] + prox * own[k]
        if step > 0:
            add_gradient(g[i - first : i - first + some], e[i - first : i - first + some], x, rows)
        for j in range(some):
            own = g[i - first + j]
            s = squares[i + j] if squares.shape[0] else own
            b = buffer[i + j] if buffer.shape[0] else own
            update(code, delta[i + j], own, s, b, factors[step], hyper)


@jit
def _update_bias(bias, first, last, e, step, rule, prox, g):
    """The same of the biases."""
    grad, _, delta, _, (squares, buffer), factors, scale = bias
    code, hyper = rule
    g = g[: last - first]
    for i in range(first, last):
        total = scale * grad[i] + prox * delta[i]
        if step > 0:
            for r in range(e.shape[1]):
                total += e[i - first, r]
        g[i - first] = total
    s = squares[first:last] if squares.shape[0] else g
    b = buffer[first:last] if buffer.shape[0] else g
    update(code, delta[first:last], g, s, b, factors[step], hyper)


@jit
def local_steps(first, last, rows, weight, bias, rule, transfer, prox):
    """All local steps of the outputs from ``first`` to ``last``.

    Args:
        first: the first output.
        last: the one behind the last.
        rows: memory of the inputs, and of the pre-activations; where the rows of each local step but the first begin
            in them, each ``[T - 1, r]``; how many of these count ``[T - 1]``; the scale of activation differences.
        weight: gradient, parameter, increment, pairs of old and of new slots, each ``[N, K]`` (``[0, 0]`` for a slot
            that the rule does not have); the factors of its local steps ``[T, 2]``; the scale of the gradient.
        bias: the same of the bias, each ``[N]``; a gradient ``[0]`` says that it is not trained.
        rule: the family's code and hyper-parameters.
        transfer: the function's code and two parameters.
        prox: proximal coefficient ``λ``.

    Returns:
        a number that is no less than the absolute value of any that a commit would write; NaN if one of them is.
    """
    x, a0, places_x, places_a0, counts, scale = rows
    code, p0, p1 = transfer
    _, parameter, delta, old, new, factors, _ = weight
    grad_b, parameter_b, delta_b, old_b, new_b, _, _ = bias
    trains_bias = grad_b.shape[0] > 0
    block = last - first if code == SOFTMAX else min(BLOCK, last - first)
    memory = np.empty((2, block, places_x.shape[1]), np.float32)
    g, gb = np.empty((block, delta.shape[1]), np.float32), np.empty(block, np.float32)
    total = _ZERO
    for n in range(first, last, block):
        m = min(n + block, last)
        e, f0 = memory[0, : m - n], memory[1, : m - n]
        for slot in range(2):
            if new[slot].shape[0]:
                new[slot][n:m] = old[slot][n:m]
            if trains_bias and new_b[slot].shape[0]:
                new_b[slot][n:m] = old_b[slot][n:m]
        delta[n:m] = _ZERO
        delta_b[n:m] = _ZERO
        for t in range(factors.shape[0]):
            own = places_x[max(t - 1, 0)]
            if t > 0:
                preactivations(delta[n:m], x, own, e)
                _difference(e, f0, delta_b[n:m], n, a0, places_a0[t - 1], counts[t - 1], code, p0, p1, scale)
            _update_weight(weight, n, m, e, x, own, t, rule, prox, g)
            if trains_bias:
                _update_bias(bias, n, m, e, t, rule, prox, gb)
        for i in range(n, m):
            for k in range(delta.shape[1]):
                total += abs(parameter[i, k] + delta[i, k])
            for slot in range(2):
                if new[slot].shape[0]:
                    total += _total(new[slot][i])
            if trains_bias:
                total += abs(parameter_b[i] + delta_b[i])
        for slot in range(2):
            if trains_bias and new_b[slot].shape[0]:
                total += _total(new_b[slot][n:m])
    return total
