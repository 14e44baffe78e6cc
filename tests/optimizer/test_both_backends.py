"""The same situations on the kernels: rows in chunks, masks, rates of their own, groups, gradients without rows."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from locoprop_torch import GroupedLinear
from tests.helpers import assert_same, loss_of, mlp, published

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not hasattr(triton, "knobs") or not (triton.knobs.runtime.interpret or torch.cuda.is_available()),
    reason="needs a recent Triton, and TRITON_INTERPRET=1 or a GPU",
)


def trained(model, backend, losses, **options):
    opt = published(model, **{"lr": 1e-3, "local_iterations": 3, **options}, backend=backend)
    for _ in range(2):
        opt.zero_grad()
        for loss in losses:
            loss(model).backward()
        opt.step()
    assert {report.backend for report in opt.last_reports} <= {backend, "none"}
    return model


def assert_agree(make, losses, **options):
    options = {key: value if callable(value) else (lambda _, value=value: value) for key, value in options.items()}
    models = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        model = make().float()
        models.append(trained(model, backend, losses, **{key: value(model) for key, value in options.items()}))
    assert_same(*models, rtol=2e-4, atol=2e-6)


def test_several_passes():
    assert_agree(mlp, [lambda m: loss_of(m, 7, seed=1), lambda m: loss_of(m, 20, seed=2), lambda m: loss_of(m, 1)])


def test_masks():
    def pruned():
        model = mlp()
        prune.custom_from_mask(model[2], "weight", (torch.arange(20).reshape(4, 5) % 3 != 0).double())
        return model

    mask = torch.arange(5) % 2 == 0
    assert_agree(pruned, [loss_of], masks={"0.bias": mask})


def test_rates_of_their_own():
    def groups(model):
        return [{"params": [p for name, p in model.named_parameters() if name.endswith("bias")], "lr": 2e-3}]

    assert_agree(mlp, [loss_of], param_groups=groups, weight_decay=0.1)


def test_gradients_without_rows():
    def make():
        return nn.ModuleDict({"used": mlp(), "unused": nn.Linear(3, 2)})

    def loss(model):
        return loss_of(model["used"]) + sum(p.square().sum() for p in model.parameters())

    assert_agree(make, [loss])


@pytest.mark.parametrize("local_loss", ["matching", "squared"])
def test_grouped_layers(local_loss):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(4, 6, 3, groups=2, padding=1)
            self.depthwise = nn.Conv2d(6, 6, 2, groups=6)
            self.experts = GroupedLinear(3, 8, 5)

        def forward(self, x):
            h = torch.relu(self.depthwise(torch.tanh(self.conv(x))))
            return self.experts(h.flatten(1).unflatten(1, (3, -1))[..., :8].transpose(0, 1))

    def loss(model):
        generator = torch.Generator().manual_seed(0)
        return model(torch.randn(5, 4, 4, 4, generator=generator)).square().mean()

    assert_agree(Model, [loss], local_loss=local_loss)
