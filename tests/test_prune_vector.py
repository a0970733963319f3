"""Slots that share one evaluator: the same answers as one by one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from toy_env import ToyGraphEnv

from agents.recorder import EvaluationsExhausted, PlanRecorder
from agents.sb3 import PruneVecEnv
from agents.transfer import train_policy
from gnnrl_gym.envs.prune_vector import PruneVectorEnv
from gnnrl_gym.evaluation.accuracy import PlanEvaluator

ARGUMENTS: dict[str, Any] = {"search_images": 50, "recalibration_images": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def vector() -> PruneVectorEnv:
    env = gym.make_vec("GNNRL-Prune-v0", num_envs=3, max_steps=2, **ARGUMENTS)
    assert isinstance(env, PruneVectorEnv)
    return env


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def test_equals_single_environments(vector: PruneVectorEnv, threads: int) -> None:
    vector.reset(seed=[5, 6, 7])
    singles = [gym.make("GNNRL-Prune-v0", max_steps=2, **ARGUMENTS) for _ in range(3)]
    for seed, env in zip((5, 6, 7), singles, strict=True):
        env.reset(seed=seed)
    rng = np.random.default_rng(0)
    # slot 1 needs two steps, so the slots are in different states when the others reset
    for scale in ([1, 0.1, 1], [1, 1, 1], [0.1, 1, 0.2]):
        actions = (rng.uniform(0.6, 1, vector.action_space.shape or ()) * np.array(scale)[:, None]).astype(np.float32)
        resets = vector._autoreset_envs.copy()
        observations, rewards, terminated, truncated, _ = vector.step(actions)
        assert torch.get_num_threads() == threads
        for slot, env in enumerate(singles):
            if resets[slot]:
                observation, reward, ended, cut = env.reset()[0], 0.0, False, False
            else:
                observation, reward, ended, cut, _ = env.step(actions[slot])
            assert (rewards[slot], terminated[slot], truncated[slot]) == (reward, ended, cut)
            np.testing.assert_array_equal(observations[slot].nodes, observation.nodes)


def test_finished_slots_may_be_reset_in_the_same_step(threads: int) -> None:
    same: Any = gym.make_vec("GNNRL-Prune-v0", num_envs=2, autoreset_mode=AutoresetMode.SAME_STEP, **ARGUMENTS)
    assert isinstance(same, PruneVectorEnv) and same.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    first, _ = same.reset(seed=0)
    for step in (1, 2):
        observations, _, terminated, _, _ = same.step(np.ones(same.action_space.shape, np.float32))
        assert terminated.all() and same.evaluations == 2 * step
        np.testing.assert_array_equal(observations[0].nodes, first[0].nodes)  # already the next episode's


@pytest.mark.parametrize("kind", ["gymnasium", "stable-baselines3"])
def test_the_plans_of_a_step_are_measured_in_one_call(
    vector: PruneVectorEnv, digits_env: gym.Env[Any, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env: Any = vector if kind == "gymnasium" else PruneVecEnv(digits_env, 3)
    calls: list[int] = []
    monkeypatch.setattr(PlanEvaluator, "prefetch", lambda self, plans: calls.append(len(plans)))
    env.reset()
    actions = np.random.default_rng(0).uniform(0.5, 1, (3, 9)).astype(np.float32)
    env.step(actions)
    assert calls == [3]


def test_evaluations_are_counted_together(vector: PruneVectorEnv) -> None:
    vector.reset(seed=0)
    before = vector.evaluations
    vector.step(np.ones(vector.action_space.shape or (), np.float32))
    assert vector.evaluations == before + 3
    assert {env.unwrapped.evaluations for env in vector.envs} == {before + 3}


def test_no_slots_raise() -> None:
    with pytest.raises(ValueError, match="num_envs"):
        gym.make_vec("GNNRL-Prune-v0", num_envs=0)


def test_prefetch_measures_without_counting(digits_env: gym.Env[Any, Any], threads: int) -> None:
    evaluator = digits_env.unwrapped.evaluator  # type: ignore[attr-defined]
    full = digits_env.unwrapped.network.widths  # type: ignore[attr-defined]
    plans = [full - shift for shift in range(1, 5)]
    one_by_one = [evaluator._measure(plan) for plan in plans]
    before = evaluator.evaluations
    evaluator._scores.clear()  # others have used the environment before
    evaluator.prefetch(plans)
    assert evaluator.evaluations == before and len(evaluator._scores) == (4 if threads > 1 else 0)
    assert [evaluator.score(plan) for plan in plans] == one_by_one
    assert evaluator.evaluations == before + 4


def test_vec_env_stops_exactly_at_the_limit(digits_env: gym.Env[Any, Any]) -> None:
    recorder = PlanRecorder(digits_env, 5)
    env = PruneVecEnv(recorder, 3)
    env.reset()
    action = np.ones((3, *(env.action_space.shape or ())), np.float32)
    env.step(action)
    with pytest.raises(EvaluationsExhausted):
        env.step(action)
    assert recorder.spent == 5 and len(recorder.accuracies) == 5


def test_bfloat16_scores_are_close_and_slims_stay_float32() -> None:
    scores = []
    for precision in ("float32", "bfloat16"):
        env: Any = gym.make("GNNRL-Prune-v0", precision=precision, search_images=200, device="cpu").unwrapped
        scores.append(env.evaluate(env.network.widths * 3 // 4))
        assert {p.dtype for p in env.slim().parameters()} == {torch.float32}
    assert abs(scores[0] - scores[1]) < 0.05
    with pytest.raises(ValueError, match="precision"):
        gym.make("GNNRL-Prune-v0", precision="half")


@pytest.mark.parametrize("shape", [(2, 9), (4, 9), (3, 8), (27,)])
def test_actions_of_another_shape_are_refused(vector: PruneVectorEnv, shape: tuple[int, ...]) -> None:
    vector.reset(seed=0)
    before = vector.evaluations
    with pytest.raises(ValueError, match=r"\[K=3, A=9\]"):
        vector.step(np.ones(shape, np.float32))
    assert vector.evaluations == before


class Shifted(gym.RewardWrapper[Any, Any]):
    def reward(self, reward: Any) -> Any:
        return reward - 100


def test_wrappers_that_the_slots_would_lack_are_refused(digits_env: gym.Env[Any, Any]) -> None:
    many = gym.make("GNNRL-PruneMany-v0", networks=[{"max_steps": 1, "search_images": 20}])
    for make in (lambda: PruneVecEnv(Shifted(digits_env), 2), lambda: train_policy(Shifted(many), 20)):
        with pytest.raises(ValueError, match=r"takes the environment as gym\.make makes it, without Shifted"):
            make()


def test_slots_draw_for_themselves() -> None:
    env = gym.make("GNNRL-PruneMany-v0", networks=[{"search_images": 20, "recalibration_images": 16}]).unwrapped

    def budgets(disturbed: bool) -> list[float]:
        env.reset(seed=0)
        first, second = env.slots(2)  # type: ignore[attr-defined]
        if disturbed:
            first.reset()
        return [(each.reset(), each.inner.budget)[1] for each in (second, env)]  # type: ignore[attr-defined]

    assert env.slots(1)[0].inner is not env.inner  # type: ignore[attr-defined]
    assert budgets(True) == budgets(False)
    assert len(set(budgets(True))) == 1  # of equal states, equal draws


def test_gymnasiums_own_processes_do_not_hang() -> None:
    """Forked, after their parent has used several threads."""
    script = """
import gymnasium as gym, gnnrl_gym
env = gym.make_vec("GNNRL-Prune-v0", 2, "async", vector_kwargs={"shared_memory": False}, search_images=20, device="cpu")
env.reset(seed=0)
print(env.step(env.action_space.sample())[1].shape)
env.close()
"""
    threads = {**os.environ, "OMP_NUM_THREADS": "2"}
    found = subprocess.run(
        [sys.executable, "-c", script], env=threads, capture_output=True, text=True, timeout=240, check=False
    )
    assert found.stdout.strip() == "(2,)", found.stderr[-2000:]


def test_slots_of_something_else_are_refused(digits_env: gym.Env[Any, Any]) -> None:
    with pytest.raises(ValueError, match="slots must be a whole number and at least 1, got 0"):
        PruneVecEnv(digits_env, 0)
    with pytest.raises(ValueError, match=r"needs a GNNRL-Prune-v0 .* make_sb3_env"):
        PruneVecEnv(ToyGraphEnv(), 2)
