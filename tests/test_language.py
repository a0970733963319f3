"""Networks of words as people write them: tables, layers that hold their sizes, queries that share keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import exact_network
from torch import Tensor, nn

WORDS, SIZE, HEADS, HEAD = 30, 24, 4, 6
X = torch.randint(0, WORDS, (2, 7), generator=torch.Generator().manual_seed(0))
NORMS = "No channel rule for layer_norm"


class TextCNN(nn.Module):
    """Kim 2014: words, convolutions of several lengths, the maximum over time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, 12, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(12, 8, length, padding=2) for length in (3, 4))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x).transpose(1, 2)
        return self.head(torch.cat([conv(x).relu().amax(2) for conv in self.convs], 1))


def test_words_lose_features() -> None:
    network = exact_network(TextCNN(), X)
    assert network.widths.tolist() == [12, 8, 8]
    slim: Any = network.slim([5, 8, 8])
    assert slim.words.weight.shape == (WORDS, 5)
    assert slim.words.embedding_dim == 5


def test_a_table_that_is_also_the_last_layer() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.mix = nn.Embedding(WORDS, 12), nn.Conv1d(12, 12, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.words(x)
            return F.linear(x + self.mix(x.transpose(1, 2)).transpose(1, 2), self.words.weight)

    assert exact_network(Tied(), X).widths.tolist() == [12]


def test_a_computed_table_is_frozen_and_named() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.wide, self.head = nn.Embedding(WORDS, 12), nn.Linear(12, 9), nn.Linear(9, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.embedding(x, self.wide(self.words(torch.arange(WORDS)))))

    assert exact_network(Computed(), X, warns="No channel rule for embedding").widths.tolist() == [12]


class Projection(nn.Module):
    """A linear layer that lies [inputs, outputs] and keeps their numbers, as GPT-2 has it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.outputs, self.inputs = outputs, inputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 5), nn.Parameter(torch.rand(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.outputs)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


class Attention(nn.Module):
    def __init__(self, inside: int) -> None:
        super().__init__()
        self.size, self.part = SIZE, inside
        self.all, self.out = Projection(3 * inside, SIZE), Projection(SIZE, inside)

    def forward(self, x: Tensor) -> Tensor:
        parts = [part.view(*part.shape[:-1], -1, HEAD).transpose(1, 2) for part in self.all(x).split(self.part, 2)]
        return self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, inside: int) -> None:
        super().__init__()
        self.attention, self.norms = Attention(inside), nn.ModuleList(nn.LayerNorm(SIZE) for _ in range(2))
        self.up, self.down = Projection(40, SIZE), Projection(SIZE, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Language(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.words, self.blocks = nn.Embedding(WORDS, SIZE), nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.words(x))


@pytest.mark.parametrize("inside", [SIZE, 2 * SIZE], ids=["as wide as the sum", "wider"])
def test_numbers_that_two_modules_hold(inside: int) -> None:
    """The projection's and the split's have to change together; where `inside` is the size of the residual sum, which
    stays, that of the last projection equals theirs by chance."""
    torch.manual_seed(0)
    network = exact_network(Language(Block(inside), Block(inside)), X, plans=4, warns=NORMS)
    assert network.widths.tolist() == [inside // HEAD, 40] * 2
    slim: Any = network.slim([1, 7, 2, 9])
    assert [block.attention.all.outputs for block in slim.blocks] == [3 * HEAD, 6 * HEAD]
    assert [block.attention.part for block in slim.blocks] == [HEAD, 2 * HEAD]
    assert [(block.attention.out.outputs, block.attention.size) for block in slim.blocks] == [(SIZE, SIZE)] * 2
    assert [block.up.outputs for block in slim.blocks] == [7, 9]


def test_one_class_of_which_some_hold_a_number_that_nothing_updates() -> None:
    """The layers in the attention can't follow, those beside it do."""

    class Fixed(Attention):
        def forward(self, x: Tensor) -> Tensor:
            parts = [part.view(*part.shape[:-1], 4, HEAD).transpose(1, 2) for part in self.all(x).split(SIZE, 2)]
            return self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))

    block = Block(SIZE)
    block.attention = Fixed(SIZE)
    with pytest.warns(UserWarning, match=r"'blocks.0.attention' .* holds a number of channels"):
        network = exact_network(Language(block), X, plans=4, warns=NORMS)
    assert network.widths.tolist() == [40]


def turned(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


class Grouped(nn.Module):
    """Queries share keys and values, and positions turn them (RoPE); a bias by distance, with `where` for what is
    too far away."""

    def __init__(self, shared: int, bias: bool, each: bool) -> None:
        super().__init__()
        kept, self.each = HEADS // shared, each
        self.shared, self.q = shared, nn.Linear(SIZE, HEADS * HEAD)
        self.k, self.v = nn.Linear(SIZE, kept * HEAD), nn.Linear(SIZE, kept * HEAD)
        self.out = nn.Linear(HEADS * HEAD, SIZE)
        self.distances = nn.Embedding(8, HEADS) if bias else None

    def repeated(self, x: Tensor) -> Tensor:
        if self.each:
            return x.repeat_interleave(self.shared, 1)
        n, heads, length, size = x.shape
        x = x[:, :, None].expand(n, heads, self.shared, length, size)
        return x.reshape(n, heads * self.shared, length, size)

    def bias(self, length: int) -> Tensor:
        far = (torch.arange(length)[:, None] - torch.arange(length)).abs()
        table = self.distances(far.clamp(max=7)).permute(2, 0, 1)[None]  # type: ignore[misc]
        return torch.where(far > 4, -1e4, table)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(*x.shape[:2], -1, HEAD).transpose(1, 2) for part in (self.q, self.k, self.v))
        at = torch.arange(x.shape[1])[:, None] / 3
        q, k = (y * at.cos() + turned(y) * at.sin() for y in (q, k))
        scores = q @ self.repeated(k).transpose(2, 3)
        scores = scores if self.distances is None else scores + self.bias(x.shape[1])
        return self.out((scores.softmax(-1) @ self.repeated(v)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("each", [False, True], ids=["expanded", "repeated"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [2, 4])
def test_heads_that_share_keys_go_together(shared: int, bias: bool, each: bool) -> None:
    torch.manual_seed(0)
    before = nn.Linear(SIZE, 9)
    model = Language(before, nn.ReLU(), nn.Linear(9, SIZE), Grouped(shared, bias, each), nn.Linear(SIZE, 3))
    network = exact_network(model, X)
    heads = [HEADS // shared] if shared < HEADS else []  # a single one stays
    assert sorted(network.widths.tolist()) == sorted([SIZE, 9, SIZE, SIZE, *heads])


@pytest.mark.parametrize("name", ["leaky", "gated", "the larger"])
def test_comparisons(name: str) -> None:
    class Compared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.side, self.head = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x, y = self.up(x), self.side(x)
            made = {
                "leaky": torch.where(x > 0, x, 0.1 * y),
                "gated": x * (x >= y),
                "the larger": torch.where(y < x, x, y.detach()) * (x <= 2),
            }
            return self.head(made[name])

    assert exact_network(Compared(), torch.randn(4, 5)).widths.tolist() == [8]
