"""``torch.compile``: before or after the optimiser is built, and names through its wrapper."""

import pytest
import torch
from torch import nn

from tests.helpers import (
    assert_same,
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
