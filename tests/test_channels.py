"""Channel groups of small hand-made networks, one per way that channels can be tied. Mixtures of all of them are in
`test_random_networks.py`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, exact_network, images, outputs, random_plans, randomise
from torch import Tensor, fx, nn

from gnnrl_gym import PrunableNetwork, UnsupportedOperation
from gnnrl_gym.zoo.random_layers import Parts
from gnnrl_gym.zoo.resnet import ZeroPadShortcut

Step = Callable[..., Any]


def conv(inputs: int, outputs: int, kernel: int = 3, **settings: Any) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **settings)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    """Stem -> body -> global average -> linear. `step(self, x)` is the body's forward, `parts` its layers: so the body
    stands in a module that has parameters. A `deep` stem has a group of its own that nothing in the body can freeze."""

    def __init__(self, step: Step, channels: int, stem: int = 8, deep: bool = False, **parts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(conv(3, 5), conv(5, stem)) if deep else conv(3, stem)
        self.step, self.head = step, nn.Linear(channels, 4)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.step(self, self.stem(x)).mean((2, 3)))


class Foreign(nn.Module):
    """A module without parameters around a function, as other people's code has them."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x)


def shuffle(x: Tensor, groups: int = 2) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def halves_swapped(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return torch.cat([b, a], 1)


def parts_swapped(x: Tensor) -> Tensor:
    a, b = x.split([3, 5], 1)
    return torch.cat([b, a], 1)


def gate(channels: int) -> nn.Module:
    """Squeeze and excitation, as torchvision writes it."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 4, 1), nn.ReLU(), nn.Conv2d(4, channels, 1), nn.Sigmoid()
    )


def pad_four(x: Tensor) -> Tensor:
    """Option A of He et al. 2016 with literal amounts: half the positions, two zero channels before and after."""
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))


def expand_gate(net: Any, x: Tensor) -> Tensor:
    return x * net.g(x).expand_as(x)


def cat_zeros(net: Any, x: Tensor) -> Tensor:
    """A shortcut whose missing channels are counted."""
    y = net.a(x)
    return net.b(y + torch.cat([x, torch.zeros(x.shape[0], y.shape[1] - x.shape[1], *x.shape[2:])], 1))


def cat_literal_zeros(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x) + torch.cat([x, torch.zeros(x.shape[0], 4, *x.shape[2:])], 1))


def cat_new_zeros(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.b(y + torch.cat([x, x.new_zeros(x.shape[0], 12 - x.shape[1], *x.shape[2:])], 1))


def unequal_parts() -> nn.Module:
    """Three and five channels to a convolution each."""
    return Parts([3, 5], [conv(3, 5), conv(5, 4)])


def shared_under_two_names() -> nn.Module:
    """A block with BatchNorm that two lists hold; the second is only used in slices."""
    block = conv(8, 8)
    first, second = nn.ModuleList([block, conv(8, 8)]), nn.ModuleList([nn.Identity(), block])

    def step(net: Any, x: Tensor) -> Tensor:
        for layer in [*net.first, *net.second[1:]]:
            x = x + layer(x)
        return x

    return Net(step, 8, first=first, second=second)


# name: (network, sorted widths)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "chain": (lambda: Net(lambda n, x: n.a(x), 12, a=conv(8, 12)), [8, 12]),
    "residual": (lambda: Net(lambda n, x: x + n.b(n.a(x)), 8, a=conv(8, 6), b=conv(6, 8)), [6, 8]),
    "concat": (
        lambda: Net(lambda n, x: n.c(torch.cat([n.a(x), n.b(x), x], 1)), 9, a=conv(8, 4), b=conv(8, 6), c=conv(18, 9)),
        [4, 6, 8, 9],
    ),
    "concat and residual": (
        lambda: Net(lambda n, x: torch.cat([n.a(x), n.b(x)], 1) + n.c(x), 9, a=conv(8, 4), b=conv(8, 5), c=conv(8, 9)),
        [4, 5, 8],
    ),
    "depthwise": (lambda: Net(lambda n, x: n.b(n.a(x)), 12, a=conv(8, 8, groups=8), b=conv(8, 12, 1)), [8, 12]),
    # a unit is a whole convolution group: three input channels and two outputs
    "grouped": (lambda: Net(lambda n, x: n.b(n.a(x)), 6, stem=12, a=conv(12, 8, groups=4), b=conv(8, 6)), [4, 6]),
    "depth multiplier": (lambda: Net(lambda n, x: n.a(x), 16, a=conv(8, 16, groups=8)), [8]),
    "zero padding that adapts": (
        lambda: Net(lambda n, x: n.a(x) + n.s(x), 12, a=conv(8, 12, stride=2), s=ZeroPadShortcut(2, 2, 2)),
        [4, 8],
    ),
    "foreign zero padding": (
        lambda: Net(lambda n, x: n.a(x) + n.s(x), 12, a=conv(8, 12, stride=2), s=Foreign(pad_four)),
        [4, 8],
    ),
    "foreign shuffle": (lambda: Net(lambda n, x: n.a(n.s(x)), 6, s=Foreign(shuffle), a=conv(8, 6)), [4, 6]),
    "foreign slice": (
        lambda: Net(lambda n, x: n.a(n.s(x)) + n.b(x), 6, s=Foreign(lambda x: x[:, 2:5]), a=conv(3, 6), b=conv(8, 6)),
        [3, 5, 6],
    ),
    "shuffle": (lambda: Net(lambda n, x: n.a(shuffle(x)), 6, a=conv(8, 6)), [4, 6]),
    "chunk": (lambda: Net(lambda n, x: n.a(halves_swapped(x)), 6, a=conv(8, 6)), [4, 6]),
    "chunks to different readers": (
        lambda: Net(lambda n, x: n.a(x.chunk(2, 1)[0]) + n.b(x.chunk(2, 1)[1]), 6, a=conv(4, 6), b=conv(4, 6)),
        [4, 6],
    ),
    "used twice": (lambda: Net(lambda n, x: n.a(n.a(x)), 8, a=conv(8, 8)), [8]),
    "gate": (lambda: Net(lambda n, x: n.a(x * n.g(x)), 6, g=gate(8), a=conv(8, 6)), [4, 6, 8]),
    "gate, expanded": (lambda: Net(expand_gate, 8, g=gate(8)), [4, 8]),
    "spatial padding": (lambda: Net(lambda n, x: n.a(F.pad(x, (1, 2, 0, 1))), 6, a=conv(8, 6)), [6, 8]),
    "permuted": (
        lambda: Net(lambda n, x: n.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 6, a=nn.Linear(8, 6)),
        [6, 8],
    ),
    "pooled": (
        lambda: Net(lambda n, x: F.max_pool2d(F.interpolate(n.a(x), scale_factor=2.0), 2), 6, a=conv(8, 6)),
        [6, 8],
    ),
    "adaptive maxima": (lambda: Net(lambda n, x: F.adaptive_max_pool2d(n.a(x), 2), 6, a=conv(8, 6)), [6, 8]),
    "transposed": (
        lambda: Net(lambda n, x: n.b(n.a(x)), 5, a=nn.ConvTranspose2d(8, 6, 2, stride=2), b=conv(6, 5)), [5, 6, 8]
    ),
    # a unit is a whole convolution group: two input channels and three outputs
    "grouped transposed": (
        lambda: Net(lambda n, x: n.b(n.a(x)), 5, a=nn.ConvTranspose2d(8, 12, 3, groups=4), b=conv(12, 5)), [4, 5]
    ),
    "slope of each channel": (lambda: Net(lambda n, x: n.p(n.a(x)), 6, a=conv(8, 6), p=nn.PReLU(6)), [6, 8]),
    "one slope": (lambda: Net(lambda n, x: n.p(n.a(x)), 6, a=conv(8, 6), p=nn.PReLU()), [6, 8]),
    "InstanceNorm": (
        lambda: Net(lambda n, x: n.i(n.a(x)), 6, a=conv(8, 6), i=nn.InstanceNorm2d(6, affine=True)), [6, 8]
    ),
    "split held by its module": (lambda: Net(lambda n, x: n.p(x), 9, p=unequal_parts()), [3, 4, 5, 5]),
    "split in three parts": (
        lambda: Net(lambda n, x: n.p(x), 9, p=Parts([2, 3, 3], [conv(2, 4), conv(3, 3), conv(3, 2)])),
        [2, 2, 3, 3, 3, 4],
    ),
    "foreign split": (
        lambda: Net(lambda n, x: n.a(n.s(x)), 6, s=Foreign(parts_swapped), a=conv(8, 6)),
        [6, 8],
    ),
    "foreign split in equal parts": (
        lambda: Net(lambda n, x: n.a(n.s(x)), 6, s=Foreign(lambda x: torch.cat(x.split(4, 1)[::-1], 1)), a=conv(8, 6)),
        [6, 8],
    ),
    "foreign slice of one channel": (
        lambda: Net(lambda n, x: n.a(n.s(x)) + n.b(x), 6, s=Foreign(lambda x: x[:, 2:3]), a=conv(1, 6), b=conv(8, 6)),
        [6, 7],
    ),
    "shared under two names": (shared_under_two_names, [8]),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_are_found_and_slim_equals_mask(name: str) -> None:
    make, widths = NETWORKS[name]
    network = exact_network(make(), images(1, 3, 8, 8))
    assert sorted(network.widths.tolist()) == widths


@pytest.mark.parametrize("name", ["residual", "grouped", "foreign zero padding", "shuffle", "foreign shuffle", "chunk"])
def test_batch_of_two(name: str) -> None:
    exact_network(NETWORKS[name][0](), images(2, 3, 8, 8))


@pytest.mark.parametrize("name", ["foreign zero padding", "foreign split", "foreign slice"])
def test_foreign_module_is_replaced_by_its_traced_graph_for_any_batch(name: str) -> None:
    model = randomise(NETWORKS[name][0]())
    network = PrunableNetwork(model, images(1, 3, 8, 8))
    plan = random_plans(network, 3)[2]
    slim, mask = network.slim(plan), network.mask(plan)
    assert isinstance(slim.s, fx.GraphModule)
    assert isinstance(model.s, Foreign)
    assert_close(outputs(slim, images(5, 3, 8, 8)), outputs(mask, images(5, 3, 8, 8)))


def test_grouped_convolution_keeps_whole_groups() -> None:
    network = exact_network(NETWORKS["grouped"][0](), images(1, 3, 8, 8))
    slim: Any = network.slim([3, 6])
    layer = slim.a[0]
    assert (layer.groups, layer.in_channels, layer.out_channels) == (3, 9, 6)
    assert layer.weight.shape == (6, 3, 3, 3)


def test_transposed_convolution_keeps_whole_groups() -> None:
    network = exact_network(NETWORKS["grouped transposed"][0](), images(1, 3, 8, 8))
    layer: Any = network.slim([3, 5]).a  # type: ignore[union-attr]
    assert (layer.groups, layer.in_channels, layer.out_channels) == (3, 6, 9)
    assert layer.weight.shape == (6, 3, 3, 3)


@pytest.mark.parametrize("affine", [True, False])
def test_slim_norms_and_slopes_know_their_channels(affine: bool) -> None:
    norm, slope = nn.InstanceNorm2d(6, affine=affine), nn.PReLU(6)
    network = exact_network(Net(lambda n, x: n.p(n.i(n.a(x))), 6, a=conv(8, 6), i=norm, p=slope), images(1, 3, 8, 8))
    slim: Any = network.slim([8, 4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of torch, about a number of channels that isn't the input's
        slim(images(1, 3, 8, 8))
    assert (slim.i.num_features, slim.p.num_parameters) == (4, 4)


def test_split_sizes_follow() -> None:
    network = exact_network(NETWORKS["split held by its module"][0](), images(1, 3, 8, 8))
    plan = network.widths - 1
    slim: Any = network.slim(plan)
    assert slim.p.sizes == [2, 4]
    assert network.model.p.sizes == [3, 5]  # type: ignore[union-attr]


def test_a_split_of_which_nothing_may_be_left_is_frozen() -> None:
    model = Net(lambda n, x: n.b(n.p(x)), 6, p=Parts([6, 2], [nn.Identity(), nn.AvgPool2d(2)]), b=conv(8, 6))
    model.p.branches[0] = nn.AvgPool2d(2)  # type: ignore[union-attr]
    network = exact_network(model, images(1, 3, 8, 8), warns="'p'.*number of channels")
    assert network.widths.tolist() == [6]


def test_rounding_that_a_norm_blows_up_freezes_nothing() -> None:
    first = nn.Conv2d(8, 6, 1)
    nn.init.constant_(first.bias, 1e5)  # type: ignore[arg-type]  # float32 keeps two decimals of what it is added to
    model = Net(lambda n, x: n.c(halves_swapped(n.i(n.a(x)))), 5, a=first, i=nn.InstanceNorm2d(6), c=conv(6, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = PrunableNetwork(randomise(model), images(1, 3, 8, 8))
    assert sorted(network.widths.tolist()) == [3, 5, 8]


class Flattening(nn.Module):
    """Convolution -> `to_rows` -> linear."""

    def __init__(self, to_rows: Callable[[Tensor], Tensor], channels: int, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = conv(3, 8), conv(8, channels)
        self.to_rows, self.head = to_rows, nn.Linear(channels * size * size, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.to_rows(self.second(self.first(x))))


def test_a_channel_owns_all_its_columns_after_flatten() -> None:
    network = exact_network(Flattening(lambda x: x.flatten(1), 6, 7), images(1, 3, 7, 7))
    assert network.widths.tolist() == [8, 6]
    slim: Any = network.slim([8, 4])
    assert slim.head.in_features == 4 * 49
    assert network.params([8, 5]) - network.params([8, 4]) == 8 * 9 + 2 + 5 * 49


def test_view_by_shape_adapts() -> None:
    network = exact_network(Flattening(lambda x: x.view(x.size(0), -1), 4, 4), images(2, 3, 4, 4))
    assert network.widths.tolist() == [8, 4]


# ---- what can't be updated is frozen, and named ----------------------------------------------------------------


FROZEN: dict[str, tuple[Callable[[], nn.Module], list[int], str]] = {
    "view with a literal": (lambda: Flattening(lambda x: x.view(-1, 64), 4, 4), [8], r"Flattening .*number.*flatten"),
    "padding with literals": (
        lambda: Net(lambda n, x: n.b(n.a(x) + pad_four(x)), 6, a=conv(8, 12, stride=2), b=conv(12, 6)),
        [6, 8],  # the four channels that it adds stay; the stem's don't depend on how many those are
        r"forward of Net .*number of channels",
    ),
    "LayerNorm over channels": (
        lambda: Net(lambda n, x: n.n(n.a(x).transpose(1, 3)).transpose(1, 3), 6, a=conv(8, 6), n=nn.LayerNorm(6)),
        [8],
        "layer_norm in 'n'",
    ),
    "GroupNorm": (
        lambda: Net(lambda n, x: n.n(n.a(x)), 6, a=conv(8, 6), n=nn.GroupNorm(2, 6)),
        [8],
        "group_norm in 'n'",
    ),
    "unknown operation": (lambda: Net(lambda n, x: n.a(x.cumsum(1)), 6, a=conv(8, 6)), [6], "cumsum"),
    "mean over channels": (lambda: Net(lambda n, x: n.a(x - x.mean(1, True)), 6, a=conv(8, 6)), [6], "mean"),
    "halves swapped by literals": (
        lambda: Net(lambda n, x: n.a(torch.cat([x[:, 4:], x[:, :4]], 1)), 6, a=conv(8, 6)),
        [6],
        r"forward of Net .*number of channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_and_named_and_still_exact(name: str) -> None:
    make, widths, message = FROZEN[name]
    network = exact_network(make(), images(1, 3, 4, 4), warns=message)
    assert sorted(network.widths.tolist()) == widths


def test_an_operation_without_a_rule_is_named_once_however_often_it_comes() -> None:
    names = ("n0", "n1", "n2")
    parts = {name: nn.Sequential(conv(8, 6), nn.GroupNorm(2, 6)) for name in names}
    model = Net(lambda n, x: n.n0(x) + n.n1(x) + n.n2(x) + n.a(x).cumsum(1), 6, a=conv(8, 6), **parts)
    with pytest.warns(UserWarning) as said:
        network = PrunableNetwork(model, images(1, 3, 4, 4))
    messages = [str(warning.message) for warning in said]
    assert len(messages) == 2 and "cumsum" in messages[1] and "more" not in messages[1]
    assert "group_norm in 'n0.1'" in messages[0] and "and 2 more" in messages[0]
    assert all(any(f"'{name}.1'" in place for place in network.channels.unsupported) for name in names)


class Depthwise(nn.Module):
    """A depthwise convolution that isn't nn.Conv2d, with its number of groups as an attribute."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.weight = channels, nn.Parameter(torch.randn(channels, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1, groups=self.channels)


# Uses of channels by position or number. Whether such a group is frozen or updated is free: it has to stay exact, and
# the rest of the network prunable.
POSITIONS: dict[str, tuple[Step, dict[str, Any]]] = {
    "first channel gates": (lambda n, x: n.a(x * x[:, :1]), {"a": conv(8, 6)}),
    "first channel gates softly": (lambda n, x: n.a(x * x[:, :1].sigmoid()), {"a": conv(8, 6)}),
    "last channel gates softly": (lambda n, x: n.a(x * x[:, -1:].sigmoid()), {"a": conv(8, 6)}),
    "last channel gates": (lambda n, x: n.a(x * x[:, -1:]), {"a": conv(8, 6)}),
    "third channel gates": (lambda n, x: n.a(x * x[:, 2:3]), {"a": conv(8, 6)}),
    "selected channel gates": (lambda n, x: n.a(x * x[:, 3].sigmoid()[:, None]), {"a": conv(8, 6)}),
    "selected and read": (lambda n, x: n.a(x) + n.b(x[:, 3][:, None]), {"a": conv(8, 6), "b": conv(1, 6)}),
    "unbound channel gates": (lambda n, x: n.a(x * x.unbind(1)[2][:, None].sigmoid()), {"a": conv(8, 6)}),
    "unbound by a negative dimension": (lambda n, x: n.a(x * x.unbind(-3)[5][:, None].sigmoid()), {"a": conv(8, 6)}),
    "slice in the middle": (lambda n, x: n.a(x[:, 2:5]) + n.b(x), {"a": conv(3, 6), "b": conv(8, 6)}),
    "every other channel": (lambda n, x: n.a(x[:, ::2]) + n.b(x), {"a": conv(4, 6), "b": conv(8, 6)}),
    "foreign, every other": (
        lambda n, x: n.a(n.s(x)) + n.b(x),
        {"s": Foreign(lambda x: x[:, ::2]), "a": conv(4, 6), "b": conv(8, 6)},
    ),
    "foreign, two inputs": (
        lambda n, x: n.b(n.s(n.a(x), x)),
        {"s": Foreign(lambda a, x: pad_four(x) + a), "a": conv(8, 12, stride=2), "b": conv(12, 6)},
    ),
    "foreign, called twice": (
        lambda n, x: n.c(torch.cat([n.s(x), n.s(n.b(x))], 1)),
        {"s": Foreign(pad_four), "b": conv(8, 8), "c": conv(24, 6)},
    ),
    "adapting, called twice": (
        lambda n, x: n.c(torch.cat([n.s(x), n.s(n.b(x))], 1)),
        {"s": ZeroPadShortcut(1, 1, 1), "b": conv(8, 8), "c": conv(20, 6)},
    ),
    "roll": (lambda n, x: n.a(x.roll(1, 1)), {"a": conv(8, 6)}),
    "flip": (lambda n, x: n.a(x.flip(1)), {"a": conv(8, 6)}),
    "expand to a literal": (lambda n, x: n.a(x * n.g(x).expand(-1, 8, 4, 4)), {"g": gate(8), "a": conv(8, 6)}),
    "functional depthwise": (lambda n, x: n.a(n.d(x)), {"d": Depthwise(8), "a": conv(8, 6)}),
    "split by sizes": (
        lambda n, x: n.a(x.split([3, 5], 1)[0]) + n.b(x.split([3, 5], 1)[1]), {"a": conv(3, 6), "b": conv(5, 6)}
    ),
    "zeros made to measure": (cat_zeros, {"a": conv(8, 12), "b": conv(12, 6)}),
    "zeros by a literal": (cat_literal_zeros, {"a": conv(8, 12), "b": conv(12, 6)}),
    "new zeros": (cat_new_zeros, {"a": conv(8, 12), "b": conv(12, 6)}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*frozen:UserWarning")
@pytest.mark.parametrize("name", POSITIONS)
def test_whatever_depends_on_positions_stays_exact(name: str) -> None:
    step, parts = POSITIONS[name]
    model, x = randomise(Net(step, 6, deep=True, **parts)), images(1, 3, 4, 4)
    for order in ("l2", "random"):  # which channels go first decides what a position means
        network = PrunableNetwork(model, x, order)
        for plan in random_plans(network, 15):
            assert_close(outputs(network.slim(plan), x), outputs(network.mask(plan), x))


@pytest.mark.filterwarnings("ignore:.*frozen:UserWarning")
def test_literals_are_found_on_an_example_of_zeros() -> None:
    model = Net(lambda n, x: n.a(torch.cat([x[:, 4:], x[:, :4]], 1)), 6, a=conv(8, 6))
    network = PrunableNetwork(model, torch.zeros(1, 3, 4, 4))  # all activations are zero, whatever their order
    for plan in random_plans(network, 6):
        x = images(1, 3, 4, 4)
        assert_close(outputs(network.slim(plan), x), outputs(network.mask(plan), x))


def test_strict_raises_with_the_place() -> None:
    with pytest.raises(UnsupportedOperation, match=r"cumsum in the network's own forward \(.*test_channels\.py:\d+\)"):
        PrunableNetwork(FROZEN["unknown operation"][0](), images(1, 3, 4, 4), strict=True)


def test_control_flow_on_data_raises_with_the_mend() -> None:
    model = Net(lambda n, x: n.a(x) if x.sum() > 0 else n.a(-x), 6, a=conv(8, 6))
    with pytest.raises(UnsupportedOperation, match=r"torch\.where or a module attribute"):
        PrunableNetwork(model, images(1, 3, 8, 8))


def test_nothing_to_prune_raises() -> None:
    with pytest.raises(UnsupportedOperation, match="no channel group"):
        PrunableNetwork(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), images(1, 3, 2, 2))


def test_a_plain_mistake_keeps_its_own_error() -> None:
    with pytest.raises(RuntimeError, match="channels"):
        PrunableNetwork(NETWORKS["chain"][0](), images(1, 5, 8, 8))


class TwoHeads(nn.Module):
    """A classifier and a map of features: two outputs, whose channels stay."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = conv(3, 8), conv(8, 6), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        return self.head(x.mean((2, 3))), self.b(x)


def test_two_outputs_keep_their_shapes() -> None:
    network = exact_network(TwoHeads(), images(1, 3, 8, 8))
    assert network.widths.tolist() == [8]
    assert [tuple(y.shape) for y in outputs(network.slim([3]), images(2, 3, 8, 8))] == [(2, 4), (2, 6, 8, 8)]


class TwoInputs(nn.Module):
    """The sum of two stems, one per input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = conv(3, 8), conv(1, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head((self.a(x) + self.b(y)).mean((2, 3)))


def test_two_inputs() -> None:
    assert exact_network(TwoInputs(), images(1, 3, 8, 8), images(1, 1, 8, 8)).widths.tolist() == [8]
