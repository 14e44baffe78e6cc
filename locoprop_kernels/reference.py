"""The local loop in plain PyTorch, in increment form: the reference for every kernel, and the fallback without one.

With ``W_t = W_0 + Δ_t``, ``b_t = b_0 + δ_t`` and ``A0 = X W_0ᵀ + b_0`` the textbook iteration of LocoProp (section 3 of
the paper) is exactly

    E_t = f(A0 + X Δ_tᵀ + δ_t) - f(A0)
    G_t = G_0 + E_tᵀ X + λ Δ_t               g_t = g_0 + Σ_batch E_t + λ δ_t

so the first step needs no product, no target is formed, and low precision rounds the *change* alone.
For the identity transfer ``E_tᵀ X = Δ_t (XᵀX) + δ_t (Σ x)ᵀ``: the batch collapses into the Gram matrix ``XᵀX``.
With ``reduction="mean"`` everything but the proximal term is divided by ``B``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from locoprop_kernels.gram import GramForm, gram_is_cheaper
from locoprop_kernels.patches import CHUNK_BYTES, KEPT_BYTES, Rows, Stacked, row_chunks
from locoprop_kernels.problem import LocalProblem, State, accumulation_dtype
from locoprop_kernels.products import Operand, product, rounded
from locoprop_kernels.settings import Settings
from locoprop_kernels.transfers import Transfer

__all__ = ["Increment", "local_loop"]

_LARGE_GROUP = 2**22  # multiply-accumulates of a group's product, from which on groups are solved one by one on CPUs
_CACHED_BYTES = 4 * 2**20  # of E at a time on CPUs: among 1 to 16 MiB the best, or close to it, at all measured shapes


@dataclass(eq=False)
class Increment:
    """What the local loop of one problem found; nothing of it is applied yet.

    Attributes:
        delta: ``{"weight": Δ, "bias": δ}``, without what is frozen; float32 (float64 for float64 parameters).
        state: the rule's state after the loop, in the form of ``LocalProblem.state``.
        driver: which form ran, ``"product"`` or ``"gram"`` (kernels have their own).
        trace: local objective before every local step and at the end, ``[T + 1]``, float64; or ``None``.
    """

    delta: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]
    driver: str
    trace: Tensor | None


class _Form(Protocol):
    """Evaluates the part of the local gradient that changes with the increment."""

    driver: str

    def change(self, delta: dict[str, Tensor]) -> dict[str, Tensor]:
        """``EᵀX`` ``[N, K]`` and ``Σ_batch E`` ``[N]`` at ``delta``: new tensors, none for what is frozen."""

    def divergence(self, delta: dict[str, Tensor]) -> Tensor:
        """Matching loss between ``f(A)`` and ``f(A0)``, summed over the batch; float64."""


class _ProductForm:
    """Any transfer function: two products per evaluation, over a chunk of the batch at a time.

    ``A0``, ``f(A0)`` and ``E`` are stored transposed, ``[N, B]``: then no product needs a transposed copy. Inputs that
    are not held as one tensor are formed once if they fit in ``KEPT_BYTES``, else in every local step.
    """

    driver = "product"

    def __init__(self, problem: LocalProblem, transfer: Transfer, operands: torch.dtype) -> None:
        self.operands = operands
        self.transfer = transfer
        self.preactivation = _transposed(problem.preactivation, accumulation_dtype(problem.weight.dtype))
        self.activation = self._f_(self.preactivation.clone())
        self.x = problem.x
        self.rows, (batch, inputs, _) = _cached_rows(problem), problem.shape
        groups = problem.groups or 1
        self.chunk_bytes = min(CHUNK_BYTES, self.rows * groups * inputs * problem.x.dtype.itemsize)
        self.held = isinstance(problem.x, Tensor) or (
            isinstance(problem.x, Stacked) and all(isinstance(part, Tensor) for part in problem.x.parts)
        )
        kept = self.held or groups * batch * inputs * operands.itemsize <= KEPT_BYTES
        self.parts: list[Operand] = list(self._formed()) if kept else []

    def _formed(self) -> Iterator[Operand]:
        for chunk in row_chunks(self.x, self.chunk_bytes):
            # What is formed here is laid out as its copy was fastest, and products take either layout.
            x = rounded(chunk.contiguous() if self.held else chunk, self.operands)
            for part in x.tensor.split(self.rows, dim=-2):
                yield Operand(part, x.exponent)

    def _chunks(self) -> Iterator[tuple[Operand, slice]]:
        """Chunks of ``X`` in the products' dtype, and which rows they are."""
        start = 0
        for x in self.parts or self._formed():
            stop = start + x.tensor.shape[-2]
            yield x, slice(start, stop)
            start = stop

    def _f_(self, a: Tensor) -> Tensor:
        """``f`` of transposed pre-activations ``[N, b]``, which it may overwrite."""
        return self.transfer.apply_(a.mT, fast=self.operands.itemsize == 2).mT

    def _preactivation(self, delta: dict[str, Tensor], x: Operand, rows: slice) -> Tensor:
        a0 = self.preactivation[..., rows]
        if "weight" not in delta:
            return a0 + delta["bias"].unsqueeze(-1)
        a = product(rounded(delta["weight"], self.operands), x.t(), a0.dtype).add_(a0)
        return a.add_(delta["bias"].unsqueeze(-1)) if "bias" in delta else a

    def change(self, delta: dict[str, Tensor]) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for x, rows in self._chunks():
            difference = self._f_(self._preactivation(delta, x, rows)).sub_(self.activation[..., rows])
            part = {}
            if "weight" in delta:
                part["weight"] = product(rounded(difference, self.operands), x, difference.dtype)
            if "bias" in delta:
                part["bias"] = difference.sum(-1)
            total = {name: total[name].add_(value) if total else value for name, value in part.items()}
        return total

    def divergence(self, delta: dict[str, Tensor]) -> Tensor:
        losses = []
        for x, rows in self._chunks():
            a, a0 = self._preactivation(delta, x, rows), self.preactivation[..., rows]
            losses.append(self.transfer.matching_loss(a.mT.double(), a0.mT.double()).sum())
        return torch.stack(losses).sum()


def _cached_rows(problem: LocalProblem) -> int:
    """How many rows of the batch to work on at a time: on a CPU what its caches hold, else all."""
    batch, _, outputs = problem.shape
    if problem.weight.device.type != "cpu":
        return max(1, batch)
    return max(1024 // (problem.groups or 1), _CACHED_BYTES // (4 * outputs * (problem.groups or 1)), 1)


def _transposed(preactivation: Tensor | Rows, dtype: torch.dtype) -> Tensor:
    """``A0`` as ``[.., N, B]``, which is contiguous."""
    if isinstance(preactivation, Tensor):
        return preactivation.mT.to(dtype).contiguous()
    *groups, batch, outputs = preactivation.shape
    whole = torch.empty(*groups, outputs, batch, dtype=dtype, device=preactivation.device)
    start = 0
    for chunk in row_chunks(preactivation):
        whole[..., start : start + chunk.shape[-2]] = chunk.mT
        start += chunk.shape[-2]
    return whole


def local_loop(problem: LocalProblem, settings: Settings, old: State) -> Increment:
    """Run all local iterations of one problem; reads it, and writes nothing that belongs to it.

    Args:
        problem: a validated problem.
        settings: the settings of the call.
        old: the rule's state before the loop.
    """
    if problem.groups is not None and problem.weight.device.type == "cpu" and math.prod(problem.shape) >= _LARGE_GROUP:
        return _group_by_group(problem, settings, old)
    rule, prox, regulariser = settings.rule, settings.prox, settings.regulariser
    transfer = problem.transfer
    assert isinstance(transfer, Transfer)
    trained = problem.trained()
    accumulate = accumulation_dtype(problem.weight.dtype)
    operands = settings.operands(problem)
    scale = problem.scale(settings.reduction)

    frozen = {name: ~mask for name in trained if (mask := problem.mask(name)) is not None}
    start = _masked({name: grad.to(accumulate) * scale for name, (_, grad) in trained.items()}, frozen)
    delta = {name: torch.zeros_like(grad) for name, grad in start.items()}
    state = {name: {slot: value.clone() for slot, value in slots.items()} for name, slots in old.items()}
    steps = {name: int(state[name]["step"]) if rule.counts_steps else 0 for name in trained}

    form: _Form | None = None
    if settings.iterations > 1 or settings.trace:
        if gram_is_cheaper(problem, settings.iterations):
            form = GramForm(problem, operands)
        else:
            form = _ProductForm(problem, transfer, operands)

    def objective() -> Tensor:
        assert form is not None
        value = form.divergence(delta) * scale
        for name, d in delta.items():
            value = value + (d.double() * start[name]).sum() + d.double().square().sum() * (prox / 2)
            if regulariser is not None:
                value = value + regulariser.increase(trained[name][0], d)
        return value

    values: list[Tensor] = []
    for t, lr in enumerate(settings.rates):
        if settings.trace:
            values.append(objective())
        grads = start
        if t > 0:
            assert form is not None
            grads = form.change(delta)
            for name, grad in grads.items():
                torch.add(start[name], grad, alpha=scale, out=grad)
                if prox:
                    grad.add_(delta[name], alpha=prox)
        if regulariser is not None:
            grads = {name: grad + regulariser.gradient(trained[name][0], delta[name]) for name, grad in grads.items()}
        for name, grad in _masked(grads, frozen).items():
            rule.update_(delta[name], grad, state[name], lr * problem.rate(name), steps[name] + t + 1)
        _masked(delta, frozen)  # momentum of earlier steps may move what has no gradient
    if settings.trace:
        values.append(objective())

    if rule.counts_steps:
        for slots in state.values():
            slots["step"] += settings.iterations
    return Increment(delta, state, form.driver if form else "product", torch.stack(values) if values else None)


def _group_by_group(problem: LocalProblem, settings: Settings, old: State) -> Increment:
    """One group after the other: its rows stay in the caches, and plain products are faster than batched ones."""
    parts = []
    for g in range(problem.groups or 0):
        state = {name: {slot: v[g] if v.dim() else v for slot, v in slots.items()} for name, slots in old.items()}
        parts.append(local_loop(problem.group(g), settings, state))
    first = parts[0]
    traces = [part.trace for part in parts if part.trace is not None]
    return Increment(
        {name: torch.stack([part.delta[name] for part in parts]) for name in first.delta},
        {
            name: {
                slot: torch.stack([part.state[name][slot] for part in parts]) if value.dim() else value
                for slot, value in slots.items()
            }
            for name, slots in first.state.items()
        },
        first.driver,
        torch.stack(traces).sum(0) if traces else None,
    )


def _masked(values: dict[str, Tensor], frozen: dict[str, Tensor]) -> dict[str, Tensor]:
    """``values``, set to zero where ``frozen`` is true; in place."""
    for name, where in frozen.items():
        values[name].masked_fill_(where, 0)
    return values
