"""Operations that move elements: repeated, chosen by indices, viewed as another tensor; and modules that hold the sizes
of the parts that they cut channels into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import exact_network, images
from test_channels import Net, Step, conv
from torch import Tensor, nn

X = images(2, 3, 8, 8)
ORDER = torch.randperm(8, generator=torch.Generator().manual_seed(0))


def by_columns(step: Callable[[Tensor], Tensor]) -> Step:
    """`step` on [N, positions, channels], and a layer after it."""
    return lambda n, x: n.after(step(x.flatten(2).mT).mT.unflatten(2, (8, 8)))


# name: (body, channels that it gives, its layers, widths)
FOLLOWED: dict[str, tuple[Step, int, dict[str, nn.Module], list[int]]] = {
    "viewed as itself": (
        lambda n, x: n.after(n.norm(x.flatten(2).mT.flatten(0, 1)).view(-1, 64, x.shape[1]).mT.reshape_as(x)),
        6, {"norm": nn.BatchNorm1d(8), "after": conv(8, 6)}, [6, 8],
    ),
    "viewed as another": (
        lambda n, x: n.after(n.same(x).flatten(2).view_as(x)), 6, {"same": conv(8, 8), "after": conv(8, 6)}, [6, 8],
    ),
    "repeated": (lambda n, x: n.after(x.repeat(1, 3, 1, 1)), 6, {"after": conv(24, 6)}, [6, 8]),
    "a parameter repeated": (
        lambda n, x: n.after(x.repeat(1, 3, 1, 1) * n.scale.weight.repeat(3)[:, None, None]),
        6, {"scale": nn.PReLU(8), "after": conv(24, 6)}, [6, 8],
    ),
    "repeated positions": (lambda n, x: n.after(x.repeat(2, 1, 2, 1)), 6, {"after": conv(8, 6)}, [6, 8]),
    "one more dimension": (lambda n, x: n.after(x.repeat(2, 1, 1, 1, 1).sum(0)), 6, {"after": conv(8, 6)}, [6, 8]),
    "each repeated": (lambda n, x: n.after(x.repeat_interleave(3, 1)), 6, {"after": conv(24, 6)}, [6, 8]),
    "each row repeated": (lambda n, x: n.after(x.repeat_interleave(2, dim=-2)), 6, {"after": conv(8, 6)}, [6, 8]),
    "rows by index": (lambda n, x: n.after(x[:, :, ORDER]), 6, {"after": conv(8, 6)}, [6, 8]),
    "columns by index": (lambda n, x: n.after(x[..., ORDER[:5]]), 6, {"after": conv(8, 6)}, [6, 8]),
    "pixels by two indices": (
        lambda n, x: n.after(x[:, :, ORDER[:, None], ORDER]), 6, {"after": conv(8, 6)}, [6, 8],
    ),
    "a table of indices": (
        lambda n, x: n.after(x[:, :, ORDER.view(2, 4)].flatten(2, 3)), 6, {"after": conv(8, 6)}, [6, 8],
    ),
    "channels last": (
        by_columns(lambda x: x[:, ORDER.repeat(8) + 8 * torch.arange(8).repeat_interleave(8)]),
        6, {"after": conv(8, 6)}, [6, 8],
    ),
    "channels last, by a table": (
        by_columns(lambda x: x[:, torch.arange(64).flip(0).view(8, 8)].flatten(1, 2)), 6, {"after": conv(8, 6)}, [6, 8],
    ),
    "beside nothing": (
        lambda n, x: n.after(torch.cat([x[:, :, :0], x, x[:, :, :2]], 2)), 6, {"after": conv(8, 6)}, [6, 8],
    ),
    "beside no channels": (lambda n, x: n.after(torch.cat([x[:, :0], x], 1)), 6, {"after": conv(8, 6)}, [6, 8]),
    "unfolded": (
        lambda n, x: n.after(F.unfold(x, 3, padding=1).unflatten(2, (8, 8))), 6, {"after": conv(72, 6)}, [6, 8],
    ),
    "folded": (
        lambda n, x: n.after(F.fold(n.wide(x).flatten(2), (9, 9), (2, 2))),
        6, {"wide": conv(8, 20), "after": conv(5, 6)}, [5, 6, 8],
    ),
    "shuffled": (lambda n, x: n.after(n.move(x)), 6, {"move": nn.ChannelShuffle(2), "after": conv(8, 6)}, [4, 6]),
    "shuffled by four": (
        lambda n, x: n.after(n.wide(x)), 6,
        {"wide": nn.Sequential(conv(8, 12), nn.ChannelShuffle(4)), "after": conv(12, 6, groups=3)}, [3, 8],
    ),
    "added up": (
        lambda n, x: n.after(x.cumsum(2) + x.logcumsumexp(3) + x.cumprod(-1)), 6, {"after": conv(8, 6)}, [6, 8],
    ),
    "largest so far": (
        lambda n, x: n.after(x.cummax(2)[0] + torch.cummin(x, dim=-1).indices), 6, {"after": conv(8, 6)}, [6, 8],
    ),
    "sorted": (
        lambda n, x: n.after(x.sort(2)[0] + x.sort(stable=True)[0] + x.argsort(2) + x.argsort(dim=-1, stable=True)),
        6, {"after": conv(8, 6)}, [6, 8],
    ),
    "the largest few": (
        lambda n, x: n.after(x.topk(3)[0] + x.topk(3, dim=-1, largest=False).indices), 6, {"after": conv(8, 6)}, [6, 8],
    ),
    "windows": (
        lambda n, x: n.after(x.unfold(2, 4, 2).unfold(3, 4, 4).amax((-1, -2))), 6, {"after": conv(8, 6)}, [6, 8],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_elements_that_are_moved_keep_their_channels(name: str) -> None:
    step, channels, parts, widths = FOLLOWED[name]
    assert sorted(exact_network(Net(step, channels, **parts), X).widths.tolist()) == widths


def test_windows_of_channels_are_frozen_and_named() -> None:
    model = Net(lambda n, x: x.unfold(1, 4, 4).amax(-1), 2, deep=True)
    assert exact_network(model, X, warns="No channel rule for unfold").widths.tolist() == [5]


@pytest.mark.parametrize("step", [lambda x: x.cumsum(1), lambda x: x.sort(1)[0], lambda x: x.topk(8, -3)[0]])
def test_the_order_of_channels_is_frozen_and_named(step: Callable[[Tensor], Tensor]) -> None:
    network = exact_network(Net(lambda n, x: step(x), 8, deep=True), X, warns="for (cumsum|sort|topk) in")
    assert network.widths.tolist() == [5]


def test_indices_by_channels_are_frozen_and_named() -> None:
    """Which entry of a table [9, 4] is read depends on the channel."""
    model = Net(lambda n, x: n.table.weight[x.argmax(-1)].permute(0, 3, 1, 2), 4, table=nn.Embedding(9, 4), deep=True)
    assert exact_network(model, X, warns="No channel rule for index").widths.tolist() == [5]


@pytest.mark.parametrize("step", [lambda n, x: x[:, ORDER], lambda n, x: x[ORDER[:2] % 2, :, ORDER[:2]][..., None, :]])
def test_indices_of_channels_or_apart_are_frozen_and_named(step: Step) -> None:
    network = exact_network(Net(step, 8, deep=True), X, warns="No channel rule for index")
    assert network.widths.tolist() == [5]


class Mixing(nn.Module):
    """Seven channels by a bias that is put together, its middle part constant, as in BEiT."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.joint = nn.Conv2d(3, 21, 1, bias=False)
        self.first, self.last = nn.Parameter(torch.rand(7)), nn.Parameter(torch.rand(7))
        self.register_buffer("middle", torch.zeros(7))
        self.head = nn.Conv2d(7, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.first, self.middle, self.last])
        a, b, c = F.conv2d(x, self.joint.weight, bias).chunk(3, 1)
        return self.head(a * b + c)


def test_a_bias_of_several_parameters() -> None:
    slim: Any = exact_network(Mixing(), X).slim([4])
    assert [len(slim.first), len(slim.middle), len(slim.last)] == [4, 4, 4]


class Biased(nn.Module):
    """Three heads of size four, with a parameter in their attention between five positions."""

    def __init__(self, shape: tuple[int, ...], step: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.all, self.out, self.bias = nn.Linear(6, 36), nn.Linear(12, 3), nn.Parameter(torch.randn(shape))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.all(x).view(len(x), 5, 3, -1, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(self.step(q, k, v, self.bias).transpose(1, 2).flatten(2))


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT + bias).softmax(-1) @ v


# name: (shape of a parameter, attention, its entries beside two heads)
BIASES: dict[str, tuple[tuple[int, ...], Callable[..., Tensor], int]] = {
    "unsqueezed": ((3, 5, 5), lambda q, k, v, w: biased(q, k, v, w[None]), 50),
    "of keys": ((3, 5), lambda q, k, v, w: biased(q, k, v, w.unsqueeze(1)), 10),
    "turned and unsqueezed": ((5, 5, 3), lambda q, k, v, w: biased(q, k, v, w.permute(2, 0, 1).unsqueeze(0)), 50),
    "squeezed": ((1, 3, 5, 5), lambda q, k, v, w: biased(q, k, v, w.squeeze(0)), 50),
    "of all heads": ((5, 5), lambda q, k, v, w: biased(q, k, v, w[None, None]), 25),
    "fused": ((3, 5, 5), lambda q, k, v, w: F.scaled_dot_product_attention(q, k, v, attn_mask=w[None]), 50),
    "fused, of all heads": ((5, 5), lambda q, k, v, w: F.scaled_dot_product_attention(q, k, v, w), 25),
}


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_of_each_head(name: str) -> None:
    shape, step, entries = BIASES[name]
    network = exact_network(Biased(shape, step), images(2, 5, 6))
    assert network.widths.tolist() == [3]
    slim: Any = network.slim([2])
    assert slim.bias.numel() == entries


def test_a_matrix_as_the_weight_of_a_convolution() -> None:
    class Pointwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(7, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight[..., None, None])

    model = Net(lambda n, x: n.after(n.a(x)), 6, a=Pointwise(), after=conv(7, 6))
    assert sorted(exact_network(model, X).widths.tolist()) == [6, 7, 8]


def test_a_dimension_that_is_new_is_none_of_the_weight() -> None:
    """A map of the pixels by a filter [8, 3, 3], which is given the dimension of its only output."""

    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x * F.conv2d(x, self.weight[None], padding=1).sigmoid()

    assert sorted(exact_network(Net(lambda n, x: n.after(n.a(x)), 6, a=Pixels(), after=conv(8, 6)), X).widths) == [6, 8]


def test_squeezing_whatever_is_one_is_frozen_and_named() -> None:
    """Of a single head that is left the dimension would go, too."""
    last = Biased((1, 3, 5, 5), lambda q, k, v, w: biased(q, k, v, w.squeeze()))
    network = exact_network(nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 6), last), images(2, 5, 6), warns="squeeze in")
    assert network.widths.tolist() == [7, 6]


# ---- sizes that modules hold -----------------------------------------------------------------------------------------


class Gated(nn.Module):
    """As MambaOut's block: a gate, channels that stay as they are, and channels that are convolved."""

    def __init__(self, hold: Callable[[list[int]], Any], sizes: list[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sizes = hold(sizes)
        self.wide, self.conv = conv(8, sum(sizes)), nn.Conv2d(sizes[2], sizes[2], 3, padding=1, groups=sizes[2])

    def forward(self, x: Tensor) -> Tensor:
        gate, same, moved = self.wide(x).split(self.sizes, 1)
        return gate.sigmoid() * torch.cat([same, self.conv(moved)], 1)


@pytest.mark.parametrize("hold", [list, tuple])
def test_sizes_of_parts_that_a_module_holds(hold: Callable[[list[int]], Any]) -> None:
    model = Net(lambda n, x: n.gated(x), 12, gated=Gated(hold, [12, 7, 5]))
    network = exact_network(model, X)
    assert sorted(network.widths.tolist()) == [5, 7, 8]
    plan = [{5: 2, 7: 6, 8: 8}[width] for width in network.widths.tolist()]
    slim: Any = network.slim(plan)
    assert slim.gated.sizes == hold([8, 6, 2])
    assert model.gated.sizes == hold([12, 7, 5])  # type: ignore[union-attr]


def test_a_bound_that_a_module_holds() -> None:
    """As ReXNet adds its input to the first channels of its output."""

    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs, self.conv = 8, conv(8, 13)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.cat([y[:, : self.inputs] + x, y[:, self.inputs :]], 1)

    network = exact_network(Net(lambda n, x: n.part(x), 13, part=Partial()), X)
    assert sorted(network.widths.tolist()) == [5, 8]
    slim: Any = network.slim([3 if width == 8 else 5 for width in network.widths])
    assert slim.part.inputs == 3


class Scales(nn.Module):
    """As Res2Net's: equal parts, one after the other convolved with what came before it."""

    def __init__(self, sizes: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width, self.whole, self.sizes = 5, 15, sizes
        self.wide, self.convs = conv(8, 15), nn.ModuleList(conv(5, 5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.wide(x).split(self.sizes(self), 1)
        b = self.convs[0](b)
        return torch.cat([a, b, self.convs[1](b + c)], 1)


@pytest.mark.parametrize(
    "sizes",
    [lambda m: m.width, lambda m: m.whole // 3, lambda m: [m.width, m.width, m.whole - 2 * m.width]],
    ids=["a size", "a share of all", "a list"],
)
def test_parts_that_share_a_size_stay_equal(sizes: Callable[[Any], Any]) -> None:
    network = exact_network(Net(lambda n, x: n.scales(x), 15, scales=Scales(sizes)), X)
    assert sorted(network.widths.tolist()) == [5, 5, 8]
    slim: Any = network.slim([2 if name.startswith("scales.wide") else 5 for name in network.group_names])
    assert slim.scales.wide[0].out_channels == 6


def test_equal_parts_of_sizes_of_their_own_need_not_stay_equal() -> None:
    model = Net(lambda n, x: n.gated(x), 10, gated=Gated(list, [10, 5, 5]))
    assert sorted(exact_network(model, X).widths.tolist()) == [5, 5, 8]


class Remembering(nn.Module):
    """A bias by channel that is computed once for evaluation, and anew after training, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.table, self.known = conv(8, 7), nn.Parameter(torch.rand(3, 7)), {}
        self.register_buffer("row", torch.tensor([1]))

    def train(self, mode: bool = True) -> Remembering:
        self.known = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.known:
            self.known["bias"] = self.table[self.row].mT[..., None]
        return (self.conv(x) * self.known["bias"]).relu()


def test_what_modules_remember_of_their_weights_is_forgotten() -> None:
    model = Net(lambda n, x: n.part(x), 7, part=Remembering()).eval()
    with torch.no_grad():
        before = model(X)
    network = exact_network(model, X)
    assert sorted(network.widths.tolist()) == [7, 8]
    assert not model.part.known  # type: ignore[union-attr]
    assert not torch.equal(model(X), before) and not model.training  # other weights by now
    slim: Any = network.slim([3, 5])
    mask: Any = network.mask([3, 5])
    assert slim.part.table.shape[1] < 7 and not slim.part.known and not mask.part.known
