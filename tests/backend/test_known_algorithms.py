"""Known algorithms that LocoProp has as special cases."""

import torch

import locoprop_kernels as lk
from tests.problems import problem_and_residual


def test_implicit_sgd_is_the_limit_of_many_local_steps():
    """Proximal point of the linearised layer: ``W = W_0 - η γ ∂L/∂A(W)ᵀ X`` at the new weights (squared loss)."""
    problem, residual = problem_and_residual("identity")
    eta = 0.05
    start = problem.weight.clone()
    lk.local_steps_([problem], rule="sgd", lr=[0.02] * 3000, prox=1 / eta, reduction="sum")
    delta = problem.weight - start
    implicit_gradient = (residual + problem.x @ delta.T).T @ problem.x
    torch.testing.assert_close(problem.weight, start - eta * implicit_gradient, rtol=1e-8, atol=1e-10)


def test_closed_form_is_the_kfac_step():
    """``Δ = -G (XᵀX/B + λI)⁻¹``: the gradient, preconditioned by the inputs' covariance."""
    problem, residual = problem_and_residual("identity")
    gradient, covariance = residual.T @ problem.x / 9, problem.x.T @ problem.x / 9
    delta, _ = lk.closed_form(problem, prox=0.1)
    torch.testing.assert_close(
        delta, -gradient @ torch.linalg.inv(covariance + 0.1 * torch.eye(4, dtype=torch.float64))
    )
    report = lk.local_steps_([problem], rule="sgd", lr=[0.2] * 3000, prox=0.1, commit=False)
    torch.testing.assert_close(report.problems[0].delta_weight, delta, rtol=1e-8, atol=1e-10)
