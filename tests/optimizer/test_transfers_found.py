"""Which transfer function each layer of an optimiser has, as its ``repr`` says."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from locoprop_torch import GroupedLinear, LocoProp, expose_projections
from tests.helpers import transfers_of


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
    found = {name[-1]: transfer for name, transfer in transfers_of(opt).items()}
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
    assert transfers_of(opt) == {
        "body.0": "softplus(beta=1)", "body.3": "identity", "head": "sigmoid",
    }  # fmt: skip


def test_a_layer_followed_by_different_functions_gets_the_identity():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return torch.tanh(self.layer(torch.relu(self.layer(x))))

    assert transfers_of(LocoProp(Twice())) == {"layer": "identity"}


def test_softmax_over_channels_and_groups():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Softmax(dim=1))
    assert transfers_of(LocoProp(model)) == {"0": "softmax"}
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Softmax(dim=-1))
    assert transfers_of(LocoProp(model)) == {"0": "identity"}
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Softmax(dim=1))
    with pytest.raises(ValueError, match="must be elementwise, got softmax"):
        LocoProp(model)


@pytest.mark.parametrize(
    ("module", "name"),
    [(nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.SiLU(), "silu"), (nn.ReLU(), "relu")],
    ids=str,
)
def test_transfers_of_transformers_are_found(module, name):
    assert transfers_of(LocoProp(nn.Sequential(nn.Linear(3, 3), module))) == {"0": name}
    layer = nn.TransformerEncoderLayer(8, 2, 12, activation=module, batch_first=True)
    aux = torch.optim.AdamW([p for n, p in layer.named_parameters() if "linear" not in n])
    found = transfers_of(LocoProp(layer, aux=aux))
    assert (found["linear1"], found["linear2"]) == (name, "identity")


def test_functional_transfers_beside_our_own_modules():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = expose_projections(nn.MultiheadAttention(8, 2, batch_first=True))
            self.experts, self.conv, self.up = GroupedLinear(4, 2, 2), nn.Conv1d(5, 5, 1), nn.Linear(8, 3)

        def forward(self, x):
            x = x + self.attention(x, x, x, need_weights=False)[0]
            x = torch.tanh(self.experts(x.unflatten(-1, (4, 2)).movedim(2, 0))).movedim(0, 2).flatten(2)
            return F.silu(self.up(torch.softmax(self.conv(x), 1)))

    assert transfers_of(LocoProp(nn.Sequential(Block(), nn.Identity()))) == {
        **{f"0.attention.{name}_proj": "identity" for name in ("q", "k", "v", "out")},
        "0.experts": "tanh",
        "0.conv": "softmax",
        "0.up": "silu",
    }
