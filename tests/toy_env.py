"""A tiny graph environment: random graphs of varying size, one step, a known best action."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.spaces import GraphInstance
from numpy.typing import NDArray


class ToyGraphEnv(gym.Env[GraphInstance, NDArray[Any]]):
    """Every node shows a value, and the best action of a decision node is its value.

    The reward is minus the mean squared distance to it. The values of a graph spread by at most 0.2 around
    a mean that is drawn from [0.2, 0.8], so the best constant action gets about -0.043, the best action
    that only knows the graph as a whole about -0.013, and the best action 0.

    Args:
        levels: levels of the hierarchy.
        decisions: least and largest number of decision nodes.
        others: least and largest number of the other nodes (with levels: of operations).
        edge_features: `E`; 0 for a graph without edge features.
        links: whether there are edges.
    """

    def __init__(
        self,
        levels: int = 1,
        decisions: tuple[int, int] = (3, 3),
        others: tuple[int, int] = (2, 6),
        edge_features: int = 2,
        links: bool = True,
    ) -> None:
        self.levels, self.decisions, self.others, self.links = levels, decisions, others, links
        self.edge_features = edge_features
        node_space = spaces.Box(-1, 1, ((levels if levels > 1 else 0) + 3,), np.float32)
        edge_space = spaces.Box(-1, 1, (edge_features,), np.float32) if edge_features else None
        self.observation_space = spaces.Graph(node_space, edge_space)
        self.action_space = spaces.Box(0, 1, (decisions[0],), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[GraphInstance, dict[str, Any]]:
        super().reset(seed=seed)
        count = int(self.np_random.integers(self.decisions[0], self.decisions[1] + 1))
        if (count,) != self.action_space.shape:
            self.action_space = spaces.Box(0, 1, (count,), np.float32)
        level = np.repeat(np.arange(self.levels), self._level_sizes(count))
        self.target, nodes = self._nodes(level, count)
        links = self._links(level, count) if self.links else np.zeros((0, 2), np.int64)
        edges = self.np_random.uniform(-1, 1, (len(links), self.edge_features)).astype(np.float32)
        self.graph = GraphInstance(nodes, edges if self.edge_features else None, links)
        return self.graph, {}

    def step(self, action: NDArray[Any]) -> tuple[GraphInstance, float, bool, bool, dict[str, Any]]:
        assert action.shape == self.target.shape
        return self.graph, -float(np.mean((action - self.target) ** 2)), True, False, {}

    def _level_sizes(self, decisions: int) -> list[int]:
        others = int(self.np_random.integers(self.others[0], self.others[1] + 1))
        if self.levels == 1:
            return [decisions + others]
        return [decisions] + [max(others // 2**level, 2) for level in range(self.levels - 1)]

    def _nodes(self, level: NDArray[Any], decisions: int) -> tuple[NDArray[Any], NDArray[Any]]:
        value = self.np_random.uniform(0.2, 0.8) + self.np_random.uniform(-0.2, 0.2, len(level))
        noise = self.np_random.uniform(-1, 1, (len(level), 2))
        one_hot = np.eye(self.levels)[level] if self.levels > 1 else np.zeros((len(level), 0))
        nodes = np.column_stack([one_hot, value, noise])
        return value[:decisions], nodes.astype(np.float32)

    def _links(self, level: NDArray[Any], decisions: int) -> NDArray[Any]:
        """Random dataflow on every level, and one parent for every member."""
        of = [np.flatnonzero(level == here) for here in range(self.levels)]
        pairs = [self.np_random.choice(nodes, (len(nodes), 2)) for nodes in of]
        for here in range(1, self.levels - 1):
            pairs.append(np.column_stack([of[here], self.np_random.choice(of[here + 1], len(of[here]))]))
        if self.levels > 1:  # layers belong to decisions, too
            layers = of[min(2, self.levels - 1)]
            pairs.append(np.column_stack([layers, self.np_random.choice(of[0], len(layers))]))
        return np.concatenate(pairs).astype(np.int64)
