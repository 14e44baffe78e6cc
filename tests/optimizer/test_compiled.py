"""``torch.compile``: before or after the optimiser is built, and names through its wrapper."""

import pytest
import torch
from torch import nn

from locoprop_torch import LocoProp
from tests.helpers import (
    assert_same,
    backward,
    batch,
    loss_of,
    mlp,
    moved,
    published,
    rows,
    step_of,
    steps,
    transfers_of,
    weights,
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model):
    return torch.compile(model, backend="eager")


def test_compiled_before_construction():
    model, twin = compiled(mlp()), mlp()
    steps(model, published(model, lr=1e-3))
    steps(twin, published(twin, lr=1e-3))
    assert_same(model, twin)


def test_compiled_after_construction():
    model, twin = mlp(), mlp()
    opt = published(model, lr=1e-3)
    steps(compiled(model), opt)
    steps(twin, published(twin, lr=1e-3))
    assert_same(model, twin)


def test_compiled_and_called_before_construction_is_said():
    model = compiled(mlp())
    model(batch()[0])
    opt = published(model, lr=1e-3)
    loss_of(model).backward()
    if rows(opt) == [8, 8, 8]:
        pytest.skip("this torch notices new hooks")
    with pytest.raises(ValueError, match=r"layer '0'.*compiled and called before.*torch\._dynamo\.reset"):
        opt.step()
    torch._dynamo.reset()
    opt.zero_grad()
    loss_of(model).backward()
    opt.step()
    assert_same(model, step_of())


def test_names_do_not_show_the_wrapper():
    model = compiled(mlp())
    for prefix in ("", "_orig_mod."):
        opt = published(model, transfers={f"{prefix}4": "softmax"}, target={f"{prefix}0": "dual"})
        assert transfers_of(opt) == {"0": "tanh", "2": "sigmoid", "4": "softmax"}
        assert "_orig_mod" not in repr(opt)


def test_a_compiled_part():
    model = nn.Sequential(compiled(mlp()[:2]), nn.Linear(5, 3).double())
    opt = published(model, lr=1e-3, transfers={"0.0": "tanh"}, masks={"0.0.weight": torch.ones(5, 6)})
    assert list(transfers_of(opt)) == ["0.0", "1"]
    steps(model, opt)
    assert opt.last_reports[0].problems[0].name == "0.0"


def test_checkpoints_of_compiled_and_plain_models_agree():
    opt, other = published(compiled(mlp())), published(mlp())
    other.load_state_dict(opt.state_dict())


def test_compiled_models_are_captured():
    model, twin = mlp(), mlp()
    wrapper = compiled(model)
    steps(wrapper, published(wrapper, lr=1e-3))
    steps(twin, published(twin, lr=1e-3))
    assert not any(moved(model, weights(twin)))


def whole_steps(wrap, count=4):
    """The model after training steps that are one function, wrapped by ``wrap``."""
    model = mlp()
    opt = LocoProp(model, rows=4)

    @wrap
    def train_step(x, y):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    losses, graphs = [], []
    for seed in range(count):
        losses.append(train_step(*batch(16, seed)).item())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return model, losses, graphs


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_whole_step_in_a_compiled_function(backend):
    """The optimiser steps between two graphs: it is left as it is, and nothing is compiled again for each step."""
    torch._dynamo.utils.counters.clear()
    model, losses, graphs = whole_steps(torch.compile(backend=backend))
    reasons = " ".join(torch._dynamo.utils.counters["graph_break"])
    twin, expected, _ = whole_steps(lambda function: function)
    assert_same(model, twin, rtol=0, atol=0)
    assert losses == expected
    assert "LocoProp.step" in reasons
    # In the second step gradients are None once more, and then nothing is new.
    assert 0 < graphs[1] == graphs[-1] < 10


def test_a_compiled_step_method():
    model, twin = mlp(), mlp()
    opt, other = LocoProp(model), LocoProp(twin)
    step = torch.compile(opt.step, backend="eager")
    for seed in range(2):
        backward(model, opt, seed=seed)
        step()
    steps(twin, other)
    assert_same(model, twin, rtol=0, atol=0)


def test_a_closure_may_be_compiled():
    """What a step calls is compiled all the same."""
    model, twin, graphs = mlp(), mlp(), []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    wrapper = torch.compile(model, backend=compiler)
    opt, other = LocoProp(model), LocoProp(twin)
    for seed in range(2):
        opt.step(lambda seed=seed: backward(wrapper, opt, seed=seed))
    steps(twin, other)
    assert_same(model, twin)
    assert graphs
