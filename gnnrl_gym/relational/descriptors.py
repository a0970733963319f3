"""Properties of a graph, always by name: positions carry no meaning (see docs/bogp.md for what happens if they do)."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import numpy as np
from numpy.typing import NDArray

Descriptors = dict[str, float]


def _adjacency(graph: nx.Graph) -> NDArray[np.float64]:
    return nx.to_numpy_array(graph, weight=None)  # an edge is there or not, whatever attributes it has


def _eigenvector_centrality(graph: nx.Graph) -> float:
    # not networkx's power iteration, which may stop short, nor its ARPACK, which starts at random
    leading = np.linalg.eigh(_adjacency(graph))[1][:, -1]
    return float(np.abs(leading).mean())


def _algebraic_connectivity(graph: nx.Graph) -> float:
    laplacian = np.diag([degree for _, degree in graph.degree()]) - _adjacency(graph)
    return float(np.linalg.eigvalsh(laplacian)[1])


def _independent_cycles(graph: nx.Graph) -> float:
    components = nx.number_connected_components(graph)
    return float(graph.number_of_edges() - graph.number_of_nodes() + components)


def _average_degree_centrality(graph: nx.Graph) -> float:
    return float(np.mean(list(nx.degree_centrality(graph).values())))


DESCRIPTORS: dict[str, Callable[[nx.Graph], float]] = {
    "density": nx.density,
    "average_degree_centrality": _average_degree_centrality,
    "eigenvector_centrality": _eigenvector_centrality,
    "clustering_coefficient": nx.average_clustering,
    "average_shortest_path_length": nx.average_shortest_path_length,
    "edge_connectivity": nx.edge_connectivity,
    "algebraic_connectivity": _algebraic_connectivity,
    "triangles": lambda graph: sum(nx.triangles(graph).values()) / 3,
    "independent_cycles": _independent_cycles,
}


def describe(graph: nx.Graph) -> Descriptors:
    """All descriptors of a connected simple graph without self-loops; edges have no weights.

    * `density`: edges over possible edges, in [0, 1].
    * `average_degree_centrality`: mean of degree / (n - 1), in [0, 1]; equals the density.
    * `eigenvector_centrality`: mean entry of the leading eigenvector of the adjacency matrix, of length 1:
      1/sqrt(n) where all nodes are alike, less where few are central.
    * `clustering_coefficient`: mean share of a node's pairs of neighbours that are neighbours, in [0, 1].
    * `average_shortest_path_length`: mean hops between two nodes, at least 1.
    * `edge_connectivity`: fewest edges whose loss splits the graph.
    * `algebraic_connectivity`: second smallest eigenvalue of the Laplacian D - A (Fiedler 1973).
    * `triangles`: how many.
    * `independent_cycles`: m - n + c, for m edges, n nodes, c components (circuit rank).

    At a given number of nodes and edges the first two and the last are the same for every connected graph.

    Raises:
        ValueError: fewer than 2 nodes, a self-loop, or a graph in several parts.
    """
    if graph.number_of_nodes() < 2 or nx.number_of_selfloops(graph):
        raise ValueError("Descriptors are of graphs of 2 nodes or more, without self-loops (masks add them).")
    if not nx.is_connected(graph):
        raise ValueError("Descriptors are of connected graphs: paths between parts have no length.")
    return {name: float(measure(graph)) for name, measure in DESCRIPTORS.items()}
