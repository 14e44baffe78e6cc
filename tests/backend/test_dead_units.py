"""Units whose gradient is zero for good: momentum and moments end at zero, not below the normal numbers.

Denormal numbers slow down every product that they are part of, some processors by a factor of a hundred.
"""

import pytest
import torch

import locoprop_kernels as lk
from locoprop_kernels import reference, rules
from tests.problems import relative_error

LEAST = torch.finfo(torch.float32).tiny
RULES = [
    rules.Adam(),
    rules.Adam(betas=(0.3, 0.95)),
    rules.Adam(flavor="tensorflow"),
    rules.RMSprop(),
    rules.RMSprop(momentum=0.9, flavor="tensorflow"),
    rules.SGD(momentum=0.9),
]


def denormal(tensors):
    """How many numbers are too small to be normal ones."""
    return sum(int(((t != 0) & (t.abs() < LEAST)).sum()) for t in tensors if t.is_floating_point())


def dead_layer(state, b=24, k=20, n=6, seed=0):
    """A ReLU layer of which only the first output has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x, a0, weight, grad = (torch.randn(*shape, generator=generator) for shape in ((b, k), (b, n), (n, k), (n, k)))
    a0[:, 1:] = -5.0
    grad[1:] = 0.0
    bias, grad_bias = torch.zeros(n), grad[:, 0].clone()
    return lk.LocalProblem(x, a0, weight, bias, grad, grad_bias, "relu", state)


def trained_to_death(rule, rows, **options):
    """State and increments after a step with gradients, and 200 of ten local steps without."""
    state: dict = {}
    problem = dead_layer(state)
    problem.grad_weight, problem.grad_bias = torch.ones(6, 20), torch.ones(6)
    options = {"rule": rule, "lr": [1e-3] * 10, "rows": rows, **options}
    lk.local_steps_([problem], **options)
    for slots in state.values():
        for value in slots.values():
            if value.is_floating_point():
                value.mul_(1e-36)  # for which most rules need thousands of local steps
    for seed in range(200):
        report = lk.local_steps_([dead_layer(state)], rows_seed=seed, commit=False, **options)
        increments = [*report.delta_weight, *report.delta_bias]
        report.commit_()
    return state, increments, report.driver


@pytest.mark.parametrize("driver", ["numba", "phases"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_nothing_is_left_below_the_normal_numbers(rule, driver, monkeypatch):
    pytest.importorskip("numba")
    if driver == "phases":
        monkeypatch.setattr(reference, "_COMPILED_ROWS", {})
    state, increments, taken = trained_to_death(rule, None)
    assert taken == driver
    assert denormal(increments) == 0
    assert denormal([value for slots in state.values() for value in slots.values()]) == 0
    assert all(not increment[1:].any() for increment in increments)


@pytest.mark.parametrize("rows", [None, 8])
@pytest.mark.parametrize("rule", [*RULES, rules.SGD(momentum=0.999)], ids=str)
def test_increments_of_pytorch_end_at_zero(rule, rows):
    _, increments, _ = trained_to_death(rule, rows, lr=[1.0] * 10, backend="reference")
    assert denormal(increments) == 0


def test_state_that_is_no_number_stays_that():
    state = {"weight": {"momentum_buffer": torch.full((6, 20), torch.nan)}}
    problem = dead_layer(state)
    problem.grad_bias = None
    report = lk.local_steps_([problem], rules.SGD(momentum=0.9), [0.1], backend="reference")
    assert not report.finite


@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.4, 0.9), (0.9, 0.9)])
def test_a_mean_that_is_short_keeps_small_gradients_after_large_ones(betas):
    pytest.importorskip("numba")
    found = []
    for dtype, backend in ((torch.float32, "auto"), (torch.float64, "reference")):
        generator = torch.Generator().manual_seed(0)
        x, a0, weight, large, small = (torch.randn(32, 32, generator=generator).to(dtype) for _ in range(5))
        state: dict = {}
        for grad, commit in ((100 * large, True), (1e-3 * small, False)):
            problem = lk.LocalProblem(x, a0, weight, grad_weight=grad, transfer="tanh", state=state)
            rule = rules.Adam(betas=betas)
            report = lk.local_steps_([problem], rule, [1e-6] * 2, backend=backend, commit=commit)
        (increment,) = report.delta_weight
        assert increment is not None
        found.append(increment.double())
    assert relative_error(*found) < 2e-6
