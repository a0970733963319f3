"""Blocks as people write them by hand: norms and scales whose parameters are reshaped or computed with, branches that
are stacked and chosen from."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import exact_network, images
from test_rules import Gated, between
from torch import Tensor, nn

from gnnrl_gym import PrunableNetwork, UnsupportedOperation

X = images(1, 3, 8, 8)


class Scale(nn.Module):
    """LayerScale: `reshape(self, x)` gives the parameter [8] as it meets the channels."""

    def __init__(self, reshape: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.gamma, self.channels, self.reshape = nn.Parameter(torch.rand(8) + 0.5), 8, reshape

    def forward(self, x: Tensor) -> Tensor:
        return x * self.reshape(self, x)


RESHAPED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "view": lambda s, x: s.gamma.view(1, -1, 1, 1),
    "reshape": lambda s, x: s.gamma.reshape(1, -1, 1, 1),
    "None": lambda s, x: s.gamma[None, :, None, None],
    "unsqueeze": lambda s, x: s.gamma.unsqueeze(0).unsqueeze(-1).unsqueeze(-1),
    "expand_as": lambda s, x: s.gamma.view(1, -1, 1, 1).expand_as(x),
    "its own size": lambda s, x: s.gamma.view(1, len(s.gamma), 1, 1),
    "size of the input": lambda s, x: s.gamma.view(1, x.shape[1], 1, 1),
    "attribute": lambda s, x: s.gamma.view(1, s.channels, 1, 1),
    "computed after": lambda s, x: 1 + s.gamma.view(-1, 1, 1).tanh(),
    "computed before": lambda s, x: (1 + s.gamma.exp()).sqrt()[:, None, None],
}


@pytest.mark.parametrize("name", RESHAPED)
def test_reshaped_parameters_follow_their_channels(name: str) -> None:
    network = exact_network(between(Scale(RESHAPED[name])), X, plans=4)
    assert sorted(network.widths.tolist()) == [6, 8]
    group = network.widths.tolist().index(8)
    plan = np.where(np.arange(2) == group, 3, network.widths)
    stays = torch.from_numpy(network.kept(plan)[network.groups.group_of == group])
    slim: Any = network.slim(plan)
    dense: Any = network.model
    assert torch.equal(slim.p.gamma, dense.p.gamma[stays])


def test_a_number_of_channels_in_such_a_view_is_named() -> None:
    model = between(Scale(lambda s, x: s.gamma.view(1, 8, 1, 1)))
    assert exact_network(model, X, plans=3, warns="write -1 in its place").widths.tolist() == [6]


@pytest.mark.parametrize("seed", range(8))
def test_any_chain_of_moves(seed: int) -> None:
    """Dimensions of size one come, go and change places."""
    rng, shape, steps = random.Random(seed), [8], []
    for _ in range(6):
        i, j = rng.randrange(len(shape)), rng.randrange(len(shape))
        kind = rng.choice(["unsqueeze", "transpose", "squeeze" if shape[i] == 1 else "unsqueeze"])
        steps.append((kind, (i, j) if kind == "transpose" else (i,)))
        shape = list(getattr(torch.empty(shape), kind)(*steps[-1][1]).shape)

    def moved(s: Any, x: Tensor) -> Tensor:
        gamma = s.gamma
        for kind, args in steps:
            gamma = getattr(gamma, kind)(*args)
        return gamma.reshape(-1, 1, 1)

    assert sorted(exact_network(between(Scale(moved)), X, plans=3).widths.tolist()) == [6, 8]


class Statistics(nn.Module):
    """BatchNorm in eval mode, by buffers: `apply(x, weight, bias, mean, variance)`."""

    def __init__(self, apply: Callable[..., Tensor]) -> None:
        super().__init__()
        self.apply_, self.weight = apply, nn.Parameter(torch.rand(8) + 0.5)
        for name in ("bias", "mean", "variance"):
            self.register_buffer(name, torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_(x, self.weight, self.bias, self.mean, self.variance)


def wide(x: Tensor) -> Tensor:
    return x.reshape(1, -1, 1, 1)


def folded(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    scale = w * (variance + 1e-5).rsqrt()
    return x * wide(scale) + wide(b - mean * scale)


def folded_wide(x: Tensor, *tensors: Tensor) -> Tensor:
    w, b, mean, variance = map(wide, tensors)
    scale = w * (variance + 1e-5).rsqrt()
    return x * scale + (b - mean * scale)


def plain(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return w[:, None, None] * (x - mean[:, None, None]) / torch.sqrt(variance[:, None, None] + 1e-5) + wide(b)


def of_the_image(x: Tensor, w: Tensor, b: Tensor, *_: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, (2, 3), unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * wide(w) + wide(b)


def of_the_image_flat(x: Tensor, w: Tensor, b: Tensor, *_: Tensor) -> Tensor:
    flat = x.view(*x.shape[:2], -1)
    deviation = (flat.var(-1) + 1e-5).sqrt()[..., None, None]
    return (x - flat.mean(-1)[..., None, None]) / deviation * wide(w) + wide(b)


@pytest.mark.parametrize("apply", [folded, folded_wide, plain, of_the_image, of_the_image_flat])
def test_norms_of_each_channel_by_hand(apply: Callable[..., Tensor]) -> None:
    assert sorted(exact_network(between(Statistics(apply)), X, plans=4).widths.tolist()) == [6, 8]


def over_channels(x: Tensor, w: Tensor, b: Tensor, *_: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, 1, keepdim=True)
    return wide(w) * (x - mean) * (variance + 1e-6).rsqrt() + wide(b)


def over_groups(x: Tensor, w: Tensor, b: Tensor, *_: Tensor) -> Tensor:
    groups = x.view(len(x), 2, -1)
    groups = (groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-5)
    return groups.view(x.shape) * wide(w) + wide(b)


@pytest.mark.parametrize(("apply", "warns"), [(over_channels, "for var_mean in 'p'"), (over_groups, "for mean in 'p'")])
def test_norms_over_channels_by_hand_are_frozen_and_named(apply: Callable[..., Tensor], warns: str) -> None:
    assert exact_network(between(Statistics(apply)), X, plans=3, warns=warns).widths.tolist() == [6]
    with pytest.raises(UnsupportedOperation, match=warns):
        PrunableNetwork(between(Statistics(apply)), X, strict=True)


def test_frozen_batch_norm_of_torchvision() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d, num_classes=5)
    for name, buffer in model.named_buffers():
        buffer.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else buffer.uniform_(-0.5, 0.5)
    network = exact_network(model, images(1, 3, 32, 32), plans=2)
    assert network.macs(np.ones_like(network.widths)) < 0.01 * network.macs(network.widths)


# parameters whose entries are no channels: (shape, what is done with it)
NO_CHANNELS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "one of several": ((4,), lambda x, w: x * w.sigmoid()[1]),
    "their sum": ((4,), lambda x, w: x * w.view(4, 1, 1).sum()),
    "a row each": ((8,), lambda x, w: x * w.view(1, 1, -1, 1)),
    "shares": ((3,), lambda x, w: x * (w.relu() / (w.relu().sum() + 1e-4))[2]),
    "with nobody": ((8,), lambda x, w: x + 0 * len(w.view(-1, 1).tanh())),
    "two of them": ((8,), lambda x, w: x * (w.view(-1, 1) * torch.ones(8, 1) + w[:, None]).mean()),
}


@pytest.mark.parametrize("name", NO_CHANNELS)
def test_parameters_alone_are_no_group_and_not_named(name: str) -> None:
    network = exact_network(between(Gated(*NO_CHANNELS[name])), X, plans=2, strict=True)
    assert sorted(network.widths.tolist()) == [6, 8]


class Selective(nn.Module):
    """Two branches, and a gate for each channel that chooses between them (SKNet). `choose(branches, logits)`."""

    def __init__(self, choose: Callable[[list[Tensor], list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.choose, self.squeeze = choose, nn.Linear(8, 4)
        self.branches = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=i, dilation=i) for i in (1, 2))
        self.excite = nn.ModuleList(nn.Linear(4, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        branches = [branch(x).relu() for branch in self.branches]
        squeezed = self.squeeze(torch.stack(branches).sum(0).mean((2, 3)))
        return self.choose(branches, [layer(squeezed) for layer in self.excite])


def stacked(branches: list[Tensor], logits: list[Tensor]) -> Tensor:
    return (torch.stack(branches, 1) * torch.stack(logits, 1).softmax(1)[..., None, None]).sum(1)


def concatenated(branches: list[Tensor], logits: list[Tensor]) -> Tensor:
    joined = torch.cat(logits, 1)
    weights = joined.view(len(joined), 2, joined.shape[1] // 2, 1, 1).softmax(1)
    return (torch.stack(branches, dim=1) * weights).sum(dim=1)


def largest(branches: list[Tensor], logits: list[Tensor]) -> Tensor:
    return torch.stack([b * g.sigmoid()[..., None, None] for b, g in zip(branches, logits, strict=True)], -1).max(-1)[0]


def indexed(branches: list[Tensor], logits: list[Tensor]) -> Tensor:
    both = torch.stack([*branches, *(g[..., None, None].expand_as(branches[0]) for g in logits)])
    return both[0] * both[2].sigmoid() + both[1] * both[-1].sigmoid()


@pytest.mark.parametrize("choose", [stacked, concatenated, largest, indexed])
def test_branches_are_stacked(choose: Callable[[list[Tensor], list[Tensor]], Tensor]) -> None:
    assert sorted(exact_network(between(Selective(choose)), X, plans=4).widths.tolist()) == [4, 6, 8, 8]
