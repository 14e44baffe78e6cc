"""Rows of a convolution: patches, cut out in chunks of bounded size, and formed as rarely as possible."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import locoprop_kernels as lk
from locoprop_kernels import patches
from locoprop_kernels.products import held
from locoprop_torch import LocoProp
from locoprop_torch.layouts import layout_of
from tests.problems import unfolded

GEOMETRIES = {
    "1-D, reflected": (nn.Conv1d(3, 4, 5, 2, 2, padding_mode="reflect"), (4, 3, 31)),
    "1-D, dilated, by examples": (nn.Conv1d(20, 4, 3, dilation=2), (6, 20, 9)),
    "3x3": (nn.Conv2d(3, 4, 3, padding=1), (5, 3, 12, 11)),
    "3x3, many channels": (nn.Conv2d(32, 4, 3, padding="same"), (3, 32, 7, 6)),
    "groups, strides": (nn.Conv2d(40, 4, (3, 2), (2, 3), (1, 0), (1, 2), groups=2), (3, 40, 9, 12)),
    "tiles": (nn.Conv2d(2, 4, 16, 16), (3, 2, 48, 32)),
    "circular, even kernel": (nn.Conv2d(2, 4, (4, 5), padding=(2, 1), padding_mode="circular"), (3, 2, 8, 7)),
    "replicated": (nn.Conv2d(2, 4, 3, padding=2, padding_mode="replicate"), (3, 2, 6, 5)),
    "1x1": (nn.Conv2d(32, 4, 1, groups=2), (3, 32, 5, 4)),
    "one position": (nn.Conv2d(5, 4, 3), (7, 5, 3, 3)),
    "3-D": (nn.Conv3d(2, 4, 3, (1, 2, 1), 1), (2, 2, 5, 6, 7)),
}


def rows_of(module, x) -> Any:
    """The rows of a convolution, which are patches."""
    layout = layout_of(module)
    assert layout is not None
    return layout.inputs(x)


@pytest.mark.parametrize("weight", ["contiguous", "channels last"])
@pytest.mark.parametrize("image", ["contiguous", "channels last", "view"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_chunks_are_the_unfolded_input(geometry, image, weight):
    module, shape = GEOMETRIES[geometry]
    x = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)  # every number is there once
    expected = unfolded(module, x)
    if image != "contiguous":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    if image == "view":
        x = torch.stack([x, -x], -1)[..., 0]
    if weight == "channels last":
        module = copy.deepcopy(module)
        module.weight = nn.Parameter(module.weight.detach().movedim(1, -1).contiguous().movedim(-1, 1))
        channels = shape[1] // module.groups
        expected = [rows.unflatten(1, (channels, -1)).mT.flatten(1) for rows in expected]
    rows = rows_of(module, x)
    want = torch.stack(expected) if module.groups > 1 else expected[0]
    assert rows.shape == want.shape
    row = 4 * rows.shape[-1] * module.groups
    for limit in (1, 3 * row, 20 * row, 2**30):
        chunks = list(rows.chunks(limit))
        assert all(chunk.numel() * 4 <= max(limit, row) for chunk in chunks)
        assert torch.equal(torch.cat(chunks, dim=-2), want)
    for group in range(module.groups if module.groups > 1 else 0):
        assert torch.equal(torch.cat(list(rows.group(group).chunks())), want[group])


def test_patches_are_written_along_the_longer_runs():
    """What takes most of the time of a copy on a CPU: [K, b] for an ordinary image, [b, K] where channels are last."""
    image, tiles = torch.randn(4, 32, 10, 10), torch.randn(4, 3, 64, 64)
    cases = [(image, 3, 1, False, False), (tiles, 4, 4, False, False), (tiles, 16, 16, False, True)]
    cases.append((image.contiguous(memory_format=torch.channels_last), 3, 1, True, True))
    for x, kernel, stride, channels_last, by_rows in cases:
        for chunk in patches.Patches(x, (kernel,) * 2, (stride,) * 2, (1, 1), channels_last).chunks(2**16):
            assert chunk.is_contiguous() == by_rows
            assert chunk.t().is_contiguous() != by_rows


def test_patches_are_those_of_torch():
    x = torch.randn(6, 8, 40, 40)
    rows = rows_of(nn.Conv2d(8, 4, 5, padding=2), x)
    expected = F.unfold(x, 5, padding=2).mT.reshape(-1, 200)
    assert torch.equal(torch.cat(list(rows.chunks(2**16))), expected)


def test_patches_are_multiplied_in_the_layout_they_were_written_in(monkeypatch):
    """Another copy of every chunk would take longer than its product where a layer is small."""
    from locoprop_kernels import input_chunks, products, reference

    contiguous = []

    def seen(matrix, dtype):
        if matrix.shape[-1] == 9 * 32:
            contiguous.append((matrix.is_contiguous(), matrix.mT.is_contiguous()))
        return products.rounded(matrix, dtype)

    for module in (input_chunks, reference):
        monkeypatch.setattr(module, "rounded", seen)
    model = nn.Sequential(nn.Conv2d(32, 4, 3, bias=False), nn.Tanh())
    opt = LocoProp(model, lr=1e-6, local_iterations=2, rows=None, backend="reference")
    model(torch.randn(4, 32, 10, 10)).square().sum().backward()
    opt.step()
    rows, weight = contiguous
    assert rows == (False, True)
    assert weight == (True, False)


class Counted(patches.Rows):
    """Rows that count how often they are formed, and of which bounds and sizes."""

    def __init__(self, rows):
        super().__init__(tuple(rows.shape), rows.dtype, rows.device)
        self.rows, self.limits, self.sizes = rows, [], []

    def chunks(self, max_bytes=patches.CHUNK_BYTES):
        self.limits.append(max_bytes)
        for chunk in self.rows.split(max(1, max_bytes // (self.rows.shape[1] * self.rows.itemsize))):
            self.sizes.append(len(chunk))
            yield chunk


def counted_loop(rows, outputs=3, **options):
    torch.manual_seed(1)
    weight = torch.randn(outputs, rows.shape[1])
    problem = lk.LocalProblem(
        rows, torch.randn(rows.shape[0], outputs), weight, grad_weight=torch.ones_like(weight), transfer="tanh"
    )
    report = lk.local_steps_([problem], lr=[1e-2] * 5, backend="reference", commit=False, **options)
    assert report.driver == "product"
    return report.delta_weight[0]


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16, torch.float16])
def test_rows_are_formed_once_if_they_fit(monkeypatch, compute_dtype):
    size = held(compute_dtype or torch.float32, torch.device("cpu")).itemsize
    kept, formed = Counted(torch.randn(50, 6)), Counted(torch.randn(50, 6))
    formed.rows = kept.rows
    results = []
    for rows, bound, times in ((kept, 50 * 6 * size, 1), (formed, 50 * 6 * size - 1, 4)):
        monkeypatch.setattr("locoprop_kernels.input_chunks.KEPT_BYTES", bound)
        results.append(counted_loop(rows, compute_dtype=compute_dtype))
        assert len(rows.limits) == times  # the first local step needs none
    assert torch.equal(*results)


@pytest.mark.parametrize(("inputs", "outputs"), [(2, 64), (4, 4)])
def test_chunks_of_rows_are_bounded_by_what_the_loop_makes_of_them(monkeypatch, inputs, outputs):
    """A layer may have more outputs than inputs: chunks of 16 MiB of ``X`` would make far larger ones of ``E``."""
    monkeypatch.setattr("locoprop_kernels.input_chunks._CACHED_BYTES", 2000 * 4 * 64)
    monkeypatch.setattr("locoprop_kernels.input_chunks.CHUNK_BYTES", 3000 * 4 * 4)
    rows = Counted(torch.randn(6000, inputs))
    counted_loop(rows, outputs)
    assert max(rows.sizes) == (2000 if outputs == 64 else 3000)


def test_closed_form_of_a_convolution():
    torch.manual_seed(0)
    module = nn.Conv2d(2, 3, 2).double()
    rows = rows_of(module, torch.randn(4, 2, 5, 5, dtype=torch.float64))
    a = torch.randn(rows.shape[0], 3, dtype=torch.float64)
    problems = [
        lk.LocalProblem(x, a, module.weight.detach().flatten(1), grad_weight=torch.ones(3, 8, dtype=torch.float64))
        for x in (rows, torch.cat(list(rows.chunks(300))))
    ]
    torch.testing.assert_close(*(lk.closed_form(problem, prox=0.1)[0] for problem in problems))
