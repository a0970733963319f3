"""What Stable-Baselines3 needs around a graph environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import RescaleAction
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from agents.recorder import PlanRecorder, SlotRecorder, check_wrappers
from gnnrl_gym.checks import check_whole
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.envs.prune_many import PruneManyEnv
from gnnrl_gym.envs.prune_vector import prefetch
from gnnrl_gym.wrappers import PadGraph


def make_sb3_env(
    env: gym.Env[Any, Any],
    max_nodes: int | None = None,
    max_edges: int | None = None,
    max_decisions: int | None = None,
) -> gym.Env[Any, Any]:
    """Wrap a graph environment so that every Stable-Baselines3 algorithm for `Box` actions takes it.

    Padding is innermost, because the number of inner action components may change with the graph and the
    rescaling is fixed. Actions become [-1, 1]: a pruning ratio `r` is the action `2 * r - 1`.

    Args:
        env: an environment with a `spaces.Graph` observation and a bounded `Box(A,)` action of floats.
        max_nodes, max_edges, max_decisions: as in `PadGraph`.

    Raises:
        TypeError, ValueError: as in `PadGraph`.
        ValueError: actions without bounds, with equal ones, or whole ones; `GNNRL-Mask-v0` or `GNNRL-Relational-v0`,
            whose actions are of something else than nodes.
    """
    if not getattr(env.unwrapped, "acts_on_nodes", True):
        raise ValueError(
            f"No component of an action of {type(env.unwrapped).__name__} acts on a node, so the graph policies don't "
            "fit: masks are searched by `gnnrl early`, relational graphs by `gnnrl bogp`. For a policy of your own pad "
            "the graph with gnnrl_gym.wrappers.PadGraph."
        )
    padded = PadGraph(env, max_nodes, max_edges, max_decisions)
    box: Any = padded.action_space
    if not (box.is_bounded() and np.issubdtype(box.dtype, np.floating) and (box.low < box.high).all()):
        raise ValueError(
            f"make_sb3_env rescales actions to [-1, 1], which needs a Box of floats with a low and a higher high; got "
            f"{box}. Let the environment bound its actions, and round those that it takes as whole numbers."
        )
    # whole numbers fit float32 and float64 boxes alike, and JSON
    rescaled = RescaleAction(_Bounded(padded), -1, 1)  # type: ignore[arg-type]
    return Monitor(_Final(rescaled) if isinstance(env.unwrapped, PruneEnv | PruneManyEnv) else rescaled)


class _Bounded(gym.ActionWrapper[Any, Any, Any]):
    """Brings actions back into their box: rescaled in float32, those at its border can be a rounding outside."""

    def action(self, action: Any) -> Any:
        space: Any = self.action_space
        return np.clip(action, space.low, space.high)


class _Final(gym.Wrapper[Any, Any, Any, Any]):
    """Ends a pruning episode for good that has used up its steps.

    Its last reward, -1, is the whole verdict, but Stable-Baselines3 adds the value of the state after a truncation.
    """

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        over = truncated and not self.env.unwrapped.running  # type: ignore[attr-defined]
        return observation, reward, terminated or over, truncated and not over, info


class PruneVecEnv(DummyVecEnv):
    """Slots of one pruning environment as a Stable-Baselines3 `VecEnv`: the plans of a step are measured side by side.

    Args:
        env: a `GNNRL-Prune-v0` or `GNNRL-PruneMany-v0` environment, or a `PlanRecorder` around one, which then counts
            for all slots.
        slots: K.

    Raises:
        ValueError: another environment, or one in wrappers of your own, which the slots would go without; or no slot.
    """

    def __init__(self, env: gym.Env[Any, Any], slots: int) -> None:
        inner: Any = env.unwrapped
        check_whole(1, slots=slots)
        if not hasattr(inner, "slots"):
            raise ValueError(
                f"PruneVecEnv needs a GNNRL-Prune-v0 or GNNRL-PruneMany-v0 environment, got {inner}: "
                "give others to DummyVecEnv([lambda: make_sb3_env(...), ...])."
            )
        check_wrappers("PruneVecEnv", env)
        found = inner.slots(slots)
        if isinstance(env, PlanRecorder):
            found = [SlotRecorder(slot, env) for slot in found]
        super().__init__([lambda slot=slot: make_sb3_env(slot) for slot in found])  # type: ignore[misc]
        self._recorder = env if isinstance(env, PlanRecorder) else None

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """The same seed for every slot: where a reset draws, all draw the same, so that plans can be compared."""
        self._seeds = [seed] * self.num_envs
        return self._seeds

    def step_wait(self) -> VecEnvStepReturn:
        """Step every slot; finished ones are reset."""
        left = None if self._recorder is None else self._recorder.left  # slots that may still score a plan
        slots: list[Any] = [env.unwrapped for env in self.envs][:left]
        ratios = [(np.clip(action, -1, 1) + 1) / 2 for action in self.actions]
        prefetch(slots, [row[: slot.action_space.shape[0]] for row, slot in zip(ratios, slots, strict=False)])
        return super().step_wait()
