"""Layers whose weights a forward turns, casts or scales before it uses them, and channels that become pixels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import exact_network, images
from test_channels import Foreign, Net, conv
from torch import Tensor, nn

from gnnrl_gym.pruning.sparsity import SparseNetwork

X = images(2, 3, 8, 8)


class Mixing(nn.Module):
    """Eight channels to seven by a matrix [7, 8], or of another `shape`, and a bias: a 1x1 convolution, as `mix` of
    what lies [N, H, W, 8], the matrix and the bias."""

    def __init__(self, mix: Callable[[Tensor, Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.randn(shape or (7, 8)) / 3), nn.Parameter(torch.rand(7))
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


def addmm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """As GPT-2's Conv1D."""
    return torch.addmm(b, x.reshape(-1, x.shape[-1]), w).view(*x.shape[:-1], w.shape[1])


def mm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (torch.mm(x.flatten(0, 2), w) + b).unflatten(0, x.shape[:-1])


# name: (step, shape of the matrix)
LAYERS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "addmm": (addmm, (8, 7)),
    "addmm, one bias for all": (lambda x, w, b: addmm(x, w, b[:1]), (8, 7)),
    "mm": (mm, (8, 7)),
    "t": (lambda x, w, b: F.linear(x, w.t(), b), (8, 7)),
    "mT": (lambda x, w, b: F.linear(x, w.mT, b), (8, 7)),
    "T, multiplied": (lambda x, w, b: x @ w.T + b, (7, 8)),
    "permuted filters": (lambda x, w, b: F.conv2d(x.permute(0, 3, 1, 2), w.permute(3, 2, 0, 1), b).permute(0, 2, 3, 1),
                         (1, 1, 8, 7)),
    "turned and back": (lambda x, w, b: F.linear(x, w.t().swapaxes(0, 1), b), (7, 8)),
    "turned thrice": (lambda x, w, b: F.linear(x, w.t().transpose(0, 1).movedim(0, 1), b), (8, 7)),
    "cast": (lambda x, w, b: F.linear(x.double(), w.to(torch.float64), b.to(torch.float64)).float(), (7, 8)),
    "equalised": (lambda x, w, b: F.linear(x, w * 0.5, b * 2), (7, 8)),
    "scaled from the left": (lambda x, w, b: F.linear(x, -(0.5 * w / 3), b), (7, 8)),
    "computed bias": (lambda x, w, b: F.linear(x, w, b.exp()), (7, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_followed_through_what_is_done_to_them(name: str) -> None:
    mix, shape = LAYERS[name]
    model = Net(lambda n, x: n.a(n.m(x)), 6, m=Mixing(mix, *shape), a=conv(7, 6))
    assert sorted(exact_network(model, X, plans=6).widths.tolist()) == [6, 7, 8]


# what is done to a matrix [7, 8], or its like -> what the warning names
COMPUTED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "something added": (lambda x, w, b: F.linear(x, w + 1, b), "add in 'm'"),
    "divided by": (lambda x, w, b: F.linear(x, 2 / w, b), "reciprocal in 'm'"),
    "by itself": (lambda x, w, b: F.linear(x, w * w, b), "mul in 'm'"),
    "rows scaled": (lambda x, w, b: F.linear(x, w * b[:, None], b), "linear in 'm'"),
    "added to every position": (lambda x, w, b: addmm(x, w.t(), torch.ones(x.numel() // 8, 1)), "addmm in 'm'"),
    "weight first": (lambda x, w, b: torch.addmm(b[:1], w, x.reshape(-1, 8).t()).t().unflatten(0, x.shape[:-1]),
                     "addmm in 'm'"),
    "softmax": (lambda x, w, b: F.linear(x, w.softmax(1), b), "softmax in 'm'"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
def test_other_computed_weights_are_frozen_and_named(name: str) -> None:
    mix, named = COMPUTED[name]
    model = Net(lambda n, x: n.a(n.m(x)), 6, m=Mixing(mix), a=conv(7, 6))
    assert exact_network(model, X, plans=2, warns=named).widths.tolist() == [6]


class Scaled(nn.Conv2d):
    """With a learned number for all filters."""

    def __init__(self, scaled: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(8, 7, 3)
        self.scaled, self.scale = scaled, nn.Parameter(torch.tensor(0.3))

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.scaled(self.scale, self.weight), self.bias)


@pytest.mark.parametrize("scaled", [torch.mul, lambda s, w: w / s], ids=["times", "over"])
def test_a_learned_scale_of_all_filters(scaled: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert sorted(exact_network(Net(lambda n, x: n.m(x), 7, m=Scaled(scaled)), X).widths.tolist()) == [7, 8]


def test_a_scale_over_filters_is_frozen_and_named() -> None:
    model = Net(lambda n, x: n.a(n.m(x)), 6, m=Scaled(torch.div), a=conv(7, 6))
    assert exact_network(model, X, plans=2, warns="div in 'm'").widths.tolist() == [6]


def test_grouped_filters_that_are_turned_are_frozen() -> None:
    def mix(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x.permute(0, 3, 1, 2), w.permute(3, 2, 0, 1), groups=4).permute(0, 2, 3, 1)

    model = Net(lambda n, x: n.a(n.m(x)), 6, m=Mixing(mix, 1, 1, 2, 8), a=conv(8, 6))
    assert exact_network(model, X, plans=2, warns="conv2d in 'm'").widths.tolist() == [6]


def test_one_matrix_both_ways() -> None:
    """Tied, as the two halves of an autoencoder are."""
    mixing = Mixing(lambda x, w, b: F.linear(F.linear(x, w, b).relu(), w.t()))
    model = Net(lambda n, x: n.m(x), 8, m=mixing)
    assert sorted(exact_network(model, X).widths.tolist()) == [7, 8]


def test_single_weights_of_computed_matrices_stay() -> None:
    model = Net(lambda n, x: n.m(x), 7, m=Mixing(lambda x, w, b: F.linear(x, w * 2, b)))
    with pytest.warns(UserWarning, match="leaves m dense: the weights there are computed"):
        network = SparseNetwork(model, X, "unstructured")
    assert "m.weight" not in network.slimmer.units


@pytest.mark.parametrize("factor", [2, 3])
def test_channels_become_pixels(factor: int) -> None:
    """As in ESPCN's upsampling; what becomes one channel goes as a whole."""
    parts = {"a": conv(8, 5 * factor**2), "up": nn.PixelShuffle(factor), "b": conv(5, 6)}
    network = exact_network(Net(lambda n, x: n.b(n.up(n.a(x))), 6, **parts), X)
    assert sorted(network.widths.tolist()) == [5, 6, 8]


def test_pixels_become_channels() -> None:
    parts = {"down": nn.PixelUnshuffle(2), "a": conv(32, 6)}
    network = exact_network(Net(lambda n, x: n.a(n.down(x)), 6, **parts), X)
    assert sorted(network.widths.tolist()) == [6, 8]


def test_pixels_and_back() -> None:
    there = Foreign(lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2) * 2, 2))
    model = Net(lambda n, x: n.a(n.m(x)), 6, m=there, a=conv(8, 6))
    assert sorted(exact_network(model, X).widths.tolist()) == [6, 8]


def test_pixel_shuffle_at_the_end_keeps_its_channels() -> None:
    model = nn.Sequential(conv(3, 8), nn.Conv2d(8, 12, 3), nn.PixelShuffle(2))
    assert exact_network(model, X).widths.tolist() == [8]


class Placed(nn.Module):
    """Every pixel's channels get a bias that two layers make of its place: continuous position bias, as in Swin v2."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(7, 3, 1)
        self.place = nn.Sequential(nn.Linear(2, 9), nn.ReLU(), nn.Linear(9, 7))
        self.table = table
        self.register_buffer("order", torch.arange(64).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.place(self.table)[self.order]  # [64, 7]
        return self.head((self.conv(x) + bias.t().unflatten(1, (8, 8))).relu())


@pytest.mark.parametrize("kind", [nn.Parameter, nn.Buffer])
def test_layers_on_a_table_of_numbers(kind: Callable[[Tensor], Tensor]) -> None:
    network = exact_network(Placed(kind(images(64, 2))), X)
    assert sorted(network.widths) == [7, 9]


def test_a_part_of_a_bias_that_is_set_to_zero() -> None:
    class Keyless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.joint, self.head = nn.Conv2d(3, 14, 1), nn.Conv2d(7, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            bias = self.joint.bias.clone()
            bias[: len(bias) // 2].zero_()
            queries, keys = F.conv2d(x, self.joint.weight, bias).chunk(2, 1)
            return self.head(queries * keys)

    assert exact_network(Keyless(), X).widths.tolist() == [7]
