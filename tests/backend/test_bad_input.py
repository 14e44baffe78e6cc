"""What is refused before anything is changed: state, shared memory, what cannot be written to, odd arguments."""

from typing import Any, cast

import numpy as np
import pytest
import torch

import locoprop_kernels as lk
from locoprop_kernels import rules, transfers
from locoprop_kernels.settings import Settings
from locoprop_kernels.transfers import Transfer
from tests.backend.test_local_steps import assert_refused, problem, run


def adam_state(**changes):
    """Of the weight of :func:`problem`."""
    slots = {"exp_avg": torch.zeros(4, 5), "exp_avg_sq": torch.zeros(4, 5), "step": torch.tensor(3)}
    return {"weight": {**slots, **changes}}


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"weight": 3}, TypeError, "state of weight must be a dict, got 3"),
        ({"weight": [1]}, TypeError, "state of weight must be a dict"),
        ({"weight": {"step": 1, 3: 4}}, ValueError, "state of weight must have exp_avg, exp_avg_sq, step"),
        (adam_state(exp_avg=1.0), TypeError, "state 'exp_avg' of weight must be a torch.Tensor, got 1.0"),
        (adam_state(exp_avg=torch.zeros(4, 5).numpy()), TypeError, "state 'exp_avg' of weight .* got a ndarray"),
        (adam_state(exp_avg=torch.zeros(4, 5).to_sparse()), ValueError, "state 'exp_avg' of weight must be dense"),
        (adam_state(exp_avg=torch.zeros(4, 5) + 1j), ValueError, "state 'exp_avg' of weight must be dense and real"),
        (adam_state(exp_avg=torch.zeros(1, 5).expand(4, 5)), ValueError, "state 'exp_avg' of weight must have memory"),
        (adam_state(step=3), TypeError, "state 'step' of weight must be a torch.Tensor, got 3"),
        (adam_state(step=torch.tensor([3])), ValueError, r"state 'step' of weight must have shape \[\], got \[1\]"),
        (adam_state(step=torch.tensor(-5)), ValueError, "state 'step' of weight must be a whole number >= 0, got -5"),
        (adam_state(step=torch.tensor(1.5)), ValueError, "state 'step' of weight must be a whole number >= 0, got 1.5"),
        (adam_state(step=torch.tensor(torch.nan)), ValueError, "state 'step' of weight must be .* got nan"),
        (adam_state(step=torch.tensor(torch.inf)), ValueError, "state 'step' of weight must be .* got inf"),
    ],
)
def test_state_that_is_none(state, error, message):
    good, bad = problem(), problem(state=state)
    before = good.weight.clone()
    with pytest.raises(error, match=f"problem 1: {message}"):
        run([good, bad], rule="adam")
    assert torch.equal(good.weight, before)
    assert good.state == {}


def test_a_number_of_steps_may_be_a_floating_point_number_as_in_torch():
    one = problem(state=adam_state(step=torch.tensor(2.0)), bias=None, grad_bias=None)
    assert run([one], rule="adam").committed
    assert one.state["weight"]["step"] == 5.0


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_two_problems_with_one_tensor(name):
    """Which they may have as two views, and problems may have the same name."""
    one = problem(name="layer")
    with pytest.raises(ValueError, match=f"layer: its {name} is also that of layer"):
        run([one, problem(name="layer", **{name: getattr(one, name).detach()})])
    assert one.state == {}
    whole = torch.randn(8, 5)
    assert run([problem(weight=whole[:4]), problem(weight=whole[4:])]).committed


@pytest.mark.parametrize("filled", [True, False])
def test_two_problems_with_one_state(filled):
    state: dict[str, Any] = {}
    one = problem(state=state)
    if filled:
        run([one])
    with pytest.raises(ValueError, match="problem 1: its state is also that of problem 0.* state of its own"):
        run([one, problem(state=state)])
    if filled:
        copy = {kind: dict(slots) for kind, slots in state.items()}
        with pytest.raises(ValueError, match="its state 'square_avg' of weight is also the state 'square_avg' of"):
            run([one, problem(state=copy)])


def expanded(name):
    shape = {"weight": (1, 5), "bias": (1,)}[name]
    return {name: torch.randn(*shape).expand(4, *shape[1:])}


def from_inference_mode(name):
    with torch.inference_mode():
        return {name: torch.randn({"weight": (4, 5), "bias": (4,)}[name])}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    ("make", "message"), [(expanded, "memory of its own for each element"), (from_inference_mode, "inference")]
)
def test_parameters_that_cannot_be_written_to(make, message, name, backend):
    good, bad = problem(), problem(**make(name))
    before = good.weight.clone()
    with pytest.raises(ValueError, match=f"problem 1: {name} must .*{message}"):
        run([good, bad], backend=backend)
    assert torch.equal(good.weight, before)
    assert good.state == {}
    assert run([problem(**make(name), **{f"grad_{name}": None})], backend=backend).committed  # it is only read


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_state_from_inference_mode(backend):
    one = problem()
    with torch.inference_mode():
        assert run([one], backend=backend).committed
        assert run([one], backend=backend).committed
    before = one.weight.clone()
    with pytest.raises(ValueError, match="problem 0: state 'square_avg' of weight must not .* inference mode"):
        run([one], backend=backend)
    assert torch.equal(one.weight, before)


def test_what_may_be_written_to_is_no_matter_of_what_was_solved_before():
    """Checks are kept for problems that are alike."""
    with torch.inference_mode():
        weight = torch.randn(4, 5)
        assert run([problem(weight=weight)]).committed
    with pytest.raises(ValueError, match="inference mode"):
        run([problem(weight=weight)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": "123"}, TypeError, "lr must be a sequence of .* got '123'"),
        ({"lr": {0.1: 1}}, TypeError, "lr must be a sequence"),
        ({"lr": {0.1}}, TypeError, "lr must be a sequence"),
        ({"lr": torch.tensor(0.1)}, TypeError, "lr must be a sequence of .* got 0.1"),
        ({"lr": np.array(0.1)}, TypeError, "lr must be a sequence"),
        ({"lr": [True]}, TypeError, r"lr must hold numbers, got \[True\]"),
        ({"lr": ["0.1"]}, TypeError, "lr must hold numbers"),
        ({"lr": [None]}, TypeError, "lr must hold numbers"),
        ({"lr": [1j]}, TypeError, "lr must hold numbers"),
        ({"lr": np.array([[0.1]])}, TypeError, "lr must hold numbers"),
        ({"lr": [10**400]}, ValueError, "lr must hold finite numbers >= 0"),
        ({"prox": 10**400}, ValueError, "prox must be finite and >= 0"),
        ({"reduction": np.zeros(3)}, ValueError, r"reduction must be one of mean, sum; got a ndarray of shape \[3\]"),
        ({"compute_dtype": np.float32}, ValueError, "compute_dtype must be .* got <class 'numpy.float32'>"),
        ({"compute_dtype": np.zeros(3)}, ValueError, "compute_dtype must be .* got a ndarray"),
        ({"trace": 3}, TypeError, "trace must be True or False, got 3"),
        ({"trace": None}, TypeError, "trace must be True or False"),
        ({"commit": "no"}, TypeError, "commit must be True or False, got 'no'"),
        ({"backend": np.zeros(3)}, ValueError, "backend must be one of auto, triton, reference; got a ndarray"),
    ],
)
def test_odd_options(options, error, message):
    assert_refused(error, message, **options)


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": np.array([0.1, 0.2])},
        {"lr": torch.tensor([0.1], requires_grad=True)},
        {"lr": iter([np.float32(0.1), 1, torch.tensor(0.1)])},
        {"prox": np.float32(0.5), "rows": np.int64(4), "rows_seed": np.int64(4), "trace": np.bool_(True)},
    ],
)
def test_numbers_of_numpy_and_torch_are_numbers(changes):
    assert run([problem(examples=np.int64(3), rate_weight=np.float32(1))], backend="reference", **changes).committed


def test_settings_have_numbers_of_python():
    given: list[Any] = ["sgd", np.array([0.1]), np.float32(1), "sum", None, np.bool_(True), None, np.int64(3)]
    made = Settings.checked(*given)
    assert [type(value) for value in (made.rates[0], made.prox, made.trace, made.rows)] == [float, float, bool, int]


@pytest.mark.parametrize("problems", [None, 3, problem()], ids=lambda value: type(value).__name__)
def test_problems_that_are_no_list(problems):
    with pytest.raises(TypeError, match="problems must be a sequence of LocalProblem, got"):
        run(problems)


def test_more_examples_than_a_float_can_count():
    with pytest.raises(ValueError, match="problem 0: examples must be >= 1 and no larger than a float"):
        run([problem(examples=10**400)])
    with pytest.raises(ValueError, match="problem 0: rate_weight must be a finite number"):
        run([problem(rate_weight=10**400)])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rules.SGD(0.9, cast(Any, "no")), TypeError, "nesterov of SGD must be True or False, got 'no'"),
        (lambda: rules.SGD(10**400), ValueError, "momentum of SGD must be >= 0 and finite"),
        (lambda: rules.RMSprop(centered=cast(Any, 1)), TypeError, "centered of RMSprop must be True or False, got 1"),
        (lambda: rules.RMSprop(flavor=cast(Any, np.zeros(2))), ValueError, "flavor of RMSprop must be one of"),
        (lambda: rules.Adam(betas=cast(Any, 0.9)), TypeError, "betas of Adam must be two numbers, got 0.9"),
        (lambda: rules.Adam(betas=cast(Any, None)), TypeError, "betas of Adam must be two numbers, got None"),
        (lambda: rules.Adam(betas=cast(Any, {0.9, 0.99})), TypeError, "betas of Adam must be two numbers"),
        (lambda: rules.Adam(betas=cast(Any, "ab")), TypeError, r"betas\[0\] of Adam must be a number, got 'a'"),
        (lambda: lk.Regulariser(cast(Any, 3)), TypeError, "torch_fn of Regulariser must be callable, got 3"),
        (lambda: lk.Regulariser(torch.sub, value=cast(Any, 3)), TypeError, "value of Regulariser must be callable"),
        (lambda: Transfer("nope"), ValueError, "transfer must be one of .*'nope'"),
        (lambda: Transfer(cast(Any, 3)), TypeError, "transfer must be a string"),
        (lambda: Transfer("leaky_relu"), ValueError, r"'leaky_relu' must have the parameters negative_slope; got \(\)"),
        (lambda: Transfer("tanh", (1.0,)), ValueError, r"'tanh' must have the parameters none; got \(1.0,\)"),
        (lambda: Transfer("elu", cast(Any, 1.0)), ValueError, "'elu' must have the parameters alpha; got 1.0"),
        (lambda: Transfer("elu", cast(Any, ("a",))), TypeError, "alpha of transfer 'elu' must be a number, got 'a'"),
        (lambda: transfers.get("elu", alpha=cast(Any, None)), TypeError, "alpha of transfer 'elu' must be a number"),
        (lambda: transfers.get("elu", alpha=10**400), ValueError, "alpha of transfer 'elu' must be finite"),
        (lambda: transfers.get("celu", alpha=0), ValueError, "alpha must not be 0 in transfer 'celu'"),
        (lambda: transfers.get("softplus", beta=0.0), ValueError, "beta must not be 0 in transfer 'softplus'"),
        (lambda: transfers.get("hardtanh", min_val=2), ValueError, "min_val must be <= max_val in transfer 'hardtanh'"),
        (lambda: lk.LocalSteps(["tanh"], backend=cast(Any, np.zeros(2))), ValueError, "backend must be one of"),
    ],
)
def test_odd_rules_regularisers_and_transfer_functions(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_numbers_of_numpy_make_the_same_rules_and_functions():
    """Also by their text, by which checkpoints are compared."""
    numpy: dict[str, Any] = {"eps": np.float64(1e-3), "centered": np.bool_(True)}
    assert repr(rules.RMSprop(**numpy)) == repr(rules.RMSprop(eps=1e-3, centered=True))
    assert repr(rules.Adam(betas=cast(Any, np.array([0.5, 0.75])))) == repr(rules.Adam(betas=(0.5, 0.75)))
    for slope in (np.float32(0.25), torch.tensor(0.25)):
        assert transfers.get("leaky_relu", negative_slope=cast(Any, slope)) == Transfer("leaky_relu", (0.25,))


@pytest.mark.parametrize(
    ("condition", "error", "message"),
    [
        ("a", TypeError, "condition must be True or False, got 'a'"),
        (1, TypeError, "condition must be True or False, got 1"),
        (torch.tensor(1.0), ValueError, r"condition must be a bool or .* got \[\] of torch.float32"),
        (torch.tensor([True, False]), ValueError, r"condition must be a bool or .* got \[2\] of torch.bool"),
    ],
)
def test_conditions_of_a_commit_that_are_none(condition, error, message):
    """After which the report can still be committed."""
    one = problem()
    before = one.weight.clone()
    report = run([one], commit=False)
    with pytest.raises(error, match=message):
        report.commit_(condition)
    assert torch.equal(one.weight, before)
    assert report.delta_weight[0] is not None
    report.commit_()
    assert report.committed
    assert not torch.equal(one.weight, before)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("condition", [True, False])
def test_conditions_of_a_commit(condition, backend):
    for value in (condition, np.bool_(condition), torch.tensor(condition), torch.tensor([condition])):
        report = run([problem()], commit=False, backend=backend)
        report.commit_(value)
        assert report.committed is condition
