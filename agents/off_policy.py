"""DDPG, TD3 and SAC with the multi-stage GNN, tuned for a few hundred evaluations."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3 import DDPG, SAC, TD3
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from agents.off_policy_policy import GraphSACPolicy, GraphTD3Policy
from agents.ppo import POLICY, StopWhenSpent, check_no_schedules
from agents.recorder import EvaluationsExhausted, PlanRecorder
from agents.sb3 import make_sb3_env

# A plan is one decision, so nothing is bootstrapped and the critic is a regression on the plans seen so far: it gets
# several steps for each new plan, all of which stay in memory.
HYPERPARAMETERS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "learning_starts": 25,
    "batch_size": 64,
    "train_freq": 1,
    "gradient_steps": 4,
    "gamma": 1.0,
    "tau": 0.05,
}
# Rewards lie in [-1, 0] and good plans a few hundredths apart: entropy may count for no more than that.
ENTROPY = 1e-3
LARGEST_BUFFER = 2000  # transitions; the observations of one take about 0.2 MB for ResNet-56
NOISE = (0.6, 0.1)  # standard deviation of the exploration noise, at the start and at the end, in actions of [-1, 1]
# Means start at a ratio of 0.75, beyond the budget: see agents.ppo.
POLICY_KWARGS: dict[str, Any] = {"initial_mean": 0.5, "node_bias": True}


class EpisodeReplayBuffer(DictReplayBuffer):
    """A replay buffer that forgets what a finished episode ended in.

    The value of a terminal state is multiplied by 0 wherever it is used; with the state before it in its place, a batch
    of one-step episodes holds one graph, which is embedded once.
    """

    def add(
        self,
        obs: dict[str, np.ndarray],  # type: ignore[override]
        next_obs: dict[str, np.ndarray],  # type: ignore[override]
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Store one step of every environment."""
        cut = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        over = done.astype(bool) & ~cut
        for key, values in next_obs.items():
            values[over] = obs[key][over]
        super().add(obs, next_obs, action, reward, done, infos)


class DecayingNoise(ActionNoise):
    """Gaussian exploration noise whose standard deviation falls linearly from `start` to `end` in `steps` steps."""

    def __init__(self, size: int, steps: int, seed: int, start: float = NOISE[0], end: float = NOISE[1]) -> None:
        super().__init__()
        self.size, self.steps, self.start, self.end = size, steps, start, end
        self._rng, self._count = np.random.default_rng(seed), 0

    def __call__(self) -> np.ndarray:
        """The noise of the next action, [size]."""
        done = min(self._count / self.steps, 1.0)
        self._count += 1
        return self._rng.normal(0, self.start + done * (self.end - self.start), self.size)

    def __deepcopy__(self, memo: dict[int, Any]) -> DecayingNoise:
        """Stable-Baselines3 copies the noise for each of several environments: every copy draws its own."""
        twin = copy.copy(self)
        twin._rng = self._rng.spawn(1)[0]
        return twin


def make_off_policy(
    algorithm: type[OffPolicyAlgorithm],
    env: Any,
    evaluations: int,
    seed: int = 0,
    device: str = "auto",
    tensorboard: Path | None = None,
    **settings: Any,
) -> OffPolicyAlgorithm:
    """A DDPG, TD3 or SAC agent for a graph environment already wrapped by `make_sb3_env`.

    Args:
        evaluations: how many are to come; the size of the replay buffer, and how fast the noise falls.
        settings: override `HYPERPARAMETERS`, buffer and noise; `policy_kwargs` override `POLICY_KWARGS`.

    Raises:
        ValueError: another `n_steps` than 1.
    """
    if settings.get("n_steps", 1) != 1:
        raise ValueError(
            f"n_steps must be 1, got {settings['n_steps']!r}: Stable-Baselines3 has no returns of several steps for "
            "graphs, and with a replay buffer of our own it would leave them out without an error."
        )
    space = env.action_space
    assert isinstance(space, spaces.Box)
    stochastic = issubclass(algorithm, SAC)
    own: dict[str, Any] = {"buffer_size": min(evaluations, LARGEST_BUFFER), "replay_buffer_class": EpisodeReplayBuffer}
    noise = DecayingNoise(space.shape[0], max(evaluations, 1), seed)
    own |= {"ent_coef": ENTROPY} if stochastic else {"action_noise": noise}
    policy = {**POLICY_KWARGS, **settings.pop("policy_kwargs", {})}
    return algorithm(
        GraphSACPolicy if stochastic else GraphTD3Policy, env, policy_kwargs=policy, seed=seed, device=device,
        tensorboard_log=str(tensorboard) if tensorboard else None, **{**HYPERPARAMETERS, **own, **settings},
    )  # fmt: skip


def ddpg(recorder: PlanRecorder, seed: int = 0, out: Path | None = None, **settings: Any) -> OffPolicyAlgorithm:
    """Deep deterministic policy gradient (Lillicrap et al. 2016): the other published variant."""
    return _learn(DDPG, recorder, seed, out, **settings)


def td3(recorder: PlanRecorder, seed: int = 0, out: Path | None = None, **settings: Any) -> OffPolicyAlgorithm:
    """Twin delayed DDPG (Fujimoto, van Hoof, Meger 2018)."""
    return _learn(TD3, recorder, seed, out, **settings)


def sac(recorder: PlanRecorder, seed: int = 0, out: Path | None = None, **settings: Any) -> OffPolicyAlgorithm:
    """Soft actor-critic (Haarnoja et al. 2018)."""
    return _learn(SAC, recorder, seed, out, **settings)


def _learn(
    algorithm: type[OffPolicyAlgorithm], recorder: PlanRecorder, seed: int, out: Path | None, **settings: Any
) -> OffPolicyAlgorithm:
    """Learn until the evaluations are spent; the policy is saved in `out`.

    Raises:
        ValueError: as `check_no_schedules` and `make_off_policy`.
    """
    check_no_schedules(settings)
    device = str(recorder.unwrapped.device)  # type: ignore[attr-defined]
    relative = getattr(recorder.unwrapped, "landing", None) == "exact"  # the landing scales all ratios alike
    settings["policy_kwargs"] = {"relative": relative, **settings.get("policy_kwargs", {})}
    agent = make_off_policy(algorithm, make_sb3_env(recorder), recorder.limit, seed, device, out, **settings)
    try:
        with contextlib.suppress(EvaluationsExhausted):
            agent.learn(10**9, callback=StopWhenSpent(recorder), tb_log_name="tensorboard")
    finally:
        if out is not None:
            agent.save(out / POLICY)
    return agent
