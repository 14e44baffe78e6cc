"""``commit=False``, and a ``commit_()`` before which users have moved parameters or state."""

import importlib.util

import pytest
import torch

import locoprop_kernels as lk
from tests.helpers import present
from tests.problems import copied, problem_for, random_layer

HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = [
    "reference",
    "auto",
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")),
]


def nothing(problem):
    """Leave everything where it is."""


def weight_elsewhere(problem):
    problem.weight.data = problem.weight.data.clone()


def weight_with_other_strides(problem):
    problem.weight.data = problem.weight.data.t().contiguous().t()


def weight_transposed_where_it_is(problem):
    problem.weight.data = problem.weight.data.t()


def bias_elsewhere(problem):
    problem.bias.data = problem.bias.data.clone()


def weight_in_double(problem):
    problem.weight.data = problem.weight.data.double()


def state_elsewhere(problem):
    for slots in problem.state.values():
        slots["exp_avg"].data = slots["exp_avg"].data.clone()


MOVES = [nothing, weight_elsewhere, weight_with_other_strides, bias_elsewhere, weight_in_double, state_elsewhere]


@pytest.mark.parametrize("rows", [40, 300], ids=["a few rows", "many rows"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("move", [*MOVES, weight_transposed_where_it_is], ids=lambda move: move.__name__)
def test_increments_go_where_parameters_are_by_then(move, backend, rows):
    x, weight, bias, residual = random_layer(1, rows, 7, 7, dtype=torch.float32)
    problem = problem_for(x, weight, bias, residual, "tanh")
    problem.weight, problem.bias = torch.nn.Parameter(problem.weight), torch.nn.Parameter(problem.bias)
    options = {"rule": "adam", "lr": [1e-2] * 3, "backend": backend}
    lk.local_steps_([problem], **options)  # gives it state
    other = copied(problem)
    report = lk.local_steps_([problem, other], commit=False, **options)
    deltas = [(present(one.delta_weight).clone(), present(one.delta_bias).clone()) for one in report.problems]
    old = problem.weight.data, problem.bias.data, *[slots["exp_avg"].data for slots in problem.state.values()]
    kept = [tensor.clone() for tensor in old]
    move(problem)
    before = [tensor.detach().clone() for tensor in (problem.weight, problem.bias)]
    others = [tensor.clone() for tensor in (other.weight, other.bias)]
    steps = [slots["step"].item() for slots in problem.state.values()]
    report.commit_()
    assert report.committed
    assert torch.equal(problem.weight, (before[0] + deltas[0][0]).to(problem.weight.dtype))
    assert torch.equal(problem.bias, before[1] + deltas[0][1])
    assert torch.equal(other.weight, others[0] + deltas[1][0])
    assert torch.equal(other.bias, others[1] + deltas[1][1])
    assert [slots["step"].item() for slots in problem.state.values()] == [step + 3 for step in steps]
    now = problem.weight.data, problem.bias.data, *[slots["exp_avg"].data for slots in problem.state.values()]
    for tensor, copy, current in zip(old, kept, now, strict=True):
        # What was moved away from belongs to somebody else.
        assert torch.equal(tensor, copy) == (tensor.data_ptr() != current.data_ptr())
