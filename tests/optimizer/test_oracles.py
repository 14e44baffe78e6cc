"""The recorded trajectories of the paper's TensorFlow notebook (tests/oracles/README.md), through ``LocoProp``."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from locoprop_kernels import rules
from locoprop_torch import LocoProp

CASES = sorted((Path(__file__).parents[1] / "oracles").glob("tf_*.npz"))
# With the kernels, which are interpreted where there is no GPU: every rule in back-propagation, and a few local steps
# with both losses, an identity layer, and sizes that are no powers of two. The others are part of the sweeps.
SHORT = {"M_rmsprop_TANH_T1", "M_rmsprop_TANH_T3", "M_adam_TANH_std"}
MODULES = {"TANH": nn.Tanh, "RELU": nn.ReLU, "NONE": nn.Identity, "SIGMOID": nn.Identity}


def rule_of(meta):
    match meta["optimizer"]:
        case "sgd":
            return rules.SGD()
        case "momentum":
            return rules.SGD(momentum=meta["momentum"])
        case "nesterov":
            return rules.SGD(momentum=meta["momentum"], nesterov=True)
        case "rmsprop":
            return rules.RMSprop(meta["decay"], meta["momentum"], meta["epsilon"], flavor="tensorflow")
        case "adam":
            return rules.Adam((meta["beta1"], meta["beta2"]), meta["epsilon"], flavor="tensorflow")
        case "adagrad":
            start = meta["initial_accumulator_value"]
            return rules.Adagrad(initial_accumulator_value=start, flavor="tensorflow")
    raise AssertionError(meta["optimizer"])


def autoencoder(meta, data):
    """The notebook's network; the sigmoid of the output layer is in the loss."""
    sizes = meta["layer_sizes"]
    modules = []
    for i, function in enumerate(meta["layer_fns"]):
        layer = nn.Linear(sizes[i], sizes[i + 1])
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(data[f"W{i}"][0].T))
            layer.bias.copy_(torch.from_numpy(data[f"b{i}"][0]))
        modules += [layer, MODULES[function]()]
    return nn.Sequential(*modules)


def runs():
    for path in CASES:
        name = path.stem.removeprefix("tf_").removeprefix("LocoProp")
        short = name.startswith(("BP", "MIXED")) or name in SHORT
        yield pytest.param("reference", path, id=f"reference-{path.stem}")
        marks = () if short else pytest.mark.sweep
        yield pytest.param("triton", path, id=f"triton-{path.stem}", marks=marks)
        # The notebook's batches are small enough for the driver that holds all their rows. It has no Gram form, which a
        # squared loss takes.
        if "LocoPropS" in path.stem or "MIXED" in path.stem:
            continue
        yield pytest.param("rows", path, id=f"rows-{path.stem}", marks=() if name in SHORT else pytest.mark.sweep)


def few_tiles():
    """In the interpreter a large tile takes no longer than a small one; the layers are small."""
    from locoprop_kernels.kernels import configs, target

    return configs.use(configs.Config(n=32, b=64, k=128, r=64)) if target.interpreted() else nullcontext()


def a_program_for_each_block():
    from locoprop_kernels.kernels import configs

    return configs.use(driver="rows")


CONTEXTS = {"reference": nullcontext, "triton": few_tiles, "rows": a_program_for_each_block}


@pytest.mark.parametrize(("way", "path"), list(runs()))
def test_trajectory(way, path):
    if way != "reference":
        pytest.importorskip("triton")
    with CONTEXTS[way]():
        report = follow(path, "reference" if way == "reference" else "triton")
    if way == "rows":
        assert "rows" in report.driver


def follow(path, backend):
    """Train as the notebook did, and compare after every step."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    data = np.load(path)
    meta = json.loads(str(data["meta"]))
    model = autoencoder(meta, data).to(device)
    back_propagation = meta["mode"] == "BP"
    opt = LocoProp(
        model,
        lr=1.0,  # set in every step
        rows=None,
        activation_lr=1.0 if back_propagation else meta["act_lr"],
        local_iterations=1 if back_propagation else meta["T"],
        rule=rule_of(meta),
        transfers={
            str(2 * i): function.lower() for i, function in enumerate(meta["layer_fns"]) if function == "SIGMOID"
        },
        reduction="sum",
        backend=backend,
    )
    steps = meta["outer_steps"]
    rates = np.broadcast_to(meta["lr"], steps)
    modes = meta["mode"] if isinstance(meta["mode"], list) else [meta["mode"]] * steps
    tolerance = 5e-4 if meta["optimizer"] == "adam" else 1e-3
    layers = [module for module in model if isinstance(module, nn.Linear)]
    for k in range(steps):
        opt.param_groups[0]["lr"] = float(rates[k])
        opt.local_loss = "squared" if modes[k] == "LocoPropS" else "matching"
        x = torch.from_numpy(data["x"][k]).to(device)
        opt.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(x), x, reduction="none").sum(1).mean()
        np.testing.assert_allclose(loss.item(), data["loss_before"][k], rtol=1e-5)
        loss.backward()
        opt.step()
        for i, layer in enumerate(layers):
            for name, actual in ((f"W{i}", layer.weight.T), (f"b{i}", layer.bias)):
                expected, start = data[name][k + 1], data[name][0]
                error = np.abs(actual.detach().cpu().numpy() - expected).max()
                assert error <= tolerance * np.abs(expected - start).max(), (name, k)
    assert opt.skipped_steps == 0
    assert opt.last_reports[0].backend == backend
    return opt.last_reports[0]
