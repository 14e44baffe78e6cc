"""``LocalSteps``: local steps as an operator, alone and in whole training steps of one compiled graph."""

import functools
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import locoprop_kernels as lk
from locoprop_kernels.compiled import _operator
from locoprop_torch import LocoProp
from tests.problems import RULES

ACTIVATION_LR = 3.0


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def batches(count=4):
    torch.manual_seed(1)
    return [(torch.randn(16, 6, dtype=torch.float64), torch.randint(4, (16,))) for _ in range(count)]


def rates(step, iterations=4):
    """Learning rates that a schedule changes in every step."""
    return torch.tensor([1e-2 * 0.9**step] * iterations, dtype=torch.float64)


def train_step(operator, x, y, parameters, state, lr, seed):
    """A whole training step as a function."""

    def loss_of(w0, b0, w1, b1):
        a0 = F.linear(x, w0, b0)
        h = torch.tanh(a0)
        a1 = F.linear(h, w1, b1)
        return F.cross_entropy(a1, y), (a0, h, a1)

    gradients, (a0, h, a1) = torch.func.grad(loss_of, argnums=(0, 1, 2, 3), has_aux=True)(*parameters)
    scaled = [ACTIVATION_LR * gradient for gradient in gradients]
    return operator([x, h], [a0, a1], parameters, scaled, state, lr, seed)


def trained(operator, function):
    parameters = [p.detach().clone() for p in model().parameters()]
    state = operator.initial_state(parameters)
    for step, (x, y) in enumerate(batches()):
        assert function(x, y, parameters, state, rates(step), step)
    return parameters


def by_optimizer(rule):
    """What the optimiser makes of the same steps."""
    network = model()
    opt = LocoProp(
        network, rule=rule, activation_lr=ACTIVATION_LR, local_iterations=4, transfers={"2": "softmax"}, rows=4,
        lr_decay=lambda t, iterations: 1.0,
    )  # fmt: skip
    for step, (x, y) in enumerate(batches()):
        opt.param_groups[0]["lr"] = float(rates(step)[0])
        opt.zero_grad()
        F.cross_entropy(network(x), y).backward()
        opt.step()
    return [p.detach() for p in network.parameters()]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_it_is_the_optimiser(rule):
    operator = lk.LocalSteps(["tanh", "softmax"], rule=rule, rows=4)
    for p, q in zip(trained(operator, functools.partial(train_step, operator)), by_optimizer(rule), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=NEEDS_COMPILER)])
def test_a_training_step_in_one_graph(backend):
    """Without a graph break, and not compiled again for each step, whose rates and seed differ."""
    operator = lk.LocalSteps(["tanh", "softmax"], rule="adam", rows=4)
    plain = functools.partial(train_step, operator)
    torch._dynamo.utils.counters.clear()
    found = trained(operator, torch.compile(plain, backend=backend, fullgraph=True))
    # One for the first seed, and one for all others.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    for p, q in zip(found, trained(operator, plain), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_opcheck(rule):
    operator = lk.LocalSteps(["leaky_relu", "identity"], rule=rule, rows=4, prox=0.1)
    parameters = [p.detach().clone() for p in model().parameters()]
    x, h, a0, a1 = (torch.randn(16, size, dtype=torch.float64) for size in (6, 5, 5, 4))
    gradients = [torch.randn_like(p) for p in parameters]
    state = operator.initial_state(parameters)
    torch.library.opcheck(_operator, ([x, h], [a0, a1], parameters, gradients, state, rates(0), 3, operator._recipe))


def test_parameters_that_ask_for_gradients():
    operator = lk.LocalSteps(["tanh", "softmax"])
    parameters = list(model().parameters())
    before = [p.detach().clone() for p in parameters]
    x, h, a0, a1 = (torch.randn(16, size, dtype=torch.float64) for size in (6, 5, 5, 4))
    step = torch.compile(operator, backend="aot_eager", fullgraph=True)
    gradients = [torch.randn_like(p) for p in before]
    assert step([x, h], [a0, a1], parameters, gradients, operator.initial_state(parameters), rates(0))
    assert not any(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))


def test_what_is_not_finite_changes_nothing():
    operator = lk.LocalSteps(["tanh"], rule="adam")
    weight, x = torch.randn(5, 6), torch.randn(8, 6)
    state = operator.initial_state([weight])
    before = [t.clone() for t in (weight, *state)]
    assert not operator([x], [x @ weight.t()], [weight], [torch.full((5, 6), torch.nan)], state, rates(0))
    for now, then in zip((weight, *state), before, strict=True):
        assert torch.equal(now, then)


class Own(lk.rules.SGD):
    pass


def test_bad_input():
    with pytest.raises(ValueError, match="rule must be one of SGD, RMSprop, Adam, Adagrad .* got Own"):
        lk.LocalSteps(["tanh"], rule=Own())
    with pytest.raises(ValueError, match="backend must be one of auto, triton, reference; got 'cuda'"):
        lk.LocalSteps(["tanh"], backend="cuda")
    with pytest.raises(ValueError, match="transfer must be one of .* got 'cosine'"):
        lk.LocalSteps(["cosine"])
    operator = lk.LocalSteps(["tanh"], rule="adam")
    w, b, x, a = torch.randn(5, 6), torch.randn(5), torch.randn(8, 6), torch.randn(8, 5)
    state = operator.initial_state([w])
    with pytest.raises(ValueError, match="those of 1 layers, got 2, 1 and 1"):
        operator([x, x], [a], [w], [w], state, rates(0))
    with pytest.raises(ValueError, match=r"must have 1 and 3 tensors for as many parameters, got 1 and 2"):
        operator([x], [a], [w], [w], state[:2], rates(0))
    with pytest.raises(ValueError, match=r"a bias \[N\] only behind the weight"):
        operator([x], [a], [b], [b], operator.initial_state([b]), rates(0))
    with pytest.raises(ValueError, match=r"problem 0: preactivation must have shape \[8, 5\]"):
        operator([x], [a.t()], [w], [w], state, rates(0))


def test_state_that_would_have_to_be_converted():
    """The converted one would be updated, and lost."""
    operator = lk.LocalSteps(["tanh"], rule="rmsprop")
    parameters, x = [torch.randn(4, 6)], torch.randn(8, 6)
    state = [value.bfloat16() for value in operator.initial_state(parameters)]
    with pytest.raises(ValueError, match=r"state must be .*'square_avg' of .* shape \[4, 6\] .* got torch.bfloat16"):
        operator([x], [x @ parameters[0].t()], parameters, [torch.ones(4, 6)], state, rates(0))


def test_rows_may_be_a_number_of_numpy():
    operator = lk.LocalSteps(["tanh"], rule="rmsprop", prox=np.float32(0.5), rows=np.int64(4))
    parameters, x = [torch.randn(4, 6)], torch.randn(8, 6)
    state = operator.initial_state(parameters)
    assert operator([x], [x @ parameters[0].t()], parameters, [torch.ones(4, 6)], state, rates(0))


def test_an_error_in_a_compiled_step_leaves_gradients_switched_on():
    operator = lk.LocalSteps(["tanh"])
    w, x, a = torch.randn(5, 6), torch.randn(8, 6), torch.randn(8, 4)
    step = torch.compile(operator, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="preactivation must have shape"):
        step([x], [a], [w], [w.clone()], operator.initial_state([w]), rates(0))
    assert torch.is_grad_enabled()
