"""How the reference backend does few rows: in blocks, with folded biases, fused updates and memory that is kept."""

import random
from typing import Any

import pytest
import torch

import locoprop_kernels as lk
from locoprop_kernels import few_rows, few_rows_loop, folding, fused, rules, scratch
from locoprop_kernels.problem import rule_states
from tests.problems import RULES, copied, problem_for, random_layer, relative_error

OPTIONS: dict[str, Any] = {"lr": [0.02, 0.01, 0.005, 0.005], "rows": 5, "rows_seed": 3, "backend": "reference"}


def problem(transfer="tanh", dtype=torch.float64, seed=0, **options):
    return problem_for(*random_layer(seed, 23, 9, 7, dtype=dtype), transfer, **options)


def steps(one, rule, count=2, **options):
    """Weight, bias and state after some steps, which start from the state that the step before has left."""
    for seed in range(count):
        report = lk.local_steps_([one], rule, **{**OPTIONS, "rows_seed": seed, **options})
        assert report.committed
    return [one.weight, one.bias, *(one.state[kind][slot] for kind in one.state for slot in one.state[kind])]


def assert_alike(some, others, error=1e-12):
    for one, other in zip(some, others, strict=True):
        assert relative_error(one, other) < error if float(other.double().norm()) else torch.equal(one, other)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_fused_updates_are_the_rules_own(rule, monkeypatch):
    one, other = problem(), problem()
    found = steps(one, rule, prox=0.1)
    monkeypatch.setattr(fused, "usable", lambda *tensors: False)
    assert_alike(found, steps(other, rule, prox=0.1))


class HalfAsFast(rules.Adam):
    """A rule of the user's own that is ours but for its rate."""

    def update_(self, delta, grad, state, lr, step):
        super().update_(delta, grad, state, lr / 2, step)


def test_what_a_subclass_overrides_is_not_replaced_by_fused_updates():
    one, other = problem(), problem()
    half = [rate / 2 for rate in OPTIONS["lr"]]
    assert_alike(steps(one, HalfAsFast()), steps(other, rules.Adam(), lr=half))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", [rules.Adam(), rules.RMSprop(), rules.RMSprop(momentum=0.0)], ids=str)
def test_gradients_are_left_as_they_are_by_fused_updates(rule, dtype):
    torch.manual_seed(0)
    delta, grad = torch.zeros(3, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype)
    state = {slot: torch.full_like(delta, value) for slot, value in rule.slots.items()}
    assert fused.usable([delta, grad, *state.values()])
    before = grad.clone()
    rule.update_(delta, grad, state, 0.1, 1)
    assert torch.equal(grad, before)
    assert bool(delta.any())


def test_fused_updates_want_contiguous_tensors_of_one_dtype():
    matrix = torch.zeros(4, 4)
    assert fused.usable([matrix, matrix])
    assert not fused.usable([matrix, matrix.t()[:2]])
    assert not fused.usable([matrix, matrix.double()])
    assert not fused.usable([matrix.bfloat16(), matrix.bfloat16()])


@pytest.mark.parametrize("transfer", ["tanh", "softmax", "identity", "gelu"])
@pytest.mark.parametrize("rule", [rules.Adam(), rules.RMSprop(), rules.SGD(momentum=0.5)], ids=str)
def test_a_folded_bias_is_a_bias(rule, transfer, monkeypatch):
    one, other = problem(transfer), problem(transfer)
    found = steps(one, rule, prox=0.1)
    monkeypatch.setattr(few_rows_loop, "can_fold", lambda *arguments: False)
    assert_alike(found, steps(other, rule, prox=0.1))


def settings_of(rule="adam", **changes):
    from locoprop_kernels.settings import Settings

    known: dict[str, Any] = {"lr": [0.1] * 3, "prox": 0.0, "reduction": "mean", "compute_dtype": None, "trace": False}
    return Settings.checked(rule, **{**known, "regulariser": None, "rows": 5, **changes})


def test_what_tells_weight_and_bias_apart_is_not_folded():
    class Own(rules.SGD):
        """A rule of the user's, which may look at the whole weight."""

    def folds(one, settings):
        return folding.can_fold(one, rule_states(one, settings.rule, "it"), settings)

    mask = torch.ones(7, dtype=torch.bool)
    assert folds(problem(), settings_of())
    assert not folds(problem(), settings_of(Own()))
    assert not folds(problem(), settings_of(regulariser=lambda now, start: now))
    assert not folds(problem(), settings_of(compute_dtype=torch.bfloat16))
    assert not folds(problem(rate_bias=0.5), settings_of())
    assert not folds(problem(mask_bias=mask), settings_of())
    frozen = problem()
    frozen.grad_bias = None
    assert not folds(frozen, settings_of())
    # The bias was frozen for a step: the rule has seen another number of gradients of it.
    lk.local_steps_([frozen], "adam", **OPTIONS)
    later = problem(state=frozen.state)
    assert not folds(later, settings_of())


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("rule", [rules.Adam(), rules.RMSprop()], ids=str)
def test_blocks_of_outputs_are_the_whole(rule, trace, folded, monkeypatch):
    if not folded:
        monkeypatch.setattr(few_rows_loop, "can_fold", lambda *arguments: False)
    one, other = problem(), problem()
    found = steps(one, rule, prox=0.1, trace=trace)
    assert len(few_rows.blocks_of_outputs(one, settings_of(rule))) == 1
    monkeypatch.setattr(few_rows, "BLOCK", 20)
    assert len(few_rows.blocks_of_outputs(one, settings_of(rule))) > 1
    assert_alike(found, steps(other, rule, prox=0.1, trace=trace))


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("rule", [rules.Adam(), rules.RMSprop(), rules.SGD(momentum=0.5)], ids=str)
def test_small_layers_side_by_side_are_as_they_are_alone(rule, trace, monkeypatch):
    def layers():
        shapes = [(23, 9, 7), (31, 7, 11), (23, 11, 5), (23, 30, 20), (23, 5, 3)]
        found = [
            problem_for(*random_layer(seed, *shape, dtype=torch.float32), transfer)
            for seed, (shape, transfer) in enumerate(
                zip(shapes, ["tanh", "relu", "softmax", "gelu", "identity"], strict=True)
            )
        ]
        found[4].rate_bias = 0.5  # its bias is not a column of the weight
        return found

    alone, side_by_side = layers(), layers()
    # The fourth falls into blocks, and the last is alone.
    monkeypatch.setattr(few_rows, "BLOCK", 250)
    monkeypatch.setattr(few_rows_loop, "BLOCK", 250)
    settings = settings_of(rule)
    states = [rule_states(one, rule, "it") for one in side_by_side]
    assert list(few_rows_loop.together(side_by_side, states, settings)) == [[0, 1, 2], [3], [4]]
    for seed in range(2):
        options = {**OPTIONS, "rows_seed": seed, "prox": 0.1, "trace": trace}
        together = lk.local_steps_(side_by_side, rule, **options)
        for i, one in enumerate(alone):
            report = lk.local_steps_([one], rule, **options)
            mine, theirs = report.trace[0], together.trace[i]
            assert (mine is not None) == (theirs is not None) == trace
            assert mine is None or theirs is None or torch.equal(mine, theirs)
    for one, other in zip(alone, side_by_side, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.bias, other.bias)
        for kind, slots in one.state.items():
            assert all(torch.equal(value, other.state[kind][slot]) for slot, value in slots.items())


def test_blocks_have_the_objective_of_the_whole(monkeypatch):
    def trace():
        return lk.local_steps_([problem()], "adam", trace=True, prox=0.1, **OPTIONS).trace[0]

    whole = trace()
    monkeypatch.setattr(few_rows, "BLOCK", 20)
    assert relative_error(trace(), whole) < 1e-12


def test_what_may_look_at_the_whole_weight_gets_it(monkeypatch):
    class Own(rules.SGD):
        """A rule of the user's."""

    monkeypatch.setattr(few_rows, "BLOCK", 20)
    assert few_rows.blocks_of_outputs(problem("softmax"), settings_of()) == [slice(None)]
    assert few_rows.blocks_of_outputs(problem(), settings_of(Own())) == [slice(None)]
    assert few_rows.blocks_of_outputs(problem(), settings_of(regulariser=lambda now, start: now)) == [slice(None)]


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 11, 22])
@pytest.mark.parametrize("transfer", ["tanh", "softmax"])
def test_filled_up_sets_count_what_they_have(rows, transfer, monkeypatch):
    """The formula of the module's docstring, set by set; nine rows and more are filled up to sixteen."""
    monkeypatch.setattr(few_rows_loop, "can_fold", lambda *arguments: False)
    from locoprop_kernels.patches import every
    from locoprop_kernels.sampling import count_sets, set_order

    one, lr = problem(transfer), [0.05, 0.05, 0.02]
    report = lk.local_steps_([one], "sgd", lr, rows=rows, rows_seed=4, reduction="sum", commit=False)
    sets = count_sets(23, rows)
    order = set_order(4, sets, 2)
    delta, bias = -lr[0] * one.grad_weight, -lr[0] * one.grad_bias
    for number, rate in zip(order, lr[1:], strict=True):
        x, a0 = (every(rows_, number, sets) for rows_ in (one.x, one.preactivation))
        e = one.transfer(a0 + x @ delta.t() + bias) - one.transfer(a0)
        delta = delta - rate * (one.grad_weight + sets * e.t() @ x)
        bias = bias - rate * (one.grad_bias + sets * e.sum(0))
    assert relative_error(report.delta_weight[0], delta) < 1e-13
    assert relative_error(report.delta_bias[0], bias) < 1e-13


# --- memory that is kept


def test_memory_is_given_out_once():
    first = scratch.take((3, 4), torch.float32, torch.device("cpu"))
    place = first.data_ptr()
    scratch.give_back(first)
    again, other = (scratch.take((12,), torch.float32, torch.device("cpu")) for _ in range(2))
    assert again.data_ptr() == place
    assert other.data_ptr() != place


def test_memory_that_is_kept_can_be_released(monkeypatch):
    monkeypatch.setattr(scratch, "_kept", {})
    monkeypatch.setattr(scratch, "_kept_bytes", 0)
    scratch.give_back(torch.empty(7), torch.empty(5))
    scratch.release()
    assert not scratch._kept
    assert scratch._kept_bytes == 0
    scratch.give_back(torch.empty(7))
    assert scratch._kept_bytes == 28


def test_no_more_than_the_limit_is_kept(monkeypatch):
    monkeypatch.setattr(scratch, "_kept", {})
    monkeypatch.setattr(scratch, "_kept_bytes", 0)
    monkeypatch.setattr(scratch, "LIMIT", 4000)
    for size in (400, 500, 600, 700, 2000):
        scratch.give_back(torch.empty(size))
    held = [tensor.numel() for tensors in scratch._kept.values() for tensor in tensors]
    assert held == [700]
    assert scratch._kept_bytes == 2800


def test_memory_that_is_taken_and_given_back_in_any_order_stays_within_the_limit(monkeypatch):
    monkeypatch.setattr(scratch, "_kept", {})
    monkeypatch.setattr(scratch, "_kept_bytes", 0)
    monkeypatch.setattr(scratch, "LIMIT", 4000)
    random.seed(seed := random.randrange(10**6))
    print("seed", seed)
    taken: list[torch.Tensor] = []
    for _ in range(500):
        if taken and random.random() < 0.5:
            scratch.give_back(taken.pop(random.randrange(len(taken))))
        else:
            taken.append(scratch.take((random.choice([100, 200, 300, 500]),), torch.float32, torch.device("cpu")))
        held = [tensor for tensors in scratch._kept.values() for tensor in tensors]
        assert scratch._kept_bytes == sum(tensor.numel() * 4 for tensor in held) <= 4000
        places = [tensor.data_ptr() for tensor in [*held, *taken]]
        assert len(set(places)) == len(places)


def test_increments_that_somebody_holds_are_not_overwritten():
    report = lk.local_steps_([problem()], "adam", commit=False, **OPTIONS)
    held = report.delta_weight[0]
    assert held is not None
    before = held.clone()
    report.commit_()
    for seed in range(3):
        lk.local_steps_([problem(seed=seed)], "adam", **OPTIONS)
    assert torch.equal(held, before)


def test_kept_memory_changes_no_bits():
    found = []
    for _ in range(3):
        one = problem(dtype=torch.float32)
        found.append(steps(one, "rmsprop", count=3))
        # Other content for what is taken next.
        lk.local_steps_([problem(dtype=torch.float32, seed=9)], "rmsprop", **OPTIONS)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("place", ["grad_weight", "grad_bias", "weight", "preactivation"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_committed(place, value):
    one = problem("identity", dtype=torch.float32)
    before = copied(one)
    getattr(one, place).view(-1)[1] = value
    getattr(before, place).view(-1)[1] = value
    # Every row is among those of nine local steps, so the pre-activation is as well.
    report = lk.local_steps_([one], "adam", **{**OPTIONS, "lr": [0.01] * 9})
    assert not report.committed
    assert torch.equal(one.weight, before.weight) or place == "weight"
    assert torch.equal(one.bias, before.bias)
    assert not one.state


def test_large_numbers_that_are_finite_are_committed():
    one = problem(dtype=torch.float32)
    one.weight[0, 0] = 3e38
    assert lk.local_steps_([one], "sgd", **OPTIONS).committed
