"""Regularisers, transfer functions and rules of the user's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import locoprop_kernels as lk
from locoprop_kernels import rules, transfers
from locoprop_kernels.testing import TextbookLayer
from tests.helpers import assert_same, mlp, present, published, sum_of_squares, train, weights
from tests.problems import copied, forget_transfer, problem_and_residual


def test_own_regulariser():
    def proximal(parameter, start):
        return 0.3 * (parameter - start)

    assert_same(train(mlp(), regulariser=proximal), train(mlp(), prox=0.3))
    # Coupled weight decay is a regulariser that is already there in the first local step.
    model, twin = mlp(), mlp()
    actual = train(model, local_iterations=1, rule="sgd", regulariser=lambda w, _: 0.1 * w, reduction="sum")
    plain = torch.optim.SGD(twin.parameters(), lr=1e-2, weight_decay=0.1)
    for k in range(2):
        plain.zero_grad()
        (3.0 * sum_of_squares(twin, k)).backward()
        plain.step()
    assert_same(actual, twin)
    with pytest.raises(TypeError, match="regulariser must be"):
        train(mlp(), regulariser=0.1)
    with pytest.raises(ValueError, match="regulariser must return a tensor of shape"):
        train(mlp(), regulariser=lambda w, w0: w.sum())


def test_trace_with_a_regulariser():
    problem, residual = problem_and_residual("tanh")
    smooth = lk.Regulariser(lambda w, _: w / (1 + w**2).sqrt(), value=lambda w, _: (1 + w**2).sqrt())
    report = lk.local_steps_([problem], lr=[1e-3] * 5, trace=True, commit=False, regulariser=smooth)
    f, delta = problem.transfer, present(report.problems[0].delta_weight)
    loss = (
        f.matching_loss(
            problem.preactivation + problem.x @ delta.T, problem.preactivation, f(problem.preactivation) - residual
        ).sum()
        / 9
    )
    new, old = ((1 + w**2).sqrt().sum() for w in (problem.weight + delta, problem.weight))
    torch.testing.assert_close(present(report.trace[0])[-1], loss + new - old)
    with pytest.raises(ValueError, match="trace needs the value"):
        lk.local_steps_([problem], lr=[1e-3], trace=True, regulariser=lambda w, _: w)


def own_function(a):
    return a * torch.sigmoid(a) + torch.log1p(a.square())


@pytest.fixture
def registered():
    yield lk.register_transfer("own", own_function)
    forget_transfer("own")


def test_registered_transfer(registered):
    problem, residual = problem_and_residual("own")
    textbook = TextbookLayer(problem.weight, None, registered, rules.RMSprop())
    target = own_function(problem.preactivation) - residual
    rates = [0.01] * 6
    report = lk.local_steps_([problem], lr=rates, reduction="sum", trace=True)
    textbook.step(problem.x, target, rates, 0.0, "sum")
    torch.testing.assert_close(problem.weight, textbook.weight, rtol=1e-10, atol=1e-10)

    lk.register_transfer("own", F.silu)  # anew: now with a potential to compare the quadrature with
    a, reference = torch.randn(2, 50, dtype=torch.float64).unbind()
    silu = transfers.get("silu")
    torch.testing.assert_close(transfers.get("own").matching_loss(a, reference), silu.matching_loss(a, reference))
    assert present(report.trace[0])[0] == 0


def test_registered_transfer_in_a_model(registered):
    class Own(nn.Module):
        def forward(self, a):
            return own_function(a)

    model = nn.Sequential(nn.Linear(4, 6), Own(), nn.Linear(6, 2)).double()
    opt = published(model, lr=1e-3, rule="sgd", transfers={"0": "own"}, target={"0": "primal"})
    x = torch.randn(8, 4, dtype=torch.float64)
    losses = []
    for _ in range(20):
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_kernels_refuse_what_has_no_triton_function(registered):
    pytest.importorskip("triton")
    problem, _ = problem_and_residual("own")
    single = copied(problem, torch.float32)
    with pytest.raises(ValueError, match="'own' has no Triton function"):
        lk.local_steps_([single], lr=[0.1], backend="triton")
    with pytest.raises(ValueError, match="regulariser"):
        lk.local_steps_([single], lr=[0.1], backend="triton", regulariser=lambda w, _: w)


def test_bad_transfers():
    with pytest.raises(ValueError, match="package's transfer functions"):
        lk.register_transfer("tanh", torch.tanh)
    with pytest.raises(ValueError, match="not elementwise"):
        lk.register_transfer("rows", lambda a: torch.softmax(a, -1))
    with pytest.raises(ValueError, match="keep shape and dtype"):
        lk.register_transfer("sum", lambda a: a.sum())
    with pytest.raises(TypeError, match="torch_fn must be callable"):
        lk.register_transfer("number", 3)  # type: ignore[arg-type]
    assert not {"rows", "sum", "number"} & set(transfers.available())
    lk.register_transfer("rows", lambda a: torch.softmax(a, -1), elementwise=False)
    forget_transfer("rows")


class SignDescent(rules.Rule):
    """A rule of three lines."""

    @property
    def slots(self):
        return {"momentum": 0.0}

    def update_(self, delta, grad, state, lr, step):
        delta.add_(state["momentum"].mul_(0.9).add_(grad, alpha=0.1).sign(), alpha=-lr)


def test_own_rule():
    model = mlp()
    before = weights(model)
    after = train(model, rule=SignDescent(), local_iterations=4, lr=1e-3, steps=1)
    steps = 1e-3 * (1 + 0.75 + 0.5 + 0.25)
    for p, q in zip(before, after, strict=True):
        assert (p - q).abs().max() <= steps * (1 + 1e-12)
