"""PadGraph: nothing is lost, nothing is invented, and the agent libraries accept the result."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.spaces import GraphInstance
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from toy_env import ToyGraphEnv

from agents.sb3 import make_sb3_env
from gnnrl_gym.wrappers import PaddedGraphSpace, PadGraph

SIZES = {"max_nodes": 40, "max_edges": 80, "max_decisions": 6}


def unpad(observation: dict[str, Any]) -> GraphInstance:
    nodes, edges = (observation[mask].astype(bool) for mask in ("node_mask", "edge_mask"))
    return GraphInstance(observation["nodes"][nodes], observation["edges"][edges], observation["edge_links"][edges])


@pytest.mark.parametrize("levels", [1, 5])
def test_padding_keeps_the_graph_and_its_order(levels: int) -> None:
    toy = ToyGraphEnv(levels, decisions=(2, 6))
    env = PadGraph(toy, **SIZES)
    for seed in range(5):
        observation, _ = env.reset(seed=seed)
        assert env.observation_space.contains(observation)
        for real, kept in zip(toy.graph, unpad(observation), strict=True):
            np.testing.assert_array_equal(real, kept)
        assert observation["node_mask"].sum() == len(list(toy.graph.nodes))
        assert observation["decision_mask"].sum() == len(toy.target)
        for key in ("nodes", "edges", "edge_links"):
            mask = observation["node_mask" if key == "nodes" else "edge_mask"].astype(bool)
            assert not observation[key][~mask].any()


def test_padding_components_of_an_action_are_cut_off() -> None:
    toy = ToyGraphEnv(decisions=(2, 6))
    env = PadGraph(toy, **SIZES)
    assert env.action_space == spaces.Box(0, 1, (6,), np.float32)
    counts = set()
    for seed in range(10):
        env.reset(seed=seed)
        action = np.full(6, 99, np.float32)
        action[: len(toy.target)] = toy.target
        assert env.step(action)[1] == pytest.approx(0, abs=1e-6)
        counts.add(len(toy.target))
    assert len(counts) > 1  # it did follow a changing number of decision nodes


def test_action_bounds_are_those_of_the_inner_environment() -> None:
    toy = ToyGraphEnv()
    toy.action_space = spaces.Box(np.array([-3, 0, 1], np.float32), np.array([3, 2, 4], np.float32))
    space = PadGraph(toy, **SIZES).action_space
    assert isinstance(space, spaces.Box)
    np.testing.assert_array_equal(space.low, [-3, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(space.high, [3, 2, 4, 4, 4, 4])


@pytest.mark.parametrize("low, high, named", [(0, 2, "0.0 to 2.0"), (-1, 1, "-1.0 to 1.0")])
def test_bounds_that_change_are_refused(low: float, high: float, named: str) -> None:
    toy = ToyGraphEnv(decisions=(3, 3))
    env = PadGraph(toy, **SIZES)
    env.reset(seed=0)
    lows, highs = np.zeros(3, np.float32), np.ones(3, np.float32)
    lows[2], highs[2] = low, high
    toy.action_space = spaces.Box(lows, highs)
    for again in (lambda: env.step(np.zeros(6)), env.reset):
        with pytest.raises(ValueError, match=f"component 2 .* from {named}.* agent 0.0 to 1.0: .* same.* scale"):
            again()


@pytest.mark.parametrize("name", ["nodes", "edges", "decisions"])
def test_too_large_a_graph_names_sizes_and_argument(name: str) -> None:
    toy = ToyGraphEnv(decisions=(3, 3), others=(9, 9))
    size = {"nodes": 12, "edges": 12, "decisions": 3}[name]
    sizes = {**SIZES, f"max_{name}": size - 1}
    with pytest.raises(ValueError, match=f"{size} {name}.*max_{name}={size - 1}.*raise max_{name} to"):
        PadGraph(toy, **sizes).reset(seed=0)
    PadGraph(toy, **{**SIZES, f"max_{name}": size}).reset(seed=0)


def test_maxima_come_from_the_environment_or_from_one_graph() -> None:
    measured = PadGraph(ToyGraphEnv(others=(4, 4)))
    assert (measured.max_nodes, measured.max_edges, measured.max_decisions) == (7, 7, 3)
    declared = ToyGraphEnv(others=(4, 4))
    declared.max_nodes, declared.max_edges = 11, 13  # type: ignore[attr-defined]
    env = PadGraph(declared)
    assert (env.max_nodes, env.max_edges, env.max_decisions) == (11, 13, 3)
    assert PadGraph(declared, max_nodes=20).max_nodes == 20


def test_a_wrapper_may_declare_them() -> None:
    """Often it is a wrapper that makes a graph of somebody else's observation."""

    class Adapter(gym.Wrapper[Any, Any, Any, Any]):
        levels, max_nodes, max_edges, max_decisions = 5, 11, 13, 4

    toy = ToyGraphEnv(5, others=(4, 4))
    toy.levels = 5
    env = PadGraph(gym.Wrapper(Adapter(toy)))
    assert (env.max_nodes, env.max_edges, env.max_decisions, env.levels) == (11, 13, 4, 5)
    assert getattr(env.observation_space, "levels", None) == 5


@pytest.mark.parametrize("features, links", [(0, True), (0, False), (2, False)])
def test_graphs_without_edges_or_edge_features(features: int, links: bool) -> None:
    env = PadGraph(ToyGraphEnv(others=(4, 4), edge_features=features, links=links))
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert observation["edges"].shape == (env.max_edges, max(features, 1))
    assert observation["edge_mask"].any() == links


def test_edge_links_may_be_none() -> None:
    env = PadGraph(ToyGraphEnv(), **SIZES)
    padded = env.pad(GraphInstance(np.ones((4, 3), np.float32), None, None))
    assert env.observation_space.contains(padded) and not padded["edge_mask"].any()


@pytest.mark.parametrize(
    "observation, action",
    [
        (spaces.Box(0, 1, (3,)), spaces.Box(0, 1, (3,))),
        (spaces.Graph(spaces.Discrete(3), None), spaces.Box(0, 1, (3,))),
        (spaces.Graph(spaces.Box(0, 1, (3,)), spaces.Discrete(3)), spaces.Box(0, 1, (3,))),
        (spaces.Graph(spaces.Box(0, 1, (3,)), None), spaces.Discrete(3)),
    ],
)
def test_other_spaces_are_refused(observation: spaces.Space[Any], action: spaces.Space[Any]) -> None:
    toy = ToyGraphEnv()
    toy.observation_space, toy.action_space = observation, action  # type: ignore[assignment]
    with pytest.raises(TypeError, match="PadGraph needs"):
        PadGraph(toy)


@pytest.mark.parametrize("links", [[[0, 4]], [[-1, 2]]])
def test_links_beyond_the_nodes_are_refused(links: list[list[int]]) -> None:
    env = PadGraph(ToyGraphEnv(), **SIZES)
    with pytest.raises(ValueError, match=r"edge_links go from .* but the graph has 4 nodes"):
        env.pad(GraphInstance(np.ones((4, 3), np.float32), None, np.array(links)))


@pytest.mark.parametrize(
    "nodes, links, message",
    [
        ((4, 5), None, r"nodes of a graph must have a row of 3 for each, got shape \(4, 5\)"),
        ((4, 3), np.zeros((2, 7), np.int64), r"edge_links .* a row of 2 for each, got shape \(2, 7\)"),
    ],
)
def test_rows_of_another_length_are_named(nodes: tuple[int, int], links: Any, message: str) -> None:
    env = PadGraph(ToyGraphEnv(), **SIZES)
    with pytest.raises(ValueError, match=message):
        env.pad(GraphInstance(np.ones(nodes, np.float32), None, links))
    assert not env.pad(GraphInstance(np.ones((4, 3), np.float32), None, np.array([])))["edge_mask"].any()


LINKS = np.array([[0, 1], [1, 2], [2, 3]])


@pytest.mark.parametrize(
    "edges, links, message",
    [
        (np.ones((1, 2)), LINKS, r"a row of 2 for each of its 3 links, got shape \(1, 2\)"),
        (np.ones(2), LINKS, r"a row of 2 for each of its 3 links, got shape \(2,\)"),
        (np.ones((3, 1)), LINKS, r"a row of 2 for each of its 3 links, got shape \(3, 1\)"),
        (None, LINKS, "a row of 2 for each of its 3 links, got None"),
        (np.ones((3, 2)), None, r"a row of 2 for each of its 0 links, got shape \(3, 2\)"),
        (np.ones((3, 2)), LINKS + 0.7, "edge_links must be whole numbers"),
        (np.ones((3, 2)), LINKS + np.nan, "edge_links must be whole numbers"),
    ],
)
def test_edges_that_are_not_those_of_the_links_are_refused(edges: Any, links: Any, message: str) -> None:
    env = PadGraph(ToyGraphEnv(edge_features=2), **SIZES)
    nodes = np.ones((4, 3), np.float32)
    with pytest.raises(ValueError, match=message):
        env.pad(GraphInstance(nodes, edges, links))
    padded = env.pad(GraphInstance(nodes, np.ones((3, 2)), LINKS.astype(float)))  # whole, whatever their type
    np.testing.assert_array_equal(padded["edge_links"][:3], LINKS)


def test_an_edge_space_without_a_feature_is_as_good_as_none() -> None:
    toy = ToyGraphEnv(edge_features=0)
    none, empty = PadGraph(toy, **SIZES), copy.deepcopy(toy)
    empty.observation_space = spaces.Graph(toy.observation_space.node_space, spaces.Box(0, 1, (0,)))  # type: ignore[attr-defined]
    env = PadGraph(empty, **SIZES)
    assert env.observation_space == none.observation_space
    assert env.observation_space.contains(env.reset(seed=0)[0])
    padded = env.pad(GraphInstance(np.ones((4, 3), np.float32), np.zeros((3, 0), np.float32), LINKS))
    assert env.observation_space.contains(padded) and padded["edge_mask"].sum() == 3
    with pytest.raises(ValueError, match=r"a row of 0 for each of its 3 links, got shape \(3, 2\)"):
        env.pad(GraphInstance(np.ones((4, 3), np.float32), np.ones((3, 2)), LINKS))


def test_a_node_space_without_a_feature_is_named() -> None:
    toy = ToyGraphEnv()
    toy.observation_space = spaces.Graph(spaces.Box(0, 1, (0,)), None)
    with pytest.raises(ValueError, match="the node space has no feature"):
        PadGraph(toy, **SIZES)


@pytest.mark.parametrize("wrong", [{"max_nodes": 0}, {"max_nodes": 2.5}, {"max_edges": -3}, {"max_decisions": "a"}])
def test_maxima_that_are_none_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a whole number"):
        PadGraph(ToyGraphEnv(), **{**SIZES, **wrong})


@pytest.mark.parametrize(
    "action, message",
    [
        (spaces.Box(0, 1, (0,)), "no component"),
        (spaces.Box(-np.inf, np.inf, (3,)), "a low and a higher high"),
        (spaces.Box(np.zeros(3), np.array([1.0, 0.0, 1.0])), "a low and a higher high"),
        (spaces.Box(0, 5, (3,), np.int64), "Box of floats"),  # rescaling makes NaN of them
    ],
)
def test_actions_that_cannot_be_rescaled_are_refused(action: spaces.Box, message: str) -> None:
    toy = ToyGraphEnv()
    toy.action_space = action
    with pytest.raises(ValueError, match=message):
        make_sb3_env(toy, **SIZES)


class Fixed(gym.Env[GraphInstance, Any]):
    """Always the same hierarchy: two decisions at level 0, their parts at level 1, the whole at level 2."""

    levels, max_nodes, max_edges = 3, 5, 6
    observation_space = spaces.Graph(spaces.Box(0, 1, (4,), np.float32), None)
    action_space = spaces.Box(0, 1, (2,), np.float32)

    def __init__(self, level: list[int], links: list[list[int]]) -> None:
        self.graph = GraphInstance(np.eye(4, dtype=np.float32)[level], None, np.array(links))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self.graph, {}


def test_a_hierarchy_that_is_none_is_refused() -> None:
    up = [[2, 4], [3, 4], [2, 3], [2, 0], [4, 1], [0, 1]]  # to parents, inside a level, and down to decisions
    PadGraph(Fixed([0, 0, 1, 1, 2], up)).reset()
    for link, named in (([0, 2], "node 0 of level 0 to node 2 of level 1"), ([4, 3], "node 4 of level 2 to node 3")):
        with pytest.raises(ValueError, match=rf"edge_links lead from {named}.*edges lead upwards"):
            PadGraph(Fixed([0, 0, 1, 1, 2], [*up[1:], link])).reset()
    for level in ([0, 1, 0, 1, 2], [0, 0, 1, 1, 3]):
        with pytest.raises(ValueError, match=r"the first 3 features of a node must be its level.*first 2, of level 0"):
            PadGraph(Fixed(level, up)).reset()
    with pytest.raises(ValueError, match="no node of level 2, the top one"):
        PadGraph(Fixed([0, 0, 1, 1, 1], up)).reset()


@pytest.mark.parametrize("links", [None, np.array([])])
def test_a_hierarchy_may_have_no_node(links: Any) -> None:
    env = PadGraph(ToyGraphEnv(levels=5), **SIZES)
    padded = env.pad(GraphInstance(np.array([]), None, links))
    assert env.observation_space.contains(padded) and not padded["node_mask"].any()


@pytest.mark.parametrize("shape", [(), (2,), (4,), (1, 3)])
def test_actions_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    env = PadGraph(ToyGraphEnv(), **{**SIZES, "max_decisions": 3})
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"an action has shape \(3,\), got"):
        env.step(np.zeros(shape))


@pytest.mark.parametrize("levels", [1, 5])
def test_stable_baselines3_accepts_it(levels: int) -> None:
    env = make_sb3_env(ToyGraphEnv(levels, decisions=(2, 6)), **SIZES)
    assert env.action_space == spaces.Box(-1, 1, (6,), np.float32)
    assert env.get_wrapper_attr("levels") == levels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # A table of nodes is neither an image nor a vector, and only our own extractor reads it.
        warnings.filterwarnings("ignore", message=".*unconventional shape")
        check_env(env)


def test_rescaled_actions_reach_the_environment_as_ratios() -> None:
    toy = ToyGraphEnv()
    env = make_sb3_env(toy, **SIZES)
    env.reset(seed=0)
    assert env.step(np.pad(2 * toy.target.astype(np.float32) - 1, (0, 3)))[1] == pytest.approx(0, abs=1e-6)


def test_links_survive_the_float_rollout_buffer() -> None:
    env = PadGraph(ToyGraphEnv(), max_nodes=100_000, max_edges=4)
    links = np.array([[99_999, 99_998], [65_537, 12_345]])
    padded = env.pad(GraphInstance(np.zeros((100_000, 3), np.float32), np.zeros((2, 2)), links))
    assert isinstance(env.observation_space, spaces.Dict)
    space = spaces.Dict({"edge_links": env.observation_space["edge_links"]})
    buffer = DictRolloutBuffer(1, space, env.action_space)
    buffer.observations["edge_links"][0] = padded["edge_links"]
    np.testing.assert_array_equal(buffer.observations["edge_links"][0, 0, :2].astype(int), links)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gym.register("ToyGraph-v0", "toy_env:ToyGraphEnv")
    yield
    gym.registry.pop("ToyGraph-v0")


def test_copies_have_the_same_spaces() -> None:
    # The maxima come from one graph of a random size, so a rebuilt environment must not look again.
    env: gym.Env[Any, Any] = PadGraph(gym.make("ToyGraph-v0", others=(500, 1000)), max_edges=2000)
    for other in (pickle.loads(pickle.dumps(env)), rebuild(env)):
        assert other.observation_space == env.observation_space
        assert other.action_space == env.action_space


def test_copies_give_the_same_observations() -> None:
    env: gym.Env[Any, Any] = PadGraph(gym.make("ToyGraph-v0", levels=5), **SIZES)
    for other in (pickle.loads(pickle.dumps(env)), rebuild(env)):
        for key, value in env.reset(seed=3)[0].items():
            np.testing.assert_array_equal(value, other.reset(seed=3)[0][key])


def rebuild(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    assert env.spec is not None
    return gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))


@pytest.mark.parametrize("levels", [1, 5])
def test_the_space_says_how_many_levels_there_are(levels: int) -> None:
    space: Any = make_sb3_env(ToyGraphEnv(levels), **SIZES).observation_space
    vector: Any = VecMonitor(DummyVecEnv([lambda: make_sb3_env(ToyGraphEnv(levels), **SIZES)]))
    for other in (space, copy.deepcopy(space), pickle.loads(pickle.dumps(space)), vector.observation_space):
        assert other.levels == levels and other == space


def test_another_hierarchy_is_another_space() -> None:
    space: Any = PadGraph(ToyGraphEnv(levels=5), **SIZES).observation_space
    flat = PaddedGraphSpace(space.spaces, levels=1)
    assert space != flat and flat != space and repr(flat).endswith("levels=1)")
    plain = spaces.Dict(space.spaces)  # of an older file, or of another wrapper
    assert space == plain and plain == space
