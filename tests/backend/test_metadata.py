"""Comparing the metadata of tensors, by torch's guards and without them."""

import weakref

import pytest
import torch
from torch import nn

from locoprop_kernels import metadata
from locoprop_kernels.metadata import Metadata


@pytest.fixture(params=["guards", "python"])
def way(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(metadata, "_works", False)
    else:
        assert metadata._guards_work(), "torch's guards have moved: comparisons take five times as long"
    return request.param


CHANGES = {
    "dtype": lambda t: t.double(),
    "strides": lambda t: t.t(),
    "a stride alone": lambda t: torch.empty(3, 4)[:, :3].copy_(t),
    "shape": lambda t: t[:2],
    "dimensions": lambda t: t[None],
    "gradient wanted": lambda t: t.clone().requires_grad_(),
    "class": lambda t: nn.Parameter(t, requires_grad=False),
    "device": lambda t: t.to("meta"),
    "layout": lambda t: t.to_sparse(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", [0, 1])
def test_whatever_differs_is_seen(way, change, place):
    tensors = [torch.rand(3, 3), torch.rand(3, 3)]
    known = Metadata(tensors)
    assert known.fits([torch.rand(3, 3), torch.rand(3, 3)])
    tensors[place] = CHANGES[change](tensors[place])
    assert not known.fits(tensors)


def test_other_numbers_of_tensors_do_not_fit(way):
    tensors = [torch.rand(3), torch.zeros((), dtype=torch.int64)]
    known = Metadata(tensors)
    assert known.fits(tensors)
    assert not known.fits(tensors[:1])
    assert not known.fits([*tensors, torch.rand(3)])


def test_tensors_are_not_kept_alive(way):
    tensor = torch.rand(3)
    known, alive = Metadata([tensor]), weakref.ref(tensor)
    del tensor
    assert alive() is None
    assert known.fits([torch.rand(3)])
