"""`make_sb3_env`: what Stable-Baselines3 gets of a graph environment, and what the environment gets of it."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3 import PPO
from toy_env import ToyGraphEnv

from agents import GraphPolicy, make_sb3_env


class Bounded(ToyGraphEnv):
    """Takes nothing outside of its box."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.action_space = spaces.Box(low, high, (3,), np.float32)

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        return super().step(action)


@pytest.mark.parametrize(("low", "high"), [(0.05, 1.0), (-1.0, 0.35), (-0.3, 2.0), (0.1, 1.0), (-2.0, 10.0)])
def test_actions_at_the_border_stay_in_the_box(low: float, high: float) -> None:
    env = make_sb3_env(Bounded(low, high), max_nodes=24, max_edges=40)
    for action in (-np.ones(3, np.float32), np.ones(3, np.float32)):
        env.reset(seed=0)
        env.step(action)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_boxes_of_either_precision_are_rescaled_without_a_warning(kind: Any) -> None:
    toy = ToyGraphEnv()
    toy.action_space = spaces.Box(0, 1, (3,), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make_sb3_env(toy, max_nodes=24, max_edges=40)
        env.reset(seed=0)
        assert env.step(2 * toy.target.astype(kind) - 1)[1] == pytest.approx(0, abs=1e-6)
    assert env.action_space == spaces.Box(-1, 1, (3,), kind)


def test_its_specification_can_be_written_down() -> None:
    env = make_sb3_env(gym.make(EnvSpec("Toy-v0", entry_point="toy_env:ToyGraphEnv")), max_nodes=24, max_edges=40)
    assert env.spec is not None and "PadGraph" in env.spec.to_json()


@pytest.mark.parametrize(("name", "settings"), [("GNNRL-Mask-v0", {}), ("GNNRL-Relational-v0", {"pool_size": 4})])
def test_actions_on_no_node_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"No component of an action of \w+Env acts on a node, .* `gnnrl bogp`"):
        make_sb3_env(gym.make(name, **settings))


def test_out_of_steps_is_an_end_without_a_value_behind_it() -> None:
    env = make_sb3_env(gym.make("GNNRL-Prune-v0", max_steps=2, search_images=20))
    env.reset(seed=0)
    idle = np.full(env.action_space.shape or (), -1, np.float32)
    ends = [env.step(idle)[1:4] for _ in range(2)]
    assert ends == [(0.0, False, False), (-1.0, True, False)]


def test_a_time_limit_of_the_callers_is_a_truncation() -> None:
    env = make_sb3_env(gym.make("GNNRL-Prune-v0", max_steps=5, search_images=20, max_episode_steps=1))
    env.reset(seed=0)
    assert env.step(np.full(env.action_space.shape or (), -1, np.float32))[1:4] == (0.0, False, True)


def test_values_of_failed_episodes_stay_within_the_rewards() -> None:
    """An agent that never gets there. Bootstrapped, the value of a failure would be this one and the next, for ever."""
    env = make_sb3_env(gym.make("GNNRL-Prune-v0", max_steps=1, search_images=20))
    idle: dict[str, Any] = {"initial_mean": -0.95, "log_std_init": -4.0}
    agent = PPO(GraphPolicy, env, n_steps=16, batch_size=16, gamma=1.0, policy_kwargs=idle, seed=0, device="cpu")
    agent.policy.value_net.bias.data.fill_(-1.0)  # type: ignore[union-attr,operator]
    agent.learn(16)
    assert agent.rollout_buffer.rewards.min() == -1  # type: ignore[attr-defined]
