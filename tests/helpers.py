"""Small models and what tests ask of an optimiser, for the situations in ``tests/optimizer``."""

import re
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from locoprop_kernels import LocalProblem, local_steps_, routes, rules
from locoprop_torch import LocoProp, presets

#: Older versions have gaps of their own, in torch.fx and FSDP2.
RECENT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)
SGD: dict[str, Any] = {"rule": rules.SGD(), "lr": 1e-2, "activation_lr": 3.0, "reduction": "sum"}


@lru_cache(maxsize=1)
def compile_kernels():
    """Compile what runs on CPUs, if it is not in the cache: processes that wait for each other should not have to."""
    zeros = torch.zeros(2, 2)
    problem = LocalProblem(zeros, zeros, zeros.clone(), grad_weight=zeros, transfer="tanh")
    assert local_steps_([problem], "adam", [0.1, 0.1]).committed


def mlp(seed=0, dtype=torch.float64, second=nn.Sigmoid):
    """Three layers, of which the ``second`` is followed by this function."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), second(), nn.Linear(4, 3)).to(dtype)


class WithNorm(nn.Module):
    """Two layers, and a normalisation that needs ``aux``."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.norm, self.head = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.norm(self.inner(x)))


def batch(rows=8, seed=1, dtype=torch.float64):
    """Inputs and targets of the models above, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype) for width in (6, 3))
    return x, y


def loss_of(model, rows=8, seed=1):
    x, y = batch(rows, seed, next(model.parameters()).dtype)
    return F.mse_loss(model(x), y)


def sum_of_squares(model, seed=1):
    """As :func:`loss_of`, without the mean."""
    x, y = batch(7, seed, next(model.parameters()).dtype)
    return F.mse_loss(model(x), y, reduction="sum")


def backward(model, opt, rows=8, seed=1):
    """A fresh gradient of :func:`loss_of`; returns the loss."""
    opt.zero_grad()
    loss = loss_of(model, rows, seed)
    loss.backward()
    return loss


def steps(model, opt, count=2, start=0):
    """Ordinary steps, each on a batch of its own."""
    for seed in range(start, start + count):
        backward(model, opt, seed=seed)
        opt.step()


def published(model, **options):
    """``LocoProp`` with the settings of the PyPI package, the published method on all rows, and these ``options``."""
    return LocoProp(model, **{**presets["package"], **options})


def train(model, steps=2, **options):
    """The weights of the model after steps on :func:`sum_of_squares`."""
    opt = published(model, **{"lr": 1e-2, "activation_lr": 3.0, **options})
    for seed in range(steps):
        opt.zero_grad()
        sum_of_squares(model, seed).backward()
        opt.step()
    return weights(model)


def step_of(seed=1, rows=8, **options):
    """A fresh model after one ordinary step."""
    model = mlp()
    opt = published(model, **{"lr": 1e-3, **options})
    loss_of(model, rows, seed).backward()
    opt.step()
    return model


def present(value):
    """``value``, which a test knows to be there."""
    assert value is not None
    return value


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def moved(model, before):
    return [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]


def assert_same(model, other, **tolerance):
    """The parameters of two models, or two lists of them, agree: to the last bits, without a ``tolerance``."""
    actual, expected = (
        [p.detach() for p in (m.parameters() if isinstance(m, nn.Module) else m)] for m in (model, other)
    )
    for p, q in zip(actual, expected, strict=True):
        torch.testing.assert_close(p, q, **(tolerance or {"rtol": 1e-12, "atol": 1e-14}))


def captured(opt):
    """The passes of each layer that a step would take; nothing public shows them before the step."""
    return {name: layer.passes for name, layer in opt._layers.items()}


def rows(opt):
    """How many captured rows each layer would take into a step."""
    return [sum(len(one.x) for one in passes) for passes in captured(opt).values()]


def held(passes):
    """How many rows of inputs the passes of a layer hold."""
    return sum(sum(map(len, one.kept.x)) if one.kept else len(one.x) for one in passes)


def transfers_of(opt):
    """The transfer function of each layer, as the table of layers in the optimiser's ``repr`` has it."""
    table = repr(opt).partition("layers:\n")[2].splitlines()
    found = (re.match(r"  (\S*) +(?:\d+ x )?\d+ -> \d+  (\w+(?:\([^)]*\))?)", line) for line in table)
    return {row[1]: row[2] for row in found if row}


def has_hooks(model):
    """Whether any module of the model has forward hooks, for which torch has no public function."""
    names = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks")
    return any(getattr(module, name) for module in model.modules() for name in names)


def force_routes(monkeypatch, operands, route):
    """Let products with such operands on CPUs take ``route`` until the test ends; others take ``torch.mm``."""
    forced = {torch.float32: f"float32={route}", torch.bfloat16: f"float32=mm,bfloat16={route}"}
    monkeypatch.setenv("LOCOPROP_CPU_PRODUCTS", forced.get(operands, "mm"))
    monkeypatch.setattr(routes, "_chosen", {})
