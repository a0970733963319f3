"""A pool of graphs with their descriptors, and the lookup from descriptors to the nearest graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from gnnrl_gym.relational.descriptors import DESCRIPTORS, Descriptors, describe
from gnnrl_gym.relational.graphs import ws_flex

LEAST_REWIRING = 0.01
ATTEMPTS_PER_GRAPH = 20
Floats = NDArray[np.float64]


class GraphPool:
    """Graphs that can be told apart by their descriptors.

    Args:
        graphs: P connected graphs.

    Attributes:
        descriptors: of each graph, by name.
        names: of the descriptors, in the order of the columns below.
        values: float64 [P, D], as they are.
        varies: bool [D]: whether the graphs differ in it at all.
        standardised: [P, D], minus the pool's mean, over its standard deviation; 0 where nothing varies.
        units: [P, D], from 0 (the pool's smallest) to 1 (its largest); 0 where nothing varies.
    """

    def __init__(self, graphs: Sequence[nx.Graph]) -> None:
        self.graphs = tuple(graphs)
        self.names = tuple(DESCRIPTORS)
        self.descriptors = tuple(describe(graph) for graph in graphs)
        self.values = np.array([[each[name] for name in self.names] for each in self.descriptors])
        self._low, self._range = self.values.min(0), np.ptp(self.values, axis=0)
        self._mean, self._deviation = self.values.mean(0), self.values.std(0)
        self.varies = self._range > 1e-9 * np.abs(self.values).max(0)
        self.standardised = self._scaled(self.values, self._mean, self._deviation)
        self.units = self._scaled(self.values, self._low, self._range)

    def __len__(self) -> int:
        return len(self.graphs)

    def nearest(self, point: Mapping[str, float], seen: Collection[int] = ()) -> int:
        """The unseen graph nearest to a point in descriptor space, in units of the pool's standard deviations.

        Args:
            point: a value for every descriptor, by name, in any order.
            seen: indices of graphs that are no answer any more.

        Raises:
            ValueError: a name is missing or unknown, a value is not finite, or all graphs are seen.
        """
        if set(point) != set(self.names):
            odd = sorted(set(point) ^ set(self.names))
            raise ValueError(f"A point needs a value for each of {', '.join(self.names)}; missing or unknown: {odd}.")
        values = np.array([point[name] for name in self.names], float)
        if not np.isfinite(values).all():
            raise ValueError(f"The descriptor {self.names[int(np.argmin(np.isfinite(values)))]} is not finite.")
        if len(seen) >= len(self):
            raise ValueError(f"All {len(self)} graphs of the pool are seen.")
        query = self._scaled(values, self._mean, self._deviation)
        distances = np.square(self.standardised - query).sum(1)
        distances[list(seen)] = np.inf
        return int(distances.argmin())

    def at(self, units: Floats) -> Descriptors:
        """The point in descriptor space that lies at `units` [D] between the pool's smallest and largest values."""
        values = self._low + np.asarray(units, float) * self._range
        return dict(zip(self.names, values.tolist(), strict=True))

    def _scaled(self, values: Floats, centre: Floats, spread: Floats) -> Floats:
        return np.where(self.varies, (values - centre) / np.where(self.varies, spread, 1.0), 0.0)


def make_pool(
    nodes: int, edges: int, size: int, seed: int = 0, accept: Callable[[nx.Graph], bool] = lambda graph: True
) -> GraphPool:
    """WS-flex graphs of equal cost, the rewiring drawn log-uniformly from [0.01, 1]: from nearly a ring to random.

    Args:
        nodes, edges: of every graph; edges without self-loops.
        size: P. No two graphs have the same descriptors (to six digits), so that each can be looked up.
        seed: equal seeds give equal pools, and the first graphs of a larger pool are those of a smaller one.
        accept: which graphs may enter, such as those whose masks keep no more weights than allowed.

    Raises:
        ValueError: size below 2, numbers that `ws_flex` refuses, or not that many different graphs in 20 draws each.
    """
    if size < 2:
        raise ValueError(f"A pool holds at least 2 graphs, got size={size}.")
    found: dict[tuple[str, ...], nx.Graph] = {}
    for draw in range(ATTEMPTS_PER_GRAPH * size):
        rng = np.random.default_rng([seed, draw])
        graph = ws_flex(nodes, edges, float(LEAST_REWIRING ** rng.random()), rng)
        if accept(graph):
            found.setdefault(tuple(f"{value:.5e}" for value in describe(graph).values()), graph)
        if len(found) == size:
            return GraphPool(tuple(found.values()))
    less = "a smaller pool" if len(found) >= 2 else "fewer edges (a lower density)"  # no pool is smaller than 2
    raise ValueError(f"Only {len(found)} graphs of {nodes} nodes and {edges} edges differ: ask for {less}.")
