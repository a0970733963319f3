"""Wrappers between a graph environment and the agent libraries, which do not take `spaces.Graph`."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.spaces import GraphInstance
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray

from gnnrl_gym.checks import check_whole

Padded = dict[str, Any]


class PaddedGraphSpace(spaces.Dict):
    """The space of padded graphs: a `Dict` that also says how many levels their hierarchy has.

    It goes with the space into copies, pickles and saved agents, so that what reads the graphs need not be told.
    """

    levels: int = 1

    def __init__(self, boxes: dict[str, spaces.Space[Any]], levels: int = 1) -> None:
        super().__init__(boxes)
        self.levels = levels

    def __eq__(self, other: Any) -> bool:
        """Equal boxes, read as equal hierarchies. A plain `Dict`, of old files say, leaves the hierarchy open."""
        return super().__eq__(other) and getattr(other, "levels", self.levels) == self.levels

    def __repr__(self) -> str:
        """With the levels, which may be all that two spaces differ in."""
        return f"PaddedGraphSpace({super().__repr__()}, levels={self.levels})"


# `Any`, because Gymnasium annotates the wrapped environment with the types of the wrapper.
class PadGraph(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Turn a `spaces.Graph` observation into a `spaces.Dict` of arrays of one fixed size.

    With `N, M, D = max_nodes, max_edges, max_decisions`, `F` node features and `E` edge features the
    observation is a dictionary of

    =============  ========  =========  ==============================================================
    key            shape     dtype      meaning
    =============  ========  =========  ==============================================================
    nodes          [N, F]    float32    node features, in the order of the graph: decision nodes first
    edges          [M, E]    float32    edge features; one column of zeros where the graph has none
    edge_links     [M, 2]    int64      source and target node of each edge
    node_mask      [N]       int8       1 for a node, 0 for padding
    edge_mask      [M]       int8       1 for an edge, 0 for padding
    decision_mask  [D]       int8       1 for an action component the environment acts on
    =============  ========  =========  ==============================================================

    Padding is zero. Libraries that turn all of it into float32 keep the links exact up to 2**24 nodes.

    The action space becomes a `Box` of `D` components: the inner bounds, and for the padding those of the
    last component. Padding components are cut off before the inner step. The inner action space is read
    anew each time, so an environment may act on another number of decision nodes after a reset, within these bounds.

    Args:
        env: an environment with a `Graph(Box(F,), Box(E,) or None)` observation and a `Box(A,)` action.
        max_nodes: `N`. Default: the attribute `max_nodes` of the environment or of a wrapper in `env`, else the size of
            one `env.reset()` graph.
        max_edges: `M`. Default: their `max_edges`, else as above; at least 1.
        max_decisions: `D`. Default: their `max_decisions`, else `env.action_space.shape[0]`.

    Raises:
        TypeError: the spaces of `env` are of another kind.
        ValueError: a maximum is not a whole number of at least 1 (`max_edges`: 0); the action space has no component,
            or the node space no feature. Also from `reset` and `step`: a graph or an action space is larger than its
            maximum, a link leads to no node, there is not one row of edge features for each link, a graph with several
            levels is no hierarchy as described, the bounds of the actions have changed, or an action has another shape.
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        max_nodes: int | None = None,
        max_edges: int | None = None,
        max_decisions: int | None = None,
    ) -> None:
        graph, action = _checked_spaces(env)
        sizes = _maxima(env, action, max_nodes, max_edges, max_decisions)
        self.max_nodes, self.max_edges, self.max_decisions = sizes
        # The resolved sizes are recorded, not the arguments: an environment rebuilt from its spec has to have
        # the same spaces, also where they were read off a random first graph.
        RecordConstructorArgs.__init__(self, max_nodes=sizes[0], max_edges=sizes[1], max_decisions=sizes[2])
        super().__init__(env)
        self.edge_features = 0 if graph.edge_space is None else _size(graph.edge_space)
        self.observation_space = _padded_space(graph, *sizes, self.levels)
        self.action_space = _padded_action_space(action, self.max_decisions)

    @property
    def levels(self) -> int:
        """Number of levels of the hierarchy; 1 where neither the environment nor a wrapper in here declares any."""
        return int(_declared(self.env, "levels", 1))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Padded, dict[str, Any]]:
        """Reset the inner environment and pad its observation."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self.pad(observation), info

    def step(self, action: NDArray[Any]) -> tuple[Padded, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step the inner environment with the first `A` of the `max_decisions` components of `action`."""
        if np.shape(action) != self.action_space.shape:
            raise ValueError(f"an action has shape {self.action_space.shape}, got {np.shape(action)}")
        real = np.asarray(action)[: self._decisions()]
        observation, reward, terminated, truncated, info = self.env.step(real)
        return self.pad(observation), reward, terminated, truncated, info

    def pad(self, graph: GraphInstance) -> Padded:
        """Pad one graph to the observation described above.

        Raises:
            ValueError: as described above.
        """
        nodes = np.asarray(graph.nodes, np.float32)
        links = np.zeros((0, 2), np.int64) if graph.edge_links is None else np.asarray(graph.edge_links)
        count, decisions = len(links), self._decisions()
        _check_fits("nodes", len(nodes), self.max_nodes)
        _check_fits("edges", count, self.max_edges)
        _check_links(links, len(nodes))
        padded = {key: np.zeros(box.shape, box.dtype) for key, box in _boxes(self.observation_space)}
        _put("nodes", nodes, padded)
        _put("edge_links", links, padded)
        padded["edges"][:count, : self.edge_features] = _edge_rows(graph.edges, count, self.edge_features)
        for mask, size in (("node_mask", len(nodes)), ("edge_mask", count), ("decision_mask", decisions)):
            padded[mask][:size] = 1
        if self.levels > 1:
            _check_levels(padded["nodes"][: len(nodes), : self.levels], padded["edge_links"][:count], decisions)
        return padded

    def _decisions(self) -> int:
        """Number of action components of the inner environment at this moment."""
        decisions = _size(self.env.action_space)
        _check_fits("decisions", decisions, self.max_decisions)
        _check_bounds(self.env.action_space, self.action_space)
        return decisions


def _check_fits(what: str, size: int, maximum: int) -> None:
    if size > maximum:
        raise ValueError(
            f"a graph of {size} {what} does not fit PadGraph(max_{what}={maximum}): raise max_{what} to at least {size}"
        )


def _check_bounds(now: spaces.Space[Any], padded: spaces.Space[Any]) -> None:
    """An agent acts within the bounds that it has seen first: others would never reach it."""
    assert isinstance(now, spaces.Box) and isinstance(padded, spaces.Box)
    low, high = padded.low[: _size(now)], padded.high[: _size(now)]
    other = np.flatnonzero((now.low != low) | (now.high != high))
    if len(other):
        i = other[0]
        raise ValueError(
            f"component {i} of the action goes from {now.low[i]} to {now.high[i]}, but PadGraph has told the agent "
            f"{low[i]} to {high[i]}: bounds must stay the same, so use [0, 1] and scale inside the environment"
        )


def _put(what: str, rows: NDArray[Any], padded: Padded) -> None:
    """Write `rows` into the first rows of their array; no rows at all may come as an empty list."""
    columns = padded[what].shape[1]
    if len(rows) and rows.shape[1:] != (columns,):
        raise ValueError(f"the {what} of a graph must have a row of {columns} for each, got shape {rows.shape}")
    if len(rows):
        padded[what][: len(rows)] = rows


def _edge_rows(given: Any, links: int, columns: int) -> NDArray[Any]:
    """Edge features [links, columns]: of another shape, numpy would repeat them, or they would be lost unnoticed."""
    edges = np.zeros((links, 0), np.float32) if given is None else np.asarray(given, np.float32)
    if (links or edges.size) and edges.shape != (links, columns):
        got = "None" if given is None else f"shape {edges.shape}"
        raise ValueError(f"the edges of a graph must have a row of {columns} for each of its {links} links, got {got}")
    return edges.reshape(links, columns)


def _check_links(links: NDArray[Any], nodes: int) -> None:
    """Nodes that are not there would be read as padding, or as nodes of another graph in the batch."""
    if len(links) and (links % 1 != 0).any():
        raise ValueError("edge_links must be whole numbers, the places of two nodes in the graph")
    if len(links) and (links.min() < 0 or links.max() >= nodes):
        raise ValueError(
            f"edge_links go from {links.min()} to {links.max()}, but the graph has {nodes} nodes: "
            "count them from 0, in each graph"
        )


def _check_levels(one_hot: NDArray[Any], links: NDArray[Any], decisions: int) -> None:
    """What breaks the conventions of a hierarchy would be read as another one, or not at all."""
    if not (np.isin(one_hot, (0, 1)).all() and (one_hot.sum(1) == 1).all() and one_hot[:decisions, 0].all()):
        raise ValueError(
            f"the first {one_hot.shape[1]} features of a node must be its level, one-hot, and the decision nodes, the "
            f"first {decisions}, of level 0: set them so, or leave `levels` out of the environment"
        )
    level = one_hot.argmax(1)
    if len(level) and level.max() < one_hot.shape[1] - 1:
        raise ValueError(
            f"the graph has no node of level {one_hot.shape[1] - 1}, the top one, whose mean is the embedding of the "
            "whole: give it one, or declare fewer `levels`"
        )
    turn = np.where(level == 0, one_hot.shape[1], level)  # level 0 is read last
    against = np.flatnonzero(turn[links[:, 0]] > turn[links[:, 1]])
    if len(against):
        source, target = links[against[0]]
        raise ValueError(
            f"edge_links lead from node {source} of level {level[source]} to node {target} of level {level[target]}: "
            "edges lead upwards, and from any level to the decision nodes, level 0, which are read last. Where a "
            "decision node is a part of something, give that part a node of its own at level 1, with an edge to the "
            "decision node"
        )


def _checked_spaces(env: gym.Env[Any, Any]) -> tuple[spaces.Graph, spaces.Box]:
    graph, action = env.observation_space, env.action_space
    parts = (graph.node_space, graph.edge_space) if isinstance(graph, spaces.Graph) else ()
    fits = [isinstance(part, spaces.Box) and len(part.shape) == 1 for part in parts if part is not None]
    if not isinstance(graph, spaces.Graph) or not all(fits):
        raise TypeError(f"PadGraph needs a Graph(Box(F,), Box(E,) or None) observation space, got {graph}")
    if not isinstance(action, spaces.Box) or len(action.shape) != 1:
        raise TypeError(f"PadGraph needs a Box(A,) action space, got {action}")
    if graph.node_space.shape == (0,):
        raise ValueError("the node space has no feature: where nodes have nothing to tell, give each a 1")
    if action.shape == (0,):
        raise ValueError(
            "the action space has no component, so its bounds can't be told: wrap the environment while it has a "
            "decision node"
        )
    return graph, action


def _declared(env: gym.Env[Any, Any], name: str, default: Any = None) -> Any:
    """What the outermost wrapper says that has the attribute `name`, else the environment."""
    return env.get_wrapper_attr(name) if env.has_wrapper_attr(name) else default


def _maxima(
    env: gym.Env[Any, Any], action: spaces.Box, nodes: int | None, edges: int | None, decisions: int | None
) -> tuple[int, int, int]:
    """Resolve the three maxima: the argument, else what the environment declares, else one observation."""
    nodes = _declared(env, "max_nodes") if nodes is None else nodes
    edges = _declared(env, "max_edges") if edges is None else edges
    decisions = _declared(env, "max_decisions") if decisions is None else decisions
    if nodes is None or edges is None:
        graph, _ = env.reset()
        nodes = len(graph.nodes) if nodes is None else nodes
        links = 0 if graph.edge_links is None else len(graph.edge_links)
        edges = links if edges is None else edges
    decisions = _size(action) if decisions is None else decisions
    check_whole(1, max_nodes=nodes, max_decisions=decisions)
    check_whole(0, max_edges=edges)
    _check_fits("decisions", _size(action), decisions)
    return int(nodes), max(int(edges), 1), int(decisions)  # a Box of no rows is refused by most libraries


def _padded_space(graph: spaces.Graph, nodes: int, edges: int, decisions: int, levels: int) -> PaddedGraphSpace:
    return PaddedGraphSpace(
        {
            "nodes": _rows(graph.node_space, nodes),
            "edges": _rows(graph.edge_space, edges),
            "edge_links": spaces.Box(0, nodes - 1, (edges, 2), np.int64),
            "node_mask": spaces.Box(0, 1, (nodes,), np.int8),
            "edge_mask": spaces.Box(0, 1, (edges,), np.int8),
            "decision_mask": spaces.Box(0, 1, (decisions,), np.int8),
        },
        levels,
    )


def _rows(space: spaces.Space[Any] | None, count: int) -> spaces.Box:
    """`count` rows of a feature space, widened to hold the zeros of the padding."""
    if not isinstance(space, spaces.Box) or space.shape == (0,):
        return spaces.Box(0, 0, (count, 1), np.float32)
    low = np.tile(np.minimum(space.low, 0), (count, 1)).astype(np.float32)
    high = np.tile(np.maximum(space.high, 0), (count, 1)).astype(np.float32)
    return spaces.Box(low, high, dtype=np.float32)


def _padded_action_space(action: spaces.Box, decisions: int) -> spaces.Box:
    padding = (0, decisions - _size(action))
    low, high = (np.pad(bound, padding, mode="edge") for bound in (action.low, action.high))
    return spaces.Box(low, high, dtype=action.dtype)  # type: ignore[arg-type]


def _boxes(space: spaces.Space[Any]) -> list[tuple[str, spaces.Box]]:
    assert isinstance(space, spaces.Dict)
    return [(key, box) for key, box in space.spaces.items() if isinstance(box, spaces.Box)]


def _size(action: spaces.Space[Any]) -> int:
    assert action.shape is not None
    return action.shape[0]
