"""WS-flex graphs: from ring to random, with an exact number of edges."""

from __future__ import annotations

import networkx as nx
import numpy as np
from numpy.typing import NDArray

ATTEMPTS = 200


def ws_flex(nodes: int, edges: int, rewiring: float, rng: np.random.Generator) -> nx.Graph:
    """A connected Watts-Strogatz graph whose mean degree need not be even (You et al. 2020, section 3.2, "WS-flex").

    A ring in which each node is tied to its nearest neighbours, the last edges at random places; then, by chance, an
    edge keeps the end that it goes out from, clockwise, and gets another other end: so no node keeps more edges than
    the next one. Graphs that fall apart are drawn again.

    Args:
        nodes: n, at least 3; they are numbered from 0.
        edges: m, exactly, from n (a ring) to n (n - 1) / 2 (complete). Self-loops are not among them: every node
            has one, in every graph, so they say nothing and are left out here.
        rewiring: probability in [0, 1] of each edge to be rewired.
        rng: source of all chance; equal states give equal graphs.

    Raises:
        ValueError: numbers out of range, or no connected graph in 200 draws.
    """
    if nodes < 3 or not nodes <= edges <= nodes * (nodes - 1) // 2:
        most = nodes * (nodes - 1) // 2
        raise ValueError(f"A graph of {nodes} nodes needs {nodes} to {most} edges and 3 nodes at least, got {edges}.")
    if not 0 <= rewiring <= 1:
        raise ValueError(f"rewiring is a probability in [0, 1], got {rewiring}.")
    for _ in range(ATTEMPTS):
        graph = nx.empty_graph(nodes)
        adjacency = _rewired(nodes, _ring(nodes, edges, rng), rewiring, rng)
        graph.add_edges_from(np.argwhere(np.triu(adjacency)).tolist())
        if nx.is_connected(graph):
            return graph
    raise ValueError(f"No connected graph of {nodes} nodes and {edges} edges in {ATTEMPTS} draws: allow more edges.")


def _ring(nodes: int, edges: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Edges [m, 2], from where clockwise to where: whole rounds of the ring at growing distance, and a part of the
    next round at random."""
    rounds, places = [], np.arange(nodes)
    left, distance = edges, 1
    while left:
        # across an even ring every edge is met from both of its ends
        starts = places[: nodes // 2] if 2 * distance == nodes else places
        chosen = starts if left >= len(starts) else rng.choice(starts, left, replace=False)
        rounds.append(np.stack([chosen, (chosen + distance) % nodes], axis=1))
        left, distance = left - len(chosen), distance + 1
    return np.concatenate(rounds)


def _rewired(nodes: int, ring: NDArray[np.int64], share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Adjacency [n, n] of the ring's edges [m, 2], each rewired with probability `share`."""
    adjacency = np.zeros((nodes, nodes), bool)
    adjacency[ring[:, 0], ring[:, 1]] = adjacency[ring[:, 1], ring[:, 0]] = True
    for start, end in ring:
        if rng.random() >= share:
            continue
        free = ~adjacency[start]
        free[start] = False
        if free.any():
            new = rng.choice(np.flatnonzero(free))
            adjacency[start, end] = adjacency[end, start] = False
            adjacency[start, new] = adjacency[new, start] = True
    return adjacency
