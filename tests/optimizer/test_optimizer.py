"""``LocoProp`` as users of ``torch.optim`` expect it to behave."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import locoprop_kernels as lk
from locoprop_kernels import rules
from locoprop_kernels.testing import TextbookLayer
from locoprop_torch import LocoProp
from locoprop_torch.optimizer import default_lr_decay


def mlp(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)).to(dtype)


def batch(rows=8, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator, dtype=torch.float64).to(dtype), torch.randn(
        rows, 3, generator=generator, dtype=torch.float64
    ).to(dtype)


def backward(model, opt, x, y, scale=1.0):
    opt.zero_grad()
    loss = F.mse_loss(model(x), y) * scale
    loss.backward()
    return loss


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def moved(model, before):
    return [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]


def snapshot(model, opt):
    return weights(model), copy.deepcopy(opt.state_dict()["state"])


def assert_unchanged(model, opt, before):
    now = snapshot(model, opt)
    assert all(torch.equal(a, b) for a, b in zip(now[0], before[0], strict=True))
    assert now[1].keys() == before[1].keys()
    for parameter, slots in now[1].items():
        assert all(torch.equal(value, before[1][parameter][slot]) for slot, value in slots.items())


# --- the algorithm, through the module


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("local_loss", ["matching", "squared"])
@pytest.mark.parametrize("prox", [0.0, 0.2])
def test_step_is_the_textbook_form(reduction, local_loss, prox):
    model = mlp(dtype=torch.float64)
    rule = rules.RMSprop(momentum=0.9)
    opt = LocoProp(
        model, lr=1e-3, activation_lr=3.0, local_iterations=4, rule=rule, local_loss=local_loss, prox=prox,
        reduction=reduction,
    )  # fmt: skip
    layers, names = [model[i] for i in (0, 2, 4)], ["tanh", "sigmoid", "identity"]
    textbook = [
        TextbookLayer(layer.weight, layer.bias, name if local_loss == "matching" else "identity", rule)
        for layer, name in zip(layers, names, strict=True)
    ]
    rates = [1e-3 * default_lr_decay(t, 4) for t in range(4)]
    for step in range(3):
        x, y = batch(seed=step, dtype=torch.float64)
        inputs, outputs = [], []
        value = x
        for i, module in enumerate(model):
            inputs.append(value)
            value = module(value)
            if i % 2 == 0:
                value.retain_grad()
                outputs.append(value)
        F.mse_loss(value, y).backward()
        targets = [t.transfer(a.detach()) - 3.0 * a.grad for t, a in zip(textbook, outputs, strict=True)]
        backward(model, opt, x, y)
        opt.step()
        for i, (layer, t) in enumerate(zip(layers, textbook, strict=True)):
            t.step(inputs[2 * i].detach(), targets[i], rates, prox, reduction)
            torch.testing.assert_close(layer.weight.detach(), t.weight, rtol=0, atol=1e-10)
            torch.testing.assert_close(layer.bias.detach(), t.bias, rtol=0, atol=1e-10)


def test_one_iteration_recovers_back_propagation():
    model, twin = mlp(), mlp()
    opt = LocoProp(model, lr=0.01, activation_lr=1.0, local_iterations=1, rule=rules.Adam(), reduction="sum")
    adam = torch.optim.Adam(twin.parameters(), lr=0.01)
    for step in range(5):
        x, y = batch(seed=step)
        backward(model, opt, x, y)
        opt.step()
        backward(twin, adam, x, y)
        adam.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_loss_falls():
    model = mlp()
    opt = LocoProp(model, lr=1e-3, rule=rules.RMSprop(momentum=0.9))
    x, y = batch(64)
    losses = []
    for _ in range(60):
        losses.append(backward(model, opt, x, y).item())
        opt.step()
    assert losses[-1] < 0.8 * losses[0]


# --- which transfer function each layer gets


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(6, 6) for name in "abcdefghijklmnop"})

    def forward(self, x):
        at = self.layers
        x = F.relu(at["a"](x))
        x = at["b"](x).tanh()
        x = torch.sigmoid(at["c"](x))
        x = F.leaky_relu(at["d"](x), 0.3)
        x = F.elu(at["e"](x), alpha=0.5)
        x = F.softplus(at["f"](x), beta=2)
        x = torch.atan(at["g"](x))
        x = F.relu(at["h"](x)) ** 2
        x = F.relu(at["i"](x)).square()
        x = at["j"](x).softmax(dim=-1)
        residual = at["k"](x)
        x = torch.relu(residual) + residual  # two consumers: not the input of the relu alone
        x = at["l"](x).relu_()
        x = torch.tanh(at["m"](x).reshape(-1, 2, 3)).flatten(1)
        x = torch.softmax(at["n"](x).reshape(-1, 2, 3), -1).flatten(1)  # rows of another length
        x = F.softmax(at["o"](x), dim=0)  # over the batch
        return at["p"](x)


def test_functional_transfers_are_found():
    model = Functional()
    opt = LocoProp(model)
    found = {name[-1]: str(layer.transfer) for name, layer in opt._layers.items()}
    assert found == {
        "a": "relu", "b": "tanh", "c": "sigmoid", "d": "leaky_relu(negative_slope=0.3)", "e": "elu(alpha=0.5)",
        "f": "softplus(beta=2)", "g": "arctan", "h": "squared_relu", "i": "squared_relu", "j": "softmax",
        "k": "identity",
        "l": "relu", "m": "tanh", "n": "identity", "o": "identity", "p": "identity",
    }  # fmt: skip
    assert "layers.f  6 -> 6  softplus(beta=2)" in repr(opt)
    assert "layers.a  6 -> 6  identity" in repr(LocoProp(model, local_loss="squared"))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 5), nn.Identity(), nn.Softplus(), nn.Linear(5, 6), nn.Dropout(0.0), nn.Tanh()
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        if x.sum() > 1e9:
            raise RuntimeError
        return self.head(self.body(x))


def test_what_cannot_be_traced_is_read_part_by_part():
    opt = LocoProp(Untraceable(), transfers={"head": "sigmoid"})
    assert {name: str(layer.transfer) for name, layer in opt._layers.items()} == {
        "body.0": "softplus(beta=1)", "body.3": "identity", "head": "sigmoid",
    }  # fmt: skip


def test_a_layer_followed_by_different_functions_gets_the_identity():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return torch.tanh(self.layer(torch.relu(self.layer(x))))

    assert str(LocoProp(Twice())._layers["layer"].transfer) == "identity"


# --- what is captured


def test_leading_dimensions_are_rows():
    model, twin = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    x, y = batch(12, dtype=torch.float64)
    for m, shape in ((model, (2, 3, 2)), (twin, (12,))):
        opt = LocoProp(m, lr=1e-3)
        backward(m, opt, x.reshape(*shape, 6), y.reshape(*shape, 3))
        opt.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_one_example_without_batch_dimension():
    model = mlp()
    opt = LocoProp(model, lr=1e-3)
    before = weights(model)
    x, y = batch(1)
    backward(model, opt, x[0], y[0])
    opt.step()
    assert all(moved(model, before))


def test_gradient_accumulation_is_the_whole_batch():
    model, twin = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    x, y = batch(12, dtype=torch.float64)
    opt, whole = LocoProp(model, lr=1e-3), LocoProp(twin, lr=1e-3)
    backward(twin, whole, x, y)
    whole.step()
    opt.zero_grad()
    for part in (slice(0, 4), slice(4, 12)):
        (F.mse_loss(model(x[part]), y[part]) * (part.stop - part.start) / 12).backward()
    opt.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


class Recurrent(nn.Module):
    """One layer, called three times."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(6, 6)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        return x


def test_a_layer_called_several_times_concatenates_its_rows():
    torch.manual_seed(0)
    model = Recurrent().double()
    x, _ = batch(5, dtype=torch.float64)
    calls = []
    model.cell.register_forward_hook(lambda _, args, out: calls.append((args[0].detach(), out.detach())))
    opt = LocoProp(model, lr=1e-3, rule="sgd", local_iterations=3)
    weight, bias = model.cell.weight.detach().clone(), model.cell.bias.detach().clone()
    model(x).square().sum().backward()
    problem = lk.LocalProblem(
        x=torch.cat([c[0] for c in calls]), preactivation=torch.cat([c[1] for c in calls]), weight=weight, bias=bias,
        grad_weight=10 * model.cell.weight.grad, grad_bias=10 * model.cell.bias.grad, transfer="tanh",
    )  # fmt: skip
    opt.step()
    lk.local_steps_([problem], rule="sgd", lr=[1e-3 * default_lr_decay(t, 3) for t in range(3)])
    torch.testing.assert_close(model.cell.weight.detach(), weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.cell.bias.detach(), bias, rtol=0, atol=1e-12)


def stray_passes(model, opt, x, y):
    with torch.no_grad():
        model(x)
    model(2 * x)  # no backward pass
    backward(model, opt, x, y)
    model(3 * x)


def model_zero_grad_drops_earlier_rows(model, opt, x, y):
    F.mse_loss(model(3 * x), y).backward()
    model.zero_grad()
    F.mse_loss(model(x), y).backward()


def retained_graph_counts_rows_once(model, opt, x, y):
    loss = F.mse_loss(model(x), y) / 2
    loss.backward(retain_graph=True)
    loss.backward()


def non_reentrant_checkpoint(model, opt, x, y):
    F.mse_loss(checkpoint(model, x, use_reentrant=False), y).backward()


def reentrant_checkpoint(model, opt, x, y):
    F.mse_loss(checkpoint(model, x.clone().requires_grad_(), use_reentrant=True), y).backward()


def keyword_argument(model, opt, x, y):
    out = model[0](input=x)
    F.mse_loss(model[1:](out), y).backward()


@pytest.mark.parametrize(
    "passes",
    [
        stray_passes,
        model_zero_grad_drops_earlier_rows,
        retained_graph_counts_rows_once,
        non_reentrant_checkpoint,
        reentrant_checkpoint,
        keyword_argument,
    ],
)
def test_only_rows_of_the_backward_pass_count(passes):
    model, twin = mlp(), mlp()
    x, y = batch()
    opt, plain = LocoProp(model, lr=1e-3), LocoProp(twin, lr=1e-3)
    backward(twin, plain, x, y)
    plain.step()
    passes(model, opt, x, y)
    assert all(sum(len(p.x) for p in layer.passes) == len(x) for layer in opt._layers.values())
    opt.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_in_place_activation_functions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    twin = nn.Sequential(copy.deepcopy(model[0]), nn.ReLU(), copy.deepcopy(model[2]))
    x, y = batch()
    for m in (model, twin):
        opt = LocoProp(m, lr=1e-3)
        backward(m, opt, x, y)
        opt.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_overwritten_input_is_refused():
    model = nn.Sequential(nn.Linear(6, 3))
    model[0].weight.requires_grad_(False)  # autograd does not guard the input then
    opt = LocoProp(model)
    x, y = batch()
    backward(model, opt, x, y)
    x.mul_(2)
    with pytest.raises(ValueError, match="input of layer '0' was overwritten"):
        opt.step()


def test_autocast_and_loss_scaling():
    model, twin = mlp(), mlp()
    x, y = batch(32)
    opt, plain = LocoProp(model, lr=1e-3), LocoProp(twin, lr=1e-3)
    before = weights(model)
    backward(twin, plain, x, y)
    plain.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.mse_loss(model(x).float(), y)
    scaler.scale(loss).backward()
    scaler.step(opt)
    scaler.update()
    for p, q, b in zip(model.parameters(), twin.parameters(), before, strict=True):
        assert (p - q).norm() <= 0.1 * (q - b).norm()


# --- parameters


def test_layers_without_bias_and_frozen_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Linear(3, 3)
    )
    model[2].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    model[5].requires_grad_(False)
    opt = LocoProp(model, lr=1e-3)
    before = weights(model)
    x, y = batch()
    backward(model, opt, x, y)
    opt.step()
    assert moved(model, before) == [True, False, True, True, False, False, False]
    model[5].requires_grad_(True)
    backward(model, opt, x, y)
    opt.step()
    assert moved(model, before)[-2:] == [True, True]


class WithNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.norm(self.inner(x)))


def test_aux_takes_the_rest():
    model = WithNorm()
    with pytest.raises(ValueError, match=r"norm\.weight, norm\.bias"):
        LocoProp(model)
    opt = LocoProp(model, aux=torch.optim.AdamW(model.norm.parameters(), lr=0.1))
    before = weights(model)
    x, y = batch()
    backward(model, opt, x, y)
    opt.step()
    assert all(moved(model, before))
    opt.zero_grad()
    assert model.norm.weight.grad is None


def test_aux_may_take_whole_layers():
    model = mlp()
    opt = LocoProp(model, aux=torch.optim.SGD(model[4].parameters(), lr=0.1))
    assert set(opt._layers) == {"0", "2"}
    with pytest.raises(ValueError, match="all parameters of layer '4'"):
        LocoProp(model, aux=torch.optim.SGD([model[4].weight], lr=0.1))
    with pytest.raises(ValueError, match="supported layer"):
        LocoProp(model, aux=torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_unused_branch_is_left_alone():
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "unused": nn.Linear(6, 3)})
    opt = LocoProp(model)
    before = weights(model)
    x, y = batch()
    for set_to_none in (True, False):
        F.mse_loss(model["used"](x), y).backward()
        opt.step()
        opt.zero_grad(set_to_none=set_to_none)
    model["unused"].weight.grad = torch.zeros(3, 6)
    F.mse_loss(model["used"](x), y).backward()
    opt.step()
    assert moved(model, before) == [True, True, False, False]


def test_add_param_group():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
    opt = LocoProp(model, lr=1e-3)
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
    x, y = batch()
    backward(model, opt, x, y)
    opt.step()
    assert all(moved(model, before))
    assert [len(report.problems) for report in opt.last_reports] == [1, 1]
    assert opt.param_groups[1]["activation_lr"] == 10.0


# --- torch's habits


def test_lr_schedulers():
    model = mlp()
    opt = LocoProp(model, lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: epoch / 2)  # starts at zero
        x, y = batch()
        before = weights(model)
        backward(model, opt, x, y)
        opt.step()
        assert not any(moved(model, before))
        assert opt.state[model[0].weight]["square_avg"].any()  # warm-up fills the state
        scheduler.step()
    assert opt.param_groups[0]["lr"] == 5e-4


def test_closure():
    model = mlp()
    opt = LocoProp(model, lr=1e-3)
    x, y = batch()
    assert torch.is_tensor(opt.step(lambda: backward(model, opt, x, y)))


@pytest.mark.parametrize("rule", ["sgd", "momentum", "nesterov", "rmsprop", "adam", "adagrad"])
def test_state_dict_resumes_exactly(rule, tmp_path):
    def fresh():
        model = WithNorm()
        return model, LocoProp(model, lr=1e-3, rule=rule, aux=torch.optim.AdamW(model.norm.parameters(), lr=0.01))

    def train(model, opt, steps):
        for step in steps:
            x, y = batch(seed=step)
            backward(model, opt, x, y)
            opt.step()

    torch.manual_seed(0)
    model, opt = fresh()
    train(model, opt, range(3))
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "checkpoint.pt")
    train(model, opt, range(3, 6))
    resumed, resumed_opt = fresh()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    resumed_opt.load_state_dict(saved["opt"])
    train(resumed, resumed_opt, range(3, 6))
    assert not any(moved(resumed, weights(model)))


def test_state_dict_of_bfloat16_parameters_keeps_float32():
    model = mlp(dtype=torch.bfloat16)
    opt = LocoProp(model, lr=1e-2)
    x, y = batch(dtype=torch.bfloat16)
    backward(model, opt, x, y)
    opt.step()
    twin = mlp(dtype=torch.bfloat16)
    other = LocoProp(twin, lr=1e-2)
    other.load_state_dict(opt.state_dict())
    state, expected = other.state[twin[0].weight]["square_avg"], opt.state[model[0].weight]["square_avg"]
    assert state.dtype == torch.float32
    assert torch.equal(state, expected)
    assert state.data_ptr() != expected.data_ptr()


def test_state_dict_of_another_optimizer_is_refused():
    model = WithNorm()
    aux = torch.optim.AdamW(model.norm.parameters())
    opt = LocoProp(model, aux=aux)
    with pytest.raises(ValueError, match="rule"):
        opt.load_state_dict(LocoProp(model, rule="adam", aux=aux).state_dict())
    plain = LocoProp(mlp())
    with pytest.raises(ValueError, match="without aux"):
        plain.load_state_dict({**plain.state_dict(), "aux": aux.state_dict()})


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda obj: pickle.loads(pickle.dumps(obj))], ids=["deepcopy", "pickle"]
)
def test_copies_of_the_model_carry_no_hooks(copier):
    model = mlp()
    opt = LocoProp(model, lr=1e-3)
    x, y = batch()
    backward(model, opt, x, y)
    twin = copier(model)
    F.mse_loss(twin(x), y).backward()
    assert sum(len(p.x) for p in opt._layers["0"].passes) == len(x)
    before = weights(twin)
    opt.step()
    assert not any(moved(twin, before))


def test_copying_model_and_optimizer_together():
    model = mlp()
    opt = LocoProp(model, lr=1e-3)
    x, y = batch()
    backward(model, opt, x, y)
    opt.step()
    for twin, twin_opt in (copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))):
        reference, reference_opt = copy.deepcopy((model, opt))
        for m, o in ((twin, twin_opt), (reference, reference_opt)):
            backward(m, o, x, y)
            o.step()
        assert not any(moved(twin, weights(reference)))
        assert all(moved(twin, weights(model)))


def test_hooks_go_with_the_optimizer():
    model = mlp()
    opt = LocoProp(model)
    backward(model, opt, *batch())
    del opt
    gc.collect()
    assert not any(module._forward_hooks for module in model.modules())


def test_two_optimizers_in_turn():
    model = mlp()
    first, second = LocoProp(model, lr=1e-3), LocoProp(model, lr=1e-3, rule="sgd")
    for opt in (first, second):
        before = weights(model)
        backward(model, opt, *batch())
        opt.step()
        assert all(moved(model, before))


@pytest.mark.parametrize("after_a_step", [False, True])
def test_the_model_may_move(after_a_step):
    model = mlp()
    opt = LocoProp(model, lr=1e-3)
    if after_a_step:
        backward(model, opt, *batch())
        opt.step()
    model.double()
    before = weights(model)
    backward(model, opt, *batch(dtype=torch.float64))
    opt.step()
    assert all(moved(model, before))
    assert opt.state[model[0].weight]["square_avg"].dtype == torch.float64


# --- transactions


def with_nan_input(model, x, y):
    x[0, 0] = float("nan")
    F.mse_loss(model(x), y).backward()


def with_infinite_gradient(model, x, y):
    F.mse_loss(model(x), y).backward()
    model[2].bias.grad[1] = float("inf")


@pytest.mark.parametrize("spoil", [with_nan_input, with_infinite_gradient])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "rmsprop", "adam", "adagrad"])
@pytest.mark.parametrize("iterations", [1, 4])
def test_non_finite_steps_change_nothing(spoil, rule, iterations):
    model = mlp()
    opt = LocoProp(model, lr=1e-3, rule=rule, local_iterations=iterations)
    backward(model, opt, *batch())
    opt.step()
    before = snapshot(model, opt)
    for count in (1, 2):
        opt.zero_grad()
        spoil(model, *batch())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.step()
        assert [w.filename for w in caught] == ([__file__] if count == 1 else [])
        assert opt.skipped_steps == count
        assert not opt.last_reports[0].committed
        assert_unchanged(model, opt, before)
    backward(model, opt, *batch())
    opt.step()
    assert opt.last_reports[0].committed
    assert all(moved(model, before[0]))


def test_divergence_of_a_local_loop_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    opt = LocoProp(model, lr=1e4, rule="sgd", local_iterations=60, local_loss="squared", lr_decay=lambda t, T: 1.0)
    backward(model, opt, *batch())
    before = snapshot(model, opt)
    with pytest.warns(RuntimeWarning, match="not finite"):
        opt.step()
    assert_unchanged(model, opt, before)


def test_aux_is_part_of_the_transaction():
    model = WithNorm()
    opt = LocoProp(model, aux=torch.optim.AdamW(model.norm.parameters(), lr=0.1))
    x, y = batch()
    for spoiled in (model.head.weight, model.norm.weight):
        backward(model, opt, x, y)
        spoiled.grad[0] = float("nan")
        before = weights(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.step()
        assert not any(moved(model, before))
    assert opt.skipped_steps == 2


def test_a_non_finite_loss_of_a_closure_is_not_trusted():
    model = mlp()
    opt = LocoProp(model)
    before = weights(model)
    with pytest.warns(RuntimeWarning, match="loss"):
        opt.step(lambda: backward(model, opt, *batch()) + float("inf"))
    assert not any(moved(model, before))


def test_all_groups_commit_or_none():
    model = nn.Sequential(nn.Linear(6, 5))
    opt = LocoProp(model, lr=1e-3)
    model.append(nn.Linear(5, 3))
    opt.add_param_group({"params": model[1].parameters()})
    backward(model, opt, *batch())
    model[1].weight.grad[0, 0] = float("nan")
    before = snapshot(model, opt)
    with pytest.warns(RuntimeWarning):
        opt.step()
    assert_unchanged(model, opt, before)


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1e-3}, ValueError, "lr must be"),
        ({"lr": float("nan")}, ValueError, "lr must be"),
        ({"lr": float("inf")}, ValueError, "lr must be"),
        ({"lr": "fast"}, TypeError, "lr must be"),
        ({"activation_lr": 0.0}, ValueError, "activation_lr must be"),
        ({"activation_lr": float("inf")}, ValueError, "activation_lr must be"),
        ({"local_iterations": 0}, ValueError, "local_iterations must be"),
        ({"local_iterations": 2.5}, TypeError, "local_iterations must be"),
        ({"prox": -0.1}, ValueError, "prox must be"),
        ({"prox": float("nan")}, ValueError, "prox must be"),
        ({"rule": "lion"}, ValueError, "rule must be one of sgd, .*'lion'"),
        ({"rule": 3}, TypeError, "rule must be"),
        ({"local_loss": "hinge"}, ValueError, "local_loss must be one of matching, squared; got 'hinge'"),
        ({"reduction": "none"}, ValueError, "reduction must be"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
        ({"compute_dtype": torch.int8}, ValueError, "compute_dtype must be"),
        ({"lr_decay": 0.5}, TypeError, "lr_decay must be"),
        ({"aux": "adam"}, ValueError, "aux must be one of adamw"),
        ({"aux": 3}, TypeError, "aux must be"),
        ({"transfers": {"1": "tanh"}}, ValueError, "transfers must name captured layers"),
        ({"transfers": {"0": "tanhh"}}, ValueError, "transfer must be one of"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        LocoProp(mlp(), **arguments)


@pytest.mark.parametrize(
    ("name", "value"), [("lr", -1.0), ("activation_lr", 0.0), ("local_iterations", 0), ("prox", -1.0)]
)
def test_bad_values_in_a_parameter_group(name, value):
    model = mlp()
    opt = LocoProp(model)
    opt.param_groups[0][name] = value
    before = weights(model)
    backward(model, opt, *batch())
    with pytest.raises(ValueError, match=f"{name} must be"):
        opt.step()
    assert not any(moved(model, before))


def test_compiled_models_are_captured():
    model, twin = mlp(), mlp()
    compiled = torch.compile(model, backend="eager")
    opt, plain = LocoProp(compiled, lr=1e-3), LocoProp(twin, lr=1e-3)
    for step in range(2):
        backward(compiled, opt, *batch(seed=step))
        opt.step()
        backward(twin, plain, *batch(seed=step))
        plain.step()
    assert not any(moved(model, weights(twin)))


def test_bad_models():
    with pytest.raises(TypeError, match="model must be"):
        LocoProp([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="at least one supported layer"):
        LocoProp(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(ValueError, match="lazy"):
        LocoProp(nn.Sequential(nn.LazyLinear(4)))


def replaced_module(model):
    model[0] = nn.Linear(6, 5)


def replaced_parameter(model):
    model[0].weight = nn.Parameter(torch.zeros(5, 6))


def reshaped_parameter(model):
    model[0].weight.data = torch.zeros(7, 6)
    model[0].weight.grad = torch.zeros(7, 6)


def removed_bias(model):
    model[0].bias = None


def sparse_gradient(model):
    model[0].weight.grad = model[0].weight.grad.to_sparse()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced_module, "layer '0' is no longer the module"),
        (replaced_parameter, "weight of layer '0' is no longer"),
        (reshaped_parameter, "layer '0' changed shape"),
        (removed_bias, "bias of layer '0' is no longer"),
        (sparse_gradient, "layer '0': the gradient of its weight must be dense"),
    ],
)
def test_a_model_that_changed_is_refused(change, message):
    model = mlp()
    opt = LocoProp(model)
    backward(model, opt, *batch())
    change(model)
    rest = weights(model[2:])
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert not any(moved(model[2:], rest))


def test_trace_shows_every_layers_local_objective():
    model = mlp()
    opt = LocoProp(model, lr=1e-4, rule="sgd", local_iterations=5, trace=True)
    backward(model, opt, *batch())
    opt.step()
    traces = opt.last_reports[0].trace
    assert [len(trace) for trace in traces] == [6, 6, 6]
    assert all((trace.diff() < 0).all() for trace in traces)
