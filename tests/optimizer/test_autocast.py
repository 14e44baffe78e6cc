"""``opt.step()`` and ``local_steps_`` inside of ``torch.autocast`` do what they do outside."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from locoprop_kernels import local_steps_
from locoprop_torch import LocoProp
from tests.helpers import assert_same, weights
from tests.problems import problem_and_residual


def linear():
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def convolution():
    return nn.Sequential(
        nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 6, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(4)
    )


def trained(make, inside, options, loss_inside=True):
    """A model after three steps, forward and backward passes under autocast."""
    torch.manual_seed(0)
    model = make()
    x, y = torch.randn(3, 40, 12), torch.randn(3, 40, 4)
    model(x[0])
    opt = LocoProp(model, aux="adamw", lr=1e-2, **options(model))
    for batch, target in zip(x, y, strict=True):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            F.mse_loss(model(batch).float(), target).backward()
            if inside:
                opt.step()
        if not inside:
            opt.step()
    assert opt.skipped_steps == 0
    return model


OPTIONS = {
    "few rows": lambda model: {"rows": 8},
    "all rows": lambda model: {"rows": None},
    "PyTorch": lambda model: {"rows": None, "backend": "reference"},
    "primal": lambda model: {"target": "primal"},
    "trace": lambda model: {"trace": True},
    "masks": lambda model: {
        "masks": {n: torch.rand(p.shape) < 0.5 for n, p in model.named_parameters() if p.dim() > 1}
    },
    "regulariser": lambda model: {
        "regulariser": lambda w, start: (w - start) * (w.reshape(1, -1) @ w.reshape(-1, 1)).squeeze()
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", [linear, convolution])
def test_a_step_inside(make, options):
    assert_same(trained(make, True, options), trained(make, False, options), rtol=0, atol=0)


def test_a_closure_keeps_it():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    opt = LocoProp(model)
    seen = []

    def closure():
        opt.zero_grad()
        output = model(torch.ones(5, 4))
        seen.append(output.dtype)
        loss = output.float().square().mean()
        loss.backward()
        return loss

    before = weights(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        opt.step(closure)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [torch.bfloat16]
    assert any(not torch.equal(old, new) for old, new in zip(before, weights(model), strict=True))


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_backend_alone(backend, trace):
    def increments(autocast):
        problem, _ = problem_and_residual("tanh")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            report = local_steps_([problem], lr=[1e-2] * 3, backend=backend, trace=trace, commit=False)
        return report.problems[0].delta_weight

    torch.testing.assert_close(increments(True), increments(False), rtol=0, atol=0)
