"""Which routine multiplies: chosen once, kept in a file, forced by name, and nothing measured where none is needed."""

import json
import logging
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from locoprop_kernels import LocalProblem, local_steps_, route_cache, routes
from locoprop_kernels.products import product, rounded
from tests.helpers import force_routes

HAS_ONEDNN = "onednn" in routes.available(torch.float32)
needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has one route in float32 only")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """As in a process that has chosen nothing yet, with a cache of its own."""
    monkeypatch.delenv("LOCOPROP_CPU_PRODUCTS", raising=False)
    monkeypatch.setenv("LOCOPROP_CACHE_DIR", str(tmp_path / "cache"))
    again(monkeypatch)


def again(monkeypatch):
    monkeypatch.setattr(routes, "_chosen", {})


def measured(monkeypatch, seconds, settled=True, medians=None):
    """Put ``seconds`` in the place of a measurement; the list gets the dtype of each one."""
    calls = []

    def measure(operands, names):
        calls.append(operands)
        return {name: seconds[name] for name in names}, medians or seconds, settled

    monkeypatch.setattr(routes, "_measure", measure)
    return calls


def files():
    where = route_cache.folder()
    return [*where.glob("*")] if where is not None and where.exists() else []


def made_by(monkeypatch, maker):
    """As on a processor of a maker, which decides the default route in float32."""
    monkeypatch.setattr(route_cache, "processor", lambda: f"{maker} Processor (family 6, model 1)")


MAKERS = {"onednn": "AMD EPYC", "mm": "Intel(R) Xeon(R)"}


@needs_onednn
@pytest.mark.parametrize("default", MAKERS)
@pytest.mark.parametrize(
    ("seconds", "settled", "displaces"),
    [(0.5, True, True), (0.9, True, False), (0.5, False, True), (0.8, False, False), (2.0, True, False)],
)
def test_only_what_is_clearly_faster_displaces_the_default(monkeypatch, default, seconds, settled, displaces):
    made_by(monkeypatch, MAKERS[default])
    (other,) = {"onednn", "mm"} - {default}
    measured(monkeypatch, {default: 1.0, other: seconds}, settled)
    assert routes.available(torch.float32) == (default, other)
    assert routes.route(torch.float32) == (other if displaces else default)
    assert len(files()) == settled


@needs_onednn
def test_a_few_lucky_samples_displace_nothing(monkeypatch):
    made_by(monkeypatch, "AMD EPYC")
    measured(monkeypatch, {"onednn": 1.0, "mm": 0.5}, medians={"onednn": 1.0, "mm": 0.95})
    assert routes.route(torch.float32) == "onednn"


def test_the_measurement_is_of_every_route_that_runs(monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        names = [name for name in routes.available(dtype) if name == "upcast" or routes.runs(dtype, name)]
        seconds, medians, settled = routes._measure(dtype, names)
        assert set(seconds) <= set(names)
        assert all(0 < seconds[name] <= medians[name] for name in seconds)
        assert isinstance(settled, bool)


@needs_onednn
def test_a_choice_is_made_once_and_logged(monkeypatch, caplog):
    calls = measured(monkeypatch, {"onednn": 1.0, "mm": 0.5})
    with caplog.at_level(logging.INFO, logger="locoprop_kernels"):
        for _ in range(3):
            routes.route(torch.float32)
    monkeypatch.setenv("LOCOPROP_CPU_PRODUCTS", "onednn")
    assert routes.choose(torch.float32) == ("mm", "measured")
    assert calls == [torch.float32]
    assert [record.getMessage() for record in caplog.records] == [
        "products with float32 operands on this CPU: route 'mm' (measured)"
    ]


@needs_onednn
def test_later_processes_take_what_is_kept(monkeypatch):
    calls = measured(monkeypatch, {"onednn": 1.0, "mm": 0.5})
    routes.route(torch.float32)
    again(monkeypatch)
    measured(monkeypatch, {"onednn": 0.5, "mm": 1.0})
    assert routes.choose(torch.float32) == ("mm", "measured before, kept in a cache file")
    kept = json.loads(files()[0].read_text())
    assert kept["key"]["torch"] == torch.__version__
    assert kept["key"]["processor"] == route_cache.processor()
    assert kept["seconds"] == {"onednn": 1.0, "mm": 0.5}
    monkeypatch.setattr(route_cache, "processor", lambda: "another one")
    again(monkeypatch)
    assert routes.choose(torch.float32) == ("onednn", "measured")
    assert len(files()) == 2
    assert calls == [torch.float32]


@needs_onednn
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"route": "mm"}', '{"key": {}, "route": 3}', "\udcff", "other route"]
)
def test_a_spoiled_file_is_measured_anew(monkeypatch, text):
    calls = measured(monkeypatch, {"onednn": 1.0, "mm": 0.5})
    routes.route(torch.float32)
    (path,) = files()
    if text == "other route":
        text = path.read_text().replace('"mm",', '"abacus",')
    path.write_bytes(text.encode(errors="surrogateescape"))
    for count in (2, 2):  # and is whole after it
        again(monkeypatch)
        assert routes.route(torch.float32) == "mm"
        assert len(calls) == count


@needs_onednn
@pytest.mark.parametrize("place", ["", "a file", "a file/below it", "a folder in the file's place"])
def test_a_cache_that_cannot_be_used_is_no_error(monkeypatch, tmp_path, place):
    calls = measured(monkeypatch, {"onednn": 1.0, "mm": 0.5})
    (tmp_path / "a file").touch()
    monkeypatch.setenv("LOCOPROP_CACHE_DIR", str(tmp_path / place) if place else "")
    if place.startswith("a folder"):
        monkeypatch.setattr(route_cache, "_path", lambda key: tmp_path)
    for count in (1, 2):
        again(monkeypatch)
        assert routes.route(torch.float32) == "mm"
        assert len(calls) == count


@needs_onednn
@pytest.mark.parametrize("links", [True, False])
def test_the_first_of_two_processes_decides(monkeypatch, links):
    """Both found no file, measured, and differ: both take what the first has kept."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links here")))
    key = {"processor": "one", "routes": ["mm", "onednn"]}
    assert route_cache.keep(key, "mm", {"mm": 1.0}) == "mm"
    assert route_cache.keep(key, "onednn", {"onednn": 1.0}) == "mm"
    assert route_cache.read(key) == "mm"
    assert [path.suffix for path in files()] == [".json"]


def test_where_the_file_is(monkeypatch):
    monkeypatch.setenv("LOCOPROP_CACHE_DIR", "somewhere")
    assert route_cache.folder() == Path("somewhere")
    monkeypatch.setenv("LOCOPROP_CACHE_DIR", "")
    assert route_cache.folder() is None
    monkeypatch.delenv("LOCOPROP_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    assert route_cache.folder() == Path("caches/locoprop")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert route_cache.folder() == Path("/home/someone/.cache/locoprop")


@pytest.mark.parametrize("text", ["abacus", "float32=abacus", "float32=upcast", "float64=mm", "mm,bfloat16=", "=,"])
def test_an_unknown_route_is_refused_by_name(monkeypatch, text):
    monkeypatch.setenv("LOCOPROP_CPU_PRODUCTS", text)
    weight, x = torch.zeros(2, 3), torch.ones(4, 3)
    problem = LocalProblem(x, torch.ones(4, 2), weight, grad_weight=torch.ones(2, 3), transfer="tanh")
    with pytest.raises(ValueError, match=r"LOCOPROP_CPU_PRODUCTS must name routes .*float32=.*mm.*got '" + text):
        local_steps_([problem], lr=[0.1, 0.1], backend="reference")
    assert not weight.any()
    assert not problem.state


@pytest.mark.parametrize("name", ["mm", "onednn"])
def test_a_route_without_a_routine_is_refused_by_name(monkeypatch, name):
    if name not in routes.available(torch.bfloat16):
        pytest.skip("not in this build of torch")
    monkeypatch.setenv("LOCOPROP_CPU_PRODUCTS", f"bfloat16={name}")
    monkeypatch.setattr(routes, "runs", lambda operands, by: False)
    with pytest.raises(ValueError, match=f"cannot take bfloat16={name}, take .*upcast"):
        routes.route(torch.bfloat16)


def test_routes_are_forced_by_dtype_or_for_all(monkeypatch):
    monkeypatch.setattr(routes, "_measure", None)
    for text, float32, bfloat16 in [
        ("mm", "mm", "mm"),
        ("float32=mm,bfloat16=upcast", "mm", "upcast"),
        ("mm, bfloat16=upcast", "mm", "upcast"),
    ]:
        monkeypatch.setenv("LOCOPROP_CPU_PRODUCTS", text)
        again(monkeypatch)
        assert routes.choose(torch.float32) == (float32, f"LOCOPROP_CPU_PRODUCTS={text}")
        assert routes.route(torch.bfloat16) == bfloat16
        assert routes.route(torch.float64) == "mm"
        assert routes.route(torch.float16) == "upcast"
    assert not files()


def test_measuring_leaves_threads_random_numbers_and_counters_alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = torch.get_rng_state()
        with FlopCounterMode(display=False) as counter:
            routes.route(torch.float32)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)
    assert counter.get_total_flops() == 0


def test_other_devices_and_float64_measure_nothing(monkeypatch):
    monkeypatch.setattr(routes, "_measure", None)
    for dtype in (torch.bfloat16, torch.float32):
        left, right = torch.empty(3, 4, device="meta"), torch.empty(4, 5, device="meta")
        assert rounded(left, dtype).tensor.dtype == dtype
        assert product(rounded(left, dtype), rounded(right, dtype), torch.float32).shape == (3, 5)
    one = torch.ones(2, 2, dtype=torch.float64)
    product(rounded(one, torch.float64), rounded(one, torch.float64), torch.float64)
    assert not files()


def test_imports_measure_nothing():
    code = "import locoprop_torch; from locoprop_kernels import routes; assert not routes._chosen"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not files()


def _choose_in_a_child(queue):
    queue.put(routes.choose(torch.float32))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_keep_the_choice(monkeypatch):
    force_routes(monkeypatch, torch.float32, "mm")
    chosen = routes.choose(torch.float32)
    monkeypatch.delenv("LOCOPROP_CPU_PRODUCTS")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_choose_in_a_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == chosen
    child.join()
