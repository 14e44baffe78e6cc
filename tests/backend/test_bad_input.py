"""What ``local_steps_`` refuses before it changes anything: state, shared memory, and what cannot be written to."""

from typing import Any

import pytest
import torch

from tests.backend.test_local_steps import problem, run


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
