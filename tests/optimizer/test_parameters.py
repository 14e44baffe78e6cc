"""Which parameters a step moves: frozen, unused, left to another optimiser, or added later."""

import pytest
import torch
from torch import nn

from tests.helpers import WithNorm, backward, loss_of, mlp, moved, published, transfers_of, weights


def test_layers_without_bias_and_frozen_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Linear(3, 3)
    )
    model[2].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    model[5].requires_grad_(False)
    opt = published(model, lr=1e-3)
    before = weights(model)
    backward(model, opt)
    opt.step()
    assert moved(model, before) == [True, False, True, True, False, False, False]
    model[5].requires_grad_(True)
    backward(model, opt)
    opt.step()
    assert moved(model, before)[-2:] == [True, True]


def test_aux_takes_the_rest():
    model = WithNorm()
    with pytest.raises(ValueError, match=r"norm\.weight, norm\.bias"):
        published(model)
    opt = published(model, aux=torch.optim.AdamW(model.norm.parameters(), lr=0.1))
    before = weights(model)
    backward(model, opt)
    opt.step()
    assert all(moved(model, before))
    opt.zero_grad()
    assert model.norm.weight.grad is None


def test_aux_may_take_whole_layers():
    model = mlp()
    opt = published(model, aux=torch.optim.SGD(model[4].parameters(), lr=0.1))
    assert set(transfers_of(opt)) == {"0", "2"}
    with pytest.raises(ValueError, match="all parameters of layer '4'"):
        published(model, aux=torch.optim.SGD([model[4].weight], lr=0.1))
    with pytest.raises(ValueError, match="supported layer"):
        published(model, aux=torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_unused_branch_is_left_alone():
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "unused": nn.Linear(6, 3)})
    opt = published(model)
    before = weights(model)
    for set_to_none in (True, False):
        loss_of(model["used"]).backward()
        opt.step()
        opt.zero_grad(set_to_none=set_to_none)
    model["unused"].weight.grad = torch.zeros(3, 6)
    loss_of(model["used"]).backward()
    opt.step()
    assert moved(model, before) == [True, True, False, False]


def test_add_param_group():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
    opt = published(model, lr=1e-3)
    head = nn.Linear(5, 3)
    with pytest.raises(ValueError, match="belong to supported layers"):
        opt.add_param_group({"params": head.parameters()})
    model.append(head)
    with pytest.raises(ValueError, match="all parameters of layer '2'"):
        opt.add_param_group({"params": [head.weight]})
    with pytest.raises(ValueError, match="lr"):
        opt.add_param_group({"params": head.parameters(), "lr": -1.0})
    opt.add_param_group({"params": head.parameters(), "lr": 1e-2, "local_iterations": 2, "rule": "sgd"})
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": list(model[0].parameters())})
    before = weights(model)
    backward(model, opt)
    opt.step()
    assert all(moved(model, before))
    assert [len(report.problems) for report in opt.last_reports] == [1, 1]
    assert opt.param_groups[1]["activation_lr"] == 10.0


def test_two_optimizers_in_turn():
    model = mlp()
    first, second = published(model, lr=1e-3), published(model, lr=1e-3, rule="sgd")
    for opt in (first, second):
        before = weights(model)
        backward(model, opt)
        opt.step()
        assert all(moved(model, before))


@pytest.mark.parametrize("after_a_step", [False, True])
def test_the_model_may_move(after_a_step):
    model = mlp(dtype=torch.float32)
    opt = published(model, lr=1e-3)
    if after_a_step:
        backward(model, opt)
        opt.step()
    model.double()
    before = weights(model)
    backward(model, opt)
    opt.step()
    assert all(moved(model, before))
    assert opt.state[model[0].weight]["square_avg"].dtype == torch.float64
