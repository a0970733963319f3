"""Products that are no layer, `matmul` and `einsum`: of activations with parameters, and with each other. Those inside
attention heads are in `test_attention.py`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import test_blocks
import torch
import torch.nn.functional as F
from conftest import exact_network, images
from test_channels import Foreign, Net, conv
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

X = images(1, 3, 8, 8)


class Mixing(nn.Module):
    """Eight channels to seven by a parameter [7, 8] (or its transpose): a 1x1 convolution."""

    def __init__(self, mix: Callable[[Tensor, Tensor], Tensor], turned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn((8, 7) if turned else (7, 8)) / 3)
        self.bias, self.mix = nn.Parameter(torch.rand(7)), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, self.weight) + self.bias.view(1, -1, 1, 1)


# name: (step, whether the weight is the transpose)
MIXED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "einsum": (lambda x, w: torch.einsum("bchw,oc->bohw", x, w), False),
    "einsum, weight first": (lambda x, w: torch.einsum("oc, bchw -> bohw", w, x), False),
    "einsum, transposed": (lambda x, w: torch.einsum("bchw,cd->bdhw", x, w), True),
    "einsum, dots": (lambda x, w: torch.einsum("...c,oc->...o", x.movedim(1, -1), w).movedim(-1, 1), False),
    "matmul": (lambda x, w: (x.permute(0, 2, 3, 1) @ w).permute(0, 3, 1, 2), True),
    "matmul, weight first": (lambda x, w: (w @ x.flatten(2)).view(x.shape[0], -1, *x.shape[2:]), False),
}


@pytest.mark.parametrize("name", MIXED)
def test_with_a_parameter_it_is_a_layer(name: str) -> None:
    mix, turned = MIXED[name]
    model = Net(lambda n, x: n.a(n.m(x)), 6, m=Mixing(mix, turned), a=conv(7, 6))
    network = exact_network(model, X, plans=6)
    assert sorted(network.widths.tolist()) == [6, 7, 7 if "einsum" in name else 8]  # see products._keep_two
    slim: Any = network.slim([1] * 3)
    assert slim.m.weight.numel() == (2 if "einsum" in name else 1)


class Nodes(nn.Module):
    """Layers on nodes [N, 7, channels], and a matrix that mixes the nodes."""

    def __init__(self, step: Callable[[Any, Tensor], Tensor], learned: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step, matrix = step, torch.rand(7, 7)
        if learned:
            self.adjacency = nn.Parameter(matrix)
        else:
            self.register_buffer("adjacency", matrix)
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.step(self, self.first(x).relu()).relu().mean(1))


# name: the second layer and the product with the matrix
OF_NODES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "left": lambda n, x: n.adjacency @ n.second(n.adjacency @ x),
    "right": lambda n, x: (n.second(x).mT @ n.adjacency).mT,
    "turned": lambda n, x: n.adjacency.t() @ n.second(x),
    "one of each image": lambda n, x: n.adjacency[None] @ n.second(x),
    "einsum": lambda n, x: torch.einsum("nm,bmc->bnc", n.adjacency, n.second(x)),
    "einsum, activations first": lambda n, x: torch.einsum("bmc,mn->bnc", n.second(x), n.adjacency),
}


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", OF_NODES)
def test_a_matrix_that_mixes_nodes_leaves_their_channels_alone(name: str, learned: bool) -> None:
    network = exact_network(Nodes(OF_NODES[name], learned), images(2, 7, 4))
    assert network.widths.tolist() == [6, 8]
    slim: Any = network.slim([2, 3])
    assert slim.adjacency.shape == (7, 7)


class Given(Nodes):
    """The matrix first, on what is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.adjacency @ x)


def test_a_matrix_that_mixes_the_nodes_of_the_input() -> None:
    assert exact_network(Given(OF_NODES["left"], learned=False), images(2, 7, 4)).widths.tolist() == [6, 8]


# name: step that a parameter [7, 8] takes part in without being a layer
OTHER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "positions are summed": lambda x, w: torch.einsum("bchw,oc->bo", x, w)[..., None, None],
    "a diagonal": lambda x, w: torch.einsum("bchh,oc->boh", x, w)[..., None],
    "no arrow": lambda x, w: torch.einsum("achw,zc", x, w).permute(0, 3, 1, 2),
    "a vector": lambda x, w: x[:, :7] + (x.movedim(1, -1) @ w[0])[:, None],
    "three": lambda x, w: torch.einsum("bchw,oc,bc->bohw", x, w, x.mean((2, 3))),
}


def counts_vectors_alike() -> bool:
    found = []
    for learned in (True, False):
        with FlopCounterMode(display=False) as counter:
            X.movedim(1, -1) @ torch.ones(3, requires_grad=learned)
        found.append(counter.get_total_flops())
    return found[0] == found[1]


@pytest.mark.parametrize("name", OTHER)
def test_other_equations_are_frozen_and_named(name: str) -> None:
    if name == "a vector" and not counts_vectors_alike():
        pytest.skip("this torch's counter sees products with a vector or not, by whether that has gradients")
    model = Net(lambda n, x: n.a(n.m(x)), 6, m=Mixing(OTHER[name]), a=conv(7, 6))
    assert exact_network(model, X, plans=2, warns=r"for (einsum|matmul) in 'm'").widths.tolist() == [6]


class NonLocal(nn.Module):
    """Attention between positions, without heads (non-local networks, SAGAN, DANet): `scores` of queries and keys
    [N, 5, positions], then `values` [N, 8, positions] and weights."""

    def __init__(self, scores: Callable[..., Tensor], values: Callable[..., Tensor], norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1), nn.Conv2d(8, 7, 1)
        self.norm, self.out, self.gamma = norm, nn.Conv2d(7, 8, 1), nn.Parameter(torch.ones(1))
        self.scores, self.values = scores, values

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        weights = self.scores(self.norm(self.q(x)).view(n, -1, h * w), self.k(x).flatten(2)).softmax(-1)
        found = self.values(self.v(x).view(n, -1, h * w), weights)
        return x + self.gamma * self.out(found.view(n, -1, h, w))


def bmm(q: Tensor, k: Tensor) -> Tensor:
    return torch.bmm(q.permute(0, 2, 1), k)


def bmm_values(v: Tensor, weights: Tensor) -> Tensor:
    return torch.bmm(v, weights.permute(0, 2, 1))


def einsum(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bci,bcj->bij", q, k)


def einsum_values(v: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("bcj,bij->bci", v, weights)


def non_local(scores: Callable[..., Tensor], values: Any = bmm_values, norm: nn.Module | None = None) -> nn.Module:
    return Net(lambda n, x: n.a(n.m(x)), 6, m=NonLocal(scores, values, norm or nn.Identity()), a=conv(8, 6))


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm2d(5), nn.ReLU()], ids=lambda norm: type(norm).__name__)
def test_attention_without_heads(norm: nn.Module) -> None:
    assert sorted(exact_network(non_local(bmm, norm=norm), X).widths.tolist()) == [5, 6, 7, 8]


def test_attention_without_heads_as_einsum() -> None:
    widths = exact_network(non_local(einsum, einsum_values), X).widths.tolist()
    assert sorted(widths) == [4, 6, 7, 8]  # of queries one channel stays, see products._keep_two


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_without_heads(masked: bool) -> None:
    """The number of queries' and keys' channels scales the product, so they stay; values lose theirs."""
    mask = torch.full((64, 64), -torch.inf).triu(1) if masked else None

    def attend(n: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2).mT for layer in (n.q, n.k, n.v))
        return n.out(F.scaled_dot_product_attention(q, k, v, mask).mT.unflatten(2, (8, 8)))

    parts: dict[str, nn.Module] = {"q": nn.Conv2d(8, 5, 1), "k": nn.Conv2d(8, 5, 1), "v": nn.Conv2d(8, 7, 1)}
    model = Net(attend, 6, **parts, out=conv(7, 6))
    assert sorted(exact_network(model, X).widths.tolist()) == [6, 7, 8]


@pytest.mark.parametrize("feature", [F.relu, F.elu])
def test_heads_of_linear_attention(feature: Callable[[Tensor], Tensor]) -> None:
    """As in EfficientViT: no softmax, and a column of ones beside the values, which sums the weights."""

    def attend(n: Any, x: Tensor) -> Tensor:
        q, k, v = n.qkv(x).view(len(x), -1, 15, 64).mT.chunk(3, -1)
        found = feature(q) @ (feature(k).mT @ F.pad(v, (0, 1), value=1.0))
        return n.out((found[..., :-1] / (found[..., -1:] + 9)).mT.reshape(len(x), -1, *x.shape[2:]))

    model = Net(attend, 6, qkv=nn.Conv2d(8, 45, 1), out=conv(15, 6))
    assert sorted(exact_network(model, X).widths.tolist()) == [3, 6, 8]


# what is not zero where a channel was removed on both sides, or depends on how many there are: step on queries and keys
NOT_ZERO: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "sigmoid": (lambda q, k: bmm(q.sigmoid(), k.exp()), "for bmm in 'm'"),
    "positions added": (lambda q, k: bmm(q + q.mean(1, True), k + 1), "for bmm in 'm'|for mean in 'm'"),
    "a constant": (lambda q, k: bmm(q + 1, k + torch.linspace(0, 1, 64)), "for bmm in 'm'"),
    "its root": (lambda q, k: bmm(q, k) * q.shape[1] ** -0.5, "number of channels"),
}


@pytest.mark.parametrize("name", NOT_ZERO)
def test_sums_over_channels_that_are_not_zero_once_removed_are_frozen(name: str) -> None:
    scores, warns = NOT_ZERO[name]
    assert sorted(exact_network(non_local(scores), X, plans=4, warns=warns).widths.tolist()) == [6, 7, 8]


@pytest.mark.parametrize(
    ("scores", "norm"),
    [(lambda q, k: bmm(q.sigmoid(), k), nn.Identity()), (lambda q, k: bmm(q, k + 1), nn.BatchNorm2d(5))],
    ids=["keys", "queries"],
)
def test_one_side_that_vanishes_is_enough(scores: Callable[[Tensor, Tensor], Tensor], norm: nn.Module) -> None:
    assert sorted(exact_network(non_local(scores, norm=norm), X).widths.tolist()) == [5, 6, 7, 8]


class Plain(nn.Module):
    """A norm without weights: what it gives for a removed channel depends on its statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(5, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_a_norm_without_weights_gives_no_zeros() -> None:
    model = non_local(lambda q, k: bmm(q, k + 1), norm=Plain())
    assert sorted(exact_network(model, X, plans=4, warns="for bmm in 'm'").widths.tolist()) == [6, 7, 8]


def test_channels_with_channels_are_frozen_and_named() -> None:
    """The weights of DANet's other attention are a matrix of channels."""
    model = Net(lambda n, x: n.a(n.m(x)), 6, deep=True, m=Channelwise(), a=conv(8, 6))
    assert sorted(exact_network(model, X, plans=4, warns="for bmm in 'm'").widths.tolist()) == [5, 6]


class Channelwise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        return x + torch.bmm(torch.bmm(flat, flat.transpose(1, 2)).softmax(-1), flat).view(x.shape)


# einsum that goes channel by channel
CHANNELWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "gate": lambda x: torch.einsum("bchw,bc->bchw", x, x.mean((2, 3)).sigmoid()),
    "rows": lambda x: torch.einsum("bchw,bcwk->bchk", x, x.softmax(-1)),
    "turned": lambda x: torch.einsum("bchw,bhck->bhwc", x, x.transpose(1, 2)).permute(0, 3, 1, 2),
    "pooled": lambda x: x * torch.einsum("bchw,bhw->bc", x, torch.ones(1, 8, 8))[..., None, None],
}


@pytest.mark.parametrize("name", CHANNELWISE)
def test_channel_by_channel(name: str) -> None:
    step = CHANNELWISE[name]
    model = Net(lambda n, x: n.a(step(x)), 6, a=conv(8, 6))
    assert sorted(exact_network(model, X).widths.tolist()) == [6, 8]


def test_heads_anywhere_in_the_equation() -> None:
    """Positions before heads, as flax and the transformers of fast-transformers have them."""

    def attend(n: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2).transpose(1, 2).unflatten(-1, (-1, 5)) for layer in (n.q, n.k, n.v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        key = F.elu(k) + 1
        found = torch.einsum("bhqk,bkhd->bqhd", scores, v)
        found = found / (torch.einsum("nlhd,nhd->nlh", F.elu(q) + 1, key.sum(1))[..., None] + 1e-6)
        return n.out(found.flatten(2).transpose(1, 2).unflatten(2, x.shape[2:]))

    parts = {name: nn.Conv2d(8, 15, 1) for name in "qkv"}
    model = Net(attend, 6, **parts, out=conv(15, 6))
    assert sorted(exact_network(model, X).widths.tolist()) == [3, 6, 8]


# ---- mixtures ------------------------------------------------------------------------------------------------------


def a_step(rng: random.Random) -> nn.Module:
    """Eight channels -> eight, as one of the networks of this file or of `test_blocks` has them."""
    mix, turned = rng.choice([*MIXED.values()])
    norm = rng.choice([test_blocks.folded, test_blocks.plain, test_blocks.of_the_image, test_blocks.of_the_image_flat])
    choose = rng.choice([test_blocks.stacked, test_blocks.concatenated, test_blocks.largest, test_blocks.indexed])
    scores, values = rng.choice(
        [(bmm, bmm_values), (einsum, einsum_values), (lambda q, k: bmm(q.exp(), k), bmm_values)]
    )
    made: list[Callable[[], nn.Module]] = [
        lambda: test_blocks.Scale(rng.choice([*test_blocks.RESHAPED.values()])),
        lambda: test_blocks.Statistics(norm),
        lambda: test_blocks.Selective(choose),
        lambda: nn.Sequential(Mixing(mix, turned), nn.Conv2d(7, 8, 1)),
        lambda: NonLocal(scores, values, rng.choice([nn.Identity(), nn.BatchNorm2d(5), nn.ReLU()])),
        lambda: Foreign(rng.choice([*CHANNELWISE.values()])),
    ]
    return rng.choice(made)()


@pytest.mark.parametrize("seed", range(8))
def test_mixtures(seed: int) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    steps = nn.ModuleList(a_step(rng) for _ in range(3))
    residual = [rng.random() < 0.3 for _ in steps]

    def forward(n: Any, x: Tensor) -> Tensor:
        for part, added in zip(n.steps, residual, strict=True):
            x = part(x).tanh() + (x if added else 0)
        return n.a(x)

    network = exact_network(Net(forward, 6, deep=True, steps=steps, a=conv(8, 6)), X, plans=5)
    widths = network.widths.tolist()
    assert 5 in widths and 6 in widths and {7, 8} & {*widths}  # the deep stem, the last layer, and what the steps have
