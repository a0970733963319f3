"""Motifs, and the graph observation that is made of operations, layers, blocks and channel groups."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from conftest import images, random_plans, randomise
from gymnasium import spaces
from torch import nn

from gnnrl_gym import PrunableNetwork
from gnnrl_gym.graph.features import DYNAMIC, EDGE_FEATURES, LEVELS, NODE_FEATURES, STATIC
from gnnrl_gym.graph.hierarchy import MAX_BLOCK, MIN_COUNT, find_motifs
from gnnrl_gym.zoo import load_model

Edges = list[tuple[int, int]]
COLUMN = {name: i for i, name in enumerate(NODE_FEATURES)}


# ---- motifs ----------------------------------------------------------------------------------------------------


def chain(text: str) -> tuple[list[str], Edges]:
    return list(text), [(i, i + 1) for i in range(len(text) - 1)]


def random_dag(seed: int) -> tuple[list[str], Edges]:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(5, 60))
    labels = rng.choice(list("abc"), size).tolist()
    far = rng.integers(1, 5, (2 * size, 1))
    starts = rng.integers(0, size, (2 * size, 1))
    edges = {(int(a), int(a + d)) for a, d in np.concatenate([starts, far], 1) if a + d < size}
    return labels, sorted(edges | {(i, i + 1) for i in range(size - 1)})


def is_acyclic(edges: Edges, count: int) -> bool:
    waiting, live = set(range(count)), set(edges)
    while free := waiting - {b for _, b in live}:
        waiting -= free
        live = {(a, b) for a, b in live if a not in free}
    return not waiting


def test_repeated_blocks_are_found() -> None:
    block_of, motif_of = find_motifs(*chain("s" + "abc" * 5 + "h"))
    assert block_of == [0, *(1 + i // 3 for i in range(15)), 6]
    assert motif_of == [0, 1, 1, 1, 1, 1, 2]


def test_residual_blocks_are_found() -> None:
    labels, edges = ["stem"], []
    for _ in range(4):  # a -> b -> sum, and around both of them
        start = len(labels) - 1
        labels += ["a", "b", "sum"]
        edges += [(start, start + 1), (start + 1, start + 2), (start + 2, start + 3), (start, start + 3)]
    block_of, motif_of = find_motifs(labels, edges)
    assert block_of == [0, *(1 + i // 3 for i in range(12))]
    assert motif_of == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("text", ["abcdef", "aaaaaaaa", "abxyab"])
def test_what_does_not_recur_stays_alone(text: str) -> None:
    block_of, _ = find_motifs(*chain(text))
    assert block_of == list(range(len(text)))


@pytest.mark.parametrize("largest", [2, 4, 8])
def test_motifs_have_a_largest_size(largest: int) -> None:
    block_of, _ = find_motifs(*chain("abcd" * 20), largest=largest)
    size = min(largest, 4)  # alike ones are not put together
    assert Counter(Counter(block_of).values()) == {size: 80 // size}


@pytest.mark.parametrize("seed", range(25))
def test_motifs_of_random_graphs(seed: int) -> None:
    labels, edges = random_dag(seed)
    block_of, motif_of = find_motifs(labels, edges)
    assert (block_of, motif_of) == find_motifs(labels, edges)
    assert set(block_of) == set(range(len(motif_of)))
    lifted = [(block_of[a], block_of[b]) for a, b in edges if block_of[a] != block_of[b]]
    assert is_acyclic(lifted, len(motif_of))
    members: list[Counter[str]] = [Counter() for _ in motif_of]
    for label, block in zip(labels, block_of, strict=True):
        members[block][label] += 1
    assert max(sum(m.values()) for m in members) <= MAX_BLOCK
    alike: dict[int, Counter[str]] = {}
    for motif, found in zip(motif_of, members, strict=True):
        assert alike.setdefault(motif, found) == found  # instances of a motif hold the same labels


def test_random_graphs_have_motifs() -> None:
    found = [find_motifs(*random_dag(seed)) for seed in range(25)]
    assert sum(len(motif_of) < len(block_of) for block_of, motif_of in found) > 10
    assert MIN_COUNT > 1


# ---- the observation -------------------------------------------------------------------------------------------


NETWORKS = {"resnet20": 32, "resnet56": 32, "mobilenet_v2": 64, "shufflenet_v2_x1_0": 64, "alexnet": 64,
            "googlenet": 64, "efficientnet_b0": 64, "convnext_tiny": 64}  # fmt: skip


def build(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*frozen", UserWarning)
        size = NETWORKS[name]
        return PrunableNetwork(randomise(load_model(name, num_classes=10)), images(1, 3, size, size))


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture(scope="module")
def resnet20() -> Any:
    return build("resnet20")


def levels(network: Any) -> np.ndarray:
    nodes = network.graph(network.widths).nodes
    return nodes[:, [COLUMN[f"level: {level}"] for level in LEVELS]].argmax(1)


def test_observation_fits_its_space(network: Any) -> None:
    graph = network.graph(network.widths)
    node, edge = ((len(NODE_FEATURES),), (len(EDGE_FEATURES),))
    space = spaces.Graph(spaces.Box(-4, 4, node, np.float32), spaces.Box(-4, 4, edge, np.float32))
    assert graph.nodes.dtype == graph.edges.dtype == np.float32
    assert graph.edge_links.dtype == np.int64
    assert space.contains(graph)


def test_decision_nodes_come_first_one_per_group(network: Any) -> None:
    nodes, level = network.graph(network.widths).nodes, levels(network)
    one_hot = nodes[:, [COLUMN[f"level: {name}"] for name in LEVELS]]
    assert np.isin(one_hot, (0, 1)).all() and (one_hot.sum(1) == 1).all()
    assert (np.diff(level) >= 0).all()
    counts = np.bincount(level, minlength=len(LEVELS))
    assert counts[0] == len(network.widths)
    assert counts[-1] == 1
    assert counts[1] >= counts[2] >= counts[3] >= 1
    share = np.round(nodes[: counts[0], COLUMN["multiplicity"]] * 10, 4)
    np.testing.assert_allclose(share, np.log2(network.widths), atol=1e-3)


def test_edges_are_valid_and_say_what_they_are(network: Any) -> None:
    graph, level = network.graph(network.widths), levels(network)
    links, (flow, member) = graph.edge_links, graph.edges[:, :2].T
    assert links.shape == (len(graph.edges), 2)
    assert links.min() >= 0 and links.max() < len(graph.nodes)
    assert (links[:, 0] != links[:, 1]).all()
    assert len({tuple(link) for link in links.tolist()}) == len(links)
    assert ((flow + member) == 1).all()
    source, target = level[links].T
    assert (source == target)[flow == 1].all()
    up, decision = target == source + 1, (target == 0) & (source == LEVELS.index("layer"))
    assert (up | decision)[member == 1].all()
    assert set(source[(member == 1) & up].tolist()) == {1, 2, 3}


def test_every_node_has_one_parent_and_every_group_a_layer(network: Any) -> None:
    graph, level = network.graph(network.widths), levels(network)
    source, target = graph.edge_links.T
    member = graph.edges[:, 1] == 1
    parents = np.bincount(source[member & (level[target] > 0)], minlength=len(level))
    assert (parents[(level > 0) & (level < 4)] == 1).all()
    layers = np.bincount(target[member & (level[target] == 0)], minlength=len(level))
    assert (layers[level == 0] >= 1).all()
    writes_or_reads = graph.edges[:, 2:4].max(1) == 1
    np.testing.assert_array_equal(writes_or_reads, member & (level[target] == 0))


def test_dataflow_has_no_cycle(network: Any) -> None:
    graph = network.graph(network.widths)
    flow = [tuple(link) for link in graph.edge_links[graph.edges[:, 0] == 1].tolist()]
    assert is_acyclic(flow, len(graph.nodes))


def test_features_are_finite_and_scaled(network: Any) -> None:
    for plan in [*random_plans(network, 4), network.widths]:
        graph = network.graph(plan, 0.3)
        for features in (graph.nodes, graph.edges):
            assert np.isfinite(features).all()
        columns = np.abs(graph.nodes).max(0)
        assert {n: c for n, c in zip(NODE_FEATURES, columns.tolist(), strict=True) if c > 1.5} == {}
        assert np.abs(graph.edges).max() <= 1.5


def test_only_dynamic_features_change(network: Any) -> None:
    dense = network.graph(network.widths)
    plans = random_plans(network, 6)
    for plan in plans:
        graph = network.graph(plan)
        changed = {NODE_FEATURES[i] for i in np.flatnonzero((graph.nodes != dense.nodes).any(0))}
        assert changed and changed <= set(DYNAMIC)
        np.testing.assert_array_equal(graph.edges, dense.edges)
        np.testing.assert_array_equal(graph.edge_links, dense.edge_links)


def test_dynamic_features_are_the_real_shares(network: Any) -> None:
    plan, full = random_plans(network, 3)[2], network.widths
    nodes = network.graph(plan, 0.37).nodes
    top, decisions = nodes[-1], nodes[: len(full)]
    macs, params = network.macs(plan) / network.macs(full), network.params(plan) / network.params(full)
    assert top[COLUMN["MACs of the network"]] == pytest.approx(macs, rel=1e-5)
    assert top[COLUMN["parameters of the network"]] == pytest.approx(params, rel=1e-5)
    assert top[COLUMN["share of MACs"]] ** 2 == pytest.approx(macs, rel=1e-4)
    assert top[COLUMN["share of parameters"]] ** 2 == pytest.approx(params, rel=1e-4)
    np.testing.assert_allclose(decisions[:, COLUMN["share kept out"]], plan / full, rtol=1e-5)
    np.testing.assert_allclose(nodes[:, COLUMN["budget"]], 0.37, rtol=1e-6)


def test_an_observation_is_the_callers_own(resnet20: Any) -> None:
    for array in resnet20.graph(resnet20.widths):
        array[:] = -3
    graph = resnet20.graph(resnet20.widths)
    assert not any((array == -3).any() for array in graph)


def test_resnet56_has_a_few_hundred_nodes() -> None:
    assert 200 < len(build("resnet56").graph(np.ones(30, np.int64)).nodes) < 600


def test_features_do_not_depend_on_global_randomness() -> None:
    graphs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        graphs.append(build("resnet20").graph(np.full(12, 5)))
    for a, b in zip(*graphs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_sensitivity_fills_its_columns() -> None:
    network = build("resnet20")
    before = network.graph(network.widths).nodes
    rise = np.linspace(-0.5, 30, len(network.widths))[::-1]
    network.graph_builder.set_sensitivity(rise)
    after = network.graph(network.widths).nodes
    changed = {NODE_FEATURES[i] for i in np.flatnonzero((before != after).any(0))}
    assert changed == {"sensitivity", "sensitivity rank"}
    decisions = after[: len(rise)]
    for name in changed:
        column = decisions[:, COLUMN[name]]
        assert np.abs(column).max() <= 1
        assert (np.diff(column) <= 0).all() and column[0] > column[-1]  # falls as the loss rise does
        assert not after[len(rise) :, COLUMN[name]].any()


def test_a_network_without_repetition_has_a_graph() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    network: Any = PrunableNetwork(model, images(1, 3, 4, 4))
    graph: Any = network.graph([2])
    assert len(graph.nodes) == network.graph_builder.nodes
    assert np.isfinite(graph.nodes).all()
    assert len(STATIC) + len(DYNAMIC) == graph.nodes.shape[1]
