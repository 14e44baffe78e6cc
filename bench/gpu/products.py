"""Products of tiles without anything else: how fast the cache that all multiprocessors share gives operands away."""

import torch
import triton
import triton.language as tl

from bench.device import clock

__all__ = ["read_rate"]


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, out_ptr, rows, columns, K, repeats, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Each program multiplies ``repeats`` tiles of ``a bᵀ``, one after another, and keeps the sum of their elements."""
    m, n, k = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :], tl.arange(0, BK)
    total = 0.0
    for i in range(repeats):
        tile = tl.program_id(0) + i * tl.num_programs(0)
        a_ptrs = a_ptr + (tile % rows * BM + m) * K + k[None, :]
        b_ptrs = b_ptr + (tile // rows % columns * BN + n) * K + k[:, None]
        accumulator = tl.zeros((BM, BN), tl.float32)
        for _ in range(0, K, BK):
            accumulator = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), accumulator)
            a_ptrs += BK
            b_ptrs += BK
        total += tl.sum(tl.sum(accumulator, 1), 0)
    tl.store(out_ptr + tl.program_id(0), total)


def read_rate(
    device: torch.device, size: int, tile: tuple[int, int, int], programs: int, repeats: int, dtype: torch.dtype
) -> tuple[float, float]:
    """Bytes/s of operands that programs read together, and FLOP/s of their products.

    Args:
        device: where to run.
        size: rows and columns of both operands; both together fit into the cache.
        tile: ``(BM, BN, BK)``; all divide ``size``.
        programs: as many as multiprocessors.
        repeats: tiles of each.
        dtype: of the operands.

    Raises:
        RuntimeError: the kernel's sums are not those of torch's product.
    """
    bm, bn, bk = tile
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.zeros(programs, device=device)
    options = {"num_warps": 8, "num_stages": 4} if device.type == "cuda" else {}

    def run() -> None:
        _product_kernel[(programs,)](a, b, out, size // bm, size // bn, size, repeats, BM=bm, BN=bn, BK=bk, **options)

    run()
    blocks = (a.float() @ b.float().t()).unflatten(0, (-1, bm)).unflatten(2, (-1, bn)).sum((1, 3))
    tiles = torch.arange(programs * repeats, device=device).view(repeats, programs)
    rows, columns = size // bm, size // bn
    expected = blocks[tiles % rows, tiles // rows % columns].sum(0)
    if not torch.allclose(out, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise RuntimeError("the sums of the products are wrong")
    seconds = min(clock(run, device) for _ in range(5))
    count = programs * repeats
    return count * (bm + bn) * size * a.element_size() / seconds, 2 * count * bm * bn * size / seconds
