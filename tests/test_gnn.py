"""The multi-stage GNN: what it must not depend on, and what it must."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation, TimeAwareObservation, TimeLimit
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from torch import Tensor
from torch_geometric.nn import GINEConv
from toy_env import ToyGraphEnv

from agents import GraphPolicy, GraphSACPolicy, make_sb3_env
from agents.gnn import EdgeConv, MultiStageGNN, _rows, linear, split_features
from gnnrl_gym.wrappers import PadGraph

Observations = dict[str, Tensor]
LEVELS = pytest.mark.parametrize("levels", [1, 2, 5])


def padded_env(levels: int, **toy: Any) -> PadGraph:
    options = {"decisions": (2, 6), "others": (4, 12), **toy}
    return PadGraph(ToyGraphEnv(levels, **options), max_nodes=40, max_edges=80, max_decisions=6)


def batch_of(env: PadGraph, size: int) -> Observations:
    """`size` different graphs, in double precision."""
    graphs = [env.reset(seed=seed)[0] for seed in range(size)]
    return {key: torch.as_tensor(np.stack([graph[key] for graph in graphs])).double() for key in graphs[0]}


def extractor(env: PadGraph, hidden: int = 16) -> MultiStageGNN:
    torch.manual_seed(0)
    assert isinstance(env.observation_space, spaces.Dict)
    return MultiStageGNN(env.observation_space, hidden=hidden, levels=env.levels).double()


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-10)


@LEVELS
def test_shapes_and_split(levels: int) -> None:
    env = padded_env(levels)
    gnn, observations = extractor(env), batch_of(env, 7)
    features = gnn(observations)
    assert features.shape == (7, gnn.features_dim) == (7, 7 * 16)
    decisions, pooled = gnn.split_features(features)
    assert decisions.shape == (7, 6, 16) and pooled.shape == (7, 16)
    assert torch.equal(torch.cat([decisions.flatten(1), pooled], 1), features)
    assert torch.equal(split_features(features, 16)[1], pooled)
    real = observations["decision_mask"].bool()
    assert not decisions[~real].any()
    assert (decisions[real].std(dim=0) > 1e-3).all()  # decision nodes are told apart


@LEVELS
def test_a_batch_of_different_graphs_equals_one_by_one(levels: int) -> None:
    env = padded_env(levels)
    gnn, observations = extractor(env), batch_of(env, 8)
    assert len(observations["node_mask"].sum(1).unique()) > 2
    single = [gnn({key: value[i : i + 1] for key, value in observations.items()}) for i in range(8)]
    assert close(gnn(observations), torch.cat(single))


@LEVELS
def test_single_precision_agrees(levels: int) -> None:
    env = padded_env(levels)
    gnn, observations = extractor(env), batch_of(env, 8)
    exact = gnn(observations)
    single = gnn.float()({key: value.float() for key, value in observations.items()})
    assert torch.allclose(exact.float(), single, atol=1e-5)


@LEVELS
def test_order_of_other_nodes_and_of_edges_does_not_matter(levels: int) -> None:
    env = padded_env(levels)
    gnn, observations = extractor(env), batch_of(env, 1)
    decisions, nodes, edges = (int(observations[mask].sum()) for mask in ("decision_mask", "node_mask", "edge_mask"))
    order = torch.arange(40)
    order[decisions:nodes] = decisions + torch.randperm(nodes - decisions)
    shuffled = torch.arange(80)
    shuffled[:edges] = torch.randperm(edges)
    permuted = dict(observations)
    permuted["nodes"] = observations["nodes"][:, order]
    permuted["edge_links"] = order.argsort()[observations["edge_links"].long()][:, shuffled].double()
    permuted["edges"] = observations["edges"][:, shuffled]
    assert not torch.equal(order, torch.arange(40))
    assert close(gnn(observations), gnn(permuted))


@LEVELS
def test_permuting_decision_nodes_permutes_their_embeddings(levels: int) -> None:
    env = padded_env(levels, decisions=(4, 4))
    gnn, observations = extractor(env), batch_of(env, 1)
    order = torch.arange(40)
    order[:4] = torch.tensor([2, 0, 3, 1])
    permuted = dict(observations)
    permuted["nodes"] = observations["nodes"][:, order]
    permuted["edge_links"] = order.argsort()[observations["edge_links"].long()].double()
    decisions, pooled = gnn.split_features(gnn(observations))
    moved, same = gnn.split_features(gnn(permuted))
    assert close(moved[:, :4], decisions[:, order[:4]]) and close(pooled, same)


@LEVELS
@pytest.mark.parametrize("garbage", [7.0, float("nan")])
def test_garbage_in_the_padding_changes_nothing(levels: int, garbage: float) -> None:
    env = padded_env(levels)
    gnn, observations = extractor(env), batch_of(env, 8)
    dirty = {key: value.clone() for key, value in observations.items()}
    dirty["nodes"][observations["node_mask"] == 0] = garbage
    dirty["edges"][observations["edge_mask"] == 0] = garbage
    dirty["edge_links"][observations["edge_mask"] == 0] = 3
    assert torch.equal(gnn(observations), gnn(dirty))


@LEVELS
def test_gradient_reaches_every_parameter(levels: int) -> None:
    env = padded_env(levels)
    gnn = extractor(env)
    features = gnn(batch_of(env, 8))
    (features * torch.randn(features.shape, dtype=features.dtype)).sum().backward()
    dead = [name for name, weight in gnn.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert dead == []


@LEVELS
@pytest.mark.parametrize("key", ["nodes", "edges"])
def test_every_real_entry_matters_to_its_own_graph_alone(levels: int, key: str) -> None:
    env = padded_env(levels)
    gnn, observations = extractor(env), batch_of(env, 4)
    observations[key].requires_grad_(True)
    gnn(observations)[1].square().sum().backward()
    gradient = observations[key].grad
    assert gradient is not None
    real = observations["node_mask" if key == "nodes" else "edge_mask"].bool()
    assert gradient[1].any() and not gradient[[0, 2, 3]].any() and not gradient[~real].any()


def test_information_climbs_the_hierarchy_and_comes_back_down() -> None:
    """An operation without edges to it but its parent chain is felt by the whole and by every decision."""
    one_hot = np.eye(5)[[0, 0, 1, 2, 3, 4]]
    nodes = np.column_stack([one_hot, np.linspace(-1, 1, 6), np.zeros((6, 2))]).astype(np.float32)
    links = np.array([[2, 3], [3, 4], [4, 5], [3, 0]])  # operation, layer, block, network; layer to decision
    env = padded_env(5, decisions=(2, 2))
    env.reset(seed=0)
    gnn = extractor(env)

    def features(value: float) -> Tensor:
        changed = nodes.copy()
        changed[2, 5] = value
        graph = env.pad(spaces.GraphInstance(changed, np.zeros((4, 2), np.float32), links))
        return gnn({key: torch.as_tensor(array)[None].double() for key, array in graph.items()})

    difference = (features(0.5) - features(-0.5)).unflatten(1, (-1, 16))[0]
    assert difference[[0, 1, 6]].abs().amax(dim=1).min() > 1e-6


def test_dataflow_has_a_direction() -> None:
    env = padded_env(1)
    gnn, observations = extractor(env), batch_of(env, 4)
    reversed_ = {**observations, "edge_links": observations["edge_links"].flip(2)}
    assert not torch.allclose(gnn(observations), gnn(reversed_), atol=1e-3)


def test_decision_nodes_of_a_hierarchy_have_no_part_in_the_whole() -> None:
    """As docs/custom-graphs.md says; so the value of PPO does not see them."""
    env = padded_env(5)
    gnn, observations = extractor(env), batch_of(env, 4)
    observations["nodes"].requires_grad_(True)
    gnn.split_features(gnn(observations))[1].square().sum().backward()
    gradient, (graph, node) = observations["nodes"].grad, observations["node_mask"].nonzero(as_tuple=True)
    assert gradient is not None
    level = observations["nodes"][graph, node, :5].argmax(1)
    assert gradient[graph, node][level > 0].any(1).all() and not gradient[graph, node][level == 0].any()


def test_sizes_and_degrees_are_not_counted() -> None:
    """As docs/custom-graphs.md says: a graph is read like two copies of it, a node like one with its edges twice."""
    env = padded_env(1, decisions=(3, 3))
    env.reset(seed=0)
    nodes, links = np.random.default_rng(0).random((4, 3)), np.array([[0, 1], [1, 2], [3, 2]])
    edges = np.random.default_rng(1).random((3, 2))
    graphs = [env.pad(spaces.GraphInstance(nodes, edges, links))]
    for more in (np.zeros((0, 3)), nodes):
        doubled = np.concatenate([links, links + len(more)])
        graphs.append(env.pad(spaces.GraphInstance(np.concatenate([nodes, more]), np.tile(edges, (2, 1)), doubled)))
    features = extractor(env)({key: torch.as_tensor(np.stack([g[key] for g in graphs])).double() for key in graphs[0]})
    assert close(features[1:], features[:1].expand(2, -1))


def test_both_ends_of_a_dataflow_edge_feel_each_other_and_nobody_else() -> None:
    env = padded_env(1, decisions=(3, 3))
    env.reset(seed=0)
    links, edges = np.array([[0, 1]]), np.zeros((1, 2), np.float32)
    graph = env.pad(spaces.GraphInstance(np.eye(3, dtype=np.float32), edges, links))
    observations = {key: torch.as_tensor(array)[None].double() for key, array in graph.items()}
    observations["nodes"].requires_grad_(True)
    gnn = extractor(env)
    decisions, _ = gnn.split_features(gnn(observations))
    for node, felt in enumerate([[0, 1], [0, 1], [2]]):
        total = decisions[0, node].square().sum()
        (gradient,) = torch.autograd.grad(total, observations["nodes"], retain_graph=True)
        assert gradient[0, :3].any(dim=1).nonzero().flatten().tolist() == felt


@LEVELS
@pytest.mark.parametrize("edge_features", [0, 2])
def test_graphs_without_edges(levels: int, edge_features: int) -> None:
    env = padded_env(levels, links=False, edge_features=edge_features)
    assert extractor(env)(batch_of(env, 3)).isfinite().all()


def test_no_parameter_depends_on_the_size_of_the_graph() -> None:
    small, large = (PadGraph(ToyGraphEnv(5), max_nodes=size, max_edges=size, max_decisions=size) for size in (60, 90))
    extractor(large).load_state_dict(extractor(small).state_dict())


@LEVELS
def test_equal_graphs_are_read_once_with_the_same_answer(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    env = padded_env(levels)
    gnn, one = extractor(env), batch_of(env, 1)
    several = {key: part.repeat(5, *[1] * (part.dim() - 1)) for key, part in one.items()}
    apart = gnn._features(several)
    sizes: list[int] = []
    read = gnn._features
    monkeypatch.setattr(gnn, "_features", lambda batch: sizes.append(len(batch["nodes"])) or read(batch))
    together = gnn(several)
    assert sizes == [1] and close(together, apart)
    weights = torch.randn(together.shape, dtype=together.dtype)
    gradients = []
    for features in (together, apart):
        gnn.zero_grad()
        (features * weights).sum().backward()
        gradients.append([p.grad.clone() for p in gnn.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(*gradients, strict=True))
    several["nodes"][3, 0, -1] += 1
    gnn(several)
    assert sizes[-1] == 5


@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 1000))
def test_edge_convolutions_are_those_of_torch_geometric(nodes: int, edges: int, seed: int) -> None:
    """Outputs and all gradients, with sources that are not the targets."""
    generator = torch.Generator().manual_seed(seed)
    ours = EdgeConv(hidden=6, edge_features=3)
    theirs = GINEConv(torch.nn.Linear(6, 6), edge_dim=3, aggr="mean")
    theirs.load_state_dict(ours.state_dict())
    links = torch.stack([torch.randint(size, (edges,), generator=generator) for size in (7, nodes)])
    sources, targets, features = (
        torch.randn(size, width, generator=generator) for size, width in ((7, 6), (nodes, 6), (edges, 3))
    )
    found = []
    for conv in (ours, theirs):
        inputs = [x.clone().requires_grad_() for x in (sources, targets, features)]
        outputs = conv((inputs[0], inputs[1]), links, inputs[2])
        parameters = list(conv.parameters())
        gradients = torch.autograd.grad(outputs.square().sum(), [*inputs, *parameters], allow_unused=True)
        found.append((outputs, *(x for x in gradients if x is not None)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.data())
def test_rows_are_found_in_the_levels_that_hold_them(counts: list[int], data: st.DataObject) -> None:
    read = [torch.randn(count, 3) for count in counts]
    chosen = data.draw(st.lists(st.integers(0, sum(counts) - 1), max_size=8)) if sum(counts) else []
    x, rows = _rows(read, torch.tensor(chosen, dtype=torch.long))
    assert torch.equal(x[rows], torch.cat(read)[chosen])
    if len(read) > 1 and chosen and max(chosen) < counts[0]:
        assert x is read[0]  # no copy


@LEVELS
def test_levels_are_read_off_the_space(levels: int) -> None:
    env = padded_env(levels)
    assert isinstance(env.observation_space, spaces.Dict)
    assert MultiStageGNN(env.observation_space).levels == levels
    assert MultiStageGNN(env.observation_space, levels=1).levels == 1
    plain = spaces.Dict(dict(env.observation_space.spaces))  # of another wrapper, say
    assert MultiStageGNN(plain).levels == 1


@pytest.mark.parametrize("levels", [-1, 0, 9])
def test_levels_have_to_fit_the_node_features(levels: int) -> None:
    space = padded_env(5).observation_space  # 8 node features
    assert isinstance(space, spaces.Dict)
    with pytest.raises(ValueError, match=f"levels={levels}.*8 columns"):
        MultiStageGNN(space, levels=levels)


@pytest.mark.parametrize("space", [spaces.Box(0, 1, (3,)), spaces.Dict({"nodes": spaces.Box(0, 1, (3, 2))})])
def test_unpadded_observations_name_the_wrapper(space: Any) -> None:
    with pytest.raises(TypeError, match="make_sb3_env"):
        MultiStageGNN(space)


def changed_spaces() -> dict[str, spaces.Space[Any]]:
    env = make_sb3_env(ToyGraphEnv(), 9, 40)
    padded: Any = env.observation_space
    return {
        "an entry more": TimeAwareObservation(TimeLimit(env, 9), flatten=False).observation_space,
        "an entry less": spaces.Dict({key: part for key, part in padded.spaces.items() if key != "edge_links"}),
        "frames of an environment": FrameStackObservation(env, 2).observation_space,
        "frames of several": VecFrameStack(DummyVecEnv([lambda: env]), 2).observation_space,
        "nodes unlike their mask": spaces.Dict({**padded.spaces, "node_mask": spaces.Box(0, 1, (8,), np.int8)}),
        "links unlike their mask": spaces.Dict({**padded.spaces, "edge_links": spaces.Box(0, 8, (39, 2), np.int64)}),
    }


@pytest.mark.parametrize("name", list(changed_spaces()))
def test_spaces_that_a_wrapper_has_changed_are_refused(name: str) -> None:
    space: Any = changed_spaces()[name]
    with pytest.raises(TypeError, match="padded graphs as PadGraph gives them"):
        MultiStageGNN(space)


@pytest.mark.parametrize("rows", range(10))
def test_blocks_of_rows_are_one_linear_layer(rows: int) -> None:
    torch.manual_seed(rows)
    layer = torch.nn.Linear(3, 5).double()
    x = torch.randn(3, rows, dtype=torch.double, requires_grad=True).T  # not contiguous
    entries = (x, layer.weight, layer.bias)
    torch.testing.assert_close(linear(layer, x), layer(x))
    ours, theirs = (torch.autograd.grad(y.square().sum(), entries) for y in (linear(layer, x), layer(x)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("link", [0.5, -1.0, 6.0, float("nan")])
def test_links_to_no_node_are_refused(link: float) -> None:
    """Those of padding aside, which has no meaning."""
    env = padded_env(1, decisions=(2, 2), others=(4, 4))
    gnn, observations = extractor(env), batch_of(env, 3)
    edges = observations["edge_mask"].sum(1).long()
    observations["edge_links"][1, edges[1], 1] = link
    gnn(observations)
    observations["edge_links"][1, edges[1] - 1, 1] = link
    with pytest.raises(ValueError, match=r"edge_links hold .* norm_obs=False"):
        gnn(observations)


@pytest.mark.parametrize("algorithm", [PPO, SAC])
def test_normalised_masks_are_refused(algorithm: Any) -> None:
    env = VecNormalize(DummyVecEnv([lambda: make_sb3_env(ToyGraphEnv(), 9, 40)]))
    settings: dict[str, Any] = {"n_steps": 8, "batch_size": 8} if algorithm is PPO else {"buffer_size": 20}
    agent = algorithm(GraphPolicy if algorithm is PPO else GraphSACPolicy, env, **settings)
    with pytest.raises(ValueError, match="norm_obs=False"):
        agent.predict(env.reset())
    env.norm_obs = False
    assert agent.predict(env.reset())[0].shape == (1, 3)


@pytest.mark.parametrize("levels", [2, 5])
@pytest.mark.parametrize(
    "change",
    [
        lambda level: 0.9 * level,
        lambda level: level + 1,
        lambda level: 0 * level,
        lambda level: level / 2 + level.roll(1) / 2,
    ],
)
def test_levels_that_are_not_one_hot_are_refused(levels: int, change: Any) -> None:
    """A node would be read on some level. VecNormalize can change the features alone."""
    env = padded_env(levels)
    gnn, observations = extractor(env), batch_of(env, 3)
    gnn(observations)
    level = observations["nodes"][1, 0, :levels]
    level[:] = change(level)
    with pytest.raises(ValueError, match=f"first {levels} columns .* one-hot .* norm_obs=False"):
        gnn(observations)


def test_decisions_without_a_node_are_refused() -> None:
    env = make_sb3_env(ToyGraphEnv(decisions=(6, 6), others=(0, 0)), 9, 40, 6)
    observation = env.reset(seed=0)[0]
    for node in (4, 5):
        observation["node_mask"][node] = 0
    with pytest.raises(ValueError, match="a graph has 4 nodes, but its action 6 components"):
        PPO(GraphPolicy, env).predict(observation)
