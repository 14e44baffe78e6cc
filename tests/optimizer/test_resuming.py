"""Schedulers, closures and state dictionaries, as users of ``torch.optim`` expect them."""

import warnings

import pytest
import torch

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
