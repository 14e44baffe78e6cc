"""What a local step on all rows does between the products, which a library makes: two passes over memory.

Between two products of a local step is the activation difference, and between two local steps the update. Each of them
is made for some outputs of a problem, in one pass over what a product has found.
"""

from __future__ import annotations

import numpy as np

from locoprop_kernels.cpu_kernels.bfloat16 import narrowed, rounded, widened
from locoprop_kernels.cpu_kernels.functions import elementwise_differences
from locoprop_kernels.cpu_kernels.jit import jit, with_whole_registers
from locoprop_kernels.cpu_kernels.table import aligned, halves, matrix, vector
from locoprop_kernels.cpu_kernels.updates import HYPERPARAMETERS, update, vectors_of
from locoprop_kernels.cpu_kernels.vectors import LANES, NUMBER, load

__all__ = ["difference", "update_outputs"]

# Numbers at a time: a few rows of so many stay in the first cache.
_PIECE = 1024
_ZERO = np.float32(0.0)


@jit
def _widen(bits, numbers):
    """Numbers in bfloat16 as float32."""
    with_whole_registers()
    for k in range(numbers.shape[0]):
        numbers[k] = widened(bits[k])


@jit
def _narrow(numbers, bits):
    """The opposite."""
    with_whole_registers()
    for k in range(numbers.shape[0]):
        bits[k] = narrowed(numbers[k])


@jit
def _round(numbers, out):
    with_whole_registers()
    for k in range(numbers.shape[0]):
        out[k] = rounded(numbers[k])


@jit
def _copy(numbers, out):
    with_whole_registers()
    for k in range(numbers.shape[0]):
        out[k] = numbers[k]


@jit
def _scale(factor, numbers, out):
    with_whole_registers()
    for k in range(numbers.shape[0]):
        out[k] = factor * numbers[k]


@jit
def _add(numbers, number):
    with_whole_registers()
    for k in range(numbers.shape[0]):
        numbers[k] += number


@jit
def _sum(numbers):
    with_whole_registers()
    total = _ZERO
    for k in range(numbers.shape[0]):
        total += numbers[k]
    return total


@jit
def _dot(one, other):
    with_whole_registers()
    total = _ZERO
    for k in range(one.shape[0]):
        total += one[k] * other[k]
    return total


@jit
def _add_multiple(to, factor, numbers):
    with_whole_registers()
    for k in range(to.shape[0]):
        to[k] += factor * numbers[k]


@jit
def _sum_of_absolutes(one, other):
    """The sum of ``|one + other|``."""
    with_whole_registers()
    total = _ZERO
    for k in range(one.shape[0]):
        total += abs(one[k] + other[k])
    return total


@jit
def difference(problem, bias, given, first, last):
    """``E = f(A0 + P + δ) - f(A0)`` in place of ``P = Δ Xᵀ``, for some outputs, and its sum over the rows of each.

    Args:
        problem: a row of the table, see :data:`~locoprop_kernels.cpu_kernels.table.PROBLEM`.
        bias: see :data:`~locoprop_kernels.cpu_kernels.table.PARAMETER`.
        given: see :data:`~locoprop_kernels.cpu_kernels.table.PASS`.
        first: the first output.
        last: the one behind the last.
    """
    rows = given.rows
    delta, sums = vector(bias.delta, last), vector(given.sums, last)
    memory = aligned(2, min(rows, _PIECE))
    for n in range(first, last):
        a0 = vector(given.a0 + NUMBER * n * given.a0_stride, rows)
        wide, narrow = vector(given.product, last * rows), halves(given.product, last * rows)
        total = sums[n] if given.adds else _ZERO
        for begin in range(0, rows, _PIECE):
            end = min(begin + _PIECE, rows)
            p, a = memory[0][: end - begin], memory[1][: end - begin]
            here = slice(n * rows + begin, n * rows + end)
            if given.narrow_product:
                _widen(narrow[here], p)
            else:
                _copy(wide[here], p)
            if delta.shape[0]:
                _add(p, delta[n])
            _copy(a0[begin:end], a)
            elementwise_differences(problem.function, p, a, problem.p0, problem.p1)
            total += _sum(p)
            if given.narrow_product:
                _narrow(p, narrow[here])
            elif problem.rounds:
                _round(p, wide[here])
            else:
                _copy(p, wide[here])
        sums[n] = total


@jit
def update_outputs(problem, weight, bias, given, first, last):
    """A local step of some outputs, from the change of the gradient that products have found.

    Args:
        problem: see :func:`difference`.
        weight: see :data:`~locoprop_kernels.cpu_kernels.table.PARAMETER`.
        bias: likewise.
        given: see :func:`difference`.
        first: the first output.
        last: the one behind the last.

    Returns:
        after the last local step a number that is no less than the absolute value of any that a commit would write; NaN
        if one of them is. Zero after the others.
    """
    inputs, sums = problem.inputs, vector(given.sums, last)
    # Of the Gram form: the batch is ``XᵀX``, the sum of its rows, and how many there are.
    sum_x, delta, delta_bias = vector(given.sum_x, inputs), matrix(weight.delta, last, inputs), vector(bias.delta, last)
    joined = given.sum_x != 0 and bias.gradient != 0
    if joined and given.step > 0:
        product = matrix(given.product, last, inputs)
        for n in range(first, last):
            _add_multiple(product[n], delta_bias[n], sum_x)
    found = given.product, given.narrow_product, given.operand
    total = _update(problem, weight, given, found, first * inputs, last * inputs)
    if bias.gradient:
        total += _update(problem, bias, given, (given.sums, np.int64(0), np.int64(0)), first, last)
    if joined:
        for n in range(first, last):
            sums[n] = _dot(delta[n], sum_x) + np.float32(given.rows) * delta_bias[n]
    return total


@jit
def _update(problem, parameter, given, found, first, last):
    """The same of the elements of a parameter from ``first`` to ``last``.

    Args:
        problem: see :func:`difference`.
        parameter: see :data:`~locoprop_kernels.cpu_kernels.table.PARAMETER`.
        given: see :func:`difference`.
        found: address of the change of the gradient; whether that is in bfloat16; address of memory for the increment
            as the operand of the next product, 0 for none.
        first: the first element.
        last: the one behind the last.
    """
    t, count, (product, narrow, operand) = given.step, last - first, found
    start, delta = vector(parameter.gradient, last)[first:], vector(parameter.delta, last)[first:]
    weight = vector(parameter.parameter, last)[first:]
    squares, buffer = vector(parameter.new_squares, last)[first:], vector(parameter.new_buffer, last)[first:]
    old_squares, old_buffer = vector(parameter.old_squares, last)[first:], vector(parameter.old_buffer, last)[first:]
    wide, bits = vector(product, last)[first:], halves(product, last)[first:]
    operand_wide, operand_bits = vector(operand, last)[first:], halves(operand, last)[first:]
    hyper, factors = vector(problem.hyper, HYPERPARAMETERS), matrix(parameter.factors, problem.steps, 2)
    rule = vectors_of(problem.family, factors[t], hyper)
    memory, rest = aligned(1, _PIECE), aligned(4, LANES)
    gradient, total = memory[0], _ZERO
    for begin in range(0, count, _PIECE):
        end = min(begin + _PIECE, count)
        here, g = slice(begin, end), gradient[: end - begin]
        if t == 0:
            _scale(parameter.scale, start[here], g)
            delta[here] = _ZERO
            _copy(old_squares[here], squares[here])
            _copy(old_buffer[here], buffer[here])
        elif narrow:
            _widen(bits[here], g)
            _gradient(g, parameter.scale, start[here], problem.scale, problem.prox, delta[here])
        else:
            _copy(wide[here], g)
            _gradient(g, parameter.scale, start[here], problem.scale, problem.prox, delta[here])
        _step(rule, delta[here], squares[here], buffer[here], g, rest)
        if operand and given.narrow_operand:
            _narrow(delta[here], operand_bits[here])
        elif operand:
            _round(delta[here], operand_wide[here])
        if t == problem.steps - 1:
            total += _sum_of_absolutes(weight[here], delta[here])
            total += _sum_of_absolutes(squares[here], squares[here]) + _sum_of_absolutes(buffer[here], buffer[here])
    return total


@jit
def _gradient(g, scale, start, change_scale, prox, delta):
    """``scale · start + change_scale · g + λ Δ`` in place of ``g``."""
    with_whole_registers()
    for k in range(g.shape[0]):
        g[k] = scale * start[k] + (change_scale * g[k] + prox * delta[k])


@jit
def _step(rule, delta, squares, buffer, gradient, rest):
    """A step of the rule, vector by vector; ``rest`` is memory ``[4, LANES]`` for what is left."""
    with_whole_registers()
    count = delta.shape[0]
    whole = count - count % LANES
    d, s, b, g = delta.ctypes.data, squares.ctypes.data, buffer.ctypes.data, gradient.ctypes.data
    for k in range(0, NUMBER * whole, NUMBER * LANES):
        update(rule, d + k, s + k, b + k, load(g + k))
    if whole < count:
        left = count - whole
        rest[:] = np.float32(1.0)
        rest[0, :left], rest[1, : squares.shape[0] and left] = delta[whole:], squares[whole:]
        rest[2, : buffer.shape[0] and left], rest[3, :left] = buffer[whole:], gradient[whole:]
        r0, r1, r2, r3 = rest[0], rest[1], rest[2], rest[3]
        update(rule, r0.ctypes.data, r1.ctypes.data, r2.ctypes.data, load(r3.ctypes.data))
        delta[whole:] = r0[:left]
        squares[whole:] = r1[: squares.shape[0] and left]
        buffer[whole:] = r2[: buffer.shape[0] and left]
