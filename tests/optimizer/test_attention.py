"""Projections of attention, exposed as layers, compute and train as before."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from locoprop_torch import expose_projections
from locoprop_torch.modules import MultiheadAttention
from tests.helpers import published


def attention_arguments(case):
    torch.manual_seed(1)
    x, memory = torch.randn(3, 5, 8), torch.randn(3, 6, 8)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.arange(6) >= torch.tensor([6, 4, 5])[:, None]
    return {
        "self": ((x, x, x), {}),
        "causal": ((x, x, x), {"attn_mask": causal, "is_causal": True, "need_weights": False}),
        "cross": ((x, memory, memory), {"key_padding_mask": padding, "average_attn_weights": False}),
        "masks": (
            (x, memory, memory),
            {"key_padding_mask": padding, "attn_mask": torch.randn(6, 5, 6), "need_weights": False},
        ),
        "unbatched": ((x[0], memory[0], memory[1]), {"attn_mask": torch.randn(5, 6)}),
    }[case]


@pytest.mark.parametrize("options", [{"batch_first": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("case", ["self", "causal", "cross", "masks", "unbatched"])
def test_exposed_projections_compute_the_same(case, options):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, **options)
    nn.init.normal_(attention.out_proj.weight)
    inputs, masks = attention_arguments(case)
    if not attention.batch_first and case != "unbatched":
        inputs = [x.transpose(0, 1) for x in inputs]
    expected, weights = attention(*inputs, **masks)
    actual, actual_weights = expose_projections(attention)(*inputs, **masks)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_weights, weights)


def test_exposed_projections_of_other_dimensions():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    inputs = torch.randn(3, 5, 8), torch.randn(3, 7, 6), torch.randn(3, 7, 4)
    torch.testing.assert_close(expose_projections(attention)(*inputs), attention(*inputs))


def test_transformer_layers_are_trained_through_exposed_projections():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    norms = [p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()]
    with pytest.raises(ValueError, match=r"self_attn\.in_proj_weight.*expose_projections"):
        published(model, aux=torch.optim.AdamW(norms))
    x = torch.randn(4, 5, 8)
    expected = model(x)
    model = expose_projections(model)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.eval()(x), expected)
    opt = published(model.train(), lr=1e-3, activation_lr=100.0, aux=torch.optim.AdamW(norms, 1e-3))
    losses = []
    for _ in range(10):
        opt.zero_grad()
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert "layers.0.self_attn.q_proj" in repr(opt)
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="add_bias_kv"):
        expose_projections(nn.MultiheadAttention(8, 2, add_bias_kv=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
def test_encoders_that_exist_already_evaluate_padded_batches(mode, norm_first, batch_first):
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 2, 1, 12, norm_first=norm_first, batch_first=batch_first)
    exposed = expose_projections(copy.deepcopy(model))
    x, padding = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([5, 2, 4])[:, None]
    x = x if batch_first else x.transpose(0, 1)
    with mode():
        expected, actual = (m.eval().encoder(x, src_key_padding_mask=padding) for m in (model, exposed))
        valid = ~padding if batch_first else ~padding.T
        torch.testing.assert_close(actual[valid], expected[valid])
        whole, target = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}, x.flip(0)
        torch.testing.assert_close(exposed(x, target, **whole), model(x, target, **whole))


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 4}], ids=str)
def test_what_is_frozen_stays_frozen(options):
    for trained in ("bias", "weight", "in_proj", "out_proj"):
        attention = nn.MultiheadAttention(8, 2, **options)
        for name, p in attention.named_parameters():
            p.requires_grad_(trained in name)
        exposed = expose_projections(attention)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            for kind in ("weight", "bias"):
                of_input = f"in_proj_{kind}" if kind == "bias" or not options else f"{name}_weight"
                original = f"out_proj.{kind}" if name == "out_proj" else of_input
                p = exposed.get_parameter(f"{name}.{kind}")
                assert p.requires_grad == (trained in original)
                assert p.is_leaf


class Doubled(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return 2 * output, weights


def test_attention_with_a_forward_of_its_own_stays(caplog):
    own, patched = Doubled(8, 2), nn.MultiheadAttention(8, 2)
    patched.forward = lambda *args: (args[0], None)  # type: ignore[method-assign]
    model = nn.ModuleList([own, nn.MultiheadAttention(8, 2), patched, nn.Linear(8, 8)])
    expose_projections(model)
    assert [type(m).__name__ for m in model] == ["Doubled", "MultiheadAttention", "MultiheadAttention", "Linear"]
    assert model[0] is own
    assert model[2] is patched
    assert isinstance(model[1], MultiheadAttention)
    assert "as they are, since their forward is not that of torch.nn.MultiheadAttention: Doubled" in caplog.text
    with pytest.raises(ValueError, match=r"0\.in_proj_weight"):
        published(model)
    with pytest.raises(TypeError, match="attention must have the forward of torch.nn, got Doubled with another"):
        MultiheadAttention(own)


def test_hooks_on_attention_go_with_it():
    attention, seen = nn.MultiheadAttention(8, 2), []
    handle = attention.register_forward_hook(lambda m, args, out: seen.append((m, "after")))
    attention.register_forward_pre_hook(lambda m, args, kwargs: seen.append((m, "before")), with_kwargs=True)
    attention.register_full_backward_hook(lambda m, before, after: seen.append((m, "backward")))
    exposed = expose_projections(attention)
    x = torch.randn(5, 3, 8, requires_grad=True)
    exposed(x, x, x)[0].sum().backward()
    assert seen == [(exposed, "before"), (exposed, "after"), (exposed, "backward")]
    handle.remove()
    exposed(x, x, x)
    assert [what for _, what in seen[3:]] == ["before"]


def test_parameters_that_attention_computes_with_are_not_lost():
    pruned = nn.MultiheadAttention(8, 2)
    prune.random_unstructured(pruned, "in_proj_weight", 0.5)
    normed = nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(8, 2), "in_proj_weight")
    for attention, name in ((pruned, "in_proj_weight_orig"), (normed, "parametrizations.in_proj_weight.original0")):
        model = nn.Sequential(nn.MultiheadAttention(8, 2), attention)
        with pytest.raises(ValueError, match=f"no parameters but those of torch.nn, got {name}"):
            expose_projections(model)
        assert not any(isinstance(m, MultiheadAttention) for m in model)
