"""Small models and what tests ask of an optimiser, for the situations in ``tests/optimizer``."""

import torch
import torch.nn.functional as F
from torch import nn

from locoprop_kernels import rules
from locoprop_torch import LocoProp

#: Older versions have gaps of their own, in torch.fx and FSDP2.
RECENT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)
SGD = {"rule": rules.SGD(), "lr": 1e-2, "activation_lr": 3.0, "reduction": "sum"}


def mlp(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)).to(dtype)


class WithNorm(nn.Module):
    """Two layers, and a normalisation that needs ``aux``."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.norm, self.head = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.norm(self.inner(x)))


def batch(rows=8, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x, y = (
        torch.randn(rows, 6, generator=generator, dtype=dtype),
        torch.randn(rows, 3, generator=generator, dtype=dtype),
    )
    return x, y


def loss_of(model, rows=8, seed=1):
    x, y = batch(rows, seed, next(model.parameters()).dtype)
    return F.mse_loss(model(x), y)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def moved(model, before):
    return [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]


def assert_same(model, other, **tolerance):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, **(tolerance or {"rtol": 1e-12, "atol": 1e-14}))


def rows(opt):
    """How many captured rows each layer would take into a step."""
    return [sum(len(captured.x) for captured in layer.passes) for layer in opt._layers.values()]


def step_of(seed=1, rows=8, **options):
    """The weights of a fresh model after one ordinary step."""
    model = mlp()
    opt = LocoProp(model, **{"lr": 1e-3, **options})
    loss_of(model, rows, seed).backward()
    opt.step()
    return model
