"""The drop-in for the PyPI package ``locoprop``: its recorded trajectories, and the installed package side by side."""

import copy
import inspect
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import locoprop_torch.compat
from locoprop_torch.compat import LocoLayer, LocopropTrainer
from tests.helpers import present

CASES = sorted((Path(__file__).parents[1] / "oracles").glob("pt_*.npz"))
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "softmax": lambda: nn.Softmax(dim=1),
}
LOSSES = {
    "bce_sum_mean": lambda a, y: F.binary_cross_entropy_with_logits(a, y, reduction="none").sum(1).mean(),
    "cross_entropy": F.cross_entropy,
}


def module_of(kind, *arguments):
    if kind == "linear":
        k, n, activation, implicit, *bias = arguments
        return LocoLayer(nn.Linear(k, n, bias=not bias or bias[0]), ACTIVATIONS[activation](), implicit)
    if kind == "conv":
        *shape, activation = arguments
        return LocoLayer(nn.Conv2d(*shape), ACTIVATIONS[activation]())
    return {"maxpool": nn.MaxPool2d, "avgpool": nn.AvgPool2d, "flatten": nn.Flatten}[kind](*arguments)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_trajectory(path):
    data = np.load(path)
    meta = json.loads(str(data["meta"]))
    dtype = getattr(torch, meta["dtype"])
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    model = nn.Sequential(*(module_of(*entry) for entry in meta["arch"])).to(dtype)
    start = {key.removeprefix("param."): data[key] for key in data.files if key.startswith("param.")}
    model.load_state_dict({name: torch.from_numpy(value[0]) for name, value in start.items()})
    trainer = LocopropTrainer(
        model,
        LOSSES[meta["loss"]],
        getattr(torch.optim, meta["optimizer"]),
        meta["optimizer_hparams"],
        **meta["trainer"],
    )
    for k in range(meta["outer_steps"]):
        x = torch.from_numpy(data["x"][k])
        y = torch.from_numpy(data["y"][k]) if "y" in data.files else x
        loss = trainer.step(x, y)
        np.testing.assert_allclose(loss.item(), data["loss"][k], rtol=1e-5)
        assert all(report.committed for report in trainer.last_reports)
        for name, value in model.state_dict().items():
            error = np.abs(value.numpy() - start[name][k + 1]).max()
            assert error <= tolerance * np.abs(start[name][k + 1] - start[name][0]).max(), (name, k)


def mlp():
    return nn.Sequential(
        nn.Flatten(),
        LocoLayer(nn.Linear(64, 20), nn.Tanh()),
        LocoLayer(nn.Linear(20, 16, bias=False), nn.LeakyReLU(0.1)),
        nn.Dropout(0.0),
        LocoLayer(nn.Linear(16, 12), nn.Identity()),
        LocoLayer(nn.Linear(12, 5), nn.Softmax(dim=-1), implicit=True),
    )


def convnet(pooling):
    return nn.Sequential(
        LocoLayer(nn.Conv2d(1, 4, 3, padding=1, stride=1 if pooling else 2, padding_mode="reflect"), nn.Tanh()),
        *([nn.MaxPool2d(2)] if pooling else []),
        LocoLayer(nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2), nn.Softplus()),
        nn.Flatten(),
        LocoLayer(nn.Linear(96, 5), nn.Softmax(dim=1), implicit=True),
    )


MODELS = {"mlp": mlp, "convnet": lambda: convnet(False), "pooled convnet": lambda: convnet(True)}
ADAM: tuple[Any, dict[str, Any]] = (torch.optim.Adam, {"lr": 1e-3})
OPTIMIZERS = {
    "RMSprop": None,
    "RMSprop centered": (torch.optim.RMSprop, {"lr": 1e-3, "centered": True}),
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "Adam": ADAM,
    "Adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3}),  # no rule of ours
    "RMSprop alpha": (torch.optim.RMSprop, {"lr": 1e-3, "alpha": 1.0, "eps": 1.0}),  # refused by our rule
    "RMSprop with decay": (torch.optim.RMSprop, {"lr": 1e-3, "weight_decay": 0.1}),
}


def both(model, optimizer=None, **options):
    """The installed package and ours on copies of ``model``."""
    locoprop = pytest.importorskip("locoprop")
    theirs = copy.deepcopy(model)
    for i, layer in enumerate(theirs):
        if isinstance(layer, LocoLayer):
            theirs[i] = locoprop.LocoLayer(layer.module, layer.activation, layer.implicit)
    arguments = (F.cross_entropy, *(optimizer or ()))
    return locoprop.LocopropTrainer(theirs, *arguments, **options), LocopropTrainer(model, *arguments, **options)


def batch(size=10):
    return torch.randn(size, 1, 8, 8, dtype=torch.float64), torch.randint(5, (size,))


def assert_same(theirs, ours, tolerance=1e-10):
    for p, q in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("correction", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_same_numbers_as_the_package(model, optimizer, correction):
    theirs, ours = both(MODELS[model]().double(), OPTIMIZERS[optimizer], correction=correction)
    for _ in range(3):
        x, y = batch()
        torch.testing.assert_close(ours.step(x, y), theirs.step(x, y), rtol=1e-12, atol=0)
        assert_same(theirs, ours)
    plain = optimizer in ("AdamW", "RMSprop alpha", "RMSprop with decay")
    layers = sum(isinstance(layer, LocoLayer) for layer in ours.model)
    assert len(ours.last_reports) == (0 if plain else layers if correction else 1)


@pytest.mark.parametrize("correction", [0.0, 0.1])
@pytest.mark.parametrize("model", MODELS)
def test_momentum_and_schedules_as_in_the_package(model, correction):
    theirs, ours = both(MODELS[model]().double(), correction=correction, momentum=0.4, learning_rate=3)
    for k in range(3):
        x, y = batch()
        for trainer in (theirs, ours):
            for opt in trainer.opts:
                if opt is not None:
                    opt.param_groups[0]["lr"] = 1e-4 / (k + 1)
            trainer.step(x, y)
        assert_same(theirs, ours)


def random_model(draw):
    """Convolutions, with pooling or without, then linear layers; on inputs ``[B, 1, 8, 8]``."""
    activations = [nn.Tanh(), nn.ReLU(), nn.Sigmoid(), nn.Softplus(), nn.ELU(0.5), nn.GELU(), nn.SiLU(), nn.Hardtanh()]
    modules: list[nn.Module] = []
    x = torch.zeros(1, 1, 8, 8)
    for _ in range(draw.randint(0, 2)):
        channels, padding = 2 * draw.randint(1, 3), draw.randint(0, 2)
        kernel = min(draw.randint(1, 3), x.shape[-1] + 2 * padding)
        convolution = nn.Conv2d(x.shape[1], channels, kernel, draw.randint(1, 2), padding)
        modules.append(LocoLayer(convolution, draw.choice(activations), implicit=draw.random() < 0.2))
        if draw.random() < 0.5:
            modules.append(draw.choice([nn.AvgPool2d(2, ceil_mode=True), nn.MaxPool2d(2, 1, padding=1)]))
        x = nn.Sequential(*modules)(torch.zeros(1, 1, 8, 8))
    modules.append(nn.Flatten())
    k = x.numel()
    for n in [draw.randint(2, 12) for _ in range(draw.randint(0, 3))]:
        modules.append(LocoLayer(nn.Linear(k, n, bias=draw.random() < 0.7), draw.choice(activations)))
        k = n
    modules.append(LocoLayer(nn.Linear(k, 5), nn.Softmax(dim=1), implicit=True))
    return nn.Sequential(*modules).double()


@pytest.mark.parametrize("correction", [0.0, 0.1])
@pytest.mark.parametrize("repetition", range(12))
def test_random_models(repetition, correction):
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    draw = random.Random(seed)
    optimizer = OPTIMIZERS[draw.choice([name for name in OPTIMIZERS if name != "RMSprop alpha"])]
    momentum, iterations = draw.choice([0.0, 0.3]), draw.randint(1, 7)
    model = random_model(draw)
    # Where two positions have the same maximum, as those that earlier pooling has given the same pixel, rounding says
    # which of them has the gradient. A running average takes that to the next batch, where they are different.
    if any(isinstance(layer, nn.MaxPool2d) for layer in model):
        momentum = 0.0
    options = {"correction": correction, "momentum": momentum, "local_iterations": iterations}
    theirs, ours = both(model, optimizer, learning_rate=draw.uniform(0.5, 10), **options)
    for _ in range(3):
        x, y = batch()
        torch.testing.assert_close(ours.step(x, y), theirs.step(x, y), rtol=1e-9, atol=1e-9)
        assert_same(theirs, ours, 1e-8)  # ill-conditioned where a gradient is next to zero


def test_any_module_and_activation():
    block = nn.Sequential(nn.Linear(64, 12), nn.LayerNorm(12))
    model = nn.Sequential(
        nn.Flatten(),
        LocoLayer(block, lambda a: torch.sin(a)),
        LocoLayer(nn.Linear(12, 5), nn.PReLU(dtype=torch.float64)),
    )
    theirs, ours = both(model.double(), correction=0.1)
    for _ in range(2):
        x, y = batch()
        theirs.step(x, y)
        ours.step(x, y)
        assert_same(theirs, ours)


def test_state_is_the_torch_optimizers():
    x, y = batch()
    theirs, ours = both(convnet(True).double(), ADAM, correction=0)
    for trainer in (theirs, ours):
        trainer.step(x, y)
    resumed = LocopropTrainer(copy.deepcopy(ours.model), F.cross_entropy, *ADAM, correction=0)
    for original, opt, copied in zip(theirs.opts, ours.opts, resumed.opts, strict=True):
        if opt is None:
            continue
        expected, actual = original.state_dict(), opt.state_dict()
        assert {p: set(s) for p, s in actual["state"].items()} == {p: set(s) for p, s in expected["state"].items()}
        torch.testing.assert_close(actual["state"], expected["state"], rtol=1e-10, atol=1e-12)
        present(copied).load_state_dict(copy.deepcopy(original.state_dict()))  # a checkpoint of the package
    for trainer in (theirs, resumed):
        trainer.step(x, y)
    assert_same(theirs, resumed)


def test_shared_parameters_are_trained_one_after_another():
    shared = nn.Linear(12, 12)
    model = nn.Sequential(
        nn.Flatten(),
        LocoLayer(nn.Linear(64, 12), nn.Tanh()),
        LocoLayer(shared, nn.Tanh()),
        LocoLayer(shared, nn.Tanh()),
        LocoLayer(nn.Linear(12, 5), nn.Softmax(-1), implicit=True),
    ).double()
    theirs, ours = both(model, correction=0)
    for _ in range(2):
        x, y = batch()
        theirs.step(x, y)
        ours.step(x, y)
        assert_same(theirs, ours)


def test_frozen_parameters_stay_frozen():
    model = mlp().double()
    model[1].module.bias.requires_grad_(False)
    before = model[1].module.bias.clone()
    for correction in (0.0, 0.1):
        LocopropTrainer(model, F.cross_entropy, correction=correction).step(*batch())
    assert torch.equal(model[1].module.bias, before)
    assert not model[1].module.bias.requires_grad
    assert model[1].module.weight.requires_grad


def test_batches_of_changing_size():
    trainer = LocopropTrainer(mlp().double(), F.cross_entropy, momentum=0.5)
    for size in (10, 4, 4, 1):
        trainer.step(*batch(size))
        assert all(report.committed for report in trainer.last_reports)


def test_inplace_activation_gives_the_same_numbers():
    for correction in (0.0, 0.1):
        results = []
        for inplace in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Flatten(),
                LocoLayer(nn.Linear(64, 12), nn.ReLU(inplace)),
                LocoLayer(nn.Linear(12, 8), nn.ReLU(inplace)),
                LocoLayer(nn.Linear(8, 5), nn.Identity()),
            ).double()
            trainer = LocopropTrainer(model, F.cross_entropy, correction=correction)
            for _ in range(2):
                trainer.step(*batch())
            results.append(torch.cat([p.flatten() for p in model.parameters()]))
        assert torch.equal(*results)


def test_layer_without_gradient_is_left_alone():
    first, second = LocoLayer(nn.Linear(64, 5), nn.Tanh()), LocoLayer(nn.Linear(5, 5), nn.Tanh())
    model = nn.Sequential(nn.Flatten(), first, second)
    outputs = []
    first.register_forward_hook(lambda module, args, output: outputs.append(output))
    before = second.module.weight.clone()
    trainer = LocopropTrainer(model, lambda out, y: outputs[-1].square().sum())
    trainer.step(torch.randn(3, 64), None)
    assert torch.equal(second.module.weight, before)


def test_defaults_are_the_packages():
    locoprop = pytest.importorskip("locoprop")
    for cls in ("LocopropTrainer", "LocoLayer"):
        theirs, ours = (inspect.signature(getattr(package, cls)) for package in (locoprop, locoprop_torch.compat))
        same = list(ours.parameters.values())[: len(theirs.parameters)]
        assert [(p.name, p.default) for p in same] == [(p.name, p.default) for p in theirs.parameters.values()]


def test_readme_of_the_package():
    """Its example, with one import line changed."""
    model = nn.Sequential(
        LocoLayer(nn.Linear(28 * 28, 1000), nn.Tanh()),
        LocoLayer(nn.Linear(1000, 500), nn.Tanh()),
        LocoLayer(nn.Linear(500, 250), nn.Tanh()),
        LocoLayer(nn.Linear(250, 30), nn.Tanh()),
        LocoLayer(nn.Linear(30, 250), nn.Tanh()),
        LocoLayer(nn.Linear(250, 500), nn.Tanh()),
        LocoLayer(nn.Linear(500, 1000), nn.Tanh()),
        LocoLayer(nn.Linear(1000, 28 * 28), nn.Sigmoid(), implicit=True),
    )

    def loss_fn(logits, labels):
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1).mean()

    trainer = LocopropTrainer(model, loss_fn)
    x = torch.rand(16, 28 * 28).round()
    losses = [trainer.step(x, x).item() for _ in range(4)]
    assert losses[-1] < losses[0]


def test_layer_interface():
    layer = LocoLayer(nn.Linear(3, 2), nn.Tanh())
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer(x), torch.tanh(layer.module(x)))
    torch.testing.assert_close(layer(hidden=layer.module(x)), layer(x))
    layer.implicit = True
    torch.testing.assert_close(layer(x), layer.module(x))
    with pytest.raises(ValueError, match="neither"):
        layer()
    with pytest.warns(UserWarning, match="not a LocoLayer"):
        LocopropTrainer(nn.Sequential(nn.Linear(3, 2)), F.mse_loss)
