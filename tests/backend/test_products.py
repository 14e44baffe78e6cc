"""Products with rounded operands against float64, in every precision, layout and route of torch."""

import pytest
import torch

from locoprop_kernels import routes
from locoprop_kernels.products import gram, product, rounded
from tests.helpers import force_routes

# Rounding of each operand by 2**-8 (bf16), 2**-11 or 2**-4 (float8) at most, then accumulation of K terms; two of the
# bf16 routes on CPUs also round the result.
FLOAT8 = torch.float8_e4m3fn
BUDGET = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.bfloat16: 3.02 * 2.0**-8,
    torch.float16: 1e-3,
    FLOAT8: 2.1 * 2.0**-4,
}
SHAPES = [(1, 1, 1), (1, 9, 5), (7, 1, 3), (33, 65, 17), (128, 100, 64), (5, 0, 3), (0, 4, 3), (4, 3, 0)]
ROUTES = [(dtype, route) for dtype in BUDGET for route in routes.available(dtype) if routes.runs(dtype, route)]


def layouts(matrix):
    yield "contiguous", matrix.contiguous()
    yield "transposed", matrix.t().contiguous().t()
    wide = matrix.new_zeros(matrix.shape[0], 2 * matrix.shape[1])
    wide[:, ::2] = matrix
    yield "strided", wide[:, ::2]
    yield "columns of a wider one", torch.cat([matrix, matrix], dim=1)[:, : matrix.shape[1]]


@pytest.mark.parametrize(("dtype", "route"), ROUTES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_is_the_product(monkeypatch, shape, dtype, route):
    force_routes(monkeypatch, dtype, route)
    n, b, k = shape
    result = torch.float64 if dtype == torch.float64 else torch.float32
    left, right = torch.randn(n, b, dtype=result), torch.randn(b, k, dtype=result)
    exact = left.double() @ right.double()
    scale = left.double().norm() * right.double().norm()
    for _, a in layouts(left):
        for _, c in layouts(right):
            value = product(rounded(a, dtype), rounded(c, dtype), result)
            assert value.shape == exact.shape
            assert value.dtype == result
            assert (value.double() - exact).norm() <= BUDGET[dtype] * scale


@pytest.mark.parametrize(("dtype", "route"), ROUTES, ids=str)
def test_product_of_a_batch_is_that_of_its_matrices(monkeypatch, dtype, route):
    force_routes(monkeypatch, dtype, route)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    left, right = torch.randn(3, 7, 20, dtype=result), torch.randn(3, 9, 20, dtype=result).mT
    value = product(rounded(left, dtype), rounded(right, dtype), result)
    exact = left.double() @ right.double()
    assert value.dtype == result
    assert (value.double() - exact).norm() <= BUDGET[dtype] * left.double().norm() * right.double().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FLOAT8], ids=str)
def test_upcast_operands_are_the_rounded_numbers_and_their_product_is_not_rounded(monkeypatch, dtype):
    force_routes(monkeypatch, dtype, "upcast")
    left, right = torch.randn(64, 300), torch.randn(300, 48)
    a, c = rounded(left, dtype), rounded(right, dtype)
    assert a.tensor.dtype == c.tensor.dtype == torch.float32
    scale = 1.0 if a.exponent is None else 2.0 ** float(a.exponent)
    assert torch.equal(a.tensor, (left / scale).to(dtype).float())
    exact = a.tensor.double() @ c.tensor.double()
    if c.exponent is not None:
        exact *= scale * 2.0 ** float(c.exponent)
    error = (product(a, c, torch.float32).double() - exact).norm()
    assert error <= BUDGET[torch.float32] * exact.norm()


@pytest.mark.parametrize(("dtype", "route"), ROUTES, ids=str)
@pytest.mark.parametrize("k", [1, 384, 385, 900])
def test_gram_is_x_transposed_times_x(monkeypatch, k, dtype, route):
    force_routes(monkeypatch, dtype, route)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    for _, x in layouts(torch.randn(40, k, dtype=result)):
        exact = x.double().t() @ x.double()
        value = gram(rounded(x, dtype), result)
        assert value.dtype == result
        assert (value.double() - exact).norm() <= BUDGET[dtype] * exact.norm()
        torch.testing.assert_close(value, value.t(), rtol=0, atol=0)


@pytest.mark.skipif("onednn" not in routes.available(torch.float32), reason="this torch has no oneDNN")
def test_onednn_gets_a_dense_right_operand(monkeypatch):
    """With rows further apart than their length it falls to a routine a thousand times slower."""
    force_routes(monkeypatch, torch.float32, "onednn")
    taken = routes._onednn_linear
    assert taken is not None

    def checked(left, weight, *rest):
        assert weight.is_contiguous() or weight.t().is_contiguous()
        return taken(left, weight, *rest)

    monkeypatch.setattr(routes, "_onednn_linear", checked)
    for _, right in layouts(torch.randn(33, 17)):
        for operand in (right, right.t()):
            left = torch.randn(5, len(operand))
            torch.testing.assert_close(product(rounded(left, torch.float32), rounded(operand, torch.float32),
                                               torch.float32), left @ operand)  # fmt: skip
    for _, x in layouts(torch.randn(50, 400)):
        gram(rounded(x, torch.float32), torch.float32)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (FLOAT8, 8e-2)], ids=str)
@pytest.mark.parametrize("magnitude", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_operands_keep_their_range(magnitude, dtype, limit):
    left, right = torch.randn(5, 40) * magnitude, torch.randn(40, 6) / magnitude * 1e3
    exact = left.double() @ right.double()
    value = product(rounded(left, dtype), rounded(right, dtype).t().t(), torch.float32)
    assert (value.double() - exact).norm() <= limit * exact.norm()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (FLOAT8, 8e-2)], ids=str)
def test_matrices_of_a_batch_have_scales_of_their_own(dtype, limit):
    sizes = torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    left, right = torch.randn(3, 7, 40) * sizes, torch.randn(3, 40, 9) * sizes
    exact = left.double() @ right.double()
    value = product(rounded(left, dtype), rounded(right, dtype), torch.float32)
    assert ((value.double() - exact).norm(dim=(1, 2)) <= limit * exact.norm(dim=(1, 2))).all()


def test_float8_has_its_numbers_to_the_nearest_and_to_the_end_of_its_range():
    every = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
    finite = every[every.isfinite() & (every.abs() < 256)]
    value = rounded(finite[:, None], FLOAT8)
    assert value.exponent is not None
    assert torch.equal(torch.ldexp(value.tensor, value.exponent), finite[:, None])
    large = rounded(torch.tensor([[255.9, 1.0]]), FLOAT8)
    assert large.exponent is not None
    assert torch.ldexp(large.tensor, large.exponent).tolist() == [[256.0, 1.0]]
    assert rounded(torch.tensor([[1.0, torch.inf, -torch.inf]]), FLOAT8).tensor[0, 1:].isnan().all()


@pytest.mark.parametrize(("dtype", "route"), ROUTES, ids=str)
def test_what_is_not_finite_stays_so(monkeypatch, dtype, route):
    force_routes(monkeypatch, dtype, route)
    left = torch.ones(3, 4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    left[1, 2] = float("nan")
    value = product(rounded(left, dtype), rounded(left.t(), dtype), left.dtype)
    assert not torch.isfinite(value[1]).any()
