"""``aux``: its groups are groups of the optimiser, for whatever walks over those."""

import copy

import pytest
import torch
from torch import nn

from tests.helpers import WithNorm, assert_same, loss_of, mlp, moved, present, published, steps, weights


def with_aux(seed=0, **options):
    model = WithNorm(seed)
    return model, published(model, lr=1e-3, aux=torch.optim.AdamW(model.norm.parameters(), lr=0.1), **options)


def scaled_step(model, opt, scale, before_step=lambda scaler: None):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    opt.zero_grad()
    scaler.scale(loss_of(model)).backward()
    before_step(scaler)
    scaler.step(opt)
    scaler.update()


def test_groups_of_aux_are_marked_and_shared():
    model, opt = with_aux()
    assert [group.get("aux", False) for group in opt.param_groups] == [False, True]
    assert opt.param_groups[1] is opt.aux.param_groups[0]
    assert {id(p) for group in opt.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


def test_gradients_of_aux_are_unscaled():
    (model, opt), (twin, plain) = with_aux(), with_aux()
    loss_of(twin).backward()
    plain.step()
    scaled_step(model, opt, 2.0**10)
    assert_same(model, twin, rtol=1e-5, atol=1e-7)


def test_infinities_in_gradients_of_aux_skip_the_step_once():
    model, opt = with_aux()
    before = weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(loss_of(model)).backward()
    model.norm.weight.grad[0] = float("inf")
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 1.0
    assert not any(moved(model, before))
    opt.zero_grad()
    scaler.scale(loss_of(model)).backward()
    scaler.step(opt)
    assert all(moved(model, before))


def test_clipping_sees_gradients_of_aux_unscaled():
    model, opt = with_aux()
    loss_of(model).backward()
    expected = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
    opt.zero_grad()
    norms = []

    def clip(scaler):
        scaler.unscale_(opt)
        norms.append(nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], 1.0))

    scaled_step(model, opt, 4096.0, clip)
    torch.testing.assert_close(norms[0], expected)


def test_schedulers_reach_aux():
    model, opt = with_aux()
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.5**epoch)
    loss_of(model).backward()
    opt.step()
    scheduler.step()
    assert opt.aux.param_groups[0]["lr"] == 0.05
    assert scheduler.get_last_lr() == [5e-4, 0.05]


@pytest.mark.parametrize("aux", ["adamw", lambda params: torch.optim.SGD(params, lr=0.1)], ids=["name", "function"])
def test_aux_is_made_from_what_is_left(aux):
    model = WithNorm()
    opt = published(model, aux=aux)
    assert {id(p) for p in present(opt.aux).param_groups[0]["params"]} == {id(p) for p in model.norm.parameters()}
    before = weights(model)
    loss_of(model).backward()
    opt.step()
    assert all(moved(model, before))
    assert published(mlp(), aux=aux).aux is None


def test_aux_for_a_transformer_in_one_line():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Embedding(10, 8), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    opt = published(model, aux="adamw")
    before = weights(model)
    model(torch.randint(10, (2, 5))).square().mean().backward()
    opt.step()
    assert all(moved(model, before))


def test_bad_functions_for_aux():
    with pytest.raises(TypeError, match=r"aux must return a torch\.optim\.Optimizer, got 3"):
        published(WithNorm(), aux=lambda params: 3)
    model = WithNorm()
    with pytest.raises(ValueError, match="aux must return an optimiser of the parameters that it was given"):
        published(model, aux=lambda params: torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"no captured layer owns.*norm\.bias"):
        published(model, aux=lambda params: torch.optim.SGD(params[:1], lr=0.1))


def test_state_of_aux_resumes():
    (model, opt), (twin, other) = with_aux(), with_aux(seed=1)
    for _ in range(3):
        opt.zero_grad()
        loss_of(model).backward()
        opt.step()
    saved = copy.deepcopy({"model": model.state_dict(), "opt": opt.state_dict()})
    assert len(saved["opt"]["state"]) == len(list(model.parameters()))
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    assert other.param_groups[1] is other.aux.param_groups[0]
    other.param_groups[1]["lr"] = opt.param_groups[1]["lr"] = 0.3
    for m, o in ((model, opt), (twin, other)):
        o.zero_grad()
        loss_of(m, seed=5).backward()
        o.step()
    assert_same(model, twin, rtol=0, atol=0)


def test_loading_aux_by_itself_is_noticed():
    _, opt = with_aux()
    opt.aux.load_state_dict(opt.aux.state_dict())
    opt.zero_grad()
    assert opt.param_groups[1] is opt.aux.param_groups[0]


def test_groups_for_aux_may_be_added():
    model, opt = with_aux()
    model.extra = nn.LayerNorm(3)
    opt.add_param_group({"params": model.extra.parameters(), "lr": 0.5})
    assert [group.get("aux", False) for group in opt.param_groups] == [False, True, True]
    assert opt.aux.param_groups[1]["lr"] == 0.5
    model.more = nn.Linear(3, 3)
    opt.add_param_group({"params": model.more.parameters()})
    assert [group.get("aux", False) for group in opt.param_groups] == [False, False, True, True]
    opt.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match="belong to supported layers"):
        opt.add_param_group({"params": [model.norm.weight, model.inner.weight]})


@pytest.mark.parametrize("fresh_state", [True, False])
def test_distributed_checkpoints_of_one_process(fresh_state):
    """``torch.distributed.checkpoint.state_dict`` makes state by a step on gradients of zeros."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    (model, opt), (twin, other) = with_aux(rule="adam"), with_aux(seed=1, rule="adam")
    if not fresh_state:
        loss_of(twin).backward()
        other.step()
        other.zero_grad()
    for _ in range(2):
        opt.zero_grad()
        loss_of(model).backward()
        opt.step()
    saved = copy.deepcopy(get_state_dict(model, opt))
    set_state_dict(twin, other, model_state_dict=saved[0], optim_state_dict=saved[1])
    for m, o in ((model, opt), (twin, other)):
        o.zero_grad()
        loss_of(m, seed=5).backward()
        o.step()
    assert_same(model, twin, rtol=0, atol=0)
    changed = with_aux(rule="adam", reduction="sum")
    with pytest.raises(ValueError, match="reduction"):
        set_state_dict(*changed, model_state_dict=saved[0], optim_state_dict=saved[1])


def test_what_was_frozen_when_the_optimizer_was_built_and_is_trained_by_nobody_is_told(caplog):
    model = WithNorm()
    model.norm.requires_grad_(False)
    opt = published(model, lr=1e-3)
    steps(model, opt)
    assert not caplog.records
    model.norm.requires_grad_(True)
    before = weights(model.norm)
    steps(model, opt, 3)
    (record,) = caplog.records
    assert "does not train norm.weight, norm.bias: they were frozen" in record.getMessage()
    assert not any(moved(model.norm, before))


def test_what_aux_has_is_trained_once_it_is_no_longer_frozen(caplog):
    model = WithNorm()
    model.norm.requires_grad_(False)
    opt = published(model, lr=1e-3, aux="adamw")
    model.norm.requires_grad_(True)
    before = weights(model.norm)
    steps(model, opt)
    assert all(moved(model.norm, before))
    assert not caplog.records
