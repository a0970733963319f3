"""What Stable-Baselines3 needs around a graph environment."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import RescaleAction
from stable_baselines3.common.monitor import Monitor

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
        env: an environment with a `spaces.Graph` observation and a bounded `Box(A,)` action.
        max_nodes, max_edges, max_decisions: as in `PadGraph`.

    Raises:
        TypeError, ValueError: as in `PadGraph`.
    """
    padded = PadGraph(env, max_nodes, max_edges, max_decisions)
    return Monitor(RescaleAction(padded, np.float32(-1), np.float32(1)))
