"""The graph policy: its distribution, its start, its learning, and its way to disk and to other graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DDPG, PPO, SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor
from toy_env import ToyGraphEnv

from agents import GraphPolicy, GraphSACPolicy, GraphTD3Policy, MultiStageGNN
from agents.policy import Head
from agents.ppo import make_ppo as make_tuned_ppo
from agents.sb3 import make_sb3_env

HEADS = pytest.mark.parametrize("head", ["node", "pooled"])
LEVELS = pytest.mark.parametrize("levels", [1, 5])


def make_env(levels: int = 1, decisions: tuple[int, int] = (2, 4), **sizes: int) -> gym.Env[Any, Any]:
    sizes = {"max_nodes": 24, "max_edges": 40, "max_decisions": 4, **sizes}
    return make_sb3_env(ToyGraphEnv(levels, decisions), **sizes)


def make_ppo(levels: int = 1, head: Head = "node", envs: int = 1, **policy: Any) -> PPO:
    extractor = {"levels": levels, "hidden": 32, "rounds": 1}
    return PPO(
        GraphPolicy,
        DummyVecEnv([lambda: make_env(levels)] * envs),
        n_steps=8,
        batch_size=8 * envs,
        n_epochs=10,
        learning_rate=3e-3,
        policy_kwargs={"head": head, "features_extractor_kwargs": extractor, **policy},
        seed=0,
        device="cpu",
    )


def graph_policy(model: PPO) -> GraphPolicy:
    assert isinstance(model.policy, GraphPolicy)
    return model.policy


def batch(size: int, levels: int = 1) -> dict[str, Tensor]:
    env = make_env(levels)
    graphs = [env.reset(seed=seed)[0] for seed in range(size)]
    return {key: torch.as_tensor(np.stack([graph[key] for graph in graphs])) for key in graphs[0]}


def mean_reward(model: PPO | None, env: gym.Env[Any, Any], episodes: int = 150) -> float:
    """Mean reward of the deterministic policy, or of uniform random actions."""
    env.action_space.seed(0)
    observation, _ = env.reset(seed=123)
    rewards = []
    for _ in range(episodes):
        action = env.action_space.sample()
        if model is not None:
            action, _ = model.predict(observation, deterministic=True)
        rewards.append(float(env.step(action)[1]))
        observation, _ = env.reset()
    return float(np.mean(rewards))


@HEADS
@LEVELS
def test_log_prob_and_entropy_count_only_real_components(head: Head, levels: int) -> None:
    policy = graph_policy(make_ppo(levels, head, log_std_init=-0.7))
    observations = batch(6, levels)
    mask = observations["decision_mask"].bool()
    assert not mask.all() and mask.any(dim=1).all()
    actions = torch.randn(6, 4)
    _, log_prob, entropy = policy.evaluate_actions(observations, actions)
    mean = policy.get_distribution(observations).mode()
    assert entropy is not None
    for i in range(6):
        real = int(mask[i].sum())
        z = (actions[i, :real] - mean[i, :real]) / np.exp(-0.7)
        by_hand = (-0.5 * z**2 + 0.7 - 0.5 * np.log(2 * np.pi)).sum()
        assert log_prob[i].item() == pytest.approx(by_hand.item(), abs=1e-4)
        assert entropy[i].item() == pytest.approx(real * (0.5 * np.log(2 * np.pi * np.e) - 0.7), abs=1e-4)


@HEADS
def test_a_distribution_knows_the_padding_of_its_own_graphs(head: Head) -> None:
    policy, actions = graph_policy(make_ppo(head=head)), torch.randn(6, 4)
    observations = batch(12)
    parts = [{key: value[half] for key, value in observations.items()} for half in (slice(6), slice(6, 12))]
    assert not torch.equal(parts[0]["decision_mask"], parts[1]["decision_mask"])
    expected = policy.evaluate_actions(parts[0], actions)[1]
    policy.evaluate_actions(parts[1], actions)
    assert torch.equal(policy.get_distribution(parts[0]).log_prob(actions), expected)


@HEADS
def test_padding_components_of_an_action_change_nothing(head: Head) -> None:
    policy, observations = graph_policy(make_ppo(head=head)), batch(6)
    actions = torch.randn(6, 4)
    _, before, _ = policy.evaluate_actions(observations, actions)
    actions[~observations["decision_mask"].bool()] = 1e3
    assert torch.equal(before, policy.evaluate_actions(observations, actions)[1])


@HEADS
def test_the_untrained_policy_starts_at_its_initial_mean(head: Head) -> None:
    policy = graph_policy(make_ppo(head=head, initial_mean=-0.4, log_std_init=-2.0))
    distribution = policy.get_distribution(batch(6))
    torch.testing.assert_close(distribution.mode(), torch.full((6, 4), -0.4), atol=0.1, rtol=0)
    sample = torch.stack([distribution.sample() for _ in range(2000)])
    assert sample.std(dim=0).mean().item() == pytest.approx(np.exp(-2.0), rel=0.05)


@pytest.mark.parametrize(("given", "widths"), [({"pi": [8]}, (8, 32)), ({"vf": [8]}, (64, 8)), ([], (64, 32))])
def test_layers_may_be_given_for_one_of_both(given: Any, widths: tuple[int, int]) -> None:
    heads: Any = graph_policy(make_ppo(net_arch=given)).mlp_extractor
    assert (heads.latent_dim_pi, heads.latent_dim_vf) == widths
    make_ppo(net_arch=given).learn(8)


@HEADS
@LEVELS
def test_gradient_reaches_every_parameter(head: Head, levels: int) -> None:
    policy = graph_policy(make_ppo(levels, head))
    values, log_prob, entropy = policy.evaluate_actions(batch(8, levels), torch.randn(8, 4))
    assert entropy is not None
    (values.sum() + log_prob.sum() + entropy.sum()).backward()
    weights = policy.named_parameters()
    dead = {name for name, weight in weights if weight.grad is None or not weight.grad.any()}
    # With the pooled head nothing reads the decision nodes of a hierarchy, which are its last stage.
    unread = {name for name in dead if "stages.4." in name}
    assert dead == (unread if head == "pooled" and levels == 5 else set())


@HEADS
@LEVELS
def test_ppo_learns(head: Head, levels: int) -> None:
    env = make_env(levels)
    model = make_ppo(levels, head, envs=32, initial_mean=-0.5)
    start, random = mean_reward(model, env), mean_reward(None, env)
    model.learn(256 * 20)
    # The best constant gets -0.043 and the best that knows only the whole -0.013: both have read the graph.
    assert mean_reward(model, env) > -0.03 > start > random


def test_node_head_tells_the_nodes_of_one_graph_apart() -> None:
    model = make_ppo(envs=32)
    model.learn(256 * 30)
    toy = ToyGraphEnv(decisions=(4, 4))
    env = make_sb3_env(toy, max_nodes=24, max_edges=40)
    correlations = []
    for seed in range(20):
        action, _ = model.predict(env.reset(seed=seed)[0], deterministic=True)
        correlations.append(np.corrcoef(action, toy.target)[0, 1])
    assert np.mean(correlations) > 0.7  # reading only the whole gives 0


def test_a_trained_policy_applies_to_another_graph_size() -> None:
    model = make_ppo(envs=32, initial_mean=-0.5)
    model.learn(256 * 10)
    large = make_env(decisions=(9, 12), max_nodes=50, max_edges=90, max_decisions=12)
    extractor = {"hidden": 32, "rounds": 1}
    other = PPO(GraphPolicy, large, policy_kwargs={"features_extractor_kwargs": extractor}, device="cpu")
    before = mean_reward(other, large)
    other.policy.load_state_dict(model.policy.state_dict())
    assert mean_reward(other, large) > -0.03 > before


def test_node_bias_frees_every_position() -> None:
    policy, observations = graph_policy(make_ppo(node_bias=True)), batch(3)
    assert policy.node_bias is not None
    before = policy.get_distribution(observations).mode()
    with torch.no_grad():
        policy.node_bias[2] += 0.25
    change = policy.get_distribution(observations).mode() - before
    torch.testing.assert_close(change, torch.tensor([0.0, 0.0, 0.25, 0.0]).expand(3, 4))
    policy.evaluate_actions(observations, torch.randn(3, 4))[1].sum().backward()
    assert policy.node_bias.grad is not None and policy.node_bias.grad.any()


@pytest.mark.parametrize("wrong", [{"head": "mean"}, {"head": "pooled", "node_bias": True}])
def test_wrong_heads_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="head must be"):
        make_ppo(**wrong)


@pytest.mark.parametrize(
    "policy",
    [
        {"head": "node", "node_bias": True, "initial_mean": 0.3},
        {"head": "pooled", "net_arch": [16, 8]},
        {"share_features_extractor": False},
    ],
)
def test_save_and_load_give_the_same_actions(policy: dict[str, Any], tmp_path: Path) -> None:
    model = make_ppo(5, **policy)
    model.learn(64)
    model.save(tmp_path / "ppo")
    graph_policy(model).save(str(tmp_path / "policy"))
    observation, _ = make_env(5).reset(seed=7)
    expected, _ = model.predict(observation, deterministic=True)
    ppo, policy_alone = PPO.load(tmp_path / "ppo", device="cpu"), GraphPolicy.load(str(tmp_path / "policy"), "cpu")
    for loaded in (ppo, policy_alone):
        np.testing.assert_array_equal(loaded.predict(observation, deterministic=True)[0], expected)


def test_the_tuned_agent_takes_one_environment_or_several() -> None:
    for env, steps in ((make_env(), 10), (DummyVecEnv([make_env] * 10), 1)):
        model = make_tuned_ppo(env, device="cpu")
        model.learn(10)
        assert (model.n_steps, model.num_timesteps) == (steps, 10)
    assert make_tuned_ppo(make_env(), device="cpu", n_steps=20).n_steps == 20


def test_equal_seeds_learn_the_same() -> None:
    weights = []
    for _ in range(2):
        model = make_ppo()
        model.learn(64)
        weights.append(torch.nn.utils.parameters_to_vector(model.policy.parameters()))
    assert torch.equal(*weights)


def test_separate_extractors_for_actor_and_critic() -> None:
    model = make_ppo(5, share_features_extractor=False)
    model.learn(16)
    observation, _ = make_env(5).reset(seed=0)
    assert model.predict(observation, deterministic=True)[0].shape == (4,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_gives_the_actions_of_the_cpu() -> None:
    model, observations = make_ppo(5), batch(8, 5)
    expected = graph_policy(model).get_distribution(observations).mode()
    there = {key: value.cuda() for key, value in observations.items()}
    actual = graph_policy(model).cuda().get_distribution(there).mode()
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-4, rtol=1e-4)


@LEVELS
def test_levels_come_with_the_environment_and_into_files(levels: int, tmp_path: Path) -> None:
    env = DummyVecEnv([lambda: make_env(levels)])
    model, told = (
        PPO(GraphPolicy, env, n_steps=8, batch_size=8, seed=0, device="cpu", policy_kwargs=kwargs)
        for kwargs in ({}, {"features_extractor_kwargs": {"levels": levels}})
    )
    assert_same_state(model, told)  # as when they are given, draws too
    model.save(tmp_path / "ppo")
    graph_policy(model).save(str(tmp_path / "policy"))
    loaded = [graph_policy(PPO.load(tmp_path / "ppo", env=env)) for env in (None, make_env(levels))]
    for policy in (graph_policy(model), *loaded, GraphPolicy.load(str(tmp_path / "policy"))):
        assert isinstance(policy.features_extractor, MultiStageGNN)
        assert policy.features_extractor.levels == levels == len(policy.features_extractor.stages)


def assert_same_state(one: PPO, other: PPO) -> None:
    states = one.policy.state_dict(), other.policy.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("algorithm", [SAC, TD3, DDPG])
def test_off_policy_algorithms_are_sent_to_their_own_policy(algorithm: Any) -> None:
    with pytest.raises((AttributeError, TypeError), match=r"for PPO and A2C: SAC .*GraphSACPolicy.*GraphTD3Policy"):
        algorithm(GraphPolicy, make_env(), buffer_size=10)
    own = GraphSACPolicy if algorithm is SAC else GraphTD3Policy
    assert algorithm(own, make_env(5), buffer_size=10).actor.features_extractor.levels == 5
