"""The way through machine code: blocks of instructions, the loops of products, and what an epilogue issues.

Nothing runs here. Of a tile's epilogue the path of an ordinary local step is followed through the branches: neither the
first step, which reads the caller's tensors, nor the last, which checks its results.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

__all__ = ["Block", "amd_blocks", "epilogue_path", "nvidia_blocks", "product_loops"]

_SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_AMDGCN = re.compile(r"^(?:(\.L\w+):|\s+([a-z]+_[a-z0-9_]+)\b[ \t]*([^\n;]*))", re.MULTILINE)
# A uniform branch names its predicate among its operands, an ordinary one in front of the instruction.
_PREDICATE = re.compile(r"\bU?P\d\b")
# Of AMD's: from there on nothing but another function's or no code at all.
_AMD_ENDS = ("s_endpgm", "s_setpc_b64")

Path = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """Instructions that run one after another. A function's last block is empty: its end.

    Attributes:
        opcodes: of each, with NVIDIA's modifiers: ``"LDG.E.128"``, ``"v_exp_f32_e32"``.
        successors: blocks that may follow.
    """

    opcodes: tuple[str, ...]
    successors: tuple[int, ...]


@dataclass(frozen=True)
class _Instruction:
    """An opcode, the place that it may branch to (an index; -1 for the end), and whether the next one may follow."""

    opcode: str
    target: int | None = None
    falls_through: bool = True


def nvidia_blocks(text: str) -> list[Block]:
    """Blocks of a function as ``cuobjdump -sass`` prints it."""
    found = _SASS.findall(text)
    index = {int(address, 16): i for i, (address, *_) in enumerate(found)}
    instructions = []
    for _, predicate, opcode, operands in found:
        name, target, always = opcode.split(".")[0], None, not predicate
        if name == "BRA" and (place := re.search(r"0x([0-9a-f]+)", operands)):
            target = index[int(place[1], 16)]
            always = always and not _PREDICATE.search(operands) and ".DIV" not in opcode
        elif name in ("EXIT", "RET"):
            target = -1
        instructions.append(_Instruction(opcode, target, target is None or not always))
    return _blocks(instructions)


def amd_blocks(text: str) -> list[Block]:
    """Blocks of a function in AMD's assembly language."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for label, opcode, operands in _AMDGCN.findall(text):
        if label:
            labels[label] = len(found)
        else:
            found.append((opcode, operands.strip()))
    instructions = []
    for opcode, operands in found:
        # Where no lane is left, masked code is jumped over; on the path that is followed some lane always is.
        target = labels.get(operands) if "branch" in opcode and not opcode.endswith("execz") else None
        if opcode in _AMD_ENDS:
            target = -1
        instructions.append(_Instruction(opcode, target, opcode not in (*_AMD_ENDS, "s_branch")))
    return _blocks(instructions, labels.values())


def _blocks(instructions: Sequence[_Instruction], more: Iterable[int] = ()) -> list[Block]:
    """The blocks of ``instructions``, cut at branches, at their targets and at the places ``more``."""
    count = len(instructions)
    leaders = {0, count, *more}
    for i, one in enumerate(instructions):
        if one.target is not None:
            leaders |= {one.target % (count + 1), i + 1}
    starts = sorted(leaders)
    number = {start: i for i, start in enumerate(starts)}
    found = []
    for start, end in pairwise(starts):
        last = instructions[end - 1]
        following = [] if last.target is None else [number[last.target % (count + 1)]]
        if last.falls_through:
            following.append(number[end])
        opcodes = tuple(one.opcode for one in instructions[start:end])
        found.append(Block(opcodes, tuple(dict.fromkeys(following))))
    return [*found, Block((), ())]


def _back_edges(blocks: Sequence[Block]) -> set[tuple[int, int]]:
    """Edges to a block that is being visited, in a depth-first search from the first."""
    found: set[tuple[int, int]] = set()
    state = [0] * len(blocks)
    state[0] = 1
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(blocks[0].successors))]
    while stack:
        block, rest = stack[-1]
        following = next(rest, None)
        if following is None:
            state[block] = 2
            stack.pop()
        elif state[following] == 1:
            found.add((block, following))
        elif not state[following]:
            state[following] = 1
            stack.append((following, iter(blocks[following].successors)))
    return found


def product_loops(blocks: Sequence[Block], matrix: re.Pattern[str]) -> list[frozenset[int]]:
    """The innermost loops with matrix instructions, each as its blocks.

    Args:
        blocks: of a function.
        matrix: what the opcode of a matrix instruction is, modifiers left out.
    """
    before: list[list[int]] = [[] for _ in blocks]
    for i, block in enumerate(blocks):
        for following in block.successors:
            before[following].append(i)
    heads: dict[int, set[int]] = {}
    for end, head in _back_edges(blocks):
        body = heads.setdefault(head, {head})
        pending = [end]
        while pending:
            block_index = pending.pop()
            if block_index not in body:
                body.add(block_index)
                pending += before[block_index]
    loops = [frozenset(body) for body in heads.values() if any(_multiplies(blocks[i], matrix) for i in body)]
    return [loop for loop in loops if not any(other < loop for other in loops)]


def _multiplies(block: Block, matrix: re.Pattern[str]) -> bool:
    return any(matrix.fullmatch(opcode.split(".")[0]) for opcode in block.opcodes)


def epilogue_path(
    blocks: Sequence[Block], matrix: re.Pattern[str], special: re.Pattern[str], needed: tuple[float, float]
) -> list[str] | None:
    """Opcodes that a warp issues from the end of the last product to the end of the program, loops once.

    At a branch the shorter way is followed, as the first and the last local step take longer than those in between, and
    large changes longer than small ones. Only where the elements would not be worked on at all then (no transfer
    function, as opposed to one), it is the shortest of the ways on which they are. What tells is the number of special
    functions, of which each element needs one.

    Args:
        blocks: of a function.
        matrix: what the opcode of a matrix instruction is, modifiers left out.
        special: the same of a special function: exponential, reciprocal, square root.
        needed: how many special functions the whole path, and a way from one of its branches, have at least if elements
            are worked on.

    Returns:
        ``None`` if the function has no matrix instruction.
    """
    back = _back_edges(blocks)
    acyclic = [tuple(to for to in block.successors if (i, to) not in back) for i, block in enumerate(blocks)]
    order = _topological(acyclic)
    join = _joins(acyclic, order)
    products = [i for i in order if _multiplies(blocks[i], matrix)]
    if not products:
        return None
    place = {block: i for i, block in enumerate(order)}
    begin = products[0]
    for other in products:
        begin = _common(begin, other, join, place)
    begin = join[begin] if begin in products else begin
    counts = [sum(bool(special.fullmatch(opcode.split(".")[0])) for opcode in block.opcodes) for block in blocks]
    ways = _Ways(acyclic, join, [len(block.opcodes) for block in blocks], counts, needed[1])
    return [opcode for i in ways.shortest(begin, len(blocks) - 1, needed[0]) for opcode in blocks[i].opcodes]


def _topological(acyclic: Sequence[tuple[int, ...]]) -> list[int]:
    """The blocks that can be reached from the first, each before those that follow it."""
    done: list[int] = []
    seen = {0}
    stack = [(0, iter(acyclic[0]))]
    while stack:
        block, rest = stack[-1]
        following = next(rest, None)
        if following is None:
            done.append(block)
            stack.pop()
        elif following not in seen:
            seen.add(following)
            stack.append((following, iter(acyclic[following])))
    return done[::-1]


def _joins(acyclic: Sequence[tuple[int, ...]], order: Sequence[int]) -> dict[int, int]:
    """Of each block, the first that all ways from it come through."""
    end = len(acyclic) - 1
    join: dict[int, int] = {}
    place = {block: i for i, block in enumerate(order)}
    for block in reversed(order):
        following = acyclic[block] or (end,)
        found = following[0]
        for other in following[1:]:
            found = _common(found, other, join, place)
        join[block] = found
    return join


def _common(one: int, other: int, join: dict[int, int], place: dict[int, int]) -> int:
    """The first block that all ways from both come through."""
    while one != other:
        if place.get(one, len(place)) < place.get(other, len(place)):
            one = join[one]
        else:
            other = join[other]
    return one


@dataclass(frozen=True)
class _Ways:
    """Ways through blocks whose loops have been cut open.

    Attributes:
        acyclic: successors of each block.
        join: of each block, the first that all ways from it come through.
        lengths: instructions of each block.
        counts: special functions of each block.
        needed: special functions of a way from a branch on which elements are worked on.
    """

    acyclic: Sequence[tuple[int, ...]]
    join: dict[int, int]
    lengths: Sequence[int]
    counts: Sequence[int]
    needed: float
    known: dict[tuple[int, int], Path] = field(default_factory=dict)

    def shortest(self, begin: int, end: int, needed: float) -> Path:
        """The blocks from ``begin`` on, before ``end``, which all ways come through."""
        if (begin, end) in self.known:
            return self.known[begin, end]
        common = []
        block = begin
        while block not in (end, len(self.acyclic) - 1):
            common.append(block)
            block = self.join[block]
        # What no way can avoid works on the elements, so branches need not.
        done = sum(self.counts[block] for block in common) >= needed
        path: Path = ()
        for block in common:
            path += (block,)
            ways = [self.shortest(to, self.join[block], self.needed) for to in self.acyclic[block]]
            if ways:
                path += min(ways, key=lambda way: (not done and self._idle(way), sum(self.lengths[i] for i in way)))
        self.known[begin, end] = path
        return path

    def _idle(self, way: Path) -> bool:
        return sum(self.counts[block] for block in way) < self.needed
