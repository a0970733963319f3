"""PPO with the multi-stage GNN, tuned for a few hundred evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from agents.policy import GraphPolicy
from agents.recorder import EvaluationsExhausted, PlanRecorder
from agents.sb3 import make_sb3_env

POLICY = "policy.zip"

# A plan is one decision with an exact landing, so an episode is nearly always one step from the same state: a batch
# of plans is compared with the batch's mean (normalised advantages), and nothing is bootstrapped.
HYPERPARAMETERS: dict[str, Any] = {
    "n_steps": 10,
    "batch_size": 10,
    "n_epochs": 10,
    "learning_rate": 3e-3,
    "gamma": 1.0,
    "gae_lambda": 1.0,
    "clip_range": 0.2,
}
# Means start at a ratio of 0.75 (action 0.5), beyond the budget: the landing scales them back, and what is learned is
# how the ratios relate.
POLICY_KWARGS: dict[str, Any] = {"initial_mean": 0.5, "log_std_init": -0.7, "node_bias": True}


class _StopWhenSpent(BaseCallback):
    def __init__(self, recorder: PlanRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def _on_step(self) -> bool:
        return not self.recorder.exhausted


def make_ppo(env: Any, seed: int = 0, device: str = "auto", tensorboard: Path | None = None, **settings: Any) -> PPO:
    """A PPO agent with `GraphPolicy` for a graph environment already wrapped by `make_sb3_env`.

    Args:
        settings: override `HYPERPARAMETERS`; `policy_kwargs` override `POLICY_KWARGS`.
    """
    policy = {**POLICY_KWARGS, **settings.pop("policy_kwargs", {})}
    policy["features_extractor_kwargs"] = {"levels": env.get_wrapper_attr("levels")} | policy.get(
        "features_extractor_kwargs", {}
    )
    log = str(tensorboard) if tensorboard else None
    return PPO(
        GraphPolicy, env, policy_kwargs=policy, seed=seed, device=device, tensorboard_log=log,
        **{**HYPERPARAMETERS, **settings},
    )  # fmt: skip


def ppo(recorder: PlanRecorder, seed: int = 0, out: Path | None = None, **settings: Any) -> PPO:
    """Learn until the evaluations are spent; the policy is saved in `out`."""
    agent = make_ppo(make_sb3_env(recorder), seed, str(recorder.unwrapped.device), out, **settings)  # type: ignore[attr-defined]
    try:
        agent.learn(10**9, callback=_StopWhenSpent(recorder), tb_log_name="tensorboard")
    except EvaluationsExhausted:
        pass
    finally:
        if out is not None:
            agent.save(out / POLICY)
    return agent
