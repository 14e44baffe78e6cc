"""Where the local steps of the squared loss end: a linear system, to test against and to compare with K-FAC."""

from __future__ import annotations

import torch
from torch import Tensor

from locoprop_kernels.patches import row_chunks
from locoprop_kernels.problem import LocalProblem, accumulation_dtype
from locoprop_kernels.settings import check_objective

__all__ = ["closed_form"]


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
        ``(Δ [N, K], δ [N])``; ``None`` for what is frozen or absent. They are in the dtype of sums: float64 for float64
        weights, float32 for all others.

    Raises:
        TypeError, ValueError: as :func:`locoprop_kernels.local_steps_`.
    """
    check_objective(prox, reduction)
    problem.validate("problem")
    if problem.groups is not None or problem.mask_weight is not None or problem.mask_bias is not None:
        raise ValueError("problem must have neither groups nor masks: its minimiser has no closed form here")
    trained = problem.trained()
    dtype = accumulation_dtype(problem.weight.dtype)
    grad = problem.grad_scale * torch.cat([g.to(dtype).reshape(len(g), -1) for _, g in trained.values()], dim=1)
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
