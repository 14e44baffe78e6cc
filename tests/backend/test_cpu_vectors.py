"""Vectors of the CPU kernels: how exact their operations are, and what a local step of a tile is."""

from typing import Any

import numpy as np
import pytest

from locoprop_kernels import rules

pytest.importorskip("numba", exc_type=ImportError)
import numba

from locoprop_kernels.cpu_kernels import jit, table, tiles, updates
from locoprop_kernels.cpu_kernels import vectors as typed

vectors: Any = typed  # numba's functions for its compiler have more parameters than those that kernels give them
LANES, BYTES = vectors.LANES, vectors.BYTES
# The least number above zero, one that is not normal, the least normal one, and the largest.
SPECIAL = np.array([1.4e-45, 1e-39, 1.1754944e-38, 3.4e38], np.float32)


@jit.jit
def _roots(a, out):
    for k in range(0, vectors.NUMBER * a.size, BYTES):
        vectors.store(out.ctypes.data + k, vectors.root(vectors.load(a.ctypes.data + k)))


@jit.jit
def _quotients(a, b, out):
    for k in range(0, vectors.NUMBER * a.size, BYTES):
        vectors.store(out.ctypes.data + k, vectors.load(a.ctypes.data + k) / vectors.load(b.ctypes.data + k))


@jit.jit
def _descend(code, hyper, factors, own, e, x, rows, prox):
    tiles.descend(own, own[0].shape[0], e, x, rows, vectors.spread(prox), updates.vectors_of(code, factors, hyper))


def _positive(seed: int, size: int = 1600) -> np.ndarray:
    """Numbers of all magnitudes whose squares float32 has."""
    generator = np.random.default_rng(seed)
    return (10 ** generator.uniform(-18, 18, size)).astype(np.float32)


def _filled(values: np.ndarray) -> np.ndarray:
    return np.resize(values, -(-len(values) // LANES) * LANES)


def _units(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest error in units of the last place."""
    return float(np.max(np.abs(found - exact) / np.spacing(exact.astype(np.float32)).astype(np.float64)))


def test_roots():
    values = _filled(np.concatenate([_positive(0) ** 2, SPECIAL[2:]]))
    found = np.empty_like(values)
    _roots(values, found)
    assert _units(found, np.sqrt(values.astype(np.float64))) < 1.5


def test_roots_of_what_is_hardly_a_number():
    values = _filled(np.concatenate([[0.0, np.nan, -1e-3, -np.inf], SPECIAL[:2]]).astype(np.float32))
    found = np.empty_like(values)
    _roots(values, found)
    assert found[0] == 0
    assert np.isnan(found[1:4]).all()
    # As exact as numbers are that are not normal: between the roots of the next ones.
    below, above = (np.nextafter(values[4:6], np.float32(end)).astype(np.float64) for end in (0, 1))
    assert (np.sqrt(below) <= found[4:6]).all()
    assert (found[4:6] <= np.sqrt(above)).all()
    values = _filled(np.array([np.inf], np.float32))
    _roots(values, found := np.empty_like(values))
    assert not np.isfinite(found).any()


def test_quotients():
    a, b = np.resize(_positive(1), 1600), np.resize(_positive(2), 1600)
    a[::2] *= -1
    found = np.empty_like(a)
    _quotients(a, b, found)
    assert _units(found, a.astype(np.float64) / b) < 1.5


def test_quotients_by_what_is_no_number():
    a = _filled(np.array([1.0, 0.0, -1.0, 1.0, np.inf], np.float32))
    b = _filled(np.array([0.0, 0.0, 0.0, np.nan, 1.0], np.float32))
    found = np.empty_like(a)
    _quotients(a, b, found)
    assert not np.isfinite(found[:5]).any()


@pytest.mark.parametrize("rule", [rules.SGD(), rules.Adam(), rules.RMSprop(momentum=0.9, flavor="tensorflow")], ids=str)
@pytest.mark.parametrize("columns", [1, 4, 7])
def test_a_local_step_of_a_tile(columns, rule):
    """Whole groups of vectors and what is left over have the same gradient, and get the same update."""
    generator = np.random.default_rng(0)
    size, n, batch = columns * LANES, 6, 8
    family = updates.family_of(rule)
    assert family is not None
    own = [table.aligned(n if kept else 0, size) for kept in (True, True, *family.slots)]
    for tensor in own:
        tensor[:] = generator.random(tensor.shape)
    d, start, squares, buffer = (tensor.astype(np.float64) for tensor in own)
    e = generator.standard_normal((batch, n + 2)).astype(np.float32)
    x = generator.standard_normal(size * 20).astype(np.float32)
    rows = generator.permutation(19)[:batch] * size + 3
    factors, _ = updates.factors(rule, (0.1,), 2)
    _descend(family.code, family.hyper, factors[0], tuple(own), e, x, rows, np.float32(0.3))
    inputs = np.stack([x[row : row + size] for row in rows]).astype(np.float64)
    g = start + 0.3 * d + e[:, :n].T.astype(np.float64) @ inputs
    (lr, other), h = factors[0].astype(np.float64), family.hyper.astype(np.float64)
    if isinstance(rule, rules.SGD):
        d -= lr * g
    elif isinstance(rule, rules.Adam):
        buffer += h[1] * (g - buffer)
        squares = h[0] * squares + h[2] * g * g
        d -= lr * buffer / (np.sqrt(squares) * other + h[3])
    else:
        squares = h[0] * squares + h[1] * g * g
        buffer = h[4] * buffer + lr * g / np.sqrt(squares + h[2])
        d -= buffer
    np.testing.assert_allclose(own[0], d, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(own[2], squares[: len(own[2])], rtol=1e-5)
    np.testing.assert_allclose(own[3], buffer[: len(own[3])], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", [rules.SGD(momentum=0.9), rules.Adam(), rules.RMSprop()], ids=str)
@pytest.mark.parametrize("columns", [3, 9])
def test_all_outputs_of_a_tile_are_computed_alike(columns, rule):
    """To the bit: sums in another order would make an output depend on its place in the layer."""
    generator = np.random.default_rng(0)
    size, batch = columns * LANES, 12
    family = updates.family_of(rule)
    assert family is not None
    own = [table.aligned(tiles.OUTPUTS if kept else 0, size) for kept in (True, True, *family.slots)]
    for tensor in own:
        tensor[:] = generator.random(size)
    e = np.repeat(generator.standard_normal((batch, 1)), tiles.OUTPUTS, axis=1).astype(np.float32)
    x = generator.standard_normal(batch * size).astype(np.float32)
    rows, out = np.arange(batch) * size, np.empty_like(e)
    factors, _ = updates.factors(rule, (0.1,), 2)
    _descend(family.code, family.hyper, factors[0], tuple(own), e, x, rows, np.float32(0.3))
    tiles.preactivations(own[0], x, rows, out, 0)
    for tensor in (*(tensor for tensor in own if len(tensor)), out.T):
        np.testing.assert_array_equal(tensor[1:], tensor[:2])


def test_memory_begins_where_a_line_of_the_caches_does():
    for rows, columns in ((1, 16), (3, 48), (24, 784), (0, 32)):
        memory = table.aligned(rows, columns)
        assert memory.shape == (rows, columns)
        assert memory.ctypes.data % 64 == 0


def test_vectors_are_as_wide_as_registers():
    """For Intel's processors with AVX-512, LLVM takes half of a register unless it is told otherwise."""
    if not jit.compiles_for("avx512f"):
        pytest.skip("this processor has no AVX-512")
    arguments = (
        np.zeros((3, 64), np.float32),
        np.zeros(256, np.float32),
        np.zeros(4, np.int64),
        np.zeros((4, 3), np.float32),
    )
    function = numba_of(tiles.by_fours)
    function(*arguments, 0)
    (assembly,) = function.inspect_asm().values()
    assert "%zmm" in assembly


def numba_of(function):
    """The same function, compiled anew: what comes from the disk cannot be looked at."""
    return numba.njit(fastmath=jit._FASTMATH, error_model="numpy")(function.py_func)
