"""What the host does while a CUDA graph is captured, without a GPU: on meta tensors, as those of one.

They have no values, so whatever waits for the device raises an error; kernels are not launched, and every copy between
host and device is seen.
"""

import pytest
import torch

pytest.importorskip("triton")
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import locoprop_torch.step
from locoprop_kernels.kernels import commit, phases, plan, prepare, rows, run, single, softmax, target
from locoprop_torch import LocoProp, presets
from tests.kernels.plans import keep_at_most, kept_plans, plans_of_their_own

DEVICE = torch.device("meta")
aten = torch.ops.aten


class PretendedGPU(TorchDispatchMode):
    """A GPU without memory; says of every copy to it whether the host may have to wait.

    Attributes:
        capturing: whether a CUDA graph is being captured.
        launches: the kernels that were launched.
        uploads: of every copy to the device, whether it was from page-locked memory and without waiting.
        locked: how many blocks of page-locked memory were taken, in a capture and outside of one.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.capturing = False
        self.launches: list[str] = []
        self.uploads: list[bool] = []
        self.locked = {True: 0, False: 0}
        self._locked_memory: list[torch.Tensor] = []
        for module in (run, plan, locoprop_torch.step):
            monkeypatch.setattr(module, "capturing", lambda device: self.capturing)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *sizes, **options: self._empty(empty, sizes, options))
        # The allocator of a graph has a pool of its own.
        monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 2**20 * (1 + self.capturing))
        monkeypatch.setattr(target, "unsupported", lambda device, settings: None)
        monkeypatch.setattr(target, "target_of", lambda device: "sm_90")
        monkeypatch.setattr(target, "multiprocessors", lambda device: 132)
        for module in (commit, phases, prepare, rows, single, softmax):
            for name in vars(module):
                if name.startswith("launch"):
                    monkeypatch.setattr(module, name, lambda *_, kind=module.__name__: self.launches.append(kind))

    def _empty(self, empty, sizes, options):
        memory = empty(*sizes, **{**options, "pin_memory": False})
        if options.get("pin_memory"):
            self.locked[self.capturing] += 1
            self._locked_memory.append(memory)
        return memory

    def _is_locked(self, tensor):
        return any(tensor.untyped_storage()._cdata == one.untyped_storage()._cdata for one in self._locked_memory)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is aten.copy_.default and args[0].device.type == "cpu" and args[1].device == DEVICE:
            assert args[2:] == (True,) or kwargs.get("non_blocking"), "the host waits for a copy"
            return args[0]
        result = function(*args, **kwargs)
        if function is aten._to_copy.default and args[0].device.type == "cpu" and result.device == DEVICE:
            self.uploads.append(self._is_locked(args[0]) and kwargs.get("non_blocking", False))
        return result


@pytest.fixture
def gpu(monkeypatch):
    plans_of_their_own(monkeypatch)
    with PretendedGPU(monkeypatch) as pretended:
        yield pretended


def made(widths=(20, 12, 5), **options):
    layers = [nn.Linear(k, n, device=DEVICE) for k, n in zip(widths, widths[1:], strict=False)]
    model = nn.Sequential(layers[0], nn.Tanh(), *layers[1:])
    options = {**presets["package"], "compute_dtype": torch.bfloat16, **options}
    return model, LocoProp(model, backend="triton", **options)


def train(gpu, model, optimizer, captured=False, batch=40):
    """One step of training; returns the launches."""
    gpu.capturing = captured
    gpu.launches.clear()
    gpu.uploads.clear()
    try:
        optimizer.zero_grad()
        model(torch.empty(batch, model[0].in_features, device=DEVICE)).square().sum().backward()
        optimizer.step()
    finally:
        gpu.capturing = False
    return list(gpu.launches)


@pytest.mark.parametrize("options", [{}, {"rows": 8}, {"rule": "adam", "prox": 0.1, "weight_decay": 0.01}], ids=str)
def test_a_captured_step_neither_waits_nor_takes_page_locked_memory(gpu, options):
    model, optimizer = made(**options)
    eager = [train(gpu, model, optimizer) for _ in range(3)][-1]
    assert train(gpu, model, optimizer, captured=True) == eager
    assert gpu.uploads
    assert all(gpu.uploads)
    assert gpu.locked[True] == 0
    assert gpu.locked[False] > 0


def test_what_a_graph_reads_lives_on(gpu, monkeypatch):
    keep_at_most(monkeypatch, 1)
    model, optimizer = made()
    train(gpu, model, optimizer)
    train(gpu, model, optimizer, captured=True)
    (captured,) = kept_plans()
    read = set(map(id, captured._kept_for_graphs))
    for batch in range(30, 33):
        train(gpu, model, optimizer, batch=batch)
    assert captured.captured
    assert captured in kept_plans()
    assert set(map(id, captured._kept_for_graphs)) == read
    # The table that a graph uploads is there when it runs, so no other step may take it for there.
    assert read - set(map(id, captured._uploads.values()))


def test_captures_without_a_step_in_between(gpu):
    model, optimizer = made()
    for _ in range(2):
        train(gpu, model, optimizer)
        for _ in range(4):
            train(gpu, model, optimizer, captured=True)
        with pytest.raises(RuntimeError, match="outside of a capture"):
            train(gpu, model, optimizer, captured=True)
    assert gpu.locked[True] == 0


def test_the_first_step_cannot_be_captured(gpu):
    model, optimizer = made()
    with pytest.raises(RuntimeError, match="new shapes or settings"):
        train(gpu, model, optimizer, captured=True)
    train(gpu, model, optimizer)
    with pytest.raises(RuntimeError, match="new shapes or settings"):
        train(gpu, model, optimizer, captured=True, batch=41)
    train(gpu, model, optimizer, captured=True)


def test_the_unit_of_the_activation_learning_rate_is_found_before(gpu):
    model, optimizer = made(activation_lr=locoprop_torch.PerExample(1.0))
    with pytest.raises(RuntimeError, match="unit of activation_lr"):
        train(gpu, model, optimizer, captured=True)


def test_aux_cannot_be_captured(gpu):
    model = nn.Sequential(nn.Linear(20, 5, device=DEVICE), nn.LayerNorm(5, device=DEVICE))
    optimizer = LocoProp(model, backend="triton", aux="adamw", **presets["package"])
    with pytest.raises(RuntimeError, match="aux"):
        train(gpu, model, optimizer, captured=True)
