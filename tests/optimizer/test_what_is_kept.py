"""``LocoProp(rows=...)``: what is held of passes of every fate, and that only those that count say which rows."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from locoprop_torch.capture import CapturedLayer
from tests.helpers import batch, captured, held, loss_of, mlp, published, weights
from tests.optimizer.test_kept_rows import needs_kernels, one_by_one, together


def held_bytes(opt):
    """Bytes of all inputs and pre-activations that passes hold, each storage once."""
    tensors = [
        tensor
        for passes in captured(opt).values()
        for one in passes
        for tensor in ([*one.kept.x, *one.kept.preactivation] if one.kept else [one.x, one.preactivation])
    ]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("run", [one_by_one, together])
@pytest.mark.parametrize("passes", [1, 2, 8, 32])
def test_what_is_held_does_not_grow_with_the_passes(passes, run):
    model = mlp()
    opt = published(model, rows=4, local_iterations=5)
    run(model, loss_of, [64] * passes, 0)
    for layer in captured(opt).values():
        assert 4 * 4 / 2 <= held(layer) <= 4 * 4
    numbers = sum(p.shape[1] + p.shape[0] for p in model.parameters() if p.dim() == 2)
    assert held_bytes(opt) <= 4 * 4 * numbers * 8


def test_a_forward_pass_keeps_copies_of_few_rows_alone(monkeypatch):
    found = []
    monkeypatch.setattr(CapturedLayer, "_reach", lambda self, captured, gradient: found.append(captured))
    model = mlp()
    opt = published(model, rows=4, local_iterations=5)
    loss_of(model, 256).backward()
    assert all(one.x is None and one.preactivation is None for one in found)
    assert [sum(map(len, one.kept.x)) for one in found] == [16, 16, 16]
    del opt


def test_small_batches_are_held_without_a_copy():
    model = mlp()
    opt = published(model, rows=4, local_iterations=5)
    loss_of(model, 16).backward()  # four sets, and four local steps that take one
    assert all(one.kept is None for passes in captured(opt).values() for one in passes)


def test_overwriting_is_harmless_once_rows_are_kept():
    def stepped(overwrite):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
        model[0].weight.requires_grad_(False)  # autograd does not guard the input then
        opt = published(model, lr=1e-3, rows=3, local_iterations=4)
        x, y = batch(64)
        F.mse_loss(model(x), y).backward()
        if overwrite:
            x.mul_(2)
        opt.step()
        return weights(model)

    assert all(map(torch.equal, stepped(True), stepped(False)))


# --- passes of every fate


def stray_before(model, x, y):
    stray = model(torch.cat([x, x, x]))
    F.mse_loss(model(x), y).backward()
    return stray


def stray_between(model, x, y):
    F.mse_loss(model(x[:40]), y[:40]).mul(40 / 64).backward()
    stray = model(2 * x)
    F.mse_loss(model(x[40:]), y[40:]).mul(24 / 64).backward()
    return stray


def two_calls(model, x, y):
    F.mse_loss(model(x[:40]), y[:40]).mul(40 / 64).backward()
    F.mse_loss(model(x[40:]), y[40:]).mul(24 / 64).backward()


def second_loss_first(model, x, y):
    first, second = (F.mse_loss(model(part), want) for part, want in ((x[:40], y[:40]), (x[40:], y[40:])))
    second.mul(24 / 64).backward()
    first.mul(40 / 64).backward()


def one_call(model, x, y):
    F.mse_loss(model(x), y).backward()


def saliency_before(model, x, y):
    torch.autograd.grad(model(x[:50].clone().requires_grad_()).sum(), list(model.parameters()))
    one_call(model, x, y)


def zero_grad_in_between(model, x, y):
    F.mse_loss(model(x[:9]), y[:9]).backward()
    model.zero_grad()
    one_call(model, x, y)


def twice_through_one_graph(model, x, y):
    loss = F.mse_loss(model(x), y) / 2
    loss.backward(retain_graph=True)
    loss.backward()


def recomputed(model, x, y):
    F.mse_loss(checkpoint(model, x, use_reentrant=False), y).backward()


def recomputed_reentrantly(model, x, y):
    F.mse_loss(checkpoint(model, x.clone().requires_grad_(), use_reentrant=True), y).backward()


def compiled(model, x, y):
    torch._dynamo.reset()
    F.mse_loss(torch.compile(model, backend="eager")(x), y).backward()


@pytest.mark.parametrize(
    ("passes", "plain"),
    [
        (stray_before, one_call), (stray_between, two_calls), (second_loss_first, two_calls),
        (saliency_before, one_call), (zero_grad_in_between, one_call), (twice_through_one_graph, one_call),
        (recomputed, one_call), (recomputed_reentrantly, one_call), (compiled, one_call),
    ],
)  # fmt: skip
def test_only_what_counts_says_which_rows(passes, plain):
    model, twin = mlp(), mlp()
    for m, run in ((model, passes), (twin, plain)):
        opt = published(m, lr=1e-3, rows=3, local_iterations=4)
        kept = run(m, *batch(64))
        # Beside a pass that has its place, and may still count, others stay whole.
        assert kept is not None or all(held(layer) <= 9 for layer in captured(opt).values())
        opt.step()
        del kept
    for p, q in zip(weights(model), weights(twin), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_a_pass_of_an_earlier_step_counts_in_a_later_one():
    """Its rows were chosen for another step; as many are there as should be."""
    model = mlp()
    opt = published(model, lr=0.0, rows=3, local_iterations=4)  # torch refuses where weights have changed
    for p in model.parameters():
        p.data = p.data.clone()
    early = loss_of(model, 50)
    opt._model_layers.end_step()
    opt.rows_seed += 1
    loss_of(model, 33, seed=2).backward()
    early.backward()
    opt.step()
    assert {problem.rows for problem in opt.last_reports[0].problems} == {83}
    assert opt.skipped_steps == 0


def test_a_call_of_an_earlier_step_does_not_hold_up_later_ones():
    model = mlp()
    opt = published(model, lr=1e-3, rows=3, local_iterations=4)
    alive = model(batch(64)[0])  # never differentiated
    loss_of(model, 64).backward()
    opt.step()
    opt.zero_grad()
    loss_of(model, 64).backward()
    assert all(held(layer) == 9 for layer in captured(opt).values())
    del alive


@pytest.mark.parametrize(
    ("change", "backend"),
    [
        ({"rows": None}, "reference"), ({"rows": 20}, "reference"), ({"rows": 1}, "reference"),
        ({"rows_seed": 7}, "reference"), ({"trace": True}, "reference"),
        pytest.param({"rows": None}, "triton", marks=needs_kernels),
    ],
)  # fmt: skip
def test_what_was_captured_wins(change, backend):
    model, twin = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    for m in (model, twin):
        opt = published(m, lr=1e-3, rows=3, local_iterations=4, backend=backend)
        loss_of(m, 64).backward()
        if m is model:
            for name, value in change.items():
                setattr(opt, name, value)
        opt.step()
        assert {problem.decision.rows for problem in opt.last_reports[0].problems} == {3}
    assert all(map(torch.equal, weights(model), weights(twin)))


@pytest.mark.parametrize("iterations", [2, 9, 40])
def test_local_iterations_may_change_in_between(iterations):
    model, twin = mlp(), mlp()
    for m, before in ((model, 4), (twin, iterations)):
        opt = published(m, lr=1e-3, rows=3, local_iterations=before)
        loss_of(m, 64).backward()
        opt.param_groups[0]["local_iterations"] = iterations
        opt.step()
        assert opt.skipped_steps == 0
    same = all(map(torch.equal, weights(model), weights(twin)))
    assert same == (iterations < 4)  # otherwise sets that were kept are taken again


def test_rows_set_after_the_forward_pass():
    model, twin = mlp(), mlp()
    opt = published(model, lr=1e-3, local_iterations=4)
    loss = loss_of(model, 64)
    opt.rows = 3
    loss.backward()
    assert all(held(layer) == 9 for layer in captured(opt).values())
    opt.step()
    other = published(twin, lr=1e-3, local_iterations=4, rows=3)
    loss_of(twin, 64).backward()
    other.step()
    assert all(map(torch.equal, weights(model), weights(twin)))


def test_resume_between_steps_of_several_passes():
    def fresh():
        model = mlp()
        return model, published(model, lr=1e-3, rows=3, local_iterations=4)

    def steps(model, opt, start, count):
        for step in range(start, start + count):
            opt.zero_grad()
            one_by_one(model, loss_of, (16, 40, 9), 10 * step)
            opt.step()

    model, opt = fresh()
    steps(model, opt, 0, 2)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    steps(model, opt, 2, 2)
    again, resumed = fresh()
    one_by_one(again, loss_of, (50,), 3)  # dropped: a checkpoint has no rows
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    steps(again, resumed, 2, 2)
    assert all(map(torch.equal, weights(again), weights(model)))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_few_rows_too(how):
    model = mlp()
    opt = published(model, lr=1e-3, rows=3, local_iterations=4)
    loss_of(model, 64).backward()
    opt.step()
    twin, other = copy.deepcopy((model, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, opt)))
    for m, o in ((model, opt), (twin, other)):
        o.zero_grad()
        loss_of(m, 64, seed=2).backward()
        assert all(held(layer) == 9 for layer in captured(o).values())
        o.step()
    assert all(map(torch.equal, weights(model), weights(twin)))


def test_layers_that_come_later_keep_few_rows_too():
    model = mlp()
    opt = published(model, rows=3, local_iterations=4)
    model.append(nn.Linear(3, 3).double())
    opt.add_param_group({"params": list(model[5].parameters())})
    loss_of(model, 64).backward()
    assert held(captured(opt)["5"]) == 9


def test_bad_rows_set_later_are_refused_by_name():
    model = mlp()
    opt = published(model, rows=3)
    setattr(opt, "rows", "few")  # noqa: B010
    with pytest.raises(ValueError, match="rows must be a positive integer"):
        loss_of(model)
