"""Projections of attention, exposed as layers, compute and train as before."""

import pytest
import torch
from torch import nn

from locoprop_torch import expose_projections
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
