"""Compile-time arguments of the kernels, a few objects instead of a list of names, and what a launch is given besides.

A kernel takes ``P``, how products are computed and with what, ``U``, how a parameter is updated, or both; the device
functions it calls take the same objects on. What depends on a field is decided when the kernel is compiled.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import triton.language as tl
from torch import Tensor

from locoprop_kernels.kernels.device import rules
from locoprop_kernels.settings import Settings

__all__ = ["NOWHERE", "Copy", "Products", "Spec", "StepArguments", "Update"]

NOWHERE = -1
"""In place of a column of the layer table: no such matrix."""


class _Constants:
    """Base of the compile-time objects: shown by a hash of all that they hold, sources of functions included.

    Triton keeps compiled kernels by the ``repr`` of their constants, and knows a function inside a tuple or an object
    by its name alone; without the hash of its source, a kernel compiled from another version would be taken.
    """

    @cached_property
    def digest(self) -> str:
        """A hash of all fields."""
        content = [(one.name, _content(getattr(self, one.name))) for one in fields(self)]  # type: ignore[arg-type]
        return hashlib.sha256(repr(content).encode()).hexdigest()[:32]

    def __repr__(self) -> str:
        return f"{type(self).__name__}_{self.digest}"


def _content(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_content, value))
    return str(value), str(getattr(value, "cache_key", ""))


@dataclass(frozen=True, repr=False)
class Products(_Constants):
    """``P``: how products are computed, and on what.

    Attributes:
        block_n: rows of the weight in a tile.
        block_b: examples in an activation tile.
        block_k: columns of the weight in an update tile.
        block_r: length of a step along the reduction.
        interpreted: whether Triton's interpreter runs the kernels.
        slices: into how many slices (1, 2, 4, 8) an epilogue cuts a tile.
        operand: dtype of the products' operands.
        precision: ``"tf32"``, or ``"ieee"``.
        scaled: whether Δ and ``E`` carry scales, and in float8 ``X`` too.
        preactivation: dtype of ``A0``.
        form: ``"product"``, ``"gram"`` or ``"softmax"``.
        split: whether products over splits of the batch come from another kernel.
        transposed: whether the update tile reads a transposed copy of ``X``.
        sampled: whether each local step has rows of its own.
        trace: whether to evaluate the local objectives.
        transfers: the layers' transfer functions; their place is the code in the layer table.
        divergences: their matching losses, with ``trace``.
        own: whether any transfer function is the user's own.
        near: the transfer functions' forms for small changes, ``None`` where there is none; for operands of 16 bits.
        ptx: whether epilogues divide by instructions of NVIDIA's; for operands of 16 bits.
    """

    block_n: int
    block_b: int
    block_k: int
    block_r: int
    interpreted: bool
    slices: int = 1
    operand: Any = tl.float32
    precision: str = "ieee"
    scaled: bool = False
    preactivation: Any = tl.float32
    form: str = "product"
    split: bool = False
    transposed: bool = False
    sampled: bool = False
    trace: bool = False
    transfers: tuple[Any, ...] = ()
    divergences: tuple[Any, ...] = ()
    own: bool = False
    near: tuple[Any, ...] = ()
    ptx: bool = False

    @property
    def any_near(self) -> bool:
        """Whether any of the transfer functions has a form for small changes."""
        return any(function is not None for function in self.near)


@dataclass(frozen=True, repr=False)
class Update(_Constants):
    """``U``: how a parameter is updated.

    Attributes:
        slots: how many tensors the rule's state has.
        counts_steps: whether the state has a counter of steps.
        rule: the update rule as a Triton function.
        hyper: the rule itself, a frozen dataclass: its hyper-parameters by name.
        regulariser: gradient of the regulariser as a Triton function, or ``None``.
        parameter: dtype of parameters and their gradients.
        masked: whether any parameter has a mask.
        ptx: as in :class:`Products`; the rule is one of ours, and is told.
    """

    slots: int
    counts_steps: bool
    rule: Any = None
    hyper: Any = None
    regulariser: Any = None
    parameter: Any = tl.float32
    masked: bool = False
    ptx: bool = False

    @classmethod
    def of(cls, settings: Settings) -> Update:
        """What the settings ask for; dtype and masks are the problems'."""
        rule, regulariser = settings.rule, settings.regulariser
        return cls(
            slots=len(rule.slots),
            counts_steps=rule.counts_steps,
            rule=rules.lookup(rule),
            hyper=rule,
            regulariser=None if regulariser is None else regulariser.triton_fn,
        )


@dataclass(frozen=True, repr=False)
class Copy(_Constants):
    """``C``: which matrix ``[B, width]`` of the layer table is copied where; columns of the table, or ``NOWHERE``.

    Attributes:
        source: address and strides of the matrix.
        width: number of its columns.
        padded_width: the same, to whole tiles.
        plain: address and row stride of a target of the same orientation.
        transposed: address of a transposed target.
        transposed_stride: row stride of that.
        step: elements from one local step's matrix to the next.
        dtype: of the source.
        operand: dtype of the targets.
        precision: as in :class:`Products`.
        interpreted: likewise.
        block: tile size.
    """

    source: int
    width: int
    padded_width: int
    plain: int
    transposed: int
    transposed_stride: int
    step: int
    dtype: Any
    operand: Any
    precision: str
    interpreted: bool
    block: int


@dataclass(frozen=True)
class Spec:
    """Everything that the kernels of a plan are compiled with.

    Attributes:
        P: for all kernels that know about products.
        U: for those that update or commit.
        tiles: ``P`` as far as the commit depends on it: the tile sizes.
        stored: ``U`` as far as the commit depends on it: what is stored.
        copy_x: the copy of ``X``.
        copy_chunks: the copy of ``X`` where it was put into its place in chunks.
        copy_a0: the copy of ``A0``.
        options: options of the launch for kernels that multiply.
        wide: the same for kernels that hold whole tiles in registers, without a product.
    """

    P: Products
    U: Update
    tiles: Products
    stored: Update
    copy_x: Copy
    copy_chunks: Copy
    copy_a0: Copy
    options: dict[str, Any] = field(default_factory=dict)
    wide: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepArguments:
    """What the launches of a step have in common.

    Attributes:
        table: the layer table.
        rates: learning rates, float32 ``[iterations]``.
        iterations: ``T``.
        prox: proximal coefficient.
        counts: examples of each layer in each local step, int32 ``[rows of the table, iterations + 1]``.
        bad: int32 ``[]``, set where something is not finite.
        trace: partial sums of the local objectives, float64 ``[iterations + 1, trace_stride]``.
        trace_stride: partial sums of one local step.
    """

    table: Tensor
    rates: Tensor
    iterations: int
    prox: float
    counts: Tensor
    bad: Tensor
    trace: Tensor
    trace_stride: int
