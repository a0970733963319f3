"""What environments share in which an action chooses one graph of a pool."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gnnrl_gym.checks import check_choice
from gnnrl_gym.envs.network import NOT_SCORED
from gnnrl_gym.relational.pool import GraphPool

ACTIONS = ("descriptors", "index")
NEIGHBOURS = 5


class PoolEnv(gym.Env[spaces.GraphInstance, Any]):
    """Choose a graph of a pool and learn what it is worth. A subclass says what that is, in `measure`.

    Spaces, reward and episodes are described in `gnnrl_gym.envs.relational.RelationalEnv`.

    Args:
        pool: P graphs with D descriptors.
        action: `descriptors` or `index`.

    Attributes:
        evaluations: graphs scored since the environment was made, repeated ones included.
        seen: scores by index, of the graphs that were scored since the last seeded reset.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}
    plan_key = "graph"  # where `info` has the plan
    acts_on_nodes = False

    def __init__(self, pool: GraphPool, action: str = "descriptors", render_mode: str | None = None) -> None:
        check_choice("action", action, ACTIONS)
        check_choice("render_mode", render_mode, (None, *self.metadata["render_modes"]))
        self.pool, self.action, self.render_mode = pool, action, render_mode
        self.evaluations = 0
        self.seen: dict[int, float] = {}
        self._scores: dict[int, float] = {}
        self._last: int | None = None
        self._running = False
        self._links, distances = _neighbours(pool.standardised)
        self._edges = (distances / max(float(distances.max()), 1e-9)).astype(np.float32)[:, None]
        self.max_nodes, self.max_edges = len(pool), len(self._links)
        columns = len(pool.names)
        self.observation_space = spaces.Graph(
            spaces.Box(-1.0, 1.0, (columns + 2,), np.float32), spaces.Box(0.0, 1.0, (1,), np.float32)
        )
        self.action_space: spaces.Space[Any] = (
            spaces.Discrete(len(pool)) if action == "index" else spaces.Box(0.0, 1.0, (columns,), np.float32)
        )

    # ---- Gymnasium ------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[spaces.GraphInstance, dict[str, Any]]:
        """Start an episode. A seed begins a new search: all graphs are unseen again."""
        super().reset(seed=seed)
        if options:
            raise ValueError(f"Unknown reset option {sorted(options)[0]!r}: there are none.")
        if seed is not None:
            self.seen.clear()
        self._last, self._running = None, True
        return self._observation(), self._info()

    def step(self, action: Any) -> tuple[spaces.GraphInstance, SupportsFloat, bool, bool, dict[str, Any]]:
        """Score the graph that `action` means; the episode ends.

        Raises:
            RuntimeError: no episode is running.
            ValueError: the action is of another shape, not finite, or outside the action space (an index must be a
                whole number). Nothing has changed then.
        """
        if not self._running:
            raise RuntimeError("No episode is running: call reset() first.")
        self._last = self.choose(action)
        self._running = False
        reward = self.evaluate(self._last) - 1.0
        return self._observation(), reward, True, False, self._info()

    def render(self) -> Any:
        """Text: the last graph's descriptors and score, and the best one's."""
        if self.render_mode is None:
            raise ValueError("Rendering needs gym.make(..., render_mode='ansi').")
        lines = [f"{len(self.seen)} of {len(self.pool)} graphs seen"]
        best = max(self.seen, key=lambda index: self.seen[index], default=None)
        for title, index in (("last", self._last), ("best", best)):
            if index is not None:
                values = ", ".join(f"{name} {value:.4g}" for name, value in self.pool.descriptors[index].items())
                lines.append(f"{title}: graph {index}, search accuracy {self.seen[index]:.4f}; {values}")
        return "\n".join(lines)

    # ---- what searchers use -----------------------------------------------------------------------------------

    def choose(self, action: Any) -> int:
        """The graph that an action means now. Changes nothing.

        Raises:
            ValueError: the action lies outside of the action space.
        """
        if self.action == "index":
            index = np.asarray(action)
            if index.shape or index.dtype.kind not in "iu" or not 0 <= index < len(self.pool):
                last = len(self.pool) - 1
                raise ValueError(f"The action is a graph of the pool, a whole number from 0 to {last}, got {action!r}.")
            return int(index)
        units = np.asarray(action, float)
        if units.shape != (len(self.pool.names),) or not ((units >= -1e-6) & (units <= 1 + 1e-6)).all():
            raise ValueError(f"The action has a value in [0, 1] for each of {', '.join(self.pool.names)}; got {units}.")
        seen = self.seen if len(self.seen) < len(self.pool) else ()
        return self.pool.nearest(self.pool.at(units), seen)

    def action_for(self, index: int) -> Any:
        """The action that means a graph (as long as it is unseen)."""
        return np.int64(index) if self.action == "index" else self.pool.units[index].astype(np.float32)

    def evaluate(self, index: int) -> float:
        """One evaluation: the search accuracy in [0, 1] of a graph. The same graph always gets the same score."""
        self.evaluations += 1
        if index not in self._scores:
            self._scores[index] = self.measure(index)
        self.seen[index] = self._scores[index]
        return self.seen[index]

    def remember(self, index: int, accuracy: float) -> None:
        """Take a score that an earlier run has measured."""
        self._scores[index] = accuracy

    def scored(self) -> dict[int, float]:
        """Scores by index of all graphs that were scored since the environment was made."""
        return dict(self._scores)

    def measure(self, index: int) -> float:
        """The search accuracy in [0, 1] of a graph."""
        raise NotImplementedError

    def facts(self, index: int) -> dict[str, Any]:
        """What else `info` says of a graph."""
        return {}

    # ---- inside -----------------------------------------------------------------------------------------------

    def _observation(self) -> spaces.GraphInstance:
        known = np.zeros((len(self.pool), 2))
        for index, accuracy in self.seen.items():
            known[index] = 1.0, accuracy
        nodes = np.hstack([2 * self.pool.units - 1, known]).astype(np.float32)
        return spaces.GraphInstance(nodes, self._edges.copy(), self._links.copy())

    def _info(self) -> dict[str, Any]:
        scored = self._last is not None
        index = self._last if self._last is not None else 0
        return {
            "graph": index if scored else -1,
            "descriptors": dict(self.pool.descriptors[index]) if scored else dict.fromkeys(self.pool.names, 0.0),
            **self.facts(index),
            "search_accuracy": self.seen[index] if scored else NOT_SCORED,
            "is_success": scored,
            "evaluations": int(scored),
        }


def _neighbours(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Links int64 [M, 2] from every graph to its nearest others in descriptor space, and their lengths [M]."""
    distances = np.sqrt(np.square(places[:, None] - places[None]).sum(-1))
    np.fill_diagonal(distances, np.inf)
    count = min(NEIGHBOURS, len(places) - 1)
    ends = np.argsort(distances, axis=1, kind="stable")[:, :count].ravel()
    starts = np.repeat(np.arange(len(places)), count)
    return np.column_stack([starts, ends]).astype(np.int64), distances[starts, ends]
