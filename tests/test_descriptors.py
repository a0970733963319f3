"""Descriptors on graphs whose values are known, and the lookup by name."""

from __future__ import annotations

from itertools import permutations
from math import cos, pi, sqrt

import networkx as nx
import numpy as np
import pytest

from benchmarks.bogp_retrieval import PUBLISHED, by_name, by_position
from gnnrl_gym.relational import DESCRIPTORS, GraphPool, describe, make_pool

KNOWN = {
    "complete": (nx.complete_graph(8), {
        "density": 1, "average_degree_centrality": 1, "eigenvector_centrality": 1 / sqrt(8),
        "clustering_coefficient": 1, "average_shortest_path_length": 1, "edge_connectivity": 7,
        "algebraic_connectivity": 8, "triangles": 56,
        "independent_cycles": 21,
    }),
    "ring": (nx.cycle_graph(9), {
        "density": 1 / 4, "average_degree_centrality": 1 / 4, "eigenvector_centrality": 1 / 3,
        "clustering_coefficient": 0, "average_shortest_path_length": 2.5, "edge_connectivity": 2,
        "algebraic_connectivity": 2 - 2 * cos(2 * pi / 9), "triangles": 0, "independent_cycles": 1,
    }),
    "star": (nx.star_graph(9), {
        "density": 1 / 5, "average_degree_centrality": 1 / 5, "eigenvector_centrality": (1 + 3) / (10 * sqrt(2)),
        "clustering_coefficient": 0, "average_shortest_path_length": 1.8, "edge_connectivity": 1,
        "algebraic_connectivity": 1, "triangles": 0, "independent_cycles": 0,
    }),
}  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> GraphPool:
    return make_pool(24, 50, 100)


@pytest.mark.parametrize("name", KNOWN)
def test_known_values(name: str) -> None:
    graph, expected = KNOWN[name]
    assert describe(graph) == pytest.approx(expected, abs=1e-9)


def test_values_of_networkx() -> None:
    graph = nx.connected_watts_strogatz_graph(20, 4, 0.4, seed=3)
    found = describe(graph)
    centrality = nx.eigenvector_centrality(graph, max_iter=10_000, tol=1e-12)
    assert found["eigenvector_centrality"] == pytest.approx(np.mean(list(centrality.values())), abs=1e-6)
    assert found["algebraic_connectivity"] == pytest.approx(nx.algebraic_connectivity(graph), abs=1e-4)
    assert found["independent_cycles"] == len(nx.cycle_basis(graph))


def test_attributes_of_edges_mean_nothing() -> None:
    graph = nx.les_miserables_graph()  # its edges have weights
    assert describe(graph) == pytest.approx(describe(nx.Graph(list(graph.edges))))


@pytest.mark.parametrize("graph", [nx.empty_graph(4), nx.empty_graph(1), nx.Graph([(0, 1), (1, 1)])])
def test_graphs_without_descriptors_are_refused(graph: nx.Graph) -> None:
    with pytest.raises(ValueError, match="Descriptors are of"):
        describe(graph)


def test_own_descriptor_retrieves_its_graph_whatever_the_field_order(pool: GraphPool) -> None:
    assert by_name(pool) == 1.0


def test_nearest_is_the_nearest_in_standard_deviations_and_skips_what_was_seen(pool: GraphPool) -> None:
    rng, seen = np.random.default_rng(0), set[int]()
    for _ in range(20):
        point = pool.at(rng.random(len(pool.names)))
        values = np.array([point[name] for name in DESCRIPTORS])
        with np.errstate(invalid="ignore", divide="ignore"):
            distances = np.nansum(np.square((pool.values - values) / pool.values.std(0))[:, pool.varies], axis=1)
        distances[list(seen)] = np.inf
        found = pool.nearest(point, seen)
        assert found == distances.argmin() and found not in seen
        seen.add(found)


def test_units_and_points_are_inverse(pool: GraphPool) -> None:
    assert pool.units.min() == 0 and pool.units.max() == 1
    for index in (0, 50, 99):
        assert pool.at(pool.units[index]) == pytest.approx(pool.descriptors[index])


def test_wrong_points_are_refused(pool: GraphPool) -> None:
    point = pool.descriptors[0]
    with pytest.raises(ValueError, match="triangles"):
        pool.nearest({name: value for name, value in point.items() if name != "triangles"})
    with pytest.raises(ValueError, match="girth"):
        pool.nearest({**point, "girth": 3.0})
    with pytest.raises(ValueError, match="density is not finite"):
        pool.nearest({**point, "density": float("nan")})
    with pytest.raises(ValueError, match="All 100 graphs"):
        pool.nearest(point, range(100))


def test_at_equal_cost_three_descriptors_say_nothing(pool: GraphPool) -> None:
    constant = {name for name, varies in zip(pool.names, pool.varies, strict=True) if not varies}
    assert constant == {"density", "average_degree_centrality", "independent_cycles"}


def test_published_flaw_swapped_positions_retrieve_other_masks(pool: GraphPool) -> None:
    assert by_position(pool, PUBLISHED, PUBLISHED) == 1.0  # the fixture itself can retrieve
    assert by_position(pool, PUBLISHED, PUBLISHED[::-1]) < 0.1
    shares = [by_position(pool, PUBLISHED, order) for order in permutations(PUBLISHED) if order != PUBLISHED]
    assert np.median(shares) < 0.1
