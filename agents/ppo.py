"""PPO with the multi-stage GNN, tuned for a few hundred evaluations."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from agents.policy import GraphPolicy
from agents.recorder import EvaluationsExhausted, PlanRecorder
from agents.sb3 import PruneVecEnv
from agents.transfer import GENERAL, start_from

POLICY = "policy.zip"

# A plan is one decision with an exact landing, so an episode is nearly always one step from the same state: a batch
# of plans is compared with the batch's mean (normalised advantages), and nothing is bootstrapped. Each plan of a batch
# has a slot of its own, so that they are measured side by side.
SLOTS = 10
HYPERPARAMETERS: dict[str, Any] = {
    "n_steps": 1,
    "batch_size": SLOTS,
    "n_epochs": 10,
    "learning_rate": 3e-3,
    "gamma": 1.0,
    "gae_lambda": 1.0,
    "clip_range": 0.2,
}
# Means start at a ratio of 0.75 (action 0.5), beyond the budget: the landing scales them back, and what is learned is
# how the ratios relate.
POLICY_KWARGS: dict[str, Any] = {"initial_mean": 0.5, "log_std_init": -0.7, "node_bias": True}

# From a trained policy the search begins near its plan, and learns each group's offset from it: what the policy knows
# stays (all of its weights free to move, it forgot faster than it learned), and fewer plans make a batch. Exploration
# narrows as the evaluations are spent, from `log_std_init` to LAST_LOG_STD.
ADAPTATION: dict[str, Any] = {"learning_rate": 3e-2, "batch_size": 6}
LAST_LOG_STD = -2.0
ROUNDING = 1e-6  # of the values in a batch; the smallest difference of two scores is an image in some ten thousand
_ADAPTED = ("node_bias", "value_net.", "mlp_extractor.value_net.")


class StopWhenSpent(BaseCallback):
    """Ends the learning once the evaluations are spent."""

    def __init__(self, recorder: PlanRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def _on_step(self) -> bool:
        return not self.recorder.exhausted


class _Learning(StopWhenSpent):
    """Where all plans of a batch score alike there is nothing to learn from them: normalised, the rounding of their
    advantages would count as much as any difference."""

    def _on_rollout_end(self) -> None:
        advantages = cast(Any, self.model).rollout_buffer.advantages
        if np.ptp(advantages) < ROUNDING:
            advantages.fill(0.0)


class _Narrowing(_Learning):
    """Exploration shrinks evenly, on the scale of the log standard deviation."""

    def _on_training_start(self) -> None:
        self.policy = cast(GraphPolicy, self.model.policy)
        self.first = self.policy.log_std.detach().clone()

    def _on_rollout_start(self) -> None:
        share = self.recorder.spent / self.recorder.limit
        with torch.no_grad():
            self.policy.log_std.copy_(self.first + share * (LAST_LOG_STD - self.first))


def check_no_schedules(settings: dict[str, Any]) -> None:
    """Check that no setting is a function of the time steps left.

    Raises:
        ValueError: a setting is a function of the time steps left. A search ends when its evaluations are spent,
            which Stable-Baselines3 can't know: the function would stand at its start for good.
    """
    for name, value in settings.items():
        if callable(value) and not isinstance(value, type):
            raise ValueError(f"{name} is a function of the steps left, but a search counts evaluations: give a number.")


def make_ppo(env: Any, seed: int = 0, device: str = "auto", tensorboard: Path | None = None, **settings: Any) -> PPO:
    """A PPO agent with `GraphPolicy` for a graph environment already wrapped by `make_sb3_env`, or a `PruneVecEnv`.

    Args:
        settings: override `HYPERPARAMETERS`; `policy_kwargs` override `POLICY_KWARGS`.
    """
    policy = {**POLICY_KWARGS, **settings.pop("policy_kwargs", {})}
    # without slots the plans of a batch come one after the other
    single = {"n_steps": settings.get("batch_size", SLOTS)} if getattr(env, "num_envs", 1) == 1 else {}
    log = str(tensorboard) if tensorboard else None
    return PPO(
        GraphPolicy, env, policy_kwargs=policy, seed=seed, device=device, tensorboard_log=log,
        **{**HYPERPARAMETERS, **single, **settings},
    )  # fmt: skip


def learn(agent: PPO, recorder: PlanRecorder, narrowing: bool = False) -> None:
    """Learn until the evaluations are spent, with exploration that is learned too, or narrows."""
    callback = (_Narrowing if narrowing else _Learning)(recorder)
    with contextlib.suppress(EvaluationsExhausted):
        agent.learn(10**9, callback=callback, tb_log_name="tensorboard")


def ppo(
    recorder: PlanRecorder,
    seed: int = 0,
    out: Path | None = None,
    policy: str | os.PathLike[str] | None = "auto",
    **settings: Any,
) -> PPO:
    """Learn until the evaluations are spent; the policy is saved in `out`.

    Args:
        policy: a policy file to start from (`agents.transfer`); "general", the one that ships with the package; None
            to learn from nothing; "auto": general where channels are removed and plans land exactly on the budget, as
            it has learned, else None. Its mean plan is the first evaluation, and its offsets per group are learned.
        settings: override `HYPERPARAMETERS`; with a policy also `ADAPTATION`.

    Raises:
        ValueError: as `check_no_schedules`.
    """
    check_no_schedules(settings)
    if policy == "auto":
        arguments = getattr(recorder.unwrapped, "arguments", {})
        learned = {"granularity": "channels", "landing": "exact"}
        policy = GENERAL if learned.items() <= arguments.items() else None
    if policy is not None:
        settings = {**ADAPTATION, **settings}
    device, slots = str(recorder.unwrapped.device), settings.get("batch_size", SLOTS)  # type: ignore[attr-defined]
    agent = make_ppo(PruneVecEnv(recorder, slots), seed, device, out, **settings)
    try:
        if policy is not None:
            _adapt(agent, policy)
            play_mean(agent, recorder)
        learn(agent, recorder, narrowing=policy is not None)
    finally:
        if out is not None:
            agent.save(out / POLICY)
    return agent


def _adapt(agent: PPO, policy: str | os.PathLike[str]) -> None:
    """Start from `policy`, with the agent's own exploration; its weights stay as they are."""
    log_std = agent.policy.log_std.detach().clone()  # type: ignore[union-attr]
    start_from(agent, policy)
    agent.policy.log_std.data = log_std  # type: ignore[union-attr]
    for name, parameter in agent.policy.named_parameters():
        parameter.requires_grad_(name.startswith(_ADAPTED))


def play_mean(agent: PPO, recorder: PlanRecorder) -> float:
    """One episode with the mean action of the policy: its return."""
    env = PruneVecEnv(recorder, 1)
    action = agent.predict(env.reset(), deterministic=True)[0][0]  # type: ignore[arg-type]
    size = (recorder.action_space.shape or (0,))[0]
    return recorder.play([(np.clip(action[:size], -1, 1) + 1) / 2])[0][0]
