"""The command for a machine with a GPU, without one: every section with tiny sizes, its time, its last lines."""

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("rich")
pytest.importorskip("triton")

from bench import cases, report  # noqa: E402
from bench.gpu import command, exchange, sections  # noqa: E402
from bench.gpu.session import Line  # noqa: E402
from tests.helpers import compile_kernels  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is for machines without a GPU")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_dry_run_goes_through_every_section(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert command.main(["--dry-run", "--out", str(out), "--minutes", "20"]) == 0
    results = report.load(out)
    names = [section.name for section in sections.SECTIONS]
    assert list(results["section_seconds"]) == names
    assert "running" not in results
    assert results["numerics"]["exit_code"] == 0
    measured = {line["section"] for line in results["lines"]}
    assert measured == {*names} - {"numerics"}
    assert all(line["measured"] > 0 for line in results["lines"])
    # What was not measured says why; everything that ran had the right result.
    assert results.get("left_out", []) == []
    for entry in results["cases"].values():
        for name, fact in entry["contestants"].items():
            if name.startswith("ours"):
                assert "seconds" in fact, (name, fact)
    assert {
        fact["driver"]
        for entry in results["cases"].values()
        for fact in entry["contestants"].values()
        if "driver" in fact
    } >= {"single", "grouped", "rows"}
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-6:] == ["most surprising:", *results["most_surprising"]]
    surprises = [Line(**line).surprise for line in results["lines"]]
    first = next(i for i, line in enumerate(results["lines"]) if line["what"] in results["most_surprising"][0])
    assert surprises[first] == pytest.approx(max(surprises), rel=1e-2)


def test_a_section_whose_time_is_up_leaves_its_cases_out(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    chosen = ["rates", "subtraction", "predictions"]
    assert command.main(["--dry-run", "--out", str(out), "--minutes", "0", "--section", *chosen]) == 0
    results = report.load(out)
    left_out = {one["what"] for one in results["left_out"]}
    assert left_out >= {"two local steps", *sections.PREDICTED[:2]}
    assert {line["section"] for line in results["lines"]} == {"rates"}
    assert "subtraction: two local steps left out: 0 s left" in capsys.readouterr().out


@pytest.mark.sweep
@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo")
def test_a_step_of_two_processes_is_timed():
    """What the section of several processes starts where there are two GPUs, here on the CPU."""
    compile_kernels()
    assert all(seconds > 0 for seconds in exchange.measure(2, dry=True, timeout=300))


def test_the_sections_take_eight_minutes_and_know_their_cases():
    assert sum(section.seconds for section in sections.SECTIONS) <= 480
    known = {case.name for case in cases.all_cases()}
    assert set(sections.CASES) | set(sections.PREDICTED) <= known
    assert len(sections.PREDICTED) == 10
    assert all(config.r <= config.k for _, config, _ in sections.to_compile() if config is not None)


def test_surprises_are_ratios():
    twice, half = Line("a", "b", 1.0, 2.0, "ms"), Line("a", "b", 2.0, 1.0, "ms")
    assert twice.surprise == pytest.approx(half.surprise) == pytest.approx(math.log(2))
    assert Line("a", "b", None, 2.0, "ms").surprise == 0.0
    assert str(twice) == "a: b: predicted 1 ms, measured 2 ms, 2.00 of that"
    assert "not predicted" in str(Line("a", "b", None, 2.0, "ms"))


def test_without_a_gpu_nothing_is_run(capsys):
    assert command.main([]) == 0
    assert "finds no GPU" in capsys.readouterr().out
