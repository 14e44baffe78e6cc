"""The demo, end to end with tiny settings."""

import gzip
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from locoprop_torch import demo
from locoprop_torch.demo import command, experiments, training
from tests.helpers import transfers_of

matplotlib_image = pytest.importorskip("matplotlib.image")
pytest.importorskip("rich")


def random_images(count):
    return np.random.default_rng(0).integers(0, 256, size=(count, 28, 28), dtype=np.uint8)


def run_demo(folder, *arguments):
    demo.main(["--out", str(folder), *arguments])
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def message_of(capsys, *arguments):
    """The error message of a run that must exit with code 2."""
    with pytest.raises(SystemExit) as stopped:
        demo.main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def check_results(results, methods, epochs, baseline_epochs):
    assert set(results) == {"config", "environment", "methods"}
    assert list(results["methods"]) == methods
    for name, entry in results["methods"].items():
        expected = epochs if name.startswith("LocoProp") else baseline_epochs
        for curve in ("train_loss", "test_loss", "seconds"):
            assert len(entry[curve]) == expected, (name, curve)
            assert np.isfinite(entry[curve]).all()
        assert (np.diff([0, *entry["seconds"]]) > 0).all()
        assert min(entry["train_loss"]) > results["config"]["loss_lower_bound"]
        final = entry["final"]
        assert final["epochs"] == expected
        assert final["train_loss"] == entry["train_loss"][-1]
        assert final["test_loss"] == entry["test_loss"][-1]
        assert final["seconds"] == entry["seconds"][-1]
        assert final["seconds_per_epoch"] == pytest.approx(final["seconds"] / expected)


def test_all_methods_on_curves(tmp_path, capsys):
    results = run_demo(tmp_path / "new" / "folder", "--images", "400", "--epochs", "2", "--baseline-epochs", "3")
    check_results(
        results, ["LocoProp-M", "LocoProp-M, 32 rows", "LocoProp-S", "RMSProp", "Adam"], epochs=2, baseline_epochs=3
    )
    config, environment = results["config"], results["environment"]
    assert (config["data"], config["train_images"], config["seed"], config["dtype"]) == ("curves", 400, 0, "float32")
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert environment["backend"]["ran"] == "reference"
    output = capsys.readouterr().out
    for words in ("784-400-", "400 train", torch.__version__, "reference", "seconds/epoch", "LocoProp-S"):
        assert words in output
    picture = matplotlib_image.imread(tmp_path / "new" / "folder" / "training_curves.png")
    assert picture.shape[1] > picture.shape[0] > 400
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 50  # drawn on


def test_same_seed_same_losses(tmp_path):
    arguments = ("--images", "200", "--epochs", "1", "--methods", "locoprop-m", "adam")
    first, again, other = (
        run_demo(tmp_path / str(run), *arguments, "--seed", seed)["methods"] for run, seed in enumerate("001")
    )
    for method in first:
        assert first[method]["train_loss"] == again[method]["train_loss"]
        assert first[method]["train_loss"] != other[method]["train_loss"]


def test_equal_time(tmp_path):
    results = run_demo(tmp_path, "--images", "200", "--seconds", "0.2", "--methods", "locoprop-rows", "adam")
    assert results["config"]["seconds"] == 0.2
    for entry in results["methods"].values():
        assert entry["seconds"][-1] >= 0.2
        assert all(seconds < 0.2 for seconds in entry["seconds"][:-1])
        assert entry["final"]["epochs"] == len(entry["seconds"])


def test_npz_data_in_bfloat16(tmp_path):
    np.savez(tmp_path / "digits.npz", x_train=random_images(8), x_test=random_images(4))
    path = str(tmp_path / "digits.npz")
    small = ("--epochs", "1", "--images", "6", "--methods", "locoprop-m", "--dtype", "bfloat16")
    results = run_demo(tmp_path / "out", "--data", path, *small)
    check_results(results, ["LocoProp-M"], epochs=1, baseline_epochs=0)
    assert results["config"]["layers"] == [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    assert results["config"]["train_images"] == 6
    assert str(tmp_path) not in json.dumps(results)


def test_idx_data(tmp_path):
    for stem, count in (("train", 8), ("t10k", 4)):
        content = struct.pack(">4I", 0x803, count, 28, 28) + random_images(count).tobytes()
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    results = run_demo(tmp_path / "out", "--data", str(tmp_path), "--epochs", "1", "--methods", "adam")
    check_results(results, ["Adam"], epochs=0, baseline_epochs=1)
    assert results["environment"]["backend"] is None


def test_autoencoder_is_the_papers():
    model = experiments.autoencoder((784, 400, 30), seed=3)
    names = [name for name, _ in model.named_children()]
    assert names == ["linear1", "tanh1", "code", "linear3", "tanh3", "logits"]
    parameters = dict(model.named_parameters())
    assert [len(parameters["code.weight"]), len(parameters["logits.weight"])] == [30, 784]
    assert parameters["linear1.weight"].abs().max() <= (6 / (784 + 400)) ** 0.5
    assert not parameters["linear1.bias"].any()
    optimizer = demo.FILES.optimizer("locoprop-m", model)
    assert transfers_of(optimizer) == {"linear1": "tanh", "code": "identity", "linear3": "tanh", "logits": "sigmoid"}


def test_diverged_loss_is_null_and_drawn_around(tmp_path, monkeypatch):
    history = training.History([300.0, float("nan")], [310.0, float("inf")], [1.0, 2.0])
    monkeypatch.setattr(command, "train", lambda *args: history)
    results = run_demo(tmp_path, "--images", "10", "--methods", "adam")
    assert results["methods"]["Adam"]["train_loss"] == [300.0, None]
    assert results["methods"]["Adam"]["final"]["test_loss"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.npz"], "missing.npz: no such file"),
        (["--device", "abacus"], "--device 'abacus' cannot be used"),
        (["--device", "meta"], "--device 'meta' cannot be used"),
        (["--epochs", "0"], "--epochs: must be >= 1, got 0"),
        (["--epochs", "two"], "--epochs: invalid integer value: 'two'"),
        (["--seconds", "0"], "--seconds must be finite and > 0, got 0"),
        (["--seconds", "9", "--epochs", "2"], "--seconds is in place of --epochs"),
        (["--seed", "-1"], "--seed: must be >= 0, got -1"),
        (["--methods", "sgd"], "invalid choice: 'sgd'"),
        (["--methods"], "--methods: expected at least one argument"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--backend", "cuda"], "invalid choice: 'cuda'"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    error = message_of(capsys, "--out", "out", *arguments)
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_more_images_than_there_are(tmp_path, capsys):
    np.savez(tmp_path / "digits.npz", x_train=random_images(8), x_test=random_images(4))
    error = message_of(capsys, "--out", str(tmp_path / "out"), "--data", str(tmp_path / "digits.npz"), "--images", "9")
    assert "--images must be at most 8" in error


def test_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in message_of(capsys, "--out", str(tmp_path / "file"), "--images", "10")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the Triton backend works here")
def test_backend_that_cannot_run(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "locoprop_torch.demo", "--out", str(tmp_path), "--images", "10"]
    done = subprocess.run([*command, "--backend", "triton"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "error: backend 'triton' cannot run" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_missing_package(tmp_path, package):
    program = (
        f"import sys; sys.modules[{package!r}] = None; from locoprop_torch import demo; demo.main(['--out', 'out'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert f'{package} is not installed: pip install "locoprop-kernels[demo]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--data", "--device", "--epochs", "--dtype", "--backend", "--seed", "--methods", "--out"):
        assert option in printed
