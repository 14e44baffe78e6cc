"""Vectors of float32 numbers, for loops of which the registers matter: where the compiler's own are not good enough.

A vector is as wide as a register. It is added to others, subtracted, multiplied and divided with Python's operators,
where products are added without rounding between.
"""

from __future__ import annotations

import operator
import platform
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, overload, register_model

from locoprop_kernels.cpu_kernels.jit import compiles_for

__all__ = ["BYTES", "FEW_REGISTERS", "LANES", "NUMBER", "load", "normal", "root", "spread", "store"]

_X86 = platform.machine().lower() in ("x86_64", "amd64")
_AVX512 = _X86 and compiles_for("avx512f")
#: Whether there are sixteen vector registers, not thirty-two.
FEW_REGISTERS = _X86 and not _AVX512
#: Numbers of a vector.
LANES = 16 if _AVX512 else 8 if _X86 and compiles_for("avx") else 4
#: Bytes of a number, and of a vector.
NUMBER, BYTES = 4, 4 * LANES
# Sums stay in their order: reordered, one output of a tile would have other ones than the next.
_FLAGS = ("contract",)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
# The least float32 number that is not zero.
_LEAST = 2.0**-149
# The bits of a float32 number that are its exponent: none of them is set below the normal numbers.
_EXPONENT = 0x7F800000


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32 x {LANES}")


_VECTOR = _Vector()


@register_model(_Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


def _constant(value: float) -> Any:
    return ir.Constant(_FLOATS, LANES * [value])


def _place(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _FLOATS.as_pointer())


@intrinsic
def load(typing: Any, address: Any) -> Any:
    """The numbers at an address: arrays cannot be taken apart in an inner loop, as references to them are counted."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_place(builder, arguments[0]), align=4)

    return _VECTOR(types.intp), code


@intrinsic
def store(typing: Any, address: Any, vector: Any) -> Any:
    """Write a vector to an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], _place(builder, arguments[0]), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, vector), code


@intrinsic
def spread(typing: Any, value: Any) -> Any:
    """A vector of one number."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        nothing, number = ir.Constant(_FLOATS, ir.Undefined), ir.IntType(32)
        one = builder.insert_element(nothing, arguments[0], ir.Constant(number, 0))
        return builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(number, LANES), LANES * [0]))

    return _VECTOR(types.float32), code


@intrinsic
def normal(typing: Any, vector: Any) -> Any:
    """The vector with zeros in place of what is below float32's normal numbers, which products are slow with."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (v,) = arguments
        integers = ir.VectorType(ir.IntType(32), LANES)
        mask, nothing = (ir.Constant(integers, LANES * [bits]) for bits in (_EXPONENT, 0))
        exponents = builder.and_(builder.bitcast(v, integers), mask)
        return builder.select(builder.icmp_unsigned("==", exponents, nothing), _constant(0.0), v)

    return _VECTOR(vector), code


@intrinsic
def root(typing: Any, vector: Any) -> Any:
    """The square root: NaN of what is negative; with AVX-512 also of infinity.

    The processor's own takes a dozen cycles. There is an estimate of ``1 / √v`` of 14 bits that takes two, and one step
    of Newton's method makes a root with an error of one unit in the last place of it.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (v,) = arguments
        if not _AVX512:
            return _call(builder, f"llvm.sqrt.v{LANES}f32", v)
        inverse = _estimate(builder, "rsqrt14", builder.fadd(v, _constant(_LEAST)))  # that 0 has one
        found = builder.fmul(v, inverse)
        rest = builder.fsub(v, builder.fmul(found, found, flags=_FLAGS), flags=_FLAGS)
        half = builder.fmul(inverse, _constant(0.5))
        return builder.fadd(found, builder.fmul(half, rest, flags=_FLAGS), flags=_FLAGS)

    return _VECTOR(vector), code


@intrinsic
def _quotient(typing: Any, a: Any, b: Any) -> Any:
    """``a / b``, in the same way; with AVX-512 NaN where ``b`` is zero or infinite."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b = arguments
        if not _AVX512:
            return builder.fdiv(a, b)
        inverse = _estimate(builder, "rcp14", b)
        found = builder.fmul(a, inverse)
        rest = builder.fsub(a, builder.fmul(found, b, flags=_FLAGS), flags=_FLAGS)
        return builder.fadd(found, builder.fmul(inverse, rest, flags=_FLAGS), flags=_FLAGS)

    return _VECTOR(a, b), code


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _estimate(builder: Any, name: str, vector: Any) -> Any:
    """An instruction of AVX-512, of all lanes."""
    lanes = ir.IntType(LANES)
    return _call(builder, f"llvm.x86.avx512.{name}.ps.512", vector, _constant(0.0), ir.Constant(lanes, -1))


def _arithmetic(instruction: str) -> Any:
    @intrinsic
    def result(typing: Any, a: Any, b: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, instruction)(*arguments, flags=_FLAGS)

        return _VECTOR(a, b), code

    return result


def _operator(symbol: Any, result: Any) -> None:
    @overload(symbol)
    def of_vectors(a, b):  # numba compares its parameters with those of the result
        if isinstance(a, _Vector) and isinstance(b, _Vector):
            return lambda a, b: result(a, b)
        return None


_operator(operator.add, _arithmetic("fadd"))
_operator(operator.sub, _arithmetic("fsub"))
_operator(operator.mul, _arithmetic("fmul"))
_operator(operator.truediv, _quotient)
