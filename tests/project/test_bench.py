"""The benchmark suite's own arithmetic: work counted right, reports without paths, comparisons that see changes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("rich")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from bench import cases, compare, epilogues, measure, model, products, report, scaling  # noqa: E402
from bench.contestants import all_contestants  # noqa: E402
from bench.work import Work  # noqa: E402
from locoprop_kernels.epilogues import Issued  # noqa: E402

CPU = torch.device("cpu")
SMALL = cases.network("small", (13, 11, 7, 9, 13), 17, "small", iterations=4)
CONVNET = cases.convnet("small", 5, 8, (3, 4, 6), 4, iterations=4)


def measured(case):
    field = [one for one in all_contestants(CPU) if not one.slow_start]
    result = measure.measure(case, field, CPU, {"fp32": 1e9, "copy": 1e9}, measure.Budget(0.01), lambda text: None)
    for name, fact in result["contestants"].items():
        assert "seconds" in fact or "trains networks" in fact["skipped"] or "not installed" in fact["skipped"], (
            name,
            fact,
        )
    return result["contestants"]


@pytest.mark.parametrize("scope", ["step", "local"])
@pytest.mark.parametrize("loss", ["matching", "squared"])
def test_contestants_do_the_same_step(scope, loss):
    facts = measured(replace(SMALL, scope=scope, loss=loss))
    assert facts["ours-fp32"]["error"] <= facts["textbook"]["error"] + 1e-5
    assert set(facts["ours-fp32"]["speedup"]) >= {"textbook"}


@pytest.mark.parametrize("loss", ["matching", "squared"])
def test_contestants_do_the_same_step_of_a_convnet(loss):
    facts = measured(replace(CONVNET, loss=loss))
    assert {"package", "textbook", "ours-fp32", "ours-bf16", "textbook-bf16", "rmsprop"} <= set(facts)
    for name in ("package", "textbook", "ours-fp32"):  # 8e-4 with an eps of another scale, 4e-2 with the mean over rows
        assert facts[name].get("error", 0.0) <= 1e-4, name


def test_a_convnet_has_the_products_that_its_case_counts():
    work = Work(CONVNET, CPU)
    model = work.model()
    with FlopCounterMode(display=False) as counter:
        work.loss(model(work.x), work.y).backward()
    assert counter.get_total_flops() == CONVNET.training_flops()
    assert [w.shape for w, _ in work.parameters] == [m.weight.shape for m in work.trained(model)]


@pytest.mark.parametrize("case", [SMALL, CONVNET], ids=["linear", "convnet"])
def test_the_floor_multiplies_what_the_case_counts(monkeypatch, case):
    monkeypatch.setattr("locoprop_kernels.routes._onednn_linear", None)  # torch's counter does not know that operator
    monkeypatch.setattr("locoprop_kernels.routes._chosen", {})
    entry = next(one for one in all_contestants(CPU) if one.name == "floor-fp32").build(Work(case, CPU))
    with FlopCounterMode(display=False) as counter:
        entry.run()
    assert counter.get_total_flops() == case.flops()


def test_every_case_is_named_once_and_predicted():
    found = cases.all_cases()
    assert len({case.name for case in found}) == len(found)
    for case in found:
        if case.loss == "matching" and case.iterations > 1:
            prediction = model.predict(case)
            steps = (case.iterations - 1) * prediction.step
            assert 0 < prediction.floor < steps < prediction.seconds
            assert prediction.step == max(prediction.queue, prediction.memory)
            assert 0 < prediction.balance <= 1.01  # waits of a step are few in comparison


def test_predictions_follow_what_they_count():
    """Of one more slow thing at a time: issue, latency, L2, HBM; and the designs before are still there to compare."""
    (case,) = cases.select(["paper-local"], quick=False)
    config, driver = model.DESIGNS["paper-local"]
    known = model.predict_with(case, config, driver).seconds
    before = replace(model.H100, other_epilogues=model.BEFORE, tile_latency=model.LATENCY_BEFORE)
    for slower in (
        replace(before, other_epilogues=tuple((phase, Issued(200.0, 4.0)) for phase, _ in model.BEFORE)),
        replace(model.H100, tile_latency=6e-6),
        model.H100.pessimistic,
        replace(model.H100, cache_bytes=1e6, memory_bandwidth=1e11),
    ):
        assert model.predict_with(case, config, driver, slower).seconds > 1.05 * known
    # The first measured design, in this model: 0.70 ms without start and first reading by a sketch of it.
    assert 9 * model.predict_with(case, config, driver, before).step == pytest.approx(0.70e-3, rel=0.02)


def test_the_page_has_the_predictions_of_now(tmp_path, monkeypatch):
    """``python -m bench.model --write`` puts them there."""
    page = tmp_path / "MODEL.md"
    written = model._PAGE.read_text()
    page.write_text(written)
    monkeypatch.setattr(model, "_PAGE", page)
    assert model.main(["--write"]) == 0
    assert page.read_text() == written
    page.write_text(written.replace("| balance |", "| other |"))
    with pytest.raises(ValueError, match="must have a table"):
        model.main(["--write"])


def test_the_table_of_epilogues_is_written_as_it_stands(monkeypatch, tmp_path, capsys):
    # The command takes it away for good, as it compiles.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    file = tmp_path / "epilogues.py"
    source = Path(epilogues.epilogues.__file__).read_text()
    file.write_text(source)
    monkeypatch.setattr(epilogues, "_FILE", file)
    monkeypatch.setattr(epilogues, "count", lambda target: epilogues.epilogues.EPILOGUES[target])
    assert epilogues.main(["--write", "--target", "sm_90"]) == 0
    assert file.read_text() == source
    monkeypatch.setattr(epilogues, "count", lambda target: {"activation": Issued(1.5, 1.0), "update": Issued(2.5, 1.0)})
    assert epilogues.main(["--write", "--target", "sm_90"]) == 0
    assert '"sm_90": {"activation": Issued(1.5, 1.0), "update": Issued(2.5, 1.0)},' in file.read_text()
    assert len(file.read_text().splitlines()) == len(source.splitlines())
    capsys.readouterr()


def test_select_takes_names_families_and_prefixes():
    assert [case.name for case in cases.select(["paper"], quick=False)] == ["paper", "paper-local", "paper-s"]
    assert {case.name for case in cases.select(["T-*"], quick=False)} == {f"T-{t}" for t in (1, 2, 5, 20, 50)}
    with pytest.raises(ValueError, match="matches none of"):
        cases.select(["no such case"], quick=False)


def test_a_case_that_does_not_fit_is_left_out_with_the_reason():
    case = cases.Case("huge", "huge", (cases.Layer(10**7, 10**5, 10**5, "tanh"),), scope="local")
    result = measure.measure(case, [], CPU, {"fp32": 1e12, "copy": 1e9}, measure.Budget(), lambda text: None)
    assert "GiB" in result["skipped"]


def test_exponents():
    sizes = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert scaling.exponent(sizes, [3 * size**1.5 for size in sizes])[0] == pytest.approx(1.5)


def test_reports_hold_no_paths(tmp_path):
    path = tmp_path / "report.json"
    report.save({"value": 1 / 3}, path)
    assert report.load(path) == {"value": 0.3333}
    with pytest.raises(ValueError, match="local paths"):
        report.save({"where": str(Path.cwd())}, path)


def test_compare_sees_what_got_worse(tmp_path, capsys):
    def results(speedup, error, spills):
        fact = {"speedup": {"package": {"p50": speedup}}, "error": error, "seconds": {"p50": 1.0}}
        record = {"kernel": "k", "configuration": "c", "target": "sm_90", "registers": 255, "spill_bytes": spills}
        record |= {"shared_bytes": 0, "scalar_products": 0}
        return {"device": {"name": "d"}, "cases": {"paper": {"contestants": {"ours-fp32": fact}}}, "records": [record]}

    old, same, worse = tmp_path / "old.json", tmp_path / "same.json", tmp_path / "worse.json"
    same.write_text(json.dumps(results(2.1, 1e-5, 0)))
    worse.write_text(json.dumps(results(1.5, 1e-3, 8)))
    assert compare.main([str(old), str(same), "--write"]) == 0
    assert "seconds" not in old.read_text()
    assert compare.main([str(old), str(same), "--strict"]) == 0
    assert compare.main([str(old), str(worse), "--strict"]) == 1
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("slower -29%", "less accurate", "more"))
    assert compare.main([str(old), str(worse)]) == 0


def test_every_route_of_a_product_is_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(products, "LAYERS", [(5, 4, 3)])
    assert products.main(["--rounds", "1", "--out", str(tmp_path)]) == 0
    found = report.load(tmp_path / "products.json")
    assert {(one["product"], one["operands"]) for one in found["products"]} == {
        (product, operands) for product in ("Δ Xᵀ", "E X") for operands in ("float32", "bfloat16", "float16")
    }
    for one in found["products"]:
        assert found["choices"][one["operands"]]["route"] in one["gflops"]
        assert all(rate > 0 for rate in one["gflops"].values())
    assert "5 × 4 → 3" in capsys.readouterr().out
