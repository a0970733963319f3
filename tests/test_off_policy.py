"""DDPG, TD3 and SAC on graphs: what they read, what they remember, and that they learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DDPG, PPO, SAC, TD3
from stable_baselines3.common.noise import VectorizedActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import Tensor, nn
from toy_env import ToyGraphEnv

from agents import GraphPolicy, GraphSACPolicy, GraphTD3Policy
from agents.off_policy import DecayingNoise, EpisodeReplayBuffer, make_off_policy
from agents.ppo import POLICY
from agents.sb3 import make_sb3_env
from agents.search import search

ALGORITHMS: dict[str, type[OffPolicyAlgorithm]] = {"ddpg": DDPG, "td3": TD3, "sac": SAC}
EACH = pytest.mark.parametrize("name", list(ALGORITHMS))
SMALL = {"features_extractor_kwargs": {"hidden": 16, "rounds": 1}, "net_arch": [32]}


def make_env(decisions: tuple[int, int] = (2, 4)) -> gym.Env[Any, Any]:
    return make_sb3_env(ToyGraphEnv(1, decisions), max_nodes=24, max_edges=40, max_decisions=4)


def make_agent(name: str, policy: dict[str, Any] | None = None, **settings: Any) -> OffPolicyAlgorithm:
    policy = {**SMALL, "node_bias": False, **(policy or {})}
    return make_off_policy(ALGORITHMS[name], make_env(), 400, device="cpu", policy_kwargs=policy, **settings)


def batch(size: int) -> tuple[dict[str, Tensor], Tensor]:
    """Observations, and which decisions are real [size, 4]."""
    env = make_env()
    graphs = [env.reset(seed=seed)[0] for seed in range(size)]
    observations = {key: torch.as_tensor(np.stack([graph[key] for graph in graphs])) for key in graphs[0]}
    return observations, observations["decision_mask"].bool()


@EACH
def test_padding_has_no_value_and_no_gradient(name: str) -> None:
    agent, (observations, real) = make_agent(name), batch(8)
    assert not real.all() and real.any(1).all()
    actions = torch.rand(8, 4).requires_grad_(True)
    agent.critic(observations, actions)[0].sum().backward()  # type: ignore[attr-defined]
    assert actions.grad is not None
    assert actions.grad[real].ne(0).all() and not actions.grad[~real].any()


@pytest.mark.parametrize("decisions", [5, 9])
def test_padding_has_no_share_in_the_entropy_of_sac(decisions: int) -> None:
    env = make_sb3_env(ToyGraphEnv(decisions=(2, 4)), max_nodes=24, max_edges=40, max_decisions=decisions)
    agent = make_off_policy(SAC, env, 400, device="cpu", policy_kwargs={**SMALL, "node_bias": False})
    observation = {key: torch.as_tensor(value)[None] for key, value in env.reset(seed=0)[0].items()}
    real = int(observation["decision_mask"].sum())
    torch.manual_seed(0)
    action, found = agent.actor.action_log_prob(observation)  # type: ignore[attr-defined]
    normal = torch.distributions.Normal(*(part[0, :real] for part in _parameters(agent, observation)))
    expected = normal.log_prob(action[0, :real].atanh()) - torch.log(1 - action[0, :real] ** 2)
    assert real < decisions and found.item() == pytest.approx(expected.sum().item(), abs=1e-3)


def _parameters(agent: Any, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of SAC's actions before the squashing, [1, D] each."""
    mean, log_std, _ = agent.actor.get_action_dist_params(observation)
    return mean, log_std.exp()


@EACH
def test_a_graph_has_the_same_action_and_value_in_any_batch(name: str) -> None:
    agent, (observations, _) = make_agent(name), batch(6)
    actions = agent.actor(observations) if name != "sac" else agent.actor(observations, deterministic=True)  # type: ignore[attr-defined]
    values = agent.critic(observations, actions)[0]  # type: ignore[attr-defined]
    for index in range(6):
        one = {key: part[index : index + 1] for key, part in observations.items()}
        alone = agent.policy._predict(one, deterministic=True)  # type: ignore[arg-type]
        torch.testing.assert_close(alone, actions[index : index + 1], rtol=1e-4, atol=1e-5)
        value = agent.critic(one, alone)[0]  # type: ignore[attr-defined]
        torch.testing.assert_close(value, values[index : index + 1], rtol=1e-4, atol=1e-5)


@EACH
@pytest.mark.parametrize("node_bias", [False, True])
def test_only_node_biases_tell_the_places_of_decisions_apart(name: str, node_bias: bool) -> None:
    critic = make_agent(name, {"node_bias": node_bias}).critic.q_networks[0]  # type: ignore[attr-defined]
    hidden, decisions = 16, 4
    nodes, whole, actions = (torch.randn(1, *shape) for shape in ((decisions, hidden), (hidden,), (decisions,)))

    def value(order: list[int]) -> float:
        return critic(torch.cat([nodes[:, order].flatten(1), whole, actions[:, order]], 1)).item()  # type: ignore[no-any-return]

    same = value([2, 0, 3, 1]) == pytest.approx(value([0, 1, 2, 3]), rel=1e-4, abs=1e-6)
    assert same is not node_bias


@EACH
def test_the_first_answer_is_the_initial_mean(name: str) -> None:
    agent, (observations, _) = make_agent(name, {"initial_mean": 0.5}), batch(4)
    actions, _ = agent.predict({key: part.numpy() for key, part in observations.items()}, deterministic=True)
    assert np.abs(actions - 0.5).max() < 0.05


@EACH
def test_a_relative_actor_keeps_the_mean_of_its_real_components(name: str) -> None:
    agent, (observations, real) = make_agent(name, {"initial_mean": 0.4, "relative": True}), batch(6)
    net = agent.actor.mu if name == "sac" else agent.actor.mu[0]  # type: ignore[attr-defined]
    torch.nn.init.normal_(net.net[-1].weight)  # far from its start, where all answers are alike
    features = agent.actor.extract_features(observations, agent.actor.features_extractor)  # type: ignore[attr-defined]
    means = net(features)
    assert means.std() > 0.1
    shares = real / real.sum(1, keepdim=True)
    torch.testing.assert_close((means * shares).sum(1), torch.full((6,), 0.4).atanh(), rtol=1e-4, atol=1e-5)


@EACH
def test_it_learns_what_its_nodes_show(name: str) -> None:
    """-0.043 is the best constant action's reward, -0.013 the best that one number for the whole graph can get."""
    agent = make_agent(name, learning_starts=50, gradient_steps=2)
    agent.learn(400)
    env = make_env()
    rewards = []
    for seed in range(1000, 1100):
        observation, _ = env.reset(seed=seed)
        rewards.append(env.step(agent.predict(observation, deterministic=True)[0])[1])
    assert np.mean([float(reward) for reward in rewards]) > -0.035


@EACH
def test_saved_and_loaded_answers_the_same(name: str, tmp_path: Path) -> None:
    agent, (observations, _) = make_agent(name, {"initial_mean": 0.3}), batch(3)
    agent.save(tmp_path / "agent.zip")
    loaded = ALGORITHMS[name].load(tmp_path / "agent.zip", device="cpu")
    arrays = {key: part.numpy() for key, part in observations.items()}
    np.testing.assert_array_equal(
        agent.predict(arrays, deterministic=True)[0], loaded.predict(arrays, deterministic=True)[0]
    )


@EACH
def test_without_node_biases_it_moves_to_graphs_of_another_size(name: str) -> None:
    small, (observations, real) = make_agent(name), batch(3)
    sizes = {"max_nodes": 30, "max_edges": 50, "max_decisions": 7}
    larger = make_sb3_env(ToyGraphEnv(1, (2, 4)), **sizes)
    policy = {**SMALL, "node_bias": False}
    large = make_off_policy(ALGORITHMS[name], larger, 400, device="cpu", policy_kwargs=policy, seed=5)
    large.policy.load_state_dict(small.policy.state_dict())
    for seed in range(3):
        graph = {key: part[seed].numpy() for key, part in observations.items()}
        padded = larger.reset(seed=seed)[0]
        found, expected = (agent.predict(x, deterministic=True)[0] for agent, x in ((large, padded), (small, graph)))
        count = int(real[seed].sum())
        np.testing.assert_allclose(found[:count], expected[:count], atol=1e-6)


@EACH
def test_layers_of_actor_and_critic_and_the_buffer_may_be_given(name: str) -> None:
    agent: Any = make_agent(name, {"net_arch": {"pi": [8], "qf": [24, 16]}}, buffer_size=50)
    actor = agent.actor.mu if name == "sac" else agent.actor.mu[0]
    layers = [[m.out_features for m in net if isinstance(m, nn.Linear)] for net in (actor.net, agent.critic.qf0.node)]
    assert (layers, agent.buffer_size) == ([[8, 1], [24, 16]], 50)


def test_state_dependent_exploration_is_refused() -> None:
    with pytest.raises(ValueError, match="leave use_sde out"):
        make_agent("sac", use_sde=True)
    with pytest.raises(ValueError, match="leave use_sde out"):
        PPO(GraphPolicy, make_env(), use_sde=True)


@EACH
def test_returns_of_several_steps_are_refused(name: str) -> None:
    make_agent(name, n_steps=1)
    with pytest.raises(ValueError, match="n_steps must be 1, got 3"):
        make_agent(name, n_steps=3)


@EACH
@pytest.mark.parametrize("mean", [-1.0, 1.0, 1.5, float("nan")])
def test_initial_means_that_no_squashed_action_has_are_refused(name: str, mean: float) -> None:
    with pytest.raises(ValueError, match="initial_mean must lie between -1 and 1"):
        make_agent(name, {"initial_mean": mean})


@pytest.mark.parametrize(
    "algorithm, policy, message",
    [
        (TD3, GraphSACPolicy, "GraphSACPolicy is for SAC: .* DDPG and TD3 agents.GraphTD3Policy"),
        (DDPG, GraphSACPolicy, "GraphSACPolicy is for SAC: .* DDPG and TD3 agents.GraphTD3Policy"),
        (SAC, GraphTD3Policy, "GraphTD3Policy is for DDPG and TD3, .* SAC agents.GraphSACPolicy"),
        (PPO, GraphTD3Policy, "GraphTD3Policy is for DDPG and TD3, .* PPO and A2C take agents.GraphPolicy"),
        (A2C, GraphTD3Policy, "GraphTD3Policy is for DDPG and TD3, .* PPO and A2C take agents.GraphPolicy"),
    ],
)
def test_a_policy_of_another_algorithm_names_its_own(algorithm: Any, policy: Any, message: str) -> None:
    settings = {} if algorithm in (PPO, A2C) else {"buffer_size": 10}
    with pytest.raises((TypeError, AttributeError), match=message):
        algorithm(policy, make_env(), **settings)


def test_the_buffer_forgets_terminal_states_but_not_truncated_ones() -> None:
    env = make_env()
    buffer = EpisodeReplayBuffer(4, env.observation_space, env.action_space, handle_timeout_termination=True)  # type: ignore[arg-type]
    first, then = (env.reset(seed=seed)[0] for seed in (0, 1))
    for info in ({}, {"TimeLimit.truncated": True}):
        now, following = ({key: value[None].copy() for key, value in graph.items()} for graph in (first, then))
        buffer.add(now, following, np.zeros((1, 4)), np.zeros(1), np.ones(1), [info])
    np.testing.assert_array_equal(buffer.next_observations["nodes"][0, 0], first["nodes"])
    np.testing.assert_array_equal(buffer.next_observations["nodes"][1, 0], then["nodes"])


def test_noise_falls_and_stays() -> None:
    noise = DecayingNoise(2000, steps=10, seed=0, start=0.5, end=0.1)
    spreads = [float(noise().std()) for _ in range(15)]
    expected = [0.5 - 0.04 * min(step, 10) for step in range(15)]
    np.testing.assert_allclose(spreads, expected, rtol=0.1)


def test_environments_side_by_side_explore_each_in_its_own_way() -> None:
    rows = VectorizedActionNoise(DecayingNoise(4, 10, seed=0), 3)()  # of Stable-Baselines3, for three of them
    assert len(np.unique(rows, axis=0)) == 3
    alone = DecayingNoise(4, 10, seed=0), DecayingNoise(4, 10, seed=0)
    np.testing.assert_array_equal(*(noise() for noise in alone))


@EACH
def test_a_search_spends_its_evaluations_and_a_seed_decides_it(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"learning_starts": 4, "gradient_steps": 1, "policy_kwargs": SMALL}
    plans = []
    for folder, seed in (("first", 0), ("again", 0), ("other", 1)):
        result = search(gym.make("GNNRL-Prune-v0"), name, 8, seed, tmp_path / folder, **settings)
        log = (tmp_path / folder / "evaluations.jsonl").read_text().splitlines()
        plans.append([json.loads(line)["widths"] for line in log])
        assert len(log) == 8 and result.macs_ratio <= 0.5 and (tmp_path / folder / POLICY).is_file()
    assert plans[0] == plans[1] != plans[2]
