"""Local problems of random numbers, and every rule and transfer function that they are solved with."""

import math

import torch

import locoprop_kernels as lk
from locoprop_kernels import rules, transfers

RULES = [
    rules.SGD(),
    rules.SGD(momentum=0.8),
    rules.SGD(momentum=0.8, nesterov=True),
    *(
        rule
        for flavor in ("torch", "tensorflow")
        for rule in (
            rules.RMSprop(flavor=flavor, eps=1e-4),
            rules.RMSprop(flavor=flavor, eps=1e-4, momentum=0.0),
            rules.RMSprop(flavor=flavor, eps=1e-3, centered=True, momentum=0.5),
            rules.Adam(flavor=flavor, eps=1e-4),
            rules.Adagrad(flavor=flavor, eps=1e-4, initial_accumulator_value=0.1),
        )
    ),
]
TRANSFERS = [
    *(transfers.get(name) for name in transfers.available()),
    transfers.get("leaky_relu", negative_slope=0.3),
    transfers.get("softplus", beta=2.0),
    transfers.get("elu", alpha=0.5),
]


def random_layer(seed, b, k, n, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, weight = normal(b, k), normal(n, k) / math.sqrt(k)
    return x, weight, normal(n) if bias else None, normal(b, n)


def problem_for(x, weight, bias, residual, transfer, **options):
    """A local problem whose target is ``f(A0) - residual``."""
    return lk.LocalProblem(
        x=x,
        preactivation=x @ weight.t() + (0 if bias is None else bias),
        weight=weight.clone(),
        bias=None if bias is None else bias.clone(),
        grad_weight=residual.t() @ x,
        grad_bias=None if bias is None else residual.sum(0),
        transfer=transfer,
        **options,
    )
