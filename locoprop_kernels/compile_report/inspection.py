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

from locoprop_kernels.compile_report import flow
from locoprop_kernels.devices import DEVICES, lookup

__all__ = ["Epilogue", "Record", "Variant", "compile_variant", "gpu_target"]

_MATRIX = re.compile(r"[A-Z0-9]*MMA$|v_(s?mfmac?|wmma)_\w+")
# Matrix instructions that keep all bits of fp32 exist on AMD alone.
_EXACT_MATRIX = re.compile(r"v_mfma_f32_\d+x\d+x\d+_?(\d+b_)?f32")
_LOAD = re.compile(r"(LD(G|GSTS|S|SM|L|TM)?|UTMALDG|UBLKCP)$|(global|buffer|flat|scratch)_load_\w+|ds_read\w*")
# Of asynchronous matrix instructions, as sm_90 and sm_100 have: wait for them, or ask to be told of their end.
_WAIT = re.compile(r"WARPGROUP\.DEPBAR|UTCBAR")
# Exponential, reciprocal, square root and their like, for which a multiprocessor has fewer lanes.
_SPECIAL = re.compile(r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_\w+")
_ACCESS = re.compile(r"(LD|ST)G(?=\.|$)|(?:global|flat)_(load|store)_")
_BITS = {"64": 64, "128": 128, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
_NARROWER = re.compile(r"\.[US](8|16)\b|_(u?s?byte|u?s?short)")
_SASS_BYTES = 16
# Of a multiprocessor, and of its shared memory what a program takes beside its own; of NVIDIA's.
_REGISTERS = 65536
_OWN_BYTES = 1024
# A product that stayed in a plain register layout is done with scalar multiply-adds.
_SCALAR_DOT = re.compile(r"\btt\.dot\b[^\n]*parent = #blocked")


@dataclass(frozen=True)
class Epilogue:
    """What a kernel writes after its product: what its instructions are counted for.

    Attributes:
        phase: ``"activation"`` or ``"update"``.
        elements: of a program's tile.
        slices: into how many slices of it the epilogue is cut.
        most: instructions for an element that it should not exceed on sm_90; ``None`` where nothing is asked.
    """

    phase: str
    elements: int
    slices: int = 1
    most: float | None = None


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
        epilogue: what to count the instructions of; ``None`` for nothing.
        resident: programs that a multiprocessor must hold at once.
    """

    kernel: str
    configuration: str
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...] = ()
    precision: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict)
    epilogue: Epilogue | None = None
    resident: int = 1


@dataclass(frozen=True)
class Counts:
    """What a warp issues in an epilogue, in an ordinary local step: neither the first nor the last.

    Attributes:
        phase: ``"activation"`` or ``"update"``.
        elements: of the tile, for a thread.
        instructions: all of them.
        special: exponentials, reciprocals, square roots.
        loads: from global memory, by their width in bits.
        stores: to global memory, likewise.
        most: instructions for an element that were asked for.
    """

    phase: str
    elements: int
    instructions: int
    special: int
    loads: dict[int, int]
    stores: dict[int, int]
    most: float | None = None

    @property
    def per_element(self) -> float:
        """Instructions for an element."""
        return self.instructions / self.elements

    def shortfalls(self) -> list[str]:
        """What is asked for and not reached."""
        found = []
        if self.most is not None and self.per_element > self.most:
            found.append(f"issues {self.per_element:.1f} instructions for an element, more than {self.most:g}")
        # Every tile reads a few numbers of the layer table, and a thread or two write sums; a matrix that is read
        # element by element has as many accesses as elements, and one of 16 bits written by 64 a quarter.
        loads, stores = sum(self.loads.values()), sum(self.stores.values())
        narrow_loads = sum(count for bits, count in self.loads.items() if bits < 64)
        narrow_stores = sum(count for bits, count in self.stores.items() if bits < 128)
        if narrow_loads > self.elements / 2:
            found.append(f"reads less than 64 bits at a time in {narrow_loads} of {loads} loads")
        if narrow_stores > self.elements / 8:
            found.append(f"writes less than 128 bits at a time in {narrow_stores} of {stores} stores")
        return found


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
        code_bytes: size of the code.
        threads: of the programs that a multiprocessor must hold at once.
        resident: these programs.
        serial_loops: loops of products that wait more than once for asynchronous matrix instructions, so that these
            run one after another.
        epilogue: its counts, where the variant asks for them.
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
    code_bytes: int = 0
    threads: int = 0
    resident: int = 1
    serial_loops: int = 0
    epilogue: Counts | None = None

    def violations(self) -> list[str]:
        """Why this must not be a default configuration; empty if it may."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes a thread")
        if self.shared_bytes > self.shared_limit:
            found.append(
                f"needs {self.shared_bytes} bytes of shared memory, more than {self.target}'s {self.shared_limit}"
            )
        # Registers come in eights; each program takes 1 KiB for itself, as the largest one does.
        registers = self.threads * -(-self.registers // 8) * 8
        if self.resident > 1 and registers > _REGISTERS:
            found.append(f"needs {registers} registers for {self.resident} programs, more than {_REGISTERS}")
        shared = self.resident * (self.shared_bytes + _OWN_BYTES)
        if self.resident > 1 and shared > self.shared_limit + _OWN_BYTES:
            found.append(f"needs {shared} bytes of shared memory for {self.resident} programs")
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
        if self.serial_loops:
            found.append(f"waits more than once for the matrix instructions of {self.serial_loops} loops")
        return found

    def shortfalls(self) -> list[str]:
        """What its epilogue should do and does not: reported, and no reason to fail."""
        return [] if self.epilogue is None else self.epilogue.shortfalls()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "violations": self.violations(), "shortfalls": self.shortfalls()}


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
    opcodes = Counter(opcode.split(".")[0] for block in code.blocks for opcode in block.opcodes)
    waits = [
        sum(bool(_WAIT.match(opcode)) for i in loop for opcode in code.blocks[i].opcodes)
        for loop in flow.product_loops(code.blocks, _MATRIX)
    ]
    lanes = gpu_target(target).warp_size * variant.options.get("num_warps", 4)
    return Record(
        kernel=variant.kernel,
        configuration=variant.configuration,
        target=target,
        precision=variant.precision,
        registers=code.registers,
        spill_bytes=code.spill_bytes,
        shared_bytes=compiled.metadata.shared,
        shared_limit=lookup(target).shared_bytes,
        matrix_instructions={opcode: n for opcode, n in sorted(opcodes.items()) if _MATRIX.fullmatch(opcode)},
        load_instructions={opcode: n for opcode, n in sorted(opcodes.items()) if _LOAD.fullmatch(opcode)},
        instructions=opcodes.total(),
        scalar_products=len(_SCALAR_DOT.findall(compiled.asm["ttgir"])),
        seconds=round(seconds, 3),
        code_bytes=code.size,
        threads=variant.resident * lanes,
        resident=variant.resident,
        serial_loops=sum(count > 1 for count in waits),
        epilogue=_counts(code.blocks, variant.epilogue, lanes, target) if variant.epilogue else None,
    )


@dataclass(frozen=True)
class _Code:
    """Machine code of a function, and what its metadata say."""

    registers: int
    spill_bytes: int
    size: int
    blocks: list[flow.Block]


def _nvidia_code(cubin: bytes) -> _Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = map(int, _only(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text))
    blocks = flow.nvidia_blocks(text)
    size = _SASS_BYTES * sum(len(block.opcodes) for block in blocks)
    # Nothing but spilled registers lives on the stack of these kernels.
    return _Code(registers, stack + local, size, blocks)


def _amd_code(text: str) -> _Code:
    (registers,) = map(int, _only(r"\.vgpr_count:\s+(\d+)", text))
    (scratch,) = map(int, _only(r"\.private_segment_fixed_size:\s+(\d+)", text))
    (spilled,) = map(int, _only(r"\.vgpr_spill_count:\s+(\d+)", text))
    (size,) = map(int, _only(r"codeLenInByte = (\d+)", text))
    # Scalar registers spill to lanes of vector registers, which stay on the chip and are counted there.
    return _Code(registers, max(scratch, 4 * spilled), size, flow.amd_blocks(text))


def _only(pattern: str, text: str) -> tuple[str, ...]:
    """The groups of the only match; a second function in the binary would be one that was not inlined."""
    matches = list(re.finditer(pattern, text))
    if len(matches) != 1:
        raise RuntimeError(f"the compiled code must hold one function, got {len(matches)} matches of {pattern!r}")
    return matches[0].groups()


def _counts(blocks: list[flow.Block], epilogue: Epilogue, lanes: int, target: str) -> Counts | None:
    """The counts of an epilogue, whose tile ``lanes`` threads share; ``None`` where no matrix instruction precedes."""
    elements = epilogue.elements // lanes
    # An element needs a special function, or half of one where two are computed at a time.
    needed = (elements / 2, elements / epilogue.slices / 2)
    path = flow.epilogue_path(blocks, _MATRIX, _SPECIAL, needed)
    if path is None:
        return None
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for opcode in path:
        if access := _ACCESS.match(opcode):
            kind = loads if (access[1] or access[2]) in ("LD", "load") else stores
            kind[_width(opcode)] += 1
    special = sum(bool(_SPECIAL.fullmatch(opcode.split(".")[0])) for opcode in path)
    most = epilogue.most if target == "sm_90" else None
    return Counts(epilogue.phase, elements, len(path), special, dict(loads), dict(stores), most)


def _width(opcode: str) -> int:
    """Bits that an access to global memory moves for a thread."""
    if narrower := _NARROWER.search(opcode):
        return 16 if "16" in narrower[0] or "short" in narrower[0] else 8
    found = [_BITS[part] for part in re.split(r"[._]", opcode) if part in _BITS]
    return found[0] if found else 32
