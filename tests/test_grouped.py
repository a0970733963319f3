"""Grouped convolutions lose whole groups, or, where these are few and large, channels of every group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import exact_network, images, randomise
from torch import Tensor, nn

from gnnrl_gym import PrunableNetwork
from gnnrl_gym.pruning.operation_grids import measured_at
from gnnrl_gym.pruning.timing import operations
from gnnrl_gym.zoo.random_layers import Shuffle

LAYERS: dict[int, tuple[type[nn.Module], type[nn.Module], tuple[int, ...]]] = {
    1: (nn.Conv1d, nn.BatchNorm1d, (9,)),
    2: (nn.Conv2d, nn.BatchNorm2d, (6, 6)),
    3: (nn.Conv3d, nn.BatchNorm3d, (4, 4, 4)),
}


def network(groups: int, inputs: int, outputs: int, dims: int = 2, between: nn.Module | None = None) -> nn.Sequential:
    """A stem, a convolution of `groups` that each read `inputs` and write `outputs` channels, a head."""
    conv, norm, _ = LAYERS[dims]
    read, written = groups * inputs, groups * outputs
    return nn.Sequential(
        conv(3, read, 3, padding=1), norm(read), nn.ReLU(), between or nn.Identity(),
        conv(read, written, 3, padding=1, groups=groups), norm(written), nn.ReLU(), conv(written, 5, 1),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_units_are_groups_or_channels_of_each_whichever_are_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups, inputs, outputs = (int(n) for n in rng.integers((2, 1, 1), (6, 9, 9)))
    dims = int(rng.integers(1, 4))
    found = exact_network(network(groups, inputs, outputs, dims), images(1, 3, *LAYERS[dims][2]), plans=4)
    few_and_large = groups < min(inputs, outputs)
    assert found.widths.tolist() == ([inputs, outputs] if few_and_large else [groups])


def test_channels_of_each_group_go_and_the_groups_stay() -> None:
    found = exact_network(network(2, 4, 6), images(1, 3, 6, 6))
    slim: Any = found.slim([3, 2])
    layer, norm = slim[4], slim[5]
    assert (layer.groups, layer.in_channels, layer.out_channels, norm.num_features) == (2, 6, 4, 4)
    assert layer.weight.shape == (4, 3, 3, 3)
    stays = found.kept([3, 2])[found.groups.group_of == 0]
    dense: Any = found.model
    assert torch.equal(slim[0].weight, dense[0].weight[torch.from_numpy(np.tile(stays, 2))])


CHAINS: dict[str, tuple[list[nn.Module], list[int]]] = {
    # which has halves of its own, and makes one half of the first half of each
    "a shuffle": ([nn.Conv2d(3, 16, 3), Shuffle(2), nn.Conv2d(16, 12, 3, groups=2)], [4, 6]),
    "depthwise": ([nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 12, 3, groups=2)], [8, 6]),
    # the channels of one of eight groups, and their like in the other half
    "many groups": ([nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=8), nn.Conv2d(16, 12, 1, groups=2)], [4, 6]),
    # places that are alike in halves and in thirds: the even ones, and the odd ones
    "few others": ([nn.Conv2d(3, 24, 3), nn.Conv2d(24, 12, 3, groups=2), nn.Conv2d(12, 12, 1, groups=3)], [12, 2, 4]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_what_else_ties_the_channels_ties_them_too(name: str) -> None:
    layers, widths = CHAINS[name]
    found = exact_network(nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(12, 5, 1)), images(1, 3, 8, 8))
    assert found.widths.tolist() == widths


class Heads(nn.Module):
    """Attention whose queries, keys and values a grouped convolution makes, a group for each of four heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.head = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 96, 1, groups=4), nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        queries, keys, values = self.qkv(x).flatten(2).unflatten(1, (-1, 24)).transpose(2, 3).chunk(3, -1)
        found = F.scaled_dot_product_attention(queries, keys, values)
        return self.head(found.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:]))


def test_whole_groups_go_where_channels_of_each_can_not() -> None:
    found = exact_network(Heads(), images(1, 3, 8, 8))
    assert found.widths.tolist() == [4]
    slim: Any = found.slim([3])
    assert (slim.qkv.groups, slim.qkv.in_channels, slim.qkv.out_channels) == (3, 24, 72)


def test_what_a_last_layer_reads_goes_though_what_it_writes_can_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 10, 3, groups=2))
    assert exact_network(model, images(1, 3, 8, 8)).widths.tolist() == [6]


class Computed(nn.Module):
    """As many groups as there are eights of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 5, 1)
        self.weight = nn.Parameter(torch.zeros(32, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(F.conv2d(x, self.weight, groups=x.shape[1] // 8).relu())


def test_a_forward_that_computes_the_number_of_groups_is_not_broken() -> None:
    model = randomise(nn.Sequential(Computed(), nn.ReLU(), nn.Conv2d(5, 4, 1)))
    with pytest.warns(UserWarning, match="computes with the number of channels of '0.stem'"):
        found = PrunableNetwork(model, images(1, 3, 8, 8))
    assert sorted(found.widths.tolist()) == [5, 8]


@pytest.mark.parametrize(
    ("groups", "inputs", "outputs", "sizes", "steps"), [(3, 8, 16, (8, 48), (1, 3)), (9, 2, 7, (63, 1), (7, 1))]
)
def test_latencies_are_measured_at_numbers_that_a_convolution_can_have(
    groups: int, inputs: int, outputs: int, sizes: tuple[int, int], steps: tuple[int, int]
) -> None:
    found = PrunableNetwork(network(groups, inputs, outputs), images(1, 3, 6, 6))
    (grouped,) = (op for op in operations(found.trace, found.channels, found.groups) if op.steps != (1, 1))
    assert (grouped.sizes, grouped.steps) == (sizes, steps)
    written = 0 if sizes[1] == 1 else 1  # whole groups have one axis for what they read and write
    for counts in measured_at(grouped, 16):
        assert grouped.call(counts, {}, torch.device("cpu"))().shape[1] == counts[written]
