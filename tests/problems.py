"""Local problems of random numbers, every rule and transfer function to solve them with, and comparisons."""

import dataclasses
import itertools
import math

import torch
import torch.nn.functional as F

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
#: The fields of a local problem that are tensors.
TENSORS = ("x", "preactivation", "weight", "bias", "grad_weight", "grad_bias", "mask_weight", "mask_bias")


def random_layer(
    seed, b, k, n, bias=True, dtype=torch.float64, groups=None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """``x, weight, bias, residual`` of a layer; one bias for each of ``groups`` layers side by side."""
    generator = torch.Generator().manual_seed(seed)
    lead = [] if groups is None else [groups]

    def normal(*shape):
        return torch.randn(*lead, *shape, generator=generator, dtype=torch.float64).to(dtype)

    x, weight = normal(b, k), normal(n, k) / math.sqrt(k)
    return x, weight, normal(n) if bias else None, normal(b, n)


def problem_for(x, weight, bias, residual, transfer, **options):
    """A local problem whose target is ``f(A0) - residual``."""
    return lk.LocalProblem(
        x=x,
        preactivation=x @ weight.mT + (0 if bias is None else bias.unsqueeze(-2)),
        weight=weight.clone(),
        bias=None if bias is None else bias.clone(),
        grad_weight=residual.mT @ x,
        grad_bias=None if bias is None else residual.sum(-2),
        transfer=transfer,
        **options,
    )


def problem_and_residual(transfer):
    """A small problem without bias, and ``f(A0) - target``."""
    x, weight, _, residual = random_layer(1, 9, 4, 3, bias=False)
    return problem_for(x, weight, None, residual, transfer), residual


def copied(problem, dtype=None, device=None, **changes):
    """A problem of the same numbers in memory of its own; of another ``dtype``, without state."""

    def copy(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device=device, dtype=value.dtype if value.dtype == torch.bool else dtype, copy=True)

    tensors = {name: copy(getattr(problem, name)) for name in TENSORS}
    state = {name: {slot: value.clone() for slot, value in slots.items()} for name, slots in problem.state.items()}
    return dataclasses.replace(problem, **{**tensors, "state": {} if dtype else state, **changes})


def relative_error(actual, expected):
    """``‖actual - expected‖ / ‖expected‖``."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def increment_errors(reports):
    """Of what a report has found for its first problem, increments and new state, relative to the second report's."""
    found, expected = (report._solution.increment(0) for report in reports)
    assert found.delta.keys() == expected.delta.keys()
    for kind, delta in expected.delta.items():
        yield relative_error(found.delta[kind], delta)
        for slot, value in expected.state[kind].items():
            if value.dim():
                yield relative_error(found.state[kind][slot], value)
            else:
                assert found.state[kind][slot] == value


def forget_transfer(name):
    """Undoes ``register_transfer``, for which the package has no function."""
    del transfers._DEFINITIONS[name]


def unfolded(module, x):
    """Patches of every group of a convolution, ``[positions, K]``, cut out one by one."""
    if x.dim() == module.weight.dim() - 1:
        x = x[None]
    spatial = len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        pads = [(t // 2, t - t // 2) for t in totals]
    else:
        pads = [(0, 0)] * spatial if module.padding == "valid" else [(p, p) for p in module.padding]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(map(any, pads)):
        x = F.pad(x, [amount for pair in reversed(pads) for amount in pair], mode=mode)
    counts = [
        (size - d * (k - 1) - 1) // s + 1
        for size, d, k, s in zip(x.shape[2:], module.dilation, module.kernel_size, module.stride, strict=True)
    ]
    rows = []
    for example in x:
        for position in itertools.product(*map(range, counts)):
            index = [slice(None)] + [
                slice(o * s, o * s + d * (k - 1) + 1, d)
                for o, s, d, k in zip(position, module.stride, module.dilation, module.kernel_size, strict=True)
            ]
            rows.append(example[tuple(index)])
    groups = zip(*(row.chunk(module.groups) for row in rows), strict=True)
    return [torch.stack([part.flatten() for part in group]) for group in groups]
