"""The phases of a local step on all rows that lie between its products, which a library makes.

After the first product that is the activation difference, and after the second the update. Each of them is made for
some outputs of a problem, and goes once through what a product has found.
"""

from __future__ import annotations

import numpy as np

from locoprop_kernels.cpu_kernels import arrays
from locoprop_kernels.cpu_kernels.functions import elementwise, elementwise_differences
from locoprop_kernels.cpu_kernels.jit import jit, with_whole_registers
from locoprop_kernels.cpu_kernels.table import aligned, halves, matrix, vector
from locoprop_kernels.cpu_kernels.updates import HYPERPARAMETERS, update, vectors_of
from locoprop_kernels.cpu_kernels.vectors import LANES, NUMBER, load

__all__ = ["difference", "prepare", "update_outputs"]

# Numbers at a time: a few rows of so many stay in the first cache.
_PIECE = 1024
# Rows and columns that are transposed at a time, in the first cache: of 16, 32 and 64 the best.
_SQUARE = 64
_ZERO = np.float32(0.0)


@jit
def _transpose(source, source_stride, a0, stride, rows, first, last):
    """``a0[n, r] = source[r, n]`` for some outputs: in squares, as either is read or written at its own stride.

    Args:
        source: ``[rows, N]``.
        source_stride: how far apart two rows of it are.
        a0: ``[N, rows]``.
        stride: likewise.
        rows: how many there are.
        first: the first output.
        last: the one behind the last.
    """
    square = aligned(_SQUARE, _SQUARE)
    for n in range(first, last, _SQUARE):
        m = min(n + _SQUARE, last)
        for begin in range(0, rows, _SQUARE):
            end = min(begin + _SQUARE, rows)
            for r in range(begin, end):
                arrays.copy(source[r * source_stride + n : r * source_stride + m], square[r - begin])
            for i in range(n, m):
                column, line = square[:, i - n], a0[i * stride + begin : i * stride + end]
                for r in range(line.shape[0]):
                    line[r] = column[r]


@jit
def prepare(problem, given, first, last):
    """Transpose the pre-activations of some outputs, if that has not been done, and find ``f(A0)`` of them.

    Args:
        problem: a row of the table, see :data:`~locoprop_kernels.cpu_kernels.table.PROBLEM`.
        given: see :data:`~locoprop_kernels.cpu_kernels.table.PHASE`.
        first: the first output.
        last: the one behind the last.
    """
    rows, stride = given.rows, given.a0_stride
    a0, f0 = vector(given.a0, last * stride), vector(given.f0, last * stride)
    if given.source:
        source = vector(given.source, (rows - 1) * given.source_stride + last)
        _transpose(source, given.source_stride, a0, stride, rows, first, last)
    for n in range(first, last if given.f0 else first):
        known = f0[n * stride : n * stride + rows]
        arrays.copy(a0[n * stride : n * stride + rows], known)
        elementwise(problem.function, known, problem.p0, problem.p1)


@jit
def difference(problem, bias, given, first, last):
    """``E = f(A0 + P + δ) - f(A0)`` in place of ``P = Δ Xᵀ``, for some outputs, and its sum over the rows of each.

    Args:
        problem: a row of the table, see :data:`~locoprop_kernels.cpu_kernels.table.PROBLEM`.
        bias: see :data:`~locoprop_kernels.cpu_kernels.table.PARAMETER`.
        given: see :data:`~locoprop_kernels.cpu_kernels.table.PHASE`.
        first: the first output.
        last: the one behind the last.
    """
    rows = given.rows
    delta, sums = vector(bias.delta, last), vector(given.sums, last)
    wide, narrow = vector(given.product, last * rows), halves(given.product, last * rows)
    memory = aligned(2, min(rows, _PIECE))
    for n in range(first, last):
        a0 = vector(given.a0 + NUMBER * n * given.a0_stride, rows)
        f0 = vector(given.f0 + NUMBER * n * given.a0_stride if given.f0 else 0, rows)
        total = sums[n] if given.adds else _ZERO
        for begin in range(0, rows, _PIECE):
            end = min(begin + _PIECE, rows)
            p, a = memory[0][: end - begin], memory[1][: end - begin]
            here = slice(n * rows + begin, n * rows + end)
            if given.narrow_product:
                arrays.widen(narrow[here], p)
            else:
                arrays.copy(wide[here], p)
            if delta.shape[0]:
                arrays.add(p, delta[n])
            before = a0[begin:end]
            if not given.f0:  # of functions that do not leave it as it is
                arrays.copy(before, a)
                before = a
            elementwise_differences(problem.function, p, before, f0[begin:end], problem.p0, problem.p1)
            total += arrays.total(p)
            if given.narrow_product:
                arrays.narrow(p, narrow[here])
            elif problem.rounds:
                arrays.round_to_bfloat16(p, wide[here])
            else:
                arrays.copy(p, wide[here])
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
            arrays.add_multiple(product[n], delta_bias[n], sum_x)
    found = given.product, given.narrow_product, given.operand
    total = _update(problem, weight, given, found, first * inputs, last * inputs)
    if bias.gradient:
        total += _update(problem, bias, given, (given.sums, np.int64(0), np.int64(0)), first, last)
    if joined:
        for n in range(first, last):
            sums[n] = arrays.dot(delta[n], sum_x) + np.float32(given.rows) * delta_bias[n]
    return total


@jit
def _update(problem, parameter, given, found, first, last):
    """A local step of the elements of a parameter from ``first`` to ``last``.

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
            arrays.scale(parameter.scale, start[here], g)
            arrays.fill(delta[here], _ZERO)
            arrays.copy(old_squares[here], squares[here])
            arrays.copy(old_buffer[here], buffer[here])
        else:
            if narrow:
                arrays.widen(bits[here], g)
            else:
                arrays.copy(wide[here], g)
            _gradient(g, parameter.scale, start[here], problem.scale, problem.prox, delta[here])
        _step(rule, delta[here], squares[here], buffer[here], g, rest)
        if operand and given.narrow_operand:
            arrays.narrow(delta[here], operand_bits[here])
        elif operand:
            arrays.round_to_bfloat16(delta[here], operand_wide[here])
        if t == problem.steps - 1:
            total += arrays.total_of_absolutes(weight[here], delta[here])
            for slot in (squares[here], buffer[here]):
                total += arrays.total_of_absolutes(slot, slot)
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
        # Mean squares of nothing are not zero, lest zero be divided by zero.
        arrays.fill(rest.reshape(-1), np.float32(1.0))
        r0, r1, r2, r3 = rest[0], rest[1], rest[2], rest[3]
        for one, own in ((delta, r0), (squares, r1), (buffer, r2), (gradient, r3)):
            arrays.copy(one[whole:], own)
        update(rule, r0.ctypes.data, r1.ctypes.data, r2.ctypes.data, load(r3.ctypes.data))
        for one, own in ((delta, r0), (squares, r1), (buffer, r2)):
            left = one[whole:]
            arrays.copy(own[: left.shape[0]], left)
