"""What the CPU kernels work from: a table with a row for each problem, of numbers and of addresses of tensors.

One call runs all tasks of all problems, whatever these are: nothing has to be handed over for each, and no thread waits
for Python's lock between two tasks. Addresses are of contiguous float32 tensors unless something else is said.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray
from numba.core import types
from numba.extending import intrinsic

from locoprop_kernels.cpu_kernels.jit import jit
from locoprop_kernels.cpu_kernels.rows import VECTOR
from locoprop_kernels.cpu_kernels.vectors import NUMBER

__all__ = [
    "CALL",
    "COMMIT",
    "DIFFERENCE",
    "LOCAL_STEPS",
    "PARAMETER",
    "PHASE",
    "PREPARE",
    "PROBLEM",
    "TASK",
    "UPDATE",
    "aligned",
    "halves",
    "integers",
    "matrix",
    "pointer",
    "take_number",
    "vector",
]

#: A weight ``[N, K]`` or a bias ``[N]``: its gradient, which is 0 where it is not trained; the parameter; memory for
#: its increment; the rule's two slots before and after, 0 for those that it does not have; the factors of the local
#: steps ``[T, 2]``; the scale of the gradient.
PARAMETER = np.dtype(
    [
        ("gradient", np.int64),
        ("parameter", np.int64),
        ("delta", np.int64),
        ("old_squares", np.int64),
        ("old_buffer", np.int64),
        ("new_squares", np.int64),
        ("new_buffer", np.int64),
        ("factors", np.int64),
        ("scale", np.float32),
    ],
    align=True,
)
#: A problem, without its parameters: ``N``, ``K`` and ``T``; memory of the inputs, how long a row is with the zeros
#: behind it, how far apart two rows are, which one is the first of each local step but the first ``[T - 1]`` (int64),
#: and how many rows further the next one is; the same of the pre-activations; how many rows each of these local steps
#: takes ``[T - 1]`` (int64), and how many at most; the code of the transfer function and its parameters; that of the
#: rule's family and its hyper-parameters; whether products round their operands to bfloat16, as the inputs have been;
#: the scale of activation differences; and ``λ``.
PROBLEM = np.dtype(
    [
        ("outputs", np.int64),
        ("inputs", np.int64),
        ("steps", np.int64),
        ("x", np.int64),
        ("x_length", np.int64),
        ("x_stride", np.int64),
        ("x_firsts", np.int64),
        ("x_step", np.int64),
        ("a0", np.int64),
        ("a0_stride", np.int64),
        ("a0_firsts", np.int64),
        ("a0_step", np.int64),
        ("counts", np.int64),
        ("most", np.int64),
        ("function", np.int64),
        ("p0", np.float32),
        ("p1", np.float32),
        ("family", np.int64),
        ("hyper", np.int64),
        ("rounds", np.int64),
        ("scale", np.float32),
        ("prox", np.float32),
    ],
    align=True,
)
#: Some outputs of a problem: its number, the first of them, and the one behind the last.
TASK = np.dtype([("problem", np.int64), ("first", np.int64), ("last", np.int64)], align=True)
#: A phase of a local step of a problem, between two products: the number of the local step; what the product before it
#: has found, ``Δ Xᵀ`` ``[N, b]`` or the change of the weight's gradient ``[N, K]``, and whether that is in bfloat16;
#: how many rows of the batch there are, which is ``b`` but in the Gram form; the pre-activations of these rows,
#: transposed ``[N, b]``, and ``f`` of them, 0 where it is not kept, and how far apart two outputs are; what the
#: pre-activations are transposed from ``[b, N]``, 0 where they have been, and how far apart two rows of that are; the
#: change of the bias's gradient ``[N]``, and whether these rows add to it; memory for the weight's increment as the
#: operand of the next product, 0 where it is taken as it is, and whether that is in bfloat16; in the Gram form the sum
#: of all rows of ``X`` ``[K]``, else 0.
PHASE = np.dtype(
    [
        ("step", np.int64),
        ("product", np.int64),
        ("narrow_product", np.int64),
        ("rows", np.int64),
        ("a0", np.int64),
        ("f0", np.int64),
        ("a0_stride", np.int64),
        ("source", np.int64),
        ("source_stride", np.int64),
        ("sums", np.int64),
        ("adds", np.int64),
        ("operand", np.int64),
        ("narrow_operand", np.int64),
        ("sum_x", np.int64),
    ],
    align=True,
)
#: What a call does: all local steps of some outputs, the commit of what they have found, or a phase of a local step.
LOCAL_STEPS, COMMIT, PREPARE, DIFFERENCE, UPDATE = range(5)
#: A call: where the number of the next task is, an int64 that threads count up; how many tasks and how many problems
#: there are; where these, their parameters (two of each) and the tasks are; memory for what each task returns; what the
#: tasks do, and where the phase is, if it is one.
CALL = np.dtype(
    [
        ("next", np.int64),
        ("count", np.int64),
        ("problem_count", np.int64),
        ("problems", np.int64),
        ("parameters", np.int64),
        ("tasks", np.int64),
        ("results", np.int64),
        ("work", np.int64),
        ("phase", np.int64),
    ],
    align=True,
)


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """An address as what :func:`numba.carray` takes."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), code


@intrinsic
def take_number(typing: Any, address: Any) -> Any:
    """The int64 at an address, which is then one more; no two threads get the same."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = context.get_value_type(types.int64)
        place = builder.inttoptr(arguments[0], word.as_pointer())
        return builder.atomic_rmw("add", place, context.get_constant(types.int64, 1), "monotonic")

    return types.int64(types.int64), code


@jit
def vector(address, size):
    """The float32 numbers ``[size]`` at an address; none where it is 0."""
    return carray(pointer(address), (size if address else 0,), np.float32)


@jit
def matrix(address, rows, columns):
    """The float32 numbers ``[rows, columns]`` at an address; no rows where it is 0."""
    return carray(pointer(address), (rows if address else 0, columns), np.float32)


@jit
def halves(address, size):
    """Numbers in bfloat16 ``[size]`` at an address, as their bits; none where it is 0."""
    return carray(pointer(address), (size if address else 0,), np.uint16)


@jit
def aligned(rows, columns):
    """Memory for float32 numbers ``[rows, columns]`` that begins where a line of the caches does.

    A vector that lies in two lines takes as long as two; where rows are of whole lines, none of them does.
    """
    memory = np.empty(rows * columns + VECTOR, np.float32)
    first = -(memory.ctypes.data // NUMBER) % VECTOR
    return memory[first : first + rows * columns].reshape(rows, columns)


@jit
def integers(address, size):
    """The int64 numbers ``[size]`` at an address."""
    return carray(pointer(address), (size,), np.int64)
