"""Relational graphs and their masks: exact cost, the dense layer from a complete graph, nothing out of reach."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from conftest import images
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gnnrl_gym.relational import Masking, block_mask, make_pool, plain_state, weight_counts, ws_flex
from gnnrl_gym.relational.masks import Mask, owners
from gnnrl_gym.zoo import load_model


def mlp(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 11, 3, groups=1), nn.ReLU(), nn.Conv2d(11, 11, 1, groups=11),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(11, 9), nn.Linear(9, 3),
    )  # fmt: skip


def masks(model: nn.Module) -> list[Tensor]:
    return [module.mask.flatten(1) for module in model.modules() if isinstance(module, Mask)]


# ---- graphs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes, edges", [(5, 5), (6, 14), (6, 15), (8, 20), (16, 24), (9, 36), (64, 172)])
@pytest.mark.parametrize("rewiring", [0.0, 0.3, 1.0])
def test_graphs_have_the_exact_edges_and_hang_together(nodes: int, edges: int, rewiring: float) -> None:
    for seed in range(4):
        graph = ws_flex(nodes, edges, rewiring, np.random.default_rng(seed))
        assert (graph.number_of_nodes(), graph.number_of_edges()) == (nodes, edges)
        assert nx.number_of_selfloops(graph) == 0
        assert nx.is_connected(graph)


def test_without_rewiring_it_is_the_ring_lattice_and_degrees_differ_by_two_at_most() -> None:
    even = ws_flex(12, 24, 0.0, np.random.default_rng(0))
    assert nx.utils.graphs_equal(even, nx.watts_strogatz_graph(12, 4, 0.0))
    degrees = [degree for _, degree in ws_flex(12, 29, 0.0, np.random.default_rng(0)).degree()]
    assert min(degrees) >= 4 and max(degrees) <= 6


def test_rewired_degrees_are_those_of_watts_and_strogatz_at_every_node() -> None:
    """An edge keeps the end that it goes out from, also where the ring closes: no node has more than others."""
    ours = np.array(
        [[d for _, d in sorted(ws_flex(32, 192, 1.0, np.random.default_rng(seed)).degree)] for seed in range(150)]
    )
    theirs = np.array([[d for _, d in nx.watts_strogatz_graph(32, 12, 1.0, seed=seed).degree] for seed in range(150)])
    assert abs(ours.mean(0) - 12).max() < 1  # the mean of 150 draws is known to 0.2
    assert ours.std(1).mean() == pytest.approx(theirs.std(1).mean(), rel=0.05)


def test_seeds_decide_graphs_and_pools() -> None:
    def edges(seed: int) -> list[list[tuple[int, int]]]:
        return [sorted(graph.edges) for graph in make_pool(10, 15, 6, seed).graphs]

    assert edges(1) == edges(1) != edges(2)
    assert edges(1)[:3] == [sorted(graph.edges) for graph in make_pool(10, 15, 3, 1).graphs]


@pytest.mark.parametrize("nodes, edges, rewiring, said", [
    (8, 7, 0.1, "8 to 28"), (8, 29, 0.1, "8 to 28"), (2, 1, 0.1, "3 nodes"), (8, 10, 1.5, r"\[0, 1\]"),
])  # fmt: skip
def test_impossible_graphs_are_refused(nodes: int, edges: int, rewiring: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ws_flex(nodes, edges, rewiring, np.random.default_rng(0))


def test_draws_that_never_hang_together_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gnnrl_gym.relational.graphs.nx.is_connected", lambda graph: False)
    with pytest.raises(ValueError, match="allow more edges"):
        ws_flex(8, 10, 0.5, np.random.default_rng(0))


def test_a_pool_of_more_graphs_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller pool"):
        make_pool(5, 8, 4)
    with pytest.raises(ValueError, match="lower density"):
        make_pool(5, 9, 4)  # all graphs of 5 nodes and 9 edges are alike, and a pool of one is none


# ---- masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, nodes", [(8, 8), (8, 4), (10, 4), (300, 64), (785, 64)])
def test_blocks_are_contiguous_and_even(channels: int, nodes: int) -> None:
    sizes = np.bincount(owners(channels, nodes), minlength=nodes)
    assert (np.diff(owners(channels, nodes)) >= 0).all()
    assert sizes.sum() == channels and sizes.max() - sizes.min() <= 1 and sizes.min() >= 1


def test_too_few_channels_of_an_image_name_the_scope_that_leaves_them_out() -> None:
    with pytest.raises(ValueError, match=r"1 channels are too few for 8 nodes: .*--scope hidden"):
        Masking.of(convnet(), "network").edges(8, 0.5)


def test_an_edge_without_weight_is_an_edge() -> None:
    graph = nx.cycle_graph(6)
    nx.set_edge_attributes(graph, 0.0, "weight")
    assert torch.equal(block_mask(graph, 6, 6), block_mask(nx.cycle_graph(6), 6, 6))


def test_a_channel_reads_its_own_node_and_neighbours() -> None:
    mask = block_mask(nx.path_graph(3), 4, 6)  # owners of the outputs: 0, 0, 1, 2
    expected = [[1, 1, 1, 1, 0, 0]] * 2 + [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    assert mask.int().tolist() == expected


@pytest.mark.parametrize("scope", ["hidden", "network"])
@pytest.mark.parametrize("make, shape", [(lambda: mlp(20, 16, 13, 3), (20,)), (convnet, (1, 12, 12))])
def test_a_complete_graph_is_the_dense_network(make: object, shape: tuple[int, ...], scope: str) -> None:
    model = make()  # type: ignore[operator]
    if scope == "network" and len(shape) == 3:
        pytest.skip("one input channel can't be shared out")
    masked = Masking.of(model, scope).apply(model, nx.complete_graph(8))
    assert all(mask.all() for mask in masks(masked)) and masks(masked)
    x = images(4, *shape)
    assert torch.equal(masked(x), model(x))


def test_which_layers_are_masked() -> None:
    assert Masking.of(mlp(20, 16, 12, 3)).names == ("2",)
    assert Masking.of(mlp(20, 16, 12, 3), "network").names == ("0", "2")
    assert Masking.of(convnet()).names == ("2", "7")  # neither stem, depthwise, nor classifier
    with pytest.raises(ValueError, match="no layer to mask"):
        Masking.of(mlp(20, 16, 3))
    with pytest.raises(ValueError, match="hidden, network"):
        Masking.of(mlp(20, 16, 3), "all")
    with pytest.raises(ValueError, match="too few for 64 nodes"):
        Masking.of(mlp(64, 20, 20, 3)).kept(nx.cycle_graph(64))


@pytest.mark.parametrize("scope", ["hidden", "network"])
@pytest.mark.parametrize("sizes", [(32, 32, 32, 4), (50, 37, 21, 5)])
def test_kept_weights_are_those_of_the_masks(sizes: tuple[int, ...], scope: str) -> None:
    model = mlp(*sizes)
    masking = Masking.of(model, scope)
    for graph in make_pool(16, 30, 5).graphs:
        masked = masking.apply(model, graph)
        counted = sum(int(mask.sum()) for mask in masks(masked))
        assert masking.kept(graph) == counted + masking.dense
        removed = sum(mask.numel() for mask in masks(masked)) - counted
        total = sum(parameter.numel() for parameter in model.parameters())
        assert weight_counts(masked) == (total - removed, total)


def test_edges_are_the_most_within_the_density() -> None:
    masking = Masking.of(mlp(32, 128, 128, 10))
    edges = masking.edges(64, 0.1)
    graph = ws_flex(64, edges, 0.5, np.random.default_rng(0))
    more = ws_flex(64, edges + 1, 0.5, np.random.default_rng(0))
    assert masking.kept(graph) <= 0.1 * 128**2 < masking.kept(more)
    assert masking.edges(64, 1.0) == 64 * 63 // 2
    with pytest.raises(ValueError, match="more nodes"):
        masking.edges(16, 0.1)
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        masking.edges(16, 1.1)


@pytest.mark.parametrize("scope", ["hidden", "network"])
def test_every_output_reads_and_every_unit_is_read(scope: str) -> None:
    model = mlp(50, 37, 21, 5)
    for graph in make_pool(16, 30, 10).graphs:
        found = masks(Masking.of(model, scope).apply(model, graph))
        for mask in found:
            assert mask.any(1).all() and mask.any(0).all()
        # after as many rounds of messages as the graph is wide, everything has reached everything
        reached = block_mask(graph, 16, 16).float()
        for _ in range(nx.diameter(graph) - 1):
            reached = reached @ block_mask(graph, 16, 16).float()
        assert (reached > 0).all()


def test_masked_weights_stay_zero_while_training() -> None:
    model, graph = mlp(20, 16, 16, 3), nx.cycle_graph(8)
    masked = Masking.of(model).apply(model, graph)
    optimizer = torch.optim.SGD(masked.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    before = masked[2].weight.detach().clone()  # type: ignore[operator]
    for step in range(5):
        loss = masked(images(8, 20, seed=step)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    removed = ~block_mask(graph, 16, 16)
    stored = masked[2].parametrizations.weight.original  # type: ignore[operator, union-attr]
    assert (stored[removed] == 0).all() and (masked[2].weight[removed] == 0).all()  # type: ignore[operator, index]
    assert not torch.equal(before, masked[2].weight)  # type: ignore[operator]


def test_initial_weights_are_scaled_to_the_fan_in() -> None:
    model, graph = mlp(20, 64, 64, 3), nx.cycle_graph(16)
    weight = Masking.of(model).apply(model, graph)[2].weight  # type: ignore[operator]
    kept = block_mask(graph, 64, 64)
    torch.testing.assert_close(weight[kept], (model[2].weight * (64 / 12) ** 0.5)[kept])


def test_plain_state_loads_into_the_dense_network() -> None:
    model = convnet()
    masked = Masking.of(model).apply(model, nx.cycle_graph(8))
    twin = convnet()
    twin.load_state_dict(plain_state(masked))
    assert torch.equal(twin(images(2, 1, 12, 12)), masked(images(2, 1, 12, 12)))
    assert parametrize.is_parametrized(masked[2])  # and the masked one is as it was


class Twice(nn.Module):
    """Uses one weight in two places: in two layers, or in one layer of two names."""

    def __init__(self, one_layer: bool) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.head = mlp(20, 16, 16, 16, 3)[::2]
        if one_layer:
            self.second = self.first
        else:
            self.second.weight = self.first.weight  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.first, self.second):
            x = layer(x).relu()
        return self.head(x)


@pytest.mark.parametrize("one_layer", [True, False])
def test_a_weight_in_two_places_is_masked_scaled_and_counted_once(one_layer: bool) -> None:
    model, graph = Twice(one_layer), nx.cycle_graph(8)
    masking = Masking.of(model)
    assert (masking.names, masking.total, Masking.of(model, "network").dense) == (("first",), 256, 3 * 16)
    masked: Any = masking.apply(model, graph)
    kept = block_mask(graph, 16, 16)
    expected = model.first.weight * kept * (16 / 6) ** 0.5  # type: ignore[operator]
    torch.testing.assert_close(masked.first.weight, expected)
    masked(images(8, 20)).square().sum().backward()
    torch.optim.SGD(masked.parameters(), 0.1).step()
    assert torch.equal(masked.second.weight, masked.first.weight)
    assert (masked.second.weight[~kept] == 0).all()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert weight_counts(masked) == (total - int((~kept).sum()), total)
    model.load_state_dict(plain_state(masked))
    x = images(2, 20)
    assert torch.equal(model(x), masked(x))


def test_ends_stay_dense_wherever_their_weights_are_used_too() -> None:
    model = mlp(16, 16, 16, 16, 16)
    model[2].weight = model[6].weight  # type: ignore[assignment]
    assert Masking.of(model).names == ("4",)
    model[4].weight = model[0].weight  # type: ignore[assignment]
    assert Masking.of(model, "network").names == ("0",)
    with pytest.raises(ValueError, match="no layer to mask"):
        Masking.of(model)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_layers_whose_weights_are_computed_are_refused_by_name(norm: Any) -> None:
    model = mlp(20, 16, 16, 3)
    norm(model[2])
    with pytest.raises(ValueError, match=r"\['2'\].*remove_parametrizations"):
        Masking.of(model)
    parametrize.remove_parametrizations(model[2], "weight")
    assert Masking.of(model).names == ("2",)


def test_what_else_is_parametrized_is_no_mask() -> None:
    model = mlp(20, 16, 16, 3).append(nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(1, 1, 3)))
    masked = Masking.of(model).apply(model, nx.cycle_graph(8))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert weight_counts(masked) == (total - int((~block_mask(nx.cycle_graph(8), 16, 16)).sum()), total)
    model.load_state_dict(plain_state(masked))


def test_a_network_of_the_zoo_is_masked() -> None:
    model = load_model("digits-resnet", "random")
    masked = Masking.of(model).apply(model, nx.cycle_graph(8))
    assert masked(images(2, 1, 8, 8)).shape == (2, 10)
    assert weight_counts(masked)[0] < 0.6 * weight_counts(masked)[1]
