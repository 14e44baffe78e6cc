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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from locoprop_kernels.patches import row_chunks
from locoprop_kernels.problem import LocalProblem, accumulation_dtype, check_schedule, rule_state
from locoprop_kernels.rules import Rule
from locoprop_kernels.transfers import Transfer

__all__ = ["Increment", "closed_form", "local_loop"]


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


def _product(left: Tensor, right: Tensor, operands: torch.dtype, result: torch.dtype) -> Tensor:
    """``left @ right`` of operands rounded to ``operands``; accumulated and returned in ``result`` where torch can."""
    if operands == torch.float16:
        # Increments can be far below float16's normal range: scale by a power of two, exactly.
        exponent = torch.frexp(left.abs().amax()).exponent
        return torch.ldexp(_low_precision_product(torch.ldexp(left, -exponent), right, operands, result), exponent)
    return _low_precision_product(left, right, operands, result)


def _low_precision_product(left: Tensor, right: Tensor, operands: torch.dtype, result: torch.dtype) -> Tensor:
    left, right = left.to(operands), right.to(operands)
    if operands.itemsize == 2 and left.is_cuda:
        return torch.mm(left, right, out_dtype=result)
    return torch.mm(left, right).to(result)


class _Form(Protocol):
    """Evaluates the part of the local gradient that changes with the increment."""

    driver: str

    def change(self, delta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``(EᵀX [N, K], Σ_batch E [N])`` at the increment ``delta``."""

    def divergence(self, delta: dict[str, Tensor]) -> Tensor:
        """Matching loss between ``f(A)`` and ``f(A0)``, summed over the batch; float64."""


class _ProductForm:
    """Any transfer function: two products per evaluation."""

    driver = "product"

    def __init__(self, problem: LocalProblem, transfer: Transfer, operands: torch.dtype) -> None:
        self.accumulate = accumulation_dtype(problem.weight.dtype)
        self.transfer = transfer
        self.operands = operands
        self.x = problem.x.to(operands) if isinstance(problem.x, Tensor) else problem.x
        self.preactivation = problem.preactivation.to(self.accumulate)
        self.activation = transfer(self.preactivation)

    def _chunks(self) -> Iterator[tuple[Tensor, slice]]:
        """Chunks of ``X`` in the products' dtype, and the rows that they are."""
        start = 0
        for x in row_chunks(self.x):
            yield x.to(self.operands), slice(start, start + len(x))
            start += len(x)

    def _preactivation(self, delta: dict[str, Tensor], x: Tensor, rows: slice) -> Tensor:
        a = self.preactivation[rows]
        if "weight" in delta:
            if self.operands == self.accumulate:
                a = torch.addmm(a, x, delta["weight"].t())
            else:
                a = a + _product(delta["weight"], x.t(), self.operands, self.accumulate).t()
        return a + delta["bias"] if "bias" in delta else a

    def change(self, delta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        total: tuple[Tensor, Tensor] | None = None
        for x, rows in self._chunks():
            difference = self.transfer(self._preactivation(delta, x, rows)) - self.activation[rows]
            part = _product(difference.t(), x, self.operands, self.accumulate), difference.sum(0)
            total = part if total is None else (total[0].add_(part[0]), total[1].add_(part[1]))
        assert total is not None
        return total

    def divergence(self, delta: dict[str, Tensor]) -> Tensor:
        losses = [
            self.transfer.matching_loss(
                self._preactivation(delta, x, rows).double(), self.preactivation[rows].double()
            ).sum()
            for x, rows in self._chunks()
        ]
        return torch.stack(losses).sum()


class _GramForm:
    """Identity transfer: one product with ``XᵀX``, whatever the batch."""

    driver = "gram"

    def __init__(self, problem: LocalProblem, operands: torch.dtype) -> None:
        self.accumulate = accumulation_dtype(problem.weight.dtype)
        self.operands = operands
        self.rows = problem.x.shape[0]
        k = problem.x.shape[1]
        self.gram = problem.weight.new_zeros(k, k, dtype=self.accumulate)
        self.sum_x = problem.weight.new_zeros(k, dtype=self.accumulate)
        for chunk in row_chunks(problem.x):
            x = chunk.to(operands)
            self.gram += _product(x.t(), x, operands, self.accumulate)
            self.sum_x += x.to(self.accumulate).sum(0)

    def change(self, delta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        weight = _product(delta["weight"], self.gram, self.operands, self.accumulate)
        bias = delta["weight"] @ self.sum_x
        if "bias" in delta:
            weight.addr_(delta["bias"], self.sum_x)
            bias.add_(delta["bias"], alpha=self.rows)
        return weight, bias

    def divergence(self, delta: dict[str, Tensor]) -> Tensor:
        weight, bias = self.change(delta)
        change = {"weight": weight, "bias": bias}
        products = [(d.double() * change[name]).sum() for name, d in delta.items()]
        return torch.stack(products).sum() / 2


def _gram_is_cheaper(problem: LocalProblem, transfer: Transfer, iterations: int) -> bool:
    b, k, n = problem.shape
    products = iterations - 1  # the first local step needs none
    return (
        transfer.name == "identity"
        and problem.grad_weight is not None
        and k * k * (b + n * products) < 2 * b * k * n * products
    )


def local_loop(
    problem: LocalProblem,
    rule: Rule,
    rates: list[float],
    prox: float,
    reduction: str,
    compute_dtype: torch.dtype | None,
    trace: bool,
    label: str = "problem",
) -> Increment:
    """Run all local iterations of one problem; reads it, and writes nothing that belongs to it.

    Args:
        problem: a validated problem.
        rule: the update rule.
        rates: learning rate of each local iteration; ``T = len(rates)``.
        prox: proximal coefficient ``λ``.
        reduction: ``"mean"`` or ``"sum"`` over the batch.
        compute_dtype: dtype of the products' operands; ``None`` for the weight's.
        trace: also evaluate the local objective.
        label: begins the messages of errors.
    """
    transfer = problem.transfer
    assert isinstance(transfer, Transfer)
    trained = problem.trained()
    accumulate = accumulation_dtype(problem.weight.dtype)
    operands = compute_dtype or problem.weight.dtype
    scale = problem.scale(reduction)

    start = {name: grad.to(accumulate) * scale for name, (_, grad) in trained.items()}
    delta = {name: torch.zeros_like(grad) for name, grad in start.items()}
    state = {
        name: {slot: value.clone() for slot, value in rule_state(problem, name, rule, label).items()}
        for name in trained
    }
    steps = {name: int(state[name]["step"]) if rule.counts_steps else 0 for name in trained}

    form: _Form | None = None
    if len(rates) > 1 or trace:
        if _gram_is_cheaper(problem, transfer, len(rates)):
            form = _GramForm(problem, operands)
        else:
            form = _ProductForm(problem, transfer, operands)

    def objective() -> Tensor:
        assert form is not None
        value = form.divergence(delta) * scale
        for name, d in delta.items():
            value = value + (d.double() * start[name]).sum() + d.double().square().sum() * (prox / 2)
        return value

    values: list[Tensor] = []
    for t, lr in enumerate(rates):
        if trace:
            values.append(objective())
        grads = dict(start)
        if t > 0:
            assert form is not None
            change = dict(zip(("weight", "bias"), form.change(delta), strict=True))
            for name in grads:
                grads[name] = torch.add(start[name], change[name], alpha=scale)
                if prox:
                    grads[name].add_(delta[name], alpha=prox)
        for name, grad in grads.items():
            rule.update_(delta[name], grad, state[name], lr, steps[name] + t + 1)
    if trace:
        values.append(objective())

    if rule.counts_steps:
        for slots in state.values():
            slots["step"] += len(rates)
    return Increment(delta, state, form.driver if form else "product", torch.stack(values) if trace else None)


@torch.no_grad()
def closed_form(
    problem: LocalProblem, prox: float = 0.0, reduction: str = "mean"
) -> tuple[Tensor | None, Tensor | None]:
    """Minimiser of a local problem with the squared loss (identity transfer): the limit ``T → ∞`` of the local steps.

    With a column of ones in ``X`` for the bias, ``[Δ δ] (C + λI) = -[G_0 g_0]``, ``C = XᵀX`` (``λB`` in place of ``λ``
    for ``reduction="mean"``): one-sided K-FAC. At ``λ = 0`` and singular ``C`` it is the minimum-norm solution, which
    is where gradient descent from zero ends.

    Args:
        problem: the local problem; its transfer function is not looked at.
        prox: proximal coefficient ``λ >= 0``.
        reduction: ``"mean"`` or ``"sum"``.

    Returns:
        ``(Δ [N, K], δ [N])``; ``None`` for what is frozen or absent.

    Raises:
        TypeError, ValueError: as :func:`locoprop_kernels.local_steps_`.
    """
    check_schedule([0.0], prox, reduction)
    problem.validate("problem")
    trained = problem.trained()
    dtype = accumulation_dtype(problem.weight.dtype)
    grad = torch.cat([g.to(dtype).reshape(len(g), -1) for _, g in trained.values()], dim=1)
    gram = grad.new_zeros(grad.shape[1], grad.shape[1])
    for chunk in row_chunks(problem.x):
        columns = {"weight": chunk.to(dtype), "bias": torch.ones_like(chunk[:, :1], dtype=dtype)}
        x = torch.cat([columns[name] for name in trained], dim=1)
        gram.addmm_(x.t(), x)
    gram.diagonal().add_(prox / problem.scale(reduction))
    if prox > 0:
        solution = -torch.cholesky_solve(grad.t(), torch.linalg.cholesky(gram)).t()
    else:
        solution = -grad @ torch.linalg.pinv(gram, hermitian=True)
    k = problem.x.shape[1] if "weight" in trained else 0
    return (
        solution[:, :k] if "weight" in trained else None,
        solution[:, k] if "bias" in trained else None,
    )
