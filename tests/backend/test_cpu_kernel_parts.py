"""The parts of the kernels for CPUs: functions, rounding, threads, where kernels are kept, and what they know."""

import concurrent.futures
import ctypes
import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
import torch

import locoprop_kernels as lk
from locoprop_kernels import cpu_kernels, reference, rules, transfers
from locoprop_kernels.settings import Settings
from tests.problems import RULES, TRANSFERS, problem_for, random_layer

pytest.importorskip("numba", exc_type=ImportError)
import numba

from locoprop_kernels.cpu_kernels import arrays, functions, host, jit, table, threads, tiles, updates

COMPILED = [rule for rule in RULES if updates.family_of(rule) is not None]
KNOWN = [transfer for transfer in TRANSFERS if transfer.name in functions.CODES]


def test_only_rare_rules_and_functions_of_the_package_are_left_to_pytorch():
    rest = [rule for rule in RULES if rule not in COMPILED]
    assert all(getattr(rule, "centered", False) or rule == rules.Adagrad(1e-4, 0.1, "tensorflow") for rule in rest)
    names = {"celu", "softsign", "relu6", "logsigmoid", "arctan", "mish"}
    assert set(transfers.available()) - set(functions.CODES) >= names
    assert not set(functions.CODES) - set(transfers.available())


def test_rounding_is_that_of_torch():
    bits = np.random.default_rng(0).integers(-(2**31), 2**31, 100_000).astype(np.int32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.00390625, 1.01171875, 3.4e38], np.float32)
    values = np.concatenate([bits.view(np.float32), special])
    found, bits = np.empty_like(values), np.empty(len(values), np.uint16)
    arrays.round_to_bfloat16(values, found)
    arrays.narrow(values, bits)
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(found, expected)
    arrays.widen(bits, found)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("product", [tiles.by_twos, tiles.by_fours])
def test_either_product_of_a_tile(product):
    """Which of them a processor takes depends on its registers."""
    generator = np.random.default_rng(0)
    d, memory = (generator.standard_normal(size).astype(np.float32) for size in ((3, 48), 500))
    rows = np.array([0, 100, 50, 400, 452, 3, 3, 200])
    out = np.zeros((8, 5), np.float32)
    product(d, memory, rows, out, 1)
    expected = np.stack([memory[row : row + 48] for row in rows]) @ d.T
    np.testing.assert_allclose(out[:, 1:4], expected, rtol=1e-5, atol=1e-5)
    assert not out[:, [0, 4]].any()


@pytest.mark.parametrize("largest", [0.65, 1e4])  # changes that are all small have formulas of their own
@pytest.mark.parametrize("transfer", KNOWN, ids=str)
def test_differences_at_the_ends_of_the_range(transfer, largest):
    """Saturated and huge."""
    special = np.array([0, 1e-30, 1e-4, 0.3, 0.64, 0.66, 5, 20, 88, 90, 1e4], np.float32)
    values = np.concatenate([-special[::-1], special])
    changes = values[abs(values) <= largest]
    changes = np.resize(changes, -(-len(changes) // 11) * 11)
    a, p = (grid.astype(np.float32).ravel() for grid in np.meshgrid(values, changes))
    if transfer.name == "squared_relu":  # in which huge numbers overflow
        a, p = a.clip(-1e3, 1e3), p.clip(-1e3, 1e3)
    before, after = torch.from_numpy(a.astype(np.float64)), torch.from_numpy((a + p).astype(np.float64))
    exact = torch.from_numpy(a.astype(np.float64) + p.astype(np.float64))
    if transfer.name == "softmax":
        before, after, exact = (value.reshape(-1, 11) for value in (before, after, exact))
    found = p.reshape(-1, 11).copy()
    code, *parameters = functions.arguments_of(transfer)
    functions.differences(code, found, a.reshape(-1, 11).copy(), 11, *parameters)
    got = torch.from_numpy(found.astype(np.float64)).reshape(before.shape)
    # Of which the sum is rounded, or is not.
    wanted = [transfer(sum_) - transfer(before) for sum_ in (after, exact)]
    scale = 1 + torch.maximum(transfer(before).abs(), transfer(after).abs())
    error = torch.minimum((got - wanted[0]).abs(), (got - wanted[1]).abs())
    assert bool((error <= 1e-6 * scale).all())


@pytest.mark.parametrize("transfer", KNOWN, ids=str)
def test_what_is_not_a_number_stays_that(transfer):
    a, p = np.full((2, 3), 0.5, np.float32), np.full((2, 3), 0.25, np.float32)
    a[0, 0] = p[1, 2] = np.nan
    code, *parameters = functions.arguments_of(transfer)
    functions.differences(code, p, a, 3, *parameters)
    assert np.isnan(p[1, 2])
    # Where the identity is f, A0 makes no difference.
    assert np.isnan(p[0, 0]) or transfer.name == "identity"


@pytest.mark.parametrize("openmp", [True, False])
def test_as_many_threads_run_as_torch_uses(openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(threads, "_parallel", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    seen = []
    barrier = threading.Barrier(2, timeout=30)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def together(data):
        seen.append((threading.get_ident(), data))
        barrier.wait()

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def alone(data):
        seen.append((threading.get_ident(), data))

    threads.run_all(address_of(together), 7, 3)
    assert len({thread for thread, _ in seen}) == 2
    assert [data for _, data in seen] == [7, 7]
    seen.clear()
    threads.run_all(address_of(alone), 8, 1)
    assert seen == [(threading.get_ident(), 8)]


def address_of(function):
    return ctypes.cast(function, ctypes.c_void_p).value


def test_numbers_are_given_to_one_thread_each():
    take_number: Any = table.take_number

    @numba.njit(nogil=True)
    def take(address, count):
        total = 0
        for _ in range(count):
            total += take_number(address)
        return total

    number = np.zeros(1, np.int64)
    take(number.ctypes.data, 0)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        totals = list(pool.map(take, [number.ctypes.data] * 4, [100_000] * 4))
    assert number[0] == 400_000
    assert sum(totals) == 400_000 * 399_999 // 2


@pytest.mark.parametrize("rows", [8, None])
def test_a_task_that_is_not_ended_is_an_error(monkeypatch, rows):
    """As where a thread has no memory: compiled code has no exceptions for its caller."""
    monkeypatch.setattr(reference, "_COMPILED_ROWS", {torch.float32: 8})
    one = problem_for(*random_layer(0, 23, 9, 7, dtype=torch.float32), "tanh")
    before = one.weight.clone()
    monkeypatch.setattr(host, "run_all", lambda *arguments: None)
    with pytest.raises(MemoryError, match="local loops on the CPU"):
        lk.local_steps_([one], "adam", [0.1] * 3, rows=rows)
    assert torch.equal(one.weight, before)
    assert not one.state


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        (Settings, "rule rates prox reduction compute_dtype trace regulariser rows rows_seed"),
        (
            lk.LocalProblem,
            "x preactivation weight bias grad_weight grad_bias transfer state name examples grad_scale "
            "mask_weight mask_bias rate_weight rate_bias",
        ),
        (rules.SGD, "momentum nesterov"),
        (rules.RMSprop, "alpha momentum eps centered flavor"),
        (rules.Adam, "betas eps flavor"),
        (rules.Adagrad, "eps initial_accumulator_value flavor"),
    ],
)
def test_the_kernels_know_every_option(kind, known):
    """One that is new must be read by the kernels, or refused in ``_know`` or ``family_of``, and then named here."""
    assert {field.name for field in dataclasses.fields(kind)} == set(known.split())


def logged_without_numba(caplog, level):
    """What is logged when the kernels are asked for twice, and there is no numba."""
    cpu_kernels.version.cache_clear()
    try:
        with caplog.at_level(level, "locoprop_kernels"):
            assert cpu_kernels.version() is None
            assert cpu_kernels.version() is None
    finally:
        cpu_kernels.version.cache_clear()
    return [record.message for record in caplog.records]


def test_a_numba_that_cannot_be_imported_is_as_none(monkeypatch, caplog):
    def broken(name, *arguments, **keywords):
        if name == "numba":
            raise ImportError("numba needs another numpy")
        return importing(name, *arguments, **keywords)

    importing = __import__
    monkeypatch.setattr("builtins.__import__", broken)
    assert logged_without_numba(caplog, "WARNING") == [
        "numba cannot be imported, so local loops on CPUs go through PyTorch: numba needs another numpy"
    ]


def test_without_numba_a_hint_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(cpu_kernels.importlib.util, "find_spec", lambda name: None)
    assert logged_without_numba(caplog, "INFO") == [
        "numba is not installed, so local loops on CPUs go through PyTorch (pip install numba)"
    ]


def test_kernels_are_kept_by_what_they_were_made_of(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCOPROP_CACHE_DIR", str(tmp_path))
    first = jit.folder()
    assert first is not None
    assert first.startswith(str(tmp_path))
    copy = tmp_path / "sources"
    copy.mkdir()
    for file in sorted(jit.Path(jit.__file__).parent.glob("*.py")):
        (copy / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(jit, "__file__", str(copy / "jit.py"))
    assert jit.folder() == first
    (copy / "tiles.py").write_text("# another one")
    changed = jit.folder()
    assert changed != first
    (copy / "constants.py").write_text("# likewise")
    monkeypatch.setattr(jit.constants, "__file__", str(copy / "constants.py"))
    assert jit.folder() not in (first, changed)
    monkeypatch.setenv("LOCOPROP_CACHE_DIR", "")
    assert jit.folder() is None


def test_a_folder_that_cannot_be_written_to_is_no_error(monkeypatch, tmp_path):
    def add(a, b):
        return a + b

    def ignore(address):
        pass

    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    for folder in (str(blocked / "inside"), None, str(tmp_path / "kernels")):
        monkeypatch.setattr(jit, "_FOLDER", folder)
        assert jit.jit(add)(1, 2) == 3
        assert jit.entry(ignore) > 0
    assert vars(jit.numba.config)["CACHE_DIR"] == ""
    assert any((tmp_path / "kernels").rglob("*.nbi"))
