"""Division, roots and powers of two, for epilogues that write 16 bits: of one instruction each where the target has it.

``PTX`` says that it has: results are off by two units in the last place of float32, and subnormal numbers count as 0.
"""

import triton
import triton.language as tl

# What is added to a root must outweigh that of the largest number that counts as 0, 1e-19.
LEAST_EPS = tl.constexpr(1e-12)


@triton.jit
def _instruction(x, ASSEMBLY: tl.constexpr):
    """One instruction, of float32 to float32."""
    return tl.inline_asm_elementwise(ASSEMBLY, "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    if PTX:
        return _instruction(x, "rcp.approx.ftz.f32 $0, $1;")
    else:
        return 1.0 / x


@triton.jit
def root(x, PTX: tl.constexpr):
    if PTX:
        return _instruction(x, "sqrt.approx.ftz.f32 $0, $1;")
    else:
        return tl.sqrt(x)


@triton.jit
def power_of_two(x, PTX: tl.constexpr):
    if PTX:
        return _instruction(x, "ex2.approx.ftz.f32 $0, $1;")
    else:
        return tl.exp2(x)


@triton.jit
def quotient(x, y, PTX: tl.constexpr):
    if PTX:
        return x * reciprocal(y, PTX)
    else:
        return x / y
