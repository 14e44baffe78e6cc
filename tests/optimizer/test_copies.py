"""Copies and pickles of a model carry nothing of this package, and hooks of others do not mislead it."""

import copy
import gc
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.nn.utils import parametrize

from tests.helpers import (
    assert_same,
    backward,
    batch,
    captured,
    has_hooks,
    loss_of,
    mlp,
    moved,
    published,
    rows,
    step_of,
    transfers_of,
    weights,
)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.fixture(params=["dual", "primal"])
def trained(request):
    model = mlp()
    opt = published(model, lr=1e-3, target=request.param)
    loss_of(model).backward()
    opt.step()
    opt.zero_grad()
    return model, opt


@pytest.mark.parametrize("copier", [copy.deepcopy, pickled, saved])
def test_copies_carry_nothing_of_ours(trained, copier):
    model, opt = trained
    twin = copier(model)
    assert not has_hooks(twin)
    for module in twin.modules():
        assert not {"__deepcopy__", "__reduce_ex__"} & set(vars(module))
    assert b"locoprop" not in pickle.dumps(twin)
    assert b"locoprop" not in pickle.dumps(model)
    loss_of(model).backward()  # the original goes on
    assert rows(opt) == [8, 8, 8]


def test_copies_can_be_scripted_and_loaded_with_weights_only(trained):
    model, _ = trained
    twin = copy.deepcopy(model)
    x, _ = batch()
    torch.testing.assert_close(torch.jit.script(twin)(x), model(x))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    kinds: list[Any] = [nn.Sequential, nn.Linear, nn.Tanh, nn.Sigmoid]
    with torch.serialization.safe_globals(kinds):
        assert_same(torch.load(buffer, weights_only=True), model, rtol=0, atol=0)


def test_the_original_can_be_traced_and_exported(trained):
    model, opt = trained
    x, _ = batch()
    expected = model(x)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,), strict=False).module()(x), expected)
    with pytest.raises(AttributeError, match=r"script a copy, torch\.jit\.script\(copy\.deepcopy\(model\)\)"):
        torch.jit.script(model)
    assert rows(opt) == [0, 0, 0]


def test_pickles_load_without_this_package(trained, tmp_path):
    model, _ = trained
    torch.save(model, tmp_path / "model.pt")
    program = f"""
import sys
sys.modules["locoprop_torch"] = sys.modules["locoprop_kernels"] = None
import torch
print(torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)(torch.zeros(1, 6).double()).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "torch.Size([1, 3])" in done.stdout, done.stderr


def test_copies_keep_the_users_hooks_in_order(trained):
    model, opt = trained
    calls: list[str] = []
    handles = [model[0].register_forward_hook(lambda *_, n=n: calls.append(n)) for n in ("first", "second")]
    copy.deepcopy(model)(batch()[0])
    assert calls == ["first", "second"]
    for handle in handles:
        handle.remove()
    loss_of(model).backward()
    assert calls == ["first", "second"]
    assert rows(opt) == [8, 8, 8]


def test_copies_of_parametrised_models():
    class Mask(nn.Module):
        def forward(self, weight):
            return weight * torch.ones_like(weight)

    model = mlp()
    parametrize.register_parametrization(model[2], "weight", Mask())
    opt = published(model)
    twin = copy.deepcopy(model)
    assert not has_hooks(twin)
    torch.testing.assert_close(twin(batch()[0]), model(batch()[0]))
    assert len(transfers_of(opt)) == 3


def test_shallow_copies_and_subclasses_with_their_own_deepcopy():
    class Own(nn.Linear):
        came_from: str

        def __deepcopy__(self, memo):
            twin = Own(self.in_features, self.out_features).to(self.weight.dtype)
            twin.load_state_dict(self.state_dict())
            twin.came_from = "own deepcopy"
            return twin

    model = nn.Sequential(Own(6, 3)).double()
    opt = published(model)
    assert copy.deepcopy(model)[0].came_from == "own deepcopy"
    assert not has_hooks(copy.copy(model[0]))
    del opt
    gc.collect()
    assert not set(vars(model[0])) & {"__deepcopy__", "__reduce_ex__"}
    assert copy.deepcopy(model)[0].came_from == "own deepcopy"


def test_two_optimizers_and_one_goes():
    model = mlp()
    first, second = published(model), published(model)
    del first
    gc.collect()
    assert not has_hooks(copy.deepcopy(model))
    loss_of(model).backward()
    assert rows(second) == [8, 8, 8]


@pytest.mark.parametrize("options", [
    {"transfers": {"9": "tanh"}}, {"param_groups": [{"params": [torch.zeros(1)]}]}, {"masks": {"x": torch.zeros(1)}},
    {"param_groups": [{"params": [], "lr": -1.0}]}, {"target": {"0": "primal", "9": "dual"}},
])  # fmt: skip
def test_failed_constructors_leave_nothing(options):
    model = mlp()
    keys = {module: set(vars(module)) for module in model.modules()}
    with pytest.raises((ValueError, TypeError)) as caught:
        published(model, **options)
    assert caught.traceback  # which keeps the frames, and the unfinished optimiser, alive
    assert not has_hooks(model)
    assert {module: set(vars(module)) for module in model.modules()} == keys


def test_a_users_hook_that_changes_the_output():
    """The pre-activation is what the layer returned; where the hook was registered does not matter."""

    def doubled(first):
        model = mlp()
        handle = None
        if first:
            handle = model[0].register_forward_hook(lambda module, args, output: 2 * output)
        opt = published(model, lr=1e-3)
        if not first:
            handle = model[0].register_forward_hook(lambda module, args, output: 2 * output)
        loss_of(model).backward()
        assert handle is not None
        (one,) = captured(opt)["0"]
        expected = torch.nn.functional.linear(one.x, model[0].weight, model[0].bias)
        torch.testing.assert_close(one.preactivation, expected.detach())
        opt.step()
        return model

    assert_same(doubled(True), doubled(False), rtol=0, atol=0)


def test_a_users_pre_hook_that_changes_the_input():
    model = mlp()
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    opt = published(model)
    loss_of(model).backward()
    torch.testing.assert_close(captured(opt)["0"][0].x, 2 * batch()[0])


def test_averaged_models():
    model = mlp()
    opt = published(model, lr=1e-3)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    loss_of(model).backward()
    opt.step()
    averaged.update_parameters(model)
    averaged(batch()[0]).sum().backward()
    assert rows(opt) == [0, 0, 0]
    assert_same(model, step_of())


@pytest.mark.parametrize("copier", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_of_the_model_carry_no_hooks(copier):
    model = mlp()
    opt = published(model, lr=1e-3)
    backward(model, opt)
    twin = copier(model)
    loss_of(twin).backward()
    assert rows(opt) == [8, 8, 8]
    before = weights(twin)
    opt.step()
    assert not any(moved(twin, before))


def test_copying_model_and_optimizer_together():
    model = mlp()
    opt = published(model, lr=1e-3)
    backward(model, opt)
    opt.step()
    for twin, twin_opt in (copy.deepcopy((model, opt)), pickled((model, opt))):
        reference, reference_opt = copy.deepcopy((model, opt))
        for m, o in ((twin, twin_opt), (reference, reference_opt)):
            backward(m, o)
            o.step()
        assert not any(moved(twin, weights(reference)))
        assert all(moved(twin, weights(model)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("change", ["dynamic", "convert", "fuse"])
def test_quantisation_in_place_leaves_our_hooks_without_effect(change):
    body = mlp(dtype=torch.float32, second=nn.ReLU)
    model = nn.Sequential(quantization.QuantStub(), *body, quantization.DeQuantStub())
    opt = published(model, transfers={})
    loss_of(model).backward()
    opt.step()
    model.eval()
    if change == "dynamic":
        quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    elif change == "convert":
        model.qconfig = quantization.default_qconfig  # type: ignore[assignment]
        quantization.prepare(model, inplace=True)
        loss_of(model)
        quantization.convert(model, inplace=True)
    else:
        quantization.fuse_modules(model, [["3", "4"]], inplace=True)
    x, _ = batch(dtype=torch.float32)
    expected = model(x)
    for twin in (copy.deepcopy(model), saved(model)):
        assert torch.equal(twin(x), expected)
    assert not any(captured(opt).values())


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_where_they_are_trained_on(layout):
    model = mlp()
    opt = published(model)
    parts = [batch(rows)[0] for rows in (3, 5)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    with pytest.raises(TypeError, match="layer '0' must be called with a dense tensor .* got a nested one"):
        model(nested)
    with torch.no_grad():
        for actual, part in zip(model[0](nested).unbind(), parts, strict=True):
            torch.testing.assert_close(actual, model[0](part))
    assert not any(captured(opt).values())


def test_hooks_go_with_the_optimizer():
    model = mlp()
    opt = published(model)
    backward(model, opt)
    del opt
    gc.collect()
    assert not has_hooks(model)
