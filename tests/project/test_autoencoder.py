"""The paper's experiments with tiny settings: the whole command, interruptions, the search, bad input."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import struct

import numpy as np
import pytest
import torch

from bench.autoencoder import beyond, data, networks, optimisers, runs, search
from bench.autoencoder.optimisers import AUTOENCODER
from bench.autoencoder.protocol import FULL, PROTOCOLS, TINY
from bench.autoencoder.runs import Deadline, OutOfTime, Plan
from bench.autoencoder.tasks import Autoencoder

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from bench.autoencoder import ablations, compare, method, statements
from bench.autoencoder.__main__ import UNFINISHED, main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A file like MNIST's, of random strokes."""
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    rng = np.random.default_rng(0)
    train, test = ((255 * (rng.random((count, 28, 28)) < 0.2)).astype(np.uint8) for count in (80, 30))
    labels = [rng.integers(10, size=count) for count in (80, 30)]
    np.savez(path, x_train=train, x_test=test, y_train=labels[0], y_test=labels[1])
    return path


@pytest.fixture(scope="module")
def task(digits):
    return Autoencoder(data.load(str(digits), TINY), TINY, TINY.encoder)


class AfterEpochs(Deadline):
    """Time is up after so many epochs."""

    def __init__(self, count):
        super().__init__()
        self.left = count

    def check(self):
        if self.left == 0:
            raise OutOfTime
        self.left -= 1


def plan_of(name, epochs=TINY.epochs):
    contestant = AUTOENCODER[name]
    make = lambda model: contestant.optimiser(model, contestant.usual, TINY)  # noqa: E731
    return Plan("test", make, name, contestant.usual, 0, epochs, TINY.warm_up)


def arguments(out, *more):
    return ["--protocol", "tiny", "--out", str(out), "--chosen", str(out / "chosen.json"), *map(str, more)]


def message_of(capsys, *given):
    with pytest.raises(SystemExit) as stopped:
        main(list(given))
    assert stopped.value.code == 2
    return capsys.readouterr().err


# --- the whole command


def test_comparison_and_report(tmp_path, digits, capsys):
    names = ["adam", "rmsprop", "locoprop-m", "locoprop-m-rows32"]
    given = arguments(tmp_path, "--data", digits, "--optimisers", *names, "--seeds", 2, "--parts", "compare", "longer")
    assert main(given) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    (block,) = results["compare"].values()
    assert list(block["entries"]) == names
    for entry in block["entries"].values():
        assert [one["seed"] for one in entry["runs"]] == [0, 1]
        for one in entry["runs"]:
            assert len(one["model_seconds"]) == len(one["optimiser_seconds"]) == TINY.epochs
            for curve in ("train_loss", "test_loss", "train_error", "test_error"):
                assert len(one["curves"][curve]) == TINY.epochs
        assert entry["peak_mib"] > 0
    assert block["entries"]["locoprop-m"]["runs"][0] != block["entries"]["locoprop-m"]["runs"][1]
    (long,) = block["longer"].values()
    assert len(long["runs"][0]["curves"]["train_loss"]) == TINY.longer * TINY.epochs
    assert {one["holds"] for one in block["statements"]} <= {True, False, None}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    assert str(tmp_path) not in page + json.dumps(results)
    assert "LocoProp-M, 32 rows" in page
    assert "digits" in capsys.readouterr().out


def test_other_parts(tmp_path, digits):
    given = arguments(tmp_path, "--data", digits, "--optimisers", "adam", "--parts", "method", "ablations", "beyond")
    assert main(given) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(len(variants) > 1 for variants in results["ablations"]["groups"].values())
    assert {"LocoProp-M", "LocoProp-S"} == set(results["method"]["traces"])
    assert [title.split()[0] for title in results["beyond"]["tasks"]] == ["convnet", "GPT"]
    for entries in results["beyond"]["tasks"].values():
        assert {"adamw", "locoprop-m"} <= set(entries)
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("data:image/png;base64,") == 4


def test_a_rerun_gives_the_same_numbers(tmp_path, digits):
    curves = []
    for name in ("one", "two"):
        given = arguments(tmp_path / name, "--data", digits, "--optimisers", "locoprop-m", "--parts", "compare")
        assert main(given) == 0
        (block,) = json.loads((tmp_path / name / "results.json").read_text())["compare"].values()
        curves.append(block["entries"]["locoprop-m"]["runs"][0]["curves"])
    assert curves[0] == curves[1]


def test_out_of_time_and_resumed(tmp_path, digits, capsys):
    given = arguments(tmp_path, "--data", digits, "--optimisers", "adam", "--parts", "compare")
    assert main([*given, "--minutes", "0"]) == UNFINISHED
    assert "--resume" in capsys.readouterr().err
    assert main([*given, "--resume"]) == 0
    assert main([*given, "--resume"]) == 0
    assert "--resume" in message_of(capsys, *given)


# --- a run


@pytest.mark.parametrize("name", AUTOENCODER)
def test_interrupted_run_ends_at_the_same_numbers(tmp_path, task, name):
    if importlib.util.find_spec(AUTOENCODER[name].library) is None:
        pytest.skip(f"{AUTOENCODER[name].library} is not installed")
    whole = runs.run(plan_of(name), task, tmp_path / "whole", "wall", Deadline())
    with pytest.raises(OutOfTime):
        runs.run(plan_of(name), task, tmp_path / "parts", "wall", AfterEpochs(2))
    assert len(list((tmp_path / "parts").glob("*.pt"))) == 1
    epochs = []
    resumed = runs.run(plan_of(name), task, tmp_path / "parts", "wall", Deadline(), lambda: epochs.append(1))
    assert len(epochs) == TINY.epochs
    assert resumed.curves == whole.curves
    assert resumed.samples == whole.samples
    assert not list((tmp_path / "parts").glob("*.pt*"))


def test_a_checkpoint_ahead_of_its_file_is_not_trained_again(tmp_path, task):
    whole = runs.run(plan_of("adam"), task, tmp_path / "whole", "wall", Deadline())
    with pytest.raises(OutOfTime):
        runs.run(plan_of("adam"), task, tmp_path, "wall", AfterEpochs(1))
    (file,) = tmp_path.glob("*.json")
    behind = file.read_text()
    with pytest.raises(OutOfTime):
        runs.run(plan_of("adam"), task, tmp_path, "wall", AfterEpochs(1))
    file.write_text(behind)
    assert runs.run(plan_of("adam"), task, tmp_path, "wall", AfterEpochs(1)).curves == whole.curves


def test_a_run_that_diverges_ends_and_says_so(tmp_path, task):
    plan = plan_of("sgd", epochs=50)
    wild = Plan(**{**vars(plan), "make": lambda model: torch.optim.SGD(model.parameters(), lr=1e38)})
    history = runs.run(wild, task, tmp_path, "wall", Deadline())
    assert history.done
    assert history.epochs < 50
    assert math.isinf(history.final())
    json.loads(next(tmp_path.glob("*.json")).read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("suffix", ["json", "pt"])
def test_broken_files_of_a_run(tmp_path, task, suffix):
    with pytest.raises(OutOfTime):
        runs.run(plan_of("adam"), task, tmp_path, "wall", AfterEpochs(1))
    (file,) = tmp_path.glob(f"*.{suffix}")
    file.write_bytes(b"{")
    with pytest.raises(ValueError, match=r"cannot be read.*: rm "):
        runs.run(plan_of("adam"), task, tmp_path, "wall", Deadline())


def test_schedule():
    factors = [runs.factor(step, 100, 5) for step in range(100)]
    np.testing.assert_allclose(factors[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1.0
    np.testing.assert_allclose(np.diff(factors[5:]), -1 / 95)
    assert factors[-1] > 0


# --- the search


def quadratic(values, number):
    return (math.log10(values["lr"]) + 2) ** 2 + (math.log10(values["forget"]) + 1) ** 2


def test_interrupted_search_ends_like_one_that_was_not(tmp_path):
    pytest.importorskip("optuna")
    whole = search.search(AUTOENCODER["adam"], 6, tmp_path / "whole.log", "test", quadratic)
    for stop in (0, 3):

        def interrupted(values, number, stop=stop):
            if number == stop:
                raise KeyboardInterrupt
            return quadratic(values, number)

        with pytest.raises(KeyboardInterrupt):
            search.search(AUTOENCODER["adam"], 6, tmp_path / "parts.log", "test", interrupted)
    assert search.search(AUTOENCODER["adam"], 6, tmp_path / "parts.log", "test", quadratic) == whole
    assert whole["trials"][0][0] == AUTOENCODER["adam"].usual
    assert len(whole["trials"]) == 6
    assert whole["loss"] == min(loss for _, loss in whole["trials"])


def test_diverged_trials_are_never_chosen(tmp_path):
    pytest.importorskip("optuna")
    found = search.search(
        AUTOENCODER["sgd"], 3, tmp_path / "log", "test", lambda values, number: 1.0 if number == 1 else math.inf
    )
    assert found["loss"] == 1.0
    assert [loss for _, loss in found["trials"]] == [None, 1.0, None]


def test_the_command_searches_and_takes_what_it_found(tmp_path, digits):
    pytest.importorskip("optuna")
    given = arguments(
        tmp_path, "--data", digits, "--optimisers", "adam", "locoprop-m", "--parts", "compare", "--search", 2
    )
    assert main(given) == 0
    chosen = json.loads((tmp_path / "chosen.json").read_text())["tiny autoencoder"]
    results = json.loads((tmp_path / "results.json").read_text())
    (block,) = results["compare"].values()
    for name, entry in block["entries"].items():
        assert len(chosen[name]["trials"]) == 2
        assert entry["values"] == chosen[name]["values"]
    assert "best of 2 trials" in results["config"]["search"]


def test_chosen_values_come_from_equal_searches():
    """Those in the repository: as many trials for everyone, values within the space that was searched."""
    entries = json.loads(search.CHOSEN.read_text(encoding="utf-8"))
    for subject, found in entries.items():
        known = AUTOENCODER if subject.endswith("autoencoder") else beyond.CONTESTANTS
        assert subject.split()[0] in PROTOCOLS
        assert set(found) == set(known)
        assert len({len(entry["trials"]) for entry in found.values()}) == 1
        for name, entry in found.items():
            assert entry["trials"][0][0] == pytest.approx(known[name].usual)
            for key, (low, high) in known[name].space.items():
                assert low <= entry["values"][key] <= high


# --- what is read off


def entry_of(kind, losses, seconds):
    runs = [{"curves": {"train_loss": losses}, "model_seconds": seconds, "optimiser_seconds": seconds}]
    return {"label": kind, "kind": kind, "runs": runs}


def test_statements_follow_the_figures():
    entries = {
        "adam": entry_of("first-order", [3.0, 2.0], [0.1, 0.1]),
        "kfac": entry_of("second-order", [3.0, 1.0], [1.0, 1.0]),
        "locoprop-m": entry_of("LocoProp", [1.5, 1.04], [0.5, 0.5]),
    }
    extra = {"adam": entry_of("first-order", [3.0, 1.0, 0.5], [0.9, 0.1, 9.0])}
    found = {one["text"].split(",")[0]: one["holds"] for one in statements.check(entries, extra)}
    assert list(found.values()) == [True, True, False, None, None, False]
    entries["locoprop-m"] = entry_of("LocoProp", [1.0, 2.5], [0.5, 0.5])
    assert [one["holds"] for one in statements.check(entries, {})] == [False, False, True, None, None, None]
    for seconds, holds in ((0.5, False), (0.45, True)):
        entries["locoprop-m-rows32"] = entry_of("LocoProp", [1.0, 2.6], [seconds, seconds])
        assert statements.check(entries, {})[4]["holds"] is holds
    del entries["locoprop-m"]
    assert {one["holds"] for one in statements.check(entries, extra)} == {None}


def test_time_to_a_loss():
    entry = entry_of("LocoProp", [3.0, 2.0, None], [0.5, 0.5, 0.5])
    assert compare.time_to(entry, 2.0) == 2.0
    assert compare.time_to(entry, 1.9) is None
    assert compare.final_loss(entry) == math.inf


def test_composed_steps_approach_the_closed_form(task):
    model = task.network(0)
    batch = task.images.train[:20]
    problem = method.problem_of(model, model[2], task, batch)
    found = method.cosines(problem, (1, 10, 1000))
    for name, values in found.items():
        assert values[0] < values[-1], name
        assert values[-1] > 0.99, name
    assert found["SGD, all rows"][-1] > 1 - 1e-6


def test_variants_differ_from_the_first():
    for variants in ablations.variants({"lr": 1.0, "gamma": 2.0}, {"lr": 3.0, "gamma": 4.0}).values():
        assert variants[0][1] == {"lr": 1.0, "gamma": 2.0}
        shown = [(label, repr(values)) for label, values in variants]
        assert len({label for label, _ in shown}) == len({values for _, values in shown}) == len(variants)


# --- data and networks


def test_labels_of_idx_files(tmp_path):
    for stem, count in (("train", 5), ("t10k", 3)):
        content = struct.pack(">2I", 0x801, count) + bytes(range(count))
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))
    train, test = data.load_labels(str(tmp_path), TINY)
    assert train.tolist() == [0, 1, 2, 3, 4]
    assert test.tolist() == [0, 1, 2]
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content[:-1]))
    with pytest.raises(ValueError, match="IDX file of labels"):
        data.load_labels(str(tmp_path), TINY)


def test_networks():
    assert networks.scaled((784, 100, 50, 30), 0.5, 2) == (784, 50, 50, 25, 25, 30)
    model = networks.autoencoder((784, 20, 4), "relu", 0)
    assert [type(part).__name__ for part in model] == ["Linear", "ReLU", "Linear", "Linear", "ReLU", "Linear"]
    for make in (lambda: networks.convnet(3), lambda: networks.GPT(10, 8, 3)):
        state = torch.random.get_rng_state()
        one, two = make().state_dict(), make().state_dict()
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(torch.equal(one[name], two[name]) for name in one)


# --- bad input


def test_unknown_optimiser(tmp_path, capsys):
    message = message_of(capsys, *arguments(tmp_path, "--optimisers", "adam", "adamm"))
    assert "--optimisers must be among sgd, momentum" in message
    assert "got 'adamm'" in message


def test_missing_library(tmp_path, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "singd" else real(name, *more))
    message = message_of(capsys, *arguments(tmp_path, "--optimisers", "adam", "kfac"))
    assert "singd is not installed" in message
    assert 'pip install -c constraints.txt -e ".[paper]"' in message


@pytest.mark.parametrize("content", [None, b"", b"not an archive"])
def test_missing_and_corrupt_data(tmp_path, capsys, content):
    path = tmp_path / "mnist.npz"
    if content is not None:
        path.write_bytes(content)
    message = message_of(capsys, *arguments(tmp_path / "out", "--data", path, "--optimisers", "adam"))
    assert str(path) in message
    assert "To get mnist: curl" in message


def test_missing_fashion_mnist(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "FASHION", tmp_path / "nowhere")
    message = message_of(capsys, *arguments(tmp_path, "--data", "fashion-mnist", "--optimisers", "adam"))
    assert "apt-get install dataset-fashion-mnist" in message


@pytest.mark.parametrize(("option", "value"), [("--seeds", "0"), ("--search", "0"), ("--width", "0"), ("--depth", "0")])
def test_numbers_out_of_range(tmp_path, capsys, option, value):
    message = message_of(capsys, *arguments(tmp_path, option, value, "--optimisers", "adam"))
    assert f"{option.removeprefix('--')}" in message
    assert f"{value}" in message


def test_broken_text(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match="must have at least"):
        beyond.text_of(tmp_path / "short.txt")
    with pytest.raises(ValueError, match="cannot be read"):
        beyond.text_of(tmp_path / "none.txt")
    assert len(beyond.text_of(None)) > 1e5


def test_the_full_protocol_begins_with_the_notebooks_values():
    values = {"lr": 1e-5, "gamma": 10.0}
    assert optimisers.contestant_of("locoprop-m", FULL).usual == values
    assert FULL.encoder == (784, 1000, 500, 250, 30)
    assert (FULL.batch_size, FULL.epochs, FULL.warm_up, FULL.momentum) == (1000, 100, 5, 0.999)


def test_everyone_has_a_space_and_a_start_in_it():
    for contestant in (*AUTOENCODER.values(), *beyond.CONTESTANTS.values()):
        assert contestant.kind in optimisers.KINDS
        assert set(contestant.usual) == set(contestant.space)
        assert all(low <= contestant.usual[key] <= high for key, (low, high) in contestant.space.items())
