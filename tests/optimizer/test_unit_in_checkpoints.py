"""``activation_lr=PerExample(...)`` in checkpoints and copies."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

from locoprop_torch import PerExample
from tests.helpers import batch, weights
from tests.optimizer.test_unit import after, step


@pytest.mark.parametrize("steps", [0, 2])
def test_resumed_exactly(steps):
    model, opt = after(count=steps)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    # Another scale and a size of its own, which the checkpoint replaces.
    resumed, again = after(count=1, scale=7.0, loss=F.mse_loss)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    assert again.param_groups[0]["activation_lr"] == PerExample(2.0)
    assert again.output_gradient == opt.output_gradient
    for m, o in ((model, opt), (resumed, again)):
        for seed in (3, 4):
            step(m, o, *batch(5, seed))
    assert all(map(torch.equal, weights(model), weights(resumed)))


def test_checkpoints_without_it():
    """Those of before there was a unit have numbers, and load."""
    _, opt = after(activation_lr=10.0)
    saved = opt.state_dict()
    del saved["output_gradient"]
    _, again = after()
    again.load_state_dict(saved)
    assert again.param_groups[0]["activation_lr"] == 10.0
    assert again.output_gradient == {}


def test_a_checkpoint_that_cannot_be_read():
    _, opt = after()
    saved = opt.state_dict()
    saved["param_groups"][0]["activation_lr"] = "2.0 per token"
    before = opt.output_gradient
    with pytest.raises(
        ValueError, match=r"activation_lr must be a number or like '1\.0 per example', got '2\.0 per to"
    ):
        opt.load_state_dict(saved)
    assert opt.output_gradient == before
    assert opt.param_groups[0]["activation_lr"] == PerExample(2.0)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("count", [0, 2])
def test_copies(copied, count):
    pair = after(count=count)
    twin, opt = copied(pair)
    assert opt.output_gradient == pair[1].output_gradient
    step(*pair, *batch(5, 3))
    step(twin, opt, *batch(5, 3))
    assert opt.output_gradient == pair[1].output_gradient != {}
    assert all(map(torch.equal, weights(pair[0]), weights(twin)))
