"""A small GPT on characters: LocoProp on its projections, AdamW on the rest."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import published

TEXT = (
    "it was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of light, it was the season of "
    "darkness, it was the spring of hope, it was the winter of despair. "
)
ALPHABET = sorted(set(TEXT))
CONTEXT = 32


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, width=32, heads=2, depth=2, tied=False):
        super().__init__()
        self.tokens, self.places = nn.Embedding(len(ALPHABET), width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(ALPHABET), bias=False)
        if tied:
            self.head.weight = self.tokens.weight
            nn.init.normal_(self.tokens.weight, std=0.1)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def losses(model, opt, steps):
    text = torch.tensor([ALPHABET.index(letter) for letter in TEXT])
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT - 1, (16,))
        windows = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
        opt.zero_grad()
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        opt.step()
        yield loss.item()


@pytest.mark.parametrize("tied", [False, True])
def test_loss_falls(tied):
    torch.manual_seed(0)
    model = GPT(tied=tied)
    projections = {id(p) for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    aux = torch.optim.AdamW([p for p in model.parameters() if id(p) not in projections], lr=3e-3)
    # The loss is a mean over 16 * 32 tokens, and so is the local loss: γ makes up for one of the two.
    opt = published(model, lr=1e-3, activation_lr=500.0, local_iterations=4, aux=aux)
    assert "gelu" in repr(opt)
    history = list(losses(model, opt, 60))
    assert opt.skipped_steps == 0
    assert history[0] > 3
    assert sum(history[-5:]) / 5 < 1.7
