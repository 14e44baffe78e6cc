"""The rows of a layer from all processes, as if one process had called it on all their batches.

The first pass of all processes is one pass, the batches in the order of the processes; so is the second, and so on.
With ``rows`` a process cannot know in a forward pass which of its rows local steps will take, as that depends on how
many the others have. So passes are kept whole until the step, and only those rows are sent that it takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from locoprop_kernels.patches import several
from locoprop_kernels.problem import PARAMETER_DTYPES
from locoprop_kernels.sampling import Sampling, count_sets_of_parts
from locoprop_torch.auxiliary import own_groups
from locoprop_torch.capture import CapturedLayer
from locoprop_torch.kept import KeptRows, starts_of
from locoprop_torch.passes import Pass
from locoprop_torch.sharding import is_sharded, own_rows, shape_of
from locoprop_torch.step import sampling_ahead
from locoprop_torch.unit import Measured
from locoprop_torch.wire import Shape, Wire

if TYPE_CHECKING:
    from locoprop_torch.optimizer import LocoProp

__all__ = ["GatheredRows", "LocalRows"]


class _Described(NamedTuple):
    """What all processes know of a pass of one of them.

    Attributes:
        module: the number of the module that was called, among those that share the weight.
        size: how many rows it has.
        x: sizes and dtype of its input.
        preactivation: those of its output.
        output: what was measured at its output: order, the bits of the sum of squares, and rows; zeros for nothing.
    """

    module: int
    size: int
    x: Shape
    preactivation: Shape
    output: tuple[int, int, int] = (0, 0, 0)

    def numbers(self) -> list[int]:
        """As integers, see :func:`_read`."""
        found = [self.module, self.size, *self.output]
        for sizes, dtype in (self.x, self.preactivation):
            found += [PARAMETER_DTYPES.index(dtype), len(sizes), *sizes]
        return found


@dataclass
class LocalRows:
    """The passes of this process.

    Attributes:
        tensors: input and pre-activation of every pass, by layer.
        numbers: what the others have to know about them.
    """

    tensors: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)

    @classmethod
    def counted(cls, optimizer: LocoProp) -> LocalRows:
        """How many rows each pass has, where all processes have the same batch and keep their passes."""
        return cls(numbers=[n for layer in optimizer._layers.values() for n in (len(layer.passes), *layer.sizes())])

    @classmethod
    def of(cls, optimizer: LocoProp) -> LocalRows:
        """The passes that this process would take into a step alone.

        Raises:
            ValueError: an input was overwritten since the forward pass, or passes were made by one process alone.
        """
        found = cls()
        for name, layer in optimizer._layers.items():
            if any(captured.kept is not None for captured in layer.passes):
                raise ValueError(
                    f"layer {name!r} was called before there were several processes: call opt.zero_grad(), and "
                    "repeat the forward and the backward pass"
                )
            found.numbers.append(len(layer.passes))
            found.tensors[name] = []
            for captured in layer.passes:
                x, a = captured.restored(name, layer.weight.dtype)
                found.tensors[name].append((x, a))
                found.numbers += _described(layer, captured, x, a).numbers()
        return found


def _described(layer: CapturedLayer, captured: Pass, x: Tensor, a: Tensor) -> _Described:
    size = layer.layout_at(captured.module).inputs(x).shape[-2]
    module = list(layer.modules.values()).index(captured.module)
    measured = layer.measured(captured)
    output = (0, 0, 0)
    if measured is not None:
        output = measured.order, _bits(measured.at_step(layer)), measured.rows
    return _Described(module, size, (tuple(x.shape), x.dtype), (tuple(a.shape), a.dtype), output)


def _bits(number: float) -> int:
    return int(torch.tensor(number, dtype=torch.float64, device="cpu").view(torch.int64))


def _measured(described: Sequence[_Described], processes: int) -> Measured | None:
    """What was measured at the output of one pass of several processes, whose gradients have been averaged."""
    found = [one.output for one in described if one.output[2]]
    if not found:
        return None
    squares = torch.tensor([bits for _, bits, _ in found], dtype=torch.int64, device="cpu").view(torch.float64)
    total = squares.sum() / processes**2
    return Measured(min(order for order, _, _ in found), total, sum(rows for _, _, rows in found), settled=True)


def _read(numbers: Sequence[int], layers: int) -> list[list[_Described]]:
    """The passes of each of the ``layers`` of a process, out of its numbers."""
    following = iter(numbers)

    def shape() -> Shape:
        dtype = PARAMETER_DTYPES[next(following)]
        return tuple(next(following) for _ in range(next(following))), dtype

    def described() -> _Described:
        module, size = next(following), next(following)
        output = next(following), next(following), next(following)
        return _Described(module, size, shape(), shape(), output)

    return [[described() for _ in range(next(following))] for _ in range(layers)]


class GatheredRows:
    """The rows of all processes, put into every layer in place of its own.

    Args:
        wire: the processes.
        optimizer: the optimiser, whose layers get them.
        local: the passes of this process.
        numbers: what every process has said of its own.
    """

    def __init__(self, wire: Wire, optimizer: LocoProp, local: LocalRows, numbers: Sequence[Sequence[int]]) -> None:
        groups = own_groups(optimizer.param_groups)
        sampling = sampling_ahead(optimizer.rows, optimizer.rows_seed, groups, optimizer.trace)
        layers = list(optimizer._layers.values())
        by_process = [_read(some, len(layers)) for some in numbers]
        shares = [
            _Share(layer, [passes[i] for passes in by_process], sampling, wire.rank) for i, layer in enumerate(layers)
        ]
        own = [tensor for share in shares for tensor in share.chosen(local.tensors[share.layer.name])]
        shapes = [[shape for share in shares for shape in share.shapes(rank)] for rank in range(wire.size)]
        found = [iter(tensors) for tensors in wire.tensors(own, shapes)]
        self._before = {layer: layer.passes for layer in layers}
        for share in shares:
            share.layer.passes = share.passes(found)

    def put_back(self) -> None:
        """Give every layer its own passes back: there was no step."""
        for layer, passes in self._before.items():
            layer.passes = passes

    def release(self) -> None:
        """Let go of the layers' own passes: a step has used them."""
        for passes in self._before.values():
            for captured in passes:
                captured.release()


class _Share:
    """What processes send of a layer, and what becomes of it.

    Args:
        layer: the layer.
        described: the passes of every process.
        sampling: which rows the step takes; ``None`` for all.
        rank: the number of this process.
    """

    def __init__(
        self, layer: CapturedLayer, described: Sequence[Sequence[_Described]], sampling: Sampling | None, rank: int
    ) -> None:
        self.layer, self.described, self.rank = layer, described, rank
        count = max(map(len, described))
        # Of sharded parameters own outputs are needed, of which there is one at least, see `own_or_zeros`.
        rows = layer.outputs or own_rows(layer.weight)
        some = 0 < rows.stop - rows.start < len(layer.weight)
        self.part = some if layer.outputs else is_sharded(layer.weight) and not layer.whole
        self.outputs = rows if rows.start < rows.stop else slice(0, 1)
        #: How many rows a process has in each pass.
        self.counts = [[passes[i].size if i < len(passes) else 0 for passes in described] for i in range(count)]
        self.sizes = [sum(counts) for counts in self.counts]
        self.sets = 1 if sampling is None else count_sets_of_parts(self.sizes, sampling.rows)
        # With one set local steps take all rows.
        self.sampling = sampling if self.sets > 1 else None

    def _starts(self, rank: int, index: int) -> list[int]:
        """The first row of a pass that each local step takes; they take every ``sets``-th from there."""
        assert self.sampling is not None
        return starts_of(self.sampling, self.sets, sum(self.sizes[:index]) + sum(self.counts[index][:rank]))

    def chosen(self, own: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """What this process sends, as :meth:`shapes` says."""
        for index, ((x, a), captured) in enumerate(zip(own, self.layer.passes, strict=True)):
            if self.sampling is None:
                yield from (x, a)
            else:
                starts = self._starts(self.rank, index)
                for rows in self.layer.layout_at(captured.module).rows(x, a):
                    yield several(rows, starts, self.sets)

    def shapes(self, rank: int) -> Iterator[Shape]:
        """Sizes and dtypes of what a process sends."""
        *lead, outputs, inputs = shape_of(self.layer.layout, self.layer.weight)
        for index, captured in enumerate(self.described[rank]):
            if self.sampling is None:
                yield from (captured.x, captured.preactivation)
            else:
                rows = sum(self._taken(rank, index))
                yield (*lead, rows, inputs), captured.x[1]
                yield (*lead, rows, outputs), captured.preactivation[1]

    def _taken(self, rank: int, index: int) -> list[int]:
        """How many rows of a pass each local step takes."""
        size = self.counts[index][rank]
        return [len(range(start, size, self.sets)) for start in self._starts(rank, index)]

    def passes(self, found: Sequence[Iterator[Tensor]]) -> list[Pass]:
        """The passes of all processes.

        Args:
            found: what each of them has sent; what is of this layer is taken from it.
        """
        parts = [
            [(index, next(tensors), next(tensors)) for index in range(len(self.described[rank]))]
            for rank, tensors in enumerate(found)
        ]
        if self.sampling is not None:
            return [self._joined(index, parts) for index in range(len(self.sizes)) if self.sizes[index]]
        modules = list(self.layer.modules.values())
        # By pass, then by process.
        order = sorted((index, rank, x, a) for rank, some in enumerate(parts) for index, x, a in some)
        return [self._whole(modules, self.described[rank][index], x, a) for index, rank, x, a in order]

    def _whole(self, modules: Sequence[nn.Module], described: _Described, x: Tensor, a: Tensor) -> Pass:
        """A pass of one process, of which all rows are there."""
        module, output = modules[described.module], _measured([described], len(self.described))
        if self.part:
            a = self.layer.layout_at(module).features(a, self.outputs)
        return Pass(module, x, a, (x._version, a._version), counted=True, output=output)

    def _joined(self, index: int, parts: Sequence[Sequence[tuple[int, Tensor, Tensor]]]) -> Pass:
        """One pass of all processes, of which the rows are kept that local steps take."""
        assert self.sampling is not None
        columns: list[list[list[Tensor]]] = [[], []]
        for rank, some in enumerate(parts):
            if index < len(some) and self.counts[index][rank]:
                taken = self._taken(rank, index)
                for column, tensor in zip(columns, some[index][1:], strict=True):
                    column.append(list(tensor.split(taken, -2)))
        x, a = ([_cat(rows, self.layer.weight.dtype) for rows in zip(*column, strict=True)] for column in columns)
        if self.part:
            a = [rows[..., self.outputs] for rows in a]
        offset = sum(self.sizes[:index])
        kept = KeptRows(self.sizes[index], self.sampling, self.sets, offset, x, a)
        described = [passes[index] for passes in self.described if index < len(passes)]
        output = _measured(described, len(self.described))
        return Pass(self.layer.module, None, None, (0, 0), kept, kept.size, offset, counted=True, output=output)


def _cat(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All rows, in ``dtype`` where they are of several."""
    same = len({part.dtype for part in parts}) == 1
    return torch.cat([part if same else part.to(dtype) for part in parts], -2)
