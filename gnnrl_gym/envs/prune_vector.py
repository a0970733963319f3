"""Several pruning episodes at once, with one evaluator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.evaluation.accuracy import PlanEvaluator
from gnnrl_gym.graph.groups import Ints


class PruneVectorEnv(SyncVectorEnv):
    """K slots of `GNNRL-Prune-v0` that share one network, its data, and one evaluator call per step.

    `gym.make_vec("GNNRL-Prune-v0", num_envs=K, ...)` makes it. The network is traced once; equal plans are measured
    once; the plans of a step are measured side by side, one thread each. Observations are tuples of K
    `GraphInstance`s, everything else is as in Gymnasium's `SyncVectorEnv`.

    Args:
        num_envs: K.
        autoreset_mode: when a finished slot is reset, as in `SyncVectorEnv`.
        arguments: of `PruneEnv`.
    """

    def __init__(
        self, num_envs: int, autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP, **arguments: Any
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}.")
        first = PruneEnv(**arguments)
        super().__init__([_making(slot) for slot in first.slots(num_envs)], autoreset_mode=autoreset_mode)
        self.evaluator = first.evaluator

    @property
    def evaluations(self) -> int:
        """Evaluations of all slots since this was made."""
        return self.evaluator.evaluations

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step every slot with its row of `actions` [K, A].

        Raises:
            ValueError: actions of another shape.
        """
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            wanted = f"[K={self.num_envs}, A={(self.single_action_space.shape or (0,))[0]}]"
            raise ValueError(f"The actions must have shape {wanted}, a row for each slot, got {actions.shape}.")
        next_step = self.autoreset_mode == AutoresetMode.NEXT_STEP  # in which finished slots are reset in this step
        running = np.flatnonzero(~self._autoreset_envs) if next_step else range(self.num_envs)
        prefetch([self.envs[slot].unwrapped for slot in running], actions[running])
        return super().step(actions)


def _making(slot: PruneEnv) -> Callable[[], PruneEnv]:
    return lambda: slot


def prefetch(slots: Sequence[Any], actions: Iterable[np.ndarray]) -> None:
    """Measure side by side what `slots` of one environment would score on their rows of `actions` [K, A]."""
    found: dict[PlanEvaluator, list[Ints]] = defaultdict(list)
    for slot, action in zip(slots, actions, strict=True):
        if (plan := slot.peek(action)) is not None:
            found[slot.evaluator].append(plan)
    for evaluator, plans in found.items():
        evaluator.prefetch(plans)
