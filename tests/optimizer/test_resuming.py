"""Schedulers, closures and state dictionaries, as users of ``torch.optim`` expect them."""

import copy
import warnings

import pytest
import torch

from locoprop_torch import LocoProp
from tests.helpers import WithNorm, backward, mlp, moved, published, steps, weights


def test_lr_schedulers():
    model = mlp()
    opt = published(model, lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: epoch / 2)  # starts at zero
        before = weights(model)
        backward(model, opt)
        opt.step()
        assert not any(moved(model, before))
        assert opt.state[model[0].weight]["square_avg"].any()  # warm-up fills the state
        scheduler.step()
    assert opt.param_groups[0]["lr"] == 5e-4


def test_closure():
    model = mlp()
    opt = published(model, lr=1e-3)
    assert torch.is_tensor(opt.step(lambda: backward(model, opt)))


@pytest.mark.parametrize("rule", ["sgd", "momentum", "nesterov", "rmsprop", "adam", "adagrad"])
def test_state_dict_resumes_exactly(rule, tmp_path):
    def fresh(seed):
        model = WithNorm(seed)
        return model, published(model, lr=1e-3, rule=rule, aux=torch.optim.AdamW(model.norm.parameters(), lr=0.01))

    model, opt = fresh(0)
    steps(model, opt, 3)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "checkpoint.pt")
    steps(model, opt, 3, start=3)
    resumed, resumed_opt = fresh(1)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    resumed_opt.load_state_dict(saved["opt"])
    steps(resumed, resumed_opt, 3, start=3)
    assert not any(moved(resumed, weights(model)))


def test_state_dict_of_bfloat16_parameters_keeps_float32():
    model = mlp(dtype=torch.bfloat16)
    opt = published(model, lr=1e-2)
    backward(model, opt)
    opt.step()
    twin = mlp(dtype=torch.bfloat16)
    other = published(twin, lr=1e-2)
    other.load_state_dict(opt.state_dict())
    state, expected = other.state[twin[0].weight]["square_avg"], opt.state[model[0].weight]["square_avg"]
    assert state.dtype == torch.float32
    assert torch.equal(state, expected)
    assert state.data_ptr() != expected.data_ptr()


def test_state_dict_of_another_optimizer_is_refused():
    model = WithNorm()
    aux = torch.optim.AdamW(model.norm.parameters())
    opt = published(model, aux=aux)
    with pytest.raises(ValueError, match="rule"):
        opt.load_state_dict(published(model, rule="adam", aux=aux).state_dict())
    plain = published(mlp())
    with pytest.raises(ValueError, match="without aux"):
        plain.load_state_dict({**plain.state_dict(), "aux": aux.state_dict()})


SPOILED = {
    "a number for a step": lambda saved: saved["state"][0].update(step=3),
    "a slot of another shape": lambda saved: saved["state"][0].update(exp_avg=torch.zeros(2, 2)),
    "no slots": lambda saved: saved["state"].update({0: 7}),
    "no slots of aux": lambda saved: saved["state"].update({4: 7}),
    "a negative learning rate": lambda saved: saved["param_groups"][0].update(lr=-1.0),
    "a text for prox": lambda saved: saved["param_groups"][0].update(prox="abc"),
    "no local iterations": lambda saved: saved["param_groups"][0].update(local_iterations=0),
    "an activation_lr that is not one": lambda saved: saved["param_groups"][0].update(activation_lr="1 per cent"),
    "a text for rows_seed": lambda saved: saved["param_groups"][0].update(rows_seed="x"),
    "a list for output_gradient": lambda saved: saved.update(output_gradient=[1]),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_state_dict_that_is_refused_changes_nothing(spoil):
    model = WithNorm()
    opt = LocoProp(model, aux="adamw")
    steps(model, opt, 2)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    spoil(saved)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises((TypeError, ValueError)):
        opt.load_state_dict(saved)
    after = opt.state_dict()
    torch.testing.assert_close(after.pop("state"), before.pop("state"), rtol=0, atol=0)
    assert after == before
