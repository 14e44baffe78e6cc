"""``log_local_losses``: what is written, when, and that training does not notice."""

import copy
from typing import Any

import pytest
import torch

from locoprop_torch import LocoProp, log_local_losses
from tests.helpers import assert_same, backward, mlp, published, steps


class Writer:
    def __init__(self):
        self.written = []

    def add_scalar(self, tag, scalar_value, global_step):
        self.written.append((tag, scalar_value, global_step))


def test_every_layer_and_step():
    model, writer = mlp(), Writer()
    opt = published(model, lr=1e-5)
    log_local_losses(opt, writer)
    expected: list[tuple[str, float, int]] = []
    for step in (1, 2):
        backward(model, opt, seed=step)
        opt.step()
        for problem in opt.last_reports[0].problems:
            expected.append((f"local loss/{problem.name}", float(problem.trace[-1]), step))
    assert writer.written == expected
    assert [tag for tag, _, _ in expected[:3]] == ["local loss/0", "local loss/2", "local loss/4"]
    assert all(value < 0 for _, value, _ in expected)


@pytest.mark.parametrize("options", [{"rows": None}, {"rows": 2}])
def test_some_steps_and_the_same_weights(options):
    """Only the steps that are written are traced, and no step is another one for it."""
    model, twin, writer = mlp(), mlp(), Writer()
    opt, other = published(model, **options), published(twin, **options)
    log_local_losses(opt, writer, every=3)
    traced = []
    for seed in range(7):
        backward(model, opt, seed=seed)
        opt.step()
        traced.append(opt.last_reports[0].problems[0].trace is not None)
    steps(twin, other, 7)
    assert traced == [False, False, True] * 2 + [False]
    assert [step for tag, _, step in writer.written if tag.endswith("/0")] == [3, 6]
    assert_same(model, twin, rtol=0, atol=0)


def test_steps_go_on_counting_after_a_resume():
    model, writer = mlp(), Writer()
    opt = published(model, lr=1e-3)
    steps(model, opt, 2)
    fresh = published(model, lr=1e-3)
    fresh.load_state_dict(opt.state_dict())
    log_local_losses(fresh, writer)
    steps(model, fresh, 1)
    assert {step for _, _, step in writer.written} == {3}


def test_no_writer_and_no_more_writing():
    model, writer = mlp(), Writer()
    opt = published(model, lr=1e-3)
    log_local_losses(opt, None)
    handle = log_local_losses(opt, writer)
    steps(model, opt, 1)
    assert len(writer.written) == 3
    handle.remove()
    steps(model, opt, 1)
    assert len(writer.written) == 3


def test_a_copy_writes_nothing():
    model, writer = mlp(), Writer()
    opt = published(model, lr=1e-3)
    log_local_losses(opt, writer)
    other = copy.deepcopy(opt)
    steps(other.model, other, 1)
    assert writer.written == []


def test_bad_input():
    opt = LocoProp(mlp())
    other: Any = torch.optim.SGD(mlp().parameters())
    wrong: list[Any] = [0, 1.5, True]
    with pytest.raises(TypeError, match="optimizer must be a LocoProp, got SGD"):
        log_local_losses(other, Writer())
    for every in wrong:
        with pytest.raises(ValueError, match=f"every must be a positive integer, got {every}"):
            log_local_losses(opt, Writer(), every)
    assert not opt.trace


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = mlp()
    opt = published(model, lr=1e-3)
    with SummaryWriter(str(tmp_path)) as writer:
        log_local_losses(opt, writer)
        steps(model, opt, 2)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == [f"local loss/{name}" for name in ("0", "2", "4")]
    last = events.Scalars("local loss/4")[-1]
    assert last.step == 2
    assert last.value == pytest.approx(float(opt.last_reports[0].problems[2].trace[-1]), rel=1e-6)
