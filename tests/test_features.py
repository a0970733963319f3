"""Features of the graph: a whole says what its parts say together, and a small network what is known of it."""

from __future__ import annotations

import warnings
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from conftest import images, random_plans, randomise
from torch import nn

from gnnrl_gym import PrunableNetwork
from gnnrl_gym.graph.features import EDGE_FEATURES, LEVELS, NODE_FEATURES, OPERATORS, importance_quantiles
from gnnrl_gym.zoo import load_model

COLUMN = {name: i for i, name in enumerate(NODE_FEATURES)}
WRITES, READS = EDGE_FEATURES.index("writes"), EDGE_FEATURES.index("reads")
NETWORKS = {"resnet20": 32, "mobilenet_v2": 64, "googlenet": 64, "vgg11": 64}


@pytest.fixture(scope="module", params=NETWORKS)
def graph(request: pytest.FixtureRequest) -> Any:
    size = NETWORKS[request.param]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*frozen", UserWarning)
        network = PrunableNetwork(randomise(load_model(request.param, num_classes=10)), images(1, 3, size, size))
    return network.graph(random_plans(network, 3)[2])


def column(graph: Any, name: str) -> np.ndarray:
    return np.asarray(graph.nodes[:, COLUMN[name]], np.float64)


def level_of(graph: Any) -> np.ndarray:
    return graph.nodes[:, : len(LEVELS)].argmax(1)  # type: ignore[no-any-return]


def held(graph: Any, level: str) -> np.ndarray:
    """Matrix [N, N]: 1 where the column's node is a child of the row's, which is of a `level`."""
    child, parent = graph.edge_links[graph.edges[:, 1] == 1].T
    matrix = np.zeros((len(graph.nodes),) * 2)
    matrix[parent, child] = level_of(graph)[parent] == LEVELS.index(level)
    return matrix


def members(graph: Any) -> np.ndarray:
    return np.round(2 ** (10 * column(graph, "members")) - 1)  # type: ignore[no-any-return]


# ---- every level says the same ---------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["layer", "block", "network", "decision"])
@pytest.mark.parametrize("name", ["share of MACs", "share of parameters"])
def test_a_part_costs_what_its_children_cost(graph: Any, level: str, name: str) -> None:
    cost, rows = column(graph, name) ** 2, level_of(graph) == LEVELS.index(level)
    np.testing.assert_allclose((held(graph, level) @ cost)[rows], cost[rows], rtol=1e-4, atol=1e-7)
    assert cost[rows].max() > 0


@pytest.mark.parametrize("level", ["layer", "block", "network", "decision"])
def test_a_part_is_the_mean_of_its_operations(graph: Any, level: str) -> None:
    names = [*(f"operator: {name}" for name in OPERATORS), "kernel", "stride", "resolution", "depth"]
    described = np.stack([column(graph, name) for name in names], 1)
    count, inside, rows = members(graph), held(graph, level), level_of(graph) == LEVELS.index(level)
    np.testing.assert_array_equal((inside @ count)[rows], count[rows])
    mean = (inside @ (described * count[:, None]))[rows] / count[rows, None]
    np.testing.assert_allclose(mean, described[rows], atol=1e-5)


def test_an_operation_is_one_and_of_one_kind(graph: Any) -> None:
    rows = level_of(graph) == LEVELS.index("operation")
    kinds = graph.nodes[rows][:, [COLUMN[f"operator: {name}"] for name in OPERATORS]]
    assert (members(graph)[rows] == 1).all() and np.isin(kinds, (0, 1)).all() and (kinds.sum(1) == 1).all()
    np.testing.assert_allclose(np.diff(column(graph, "depth")[rows]), 2 / (rows.sum() - 1), atol=1e-5)  # in order
    assert column(graph, "depth")[rows][0] == -1


# ---- a small network, by hand ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Any:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10),
    )  # fmt: skip
    return PrunableNetwork(model, images(1, 3, 16, 16))


def test_operations_are_described(small: Any) -> None:
    graph = small.graph([4, 2])
    rows = level_of(graph) == LEVELS.index("operation")

    def found(name: str) -> list[float]:
        return np.round(column(graph, name)[rows], 4).tolist()  # type: ignore[no-any-return]

    kinds = graph.nodes[rows][:, [COLUMN[f"operator: {name}"] for name in OPERATORS]].argmax(1)
    names = [list(OPERATORS)[kind] for kind in kinds]
    assert names == ["conv", "activation", "grouped conv", "conv", "activation", "shape", "linear"]
    assert found("kernel") == [round(np.log2(5) / 4, 4), 0, round(np.log2(3) / 4, 4), 0, 0, 0, 0]
    assert found("stride") == [0.25, 0, 0, 0, 0, 0, 0]
    assert found("convolution groups") == [0, 0, 0.4, 0, 0, 0, 0]
    assert found("resolution") == [3 / 8, 3 / 8, 3 / 8, 3 / 8, 3 / 8, 0, 0]
    # channels at 4 of 16 and 2 of 8 kept; what is flattened has 64 features of each channel
    widths_in, widths_out = [3, 4, 4, 4, 2, 2, 128], [4, 4, 4, 2, 2, 128, 10]
    np.testing.assert_allclose(found("log channels in"), np.log2(widths_in) / 12, atol=1e-4)
    np.testing.assert_allclose(found("log channels out"), np.log2(widths_out) / 12, atol=1e-4)
    assert found("share kept in") == [1, *[0.25] * 6]
    assert found("share kept out") == [*[0.25] * 6, 1]
    macs = np.array([3 * 4 * 25 * 64, 0, 4 * 9 * 64, 4 * 2 * 64, 0, 0, 128 * 10])
    dense = 3 * 16 * 25 * 64 + 16 * 9 * 64 + 16 * 8 * 64 + 512 * 10
    np.testing.assert_allclose(np.square(found("share of MACs")), macs / dense, atol=1e-4)
    params = np.array([3 * 4 * 25 + 4, 0, 4 * 9 + 4, 4 * 2 + 2, 0, 0, 128 * 10 + 10])
    np.testing.assert_allclose(np.square(found("share of parameters")), params / small.params(small.widths), atol=2e-4)


def test_a_group_says_who_writes_and_who_reads_it(small: Any) -> None:
    graph = small.graph(small.widths)
    layers = np.flatnonzero(level_of(graph) == LEVELS.index("layer")).tolist()
    touched = {
        (layers.index(source), target): edge[[WRITES, READS]]
        for (source, target), edge in zip(graph.edge_links.tolist(), graph.edges, strict=True)
        if target < 2
    }
    first, depthwise, last, head = sorted({layer for layer, _ in touched})
    # the depthwise convolution's weights have the group's channels where others have outputs
    assert touched.pop((depthwise, 0)).tolist() == [1, 0]
    assert {edge: tuple(value) for edge, value in touched.items()} == {
        (first, 0): (1, 0), (last, 0): (0, 1), (last, 1): (1, 0), (head, 1): (0, 1),
    }  # fmt: skip


def test_dataflow_carries_the_dense_channels(small: Any) -> None:
    graph = small.graph([4, 2])
    rows = np.flatnonzero(level_of(graph) == LEVELS.index("operation")).tolist()
    flow = {
        (source, target): edge[EDGE_FEATURES.index("log channels")]
        for (source, target), edge in zip(graph.edge_links.tolist(), graph.edges, strict=True)
        if edge[0] and source in rows
    }
    assert sorted(flow) == list(pairwise(rows))
    np.testing.assert_allclose([flow[key] for key in sorted(flow)], np.log2([16, 16, 16, 8, 8, 512]) / 12, atol=1e-6)


def test_blocks_of_one_motif_know_how_many_they_are() -> None:
    block = lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())  # noqa: E731
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *(block() for _ in range(5)), nn.Flatten(), nn.Linear(8 * 36, 2)).eval()
    network: Any = PrunableNetwork(model, images(1, 3, 8, 8))
    graph = network.graph(network.widths)
    blocks = column(graph, "multiplicity")[level_of(graph) == LEVELS.index("block")]
    counts = np.round(2 ** (10 * blocks)).astype(int).tolist()
    assert Counter(counts) == {1: 3, 4: 4}  # the last of the five flattens, too


def test_quantiles_of_importance_show_a_weak_tail() -> None:
    np.testing.assert_allclose(importance_quantiles(np.full(9, 3.0)), 0)
    np.testing.assert_allclose(importance_quantiles(np.arange(11.0)), [-0.8, -0.5, 0, 0.5])
    np.testing.assert_allclose(importance_quantiles(np.array([0.0] * 9 + [100.0])), -1)
    np.testing.assert_allclose(importance_quantiles(np.zeros(3)), -1)
