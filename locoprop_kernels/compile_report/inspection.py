"""Compile kernels ahead of time for a GPU that need not be there, and read the machine code.

Triton compiles for any target it knows, and its wheel carries NVIDIA's assembler and disassembler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from locoprop_kernels.devices import DEVICES, lookup

__all__ = ["Record", "Variant", "compile_variant", "gpu_target"]

_MATRIX = re.compile(r"[A-Z0-9]*MMA$|v_(s?mfmac?|wmma)_\w+")
# Matrix instructions that keep all bits of fp32 exist on AMD alone.
_EXACT_MATRIX = re.compile(r"v_mfma_f32_\d+x\d+x\d+_?(\d+b_)?f32")
_LOAD = re.compile(r"(LD(G|GSTS|S|SM|L|TM)?|UTMALDG|UBLKCP)$|(global|buffer|flat|scratch)_load_\w+|ds_read\w*")
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)([.\w]*)", re.MULTILINE)
_AMDGCN = re.compile(r"^\s+([a-z]+_[a-z0-9_]+)\b()", re.MULTILINE)
# A product that stayed in a plain register layout is done with scalar multiply-adds.
_SCALAR_DOT = re.compile(r"\btt\.dot\b[^\n]*parent = #blocked")


@dataclass(frozen=True)
class Variant:
    """A kernel specialised as it would be launched.

    Attributes:
        kernel: the kernel's name.
        configuration: what sets the variant apart, for people.
        function: the ``@triton.jit`` function.
        signature: Triton type of each argument that is not a constant, ``{"x_ptr": "*bf16", "B": "i32"}``.
        constants: values of the constants, by argument name.
        divisible: arguments that are multiples of 16 (sizes) or aligned to 16 bytes (pointers).
        precision: of the products' operands: "bf16", "fp16", "tf32", "ieee", "fp8"; "none" without products.
        options: options of the launch: ``num_warps``, ``num_stages``, ...
    """

    kernel: str
    configuration: str
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...] = ()
    precision: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """What the compiler made of a variant.

    Attributes:
        kernel, configuration, target, precision: what was compiled.
        registers: of a thread (vector registers on AMD).
        spill_bytes: memory of a thread that registers were spilled to.
        shared_bytes: shared memory of a program.
        shared_limit: the most that the target gives one.
        matrix_instructions: how often each opcode occurs.
        load_instructions: how often each opcode occurs.
        instructions: all of them.
        scalar_products: ``tl.dot`` operations that did not become matrix instructions.
        seconds: compilation time (short if it was cached).
    """

    kernel: str
    configuration: str
    target: str
    precision: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    matrix_instructions: dict[str, int]
    load_instructions: dict[str, int]
    instructions: int
    scalar_products: int
    seconds: float

    def violations(self) -> list[str]:
        """Why this must not be a default configuration; empty if it may."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes a thread")
        if self.shared_bytes > self.shared_limit:
            found.append(
                f"needs {self.shared_bytes} bytes of shared memory, more than {self.target}'s {self.shared_limit}"
            )
        if self.precision not in ("none", "ieee"):
            if not self.matrix_instructions:
                found.append(f"multiplies {self.precision} without matrix instructions")
            elif self.scalar_products:
                found.append(
                    f"multiplies {self.precision} without matrix instructions in {self.scalar_products} products"
                )
        rounding = [op for op in self.matrix_instructions if not _EXACT_MATRIX.fullmatch(op)]
        if self.precision == "ieee" and rounding:
            found.append(f"multiplies IEEE fp32 with {', '.join(rounding)}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "violations": self.violations()}


def gpu_target(name: str) -> GPUTarget:
    """Triton's name of a target.

    Args:
        name: ``"sm_90"``, ``"gfx942"``, ...

    Raises:
        ValueError: it is none of those whose limits are known.
    """
    known = dict.fromkeys(device.target for device in DEVICES)
    if name not in known:
        raise ValueError(f"target must be one of {', '.join(known)}; got {name!r}")
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


def compile_variant(variant: Variant, target: str) -> Record:
    """Compile a kernel for ``target`` and say what came out.

    Raises:
        ValueError: an unknown target.
        RuntimeError: Triton runs interpreted in this process, so nothing can be compiled.
    """
    if not isinstance(variant.function, triton.JITFunction):
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1; unset it and start a new process")
    start = time.perf_counter()
    signature = {
        name: "constexpr" if name in variant.constants else variant.signature[name]
        for name in variant.function.arg_names
    }
    positions = {name: (index,) for index, name in enumerate(variant.function.arg_names)}
    source = ASTSource(
        variant.function,
        signature=signature,
        constexprs=dict(variant.constants),
        attrs={positions[name]: [["tt.divisibility", 16]] for name in variant.divisible},
    )
    compiled = triton.compile(source, target=gpu_target(target), options=dict(variant.options))
    seconds = time.perf_counter() - start
    code = _nvidia_code(compiled.asm["cubin"]) if "cubin" in compiled.asm else _amd_code(compiled.asm["amdgcn"])
    return Record(
        kernel=variant.kernel,
        configuration=variant.configuration,
        target=target,
        precision=variant.precision,
        shared_bytes=compiled.metadata.shared,
        shared_limit=lookup(target).shared_bytes,
        scalar_products=len(_SCALAR_DOT.findall(compiled.asm["ttgir"])),
        seconds=round(seconds, 3),
        **code,
    )


def _nvidia_code(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = map(int, _only(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text))
    # Nothing but spilled registers lives on the stack of these kernels.
    return {"registers": registers, "spill_bytes": stack + local, **_opcodes(_SASS.findall(text))}


def _amd_code(text: str) -> dict[str, Any]:
    (registers,) = map(int, _only(r"\.vgpr_count:\s+(\d+)", text))
    (scratch,) = map(int, _only(r"\.private_segment_fixed_size:\s+(\d+)", text))
    (spilled,) = map(int, _only(r"\.vgpr_spill_count:\s+(\d+)", text))
    # Scalar registers spill to lanes of vector registers, which stay on the chip and are counted there.
    return {"registers": registers, "spill_bytes": max(scratch, 4 * spilled), **_opcodes(_AMDGCN.findall(text))}


def _only(pattern: str, text: str) -> tuple[str, ...]:
    """The groups of the only match; a second function in the binary would be one that was not inlined."""
    matches = list(re.finditer(pattern, text))
    if len(matches) != 1:
        raise RuntimeError(f"the compiled code must hold one function, got {len(matches)} matches of {pattern!r}")
    return matches[0].groups()


def _opcodes(instructions: list[tuple[str, str]]) -> dict[str, Any]:
    counts = Counter(opcode for opcode, _ in instructions)
    return {
        "matrix_instructions": {opcode: n for opcode, n in sorted(counts.items()) if _MATRIX.fullmatch(opcode)},
        "load_instructions": {opcode: n for opcode, n in sorted(counts.items()) if _LOAD.fullmatch(opcode)},
        "instructions": sum(counts.values()),
    }
