"""The product form on few rows: other rows of the batch in each local step, see :mod:`locoprop_kernels.sampling`.

Products are small here, and the cost of a local step is that of going through all weights. So everything that a local
step reads beside them is laid out before the first, products are added to what they change, and where the outputs do
not depend on each other the loop can take a block of them at a time, which stays in the caches for all local steps.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from locoprop_kernels import rules
from locoprop_kernels.form import Form
from locoprop_kernels.patches import Rows, one_after_another, several
from locoprop_kernels.problem import LocalProblem, accumulation_dtype
from locoprop_kernels.products import Operand, added_product, rounded
from locoprop_kernels.sampling import set_size
from locoprop_kernels.scratch import copy_of, give_back, take
from locoprop_kernels.settings import Settings
from locoprop_kernels.transfers import Transfer

__all__ = ["BLOCK", "FewRowsForm", "blocks_of_outputs"]

#: Weights of a block: their increment, two slots, gradient and start are 10 MB, which the last-level caches of servers
#: hold. Smaller blocks pay for more calls of torch, larger ones for the way to memory.
BLOCK = 2**19


class _RowSet(NamedTuple):
    """What a local step needs of its rows. Beyond ``rows`` there may be some with zeros for an input.

    Attributes:
        rows: how many rows count.
        x: inputs ``[.., r, K]``, rounded.
        xt: the same, transposed.
        preactivation: ``A0`` ``[.., N, r]``.
        activation: ``f(A0)`` ``[.., N, r]``.
    """

    rows: int
    x: Operand
    xt: Operand
    preactivation: Tensor
    activation: Tensor


class FewRowsForm(Form):
    """Any transfer function: in each local step two products with one set of rows, which counts for the whole batch.

    Args:
        problem: a validated problem whose batch falls into more than one set.
        settings: the settings of the call.
        fold: whether the bias is a column of the weight, see :mod:`locoprop_kernels.folding`.
    """

    def __init__(self, problem: LocalProblem, settings: Settings, fold: bool) -> None:
        assert isinstance(problem.transfer, Transfer)
        self.transfer, self.operands = problem.transfer, settings.operands(problem)
        self.elementwise, self.fast = problem.transfer.elementwise, self.operands.itemsize == 2
        self.sets = settings.sets(problem)
        order = settings.set_order(self.sets)
        self.order = order if settings.trace else order[: settings.iterations - 1]
        self.held = self._laid_out(problem, fold)
        self.buffer: Tensor | None = None

    def _laid_out(self, problem: LocalProblem, fold: bool) -> dict[int, _RowSet]:
        """Copies of all rows that local steps take, in one tensor each of inputs, pre-activations and activations."""
        numbers = tuple(dict.fromkeys(self.order))
        places = _places(problem.shape[0], self.sets, numbers)
        inputs, preactivations = (_chosen(rows, self.sets, numbers) for rows in (problem.x, problem.preactivation))
        *lead, rows, columns = inputs.shape
        if places.joined is not None:
            rows = len(places.joined)
            preactivations = _gathered(preactivations, places.joined)
        x = take([*lead, rows, columns + fold], inputs.dtype, inputs.device)
        if places.joined is None:
            x[..., :columns] = inputs
        else:
            torch.index_select(inputs, -2, places.joined.to(x.device), out=x[..., :columns])
        if fold:
            x[..., columns:] = 1.0
        if places.filled is not None:
            x.index_fill_(-2, places.filled.to(x.device), 0.0)
        # A tensor of its own for each set, so that no set's numbers depend on how many there are, to the bit.
        by_set = preactivations.unflatten(-2, (len(numbers), places.width)).movedim(-3, 0)
        a0 = take(by_set.mT.shape, accumulation_dtype(problem.weight.dtype), x.device).copy_(by_set.mT)
        if places.joined is not None:
            give_back(preactivations)
        whole, f = rounded(x, self.operands), self._f_(copy_of(a0))
        self.memory = [x, a0, f]
        xs = [Operand(part, whole.exponent) for part in whole.tensor.split(places.width, -2)]
        parts = zip(places.counts, xs, (part.t() for part in xs), a0.unbind(), f.unbind(), strict=True)
        return {number: _RowSet(*part) for number, part in zip(numbers, parts, strict=True)}

    def outputs(self, some: slice) -> FewRowsForm:
        """The form of the problem of some outputs."""
        part = FewRowsForm.__new__(FewRowsForm)
        part.__dict__.update(self.__dict__)
        part.buffer, part.memory = None, []
        part.held = {
            number: rows._replace(
                preactivation=rows.preactivation[..., some, :],
                activation=rows.activation[..., some, :],
            )
            for number, rows in self.held.items()
        }
        return part

    def _f_(self, a: Tensor) -> Tensor:
        """``f`` of transposed pre-activations ``[.., N, r]``, which it may overwrite."""
        if self.elementwise:
            return self.transfer.apply_(a, self.fast)
        return self.transfer.apply_(a.mT, self.fast).mT

    def _preactivation(self, delta: dict[str, Tensor], rows: _RowSet) -> Tensor:
        if "weight" not in delta:
            return rows.preactivation + delta["bias"].unsqueeze(-1)
        a = added_product(rows.preactivation, rounded(delta["weight"], self.operands), rows.xt)
        return a.add_(delta["bias"].unsqueeze(-1)) if "bias" in delta else a

    def _difference(self, delta: dict[str, Tensor], rows: _RowSet) -> Tensor:
        return self._f_(self._preactivation(delta, rows)).sub_(rows.activation)

    def gradient(self, delta: dict[str, Tensor], t: int, start: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        rows = self.held[self.order[t - 1]]
        difference = self._difference(delta, rows)
        grads: dict[str, Tensor] = {}
        if "weight" in delta:
            if self.buffer is None:
                self.buffer = take(start["weight"].shape, start["weight"].dtype, start["weight"].device)
                self.memory.append(self.buffer)
            e = rounded(difference, self.operands)
            grads["weight"] = added_product(start["weight"], e, rows.x, scale * self.sets, self.buffer)
        if "bias" in delta:
            grads["bias"] = torch.add(start["bias"], difference[..., : rows.rows].sum(-1), alpha=scale * self.sets)
        return grads

    def release(self) -> None:
        """Let go of all memory, for the next problem."""
        give_back(*self.memory)
        self.memory = []

    def divergence(self, delta: dict[str, Tensor], t: int) -> Tensor:
        if t == 0:
            return torch.zeros((), dtype=torch.float64, device=next(iter(delta.values())).device)
        rows = self.held[self.order[t - 1]]
        a, a0 = (
            every_row[..., : rows.rows].mT.double()
            for every_row in (self._preactivation(delta, rows), rows.preactivation)
        )
        return self.transfer.matching_loss(a, a0).sum() * self.sets


class _Places(NamedTuple):
    """How some sets of rows are laid out, each with ``width`` places: its own rows, then copies of the first of them.

    The copies make all sets equally long. They do not count, so their inputs are set to zero afterwards.

    Attributes:
        width: places of a set; a multiple of 16 beyond 8, as CPUs take up to twice as long for 31 as for 32.
        counts: for each set, how many rows it has.
        joined: for each place of all sets, which row of the sets one after another it takes; ``None`` where all sets
            fill their places, so that each place takes the row of its own number.
        filled: the places that hold a copy; ``None`` where none does.
    """

    width: int
    counts: tuple[int, ...]
    joined: Tensor | None
    filled: Tensor | None


# All layers of a step with a batch of one size ask for the same.
@lru_cache(maxsize=8)
def _places(batch: int, sets: int, numbers: tuple[int, ...]) -> _Places:
    sizes = tuple(set_size(batch, sets, number) for number in numbers)
    most = max(sizes)
    width = most if most <= 8 else -(-most // 16) * 16
    if min(sizes) == width:
        return _Places(width, sizes, None, None)
    counts, row = np.array(sizes), np.arange(width)
    counted = row < counts[:, None]
    joined = (np.cumsum(counts) - counts)[:, None] + np.where(counted, row, 0)
    filled = np.flatnonzero(~counted)
    return _Places(width, sizes, torch.from_numpy(joined.ravel()), torch.from_numpy(filled))


def _chosen(rows: Tensor | Rows, sets: int, numbers: tuple[int, ...]) -> Tensor:
    """Sets of rows as they are, one after the other, ``[.., b, K]``."""
    if isinstance(rows, Tensor):
        return several(rows, numbers, sets)
    return one_after_another(rows, numbers, sets)


def _gathered(rows: Tensor, places: Tensor) -> Tensor:
    """Some of ``rows`` ``[.., b, K]``, in memory that can be given back."""
    found = take([*rows.shape[:-2], len(places), rows.shape[-1]], rows.dtype, rows.device)
    return torch.index_select(rows, -2, places.to(rows.device), out=found)


def blocks_of_outputs(problem: LocalProblem, settings: Settings) -> list[slice]:
    """Which outputs the local loop takes at a time: all, or on a CPU a block of rows of the weight.

    A block at a time is the same iteration where no output depends on another: not with a softmax, nor where a rule or
    a regulariser of the user's own may look at the whole weight.
    """
    _, inputs, outputs = problem.shape
    assert isinstance(problem.transfer, Transfer)
    independent = problem.transfer.elementwise and settings.regulariser is None and rules.is_elementwise(settings.rule)
    if problem.weight.device.type != "cpu" or problem.groups is not None or not independent:
        return [slice(None)]
    size = math.ceil(outputs / math.ceil(inputs * outputs / BLOCK))
    return [slice(start, start + size) for start in range(0, outputs, size)]
