"""GNNRL-PruneMany-v0: several networks and budgets, one drawn at every reset."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import EzPickle

from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.evaluation.accuracy import PlanEvaluator
from gnnrl_gym.graph.groups import Ints


class PruneManyEnv(gym.Env[spaces.GraphInstance, np.ndarray], EzPickle):
    """Prune whichever network comes up: what a policy that transfers is trained on.

    ## Description
    Every reset draws a network and a budget; the episode is then that of `GNNRL-Prune-v0`.

    ## Observation Space
    As in `GNNRL-Prune-v0`; the graphs differ in size. `max_nodes`, `max_edges`, `max_decisions` bound them (`PadGraph`
    reads these).

    ## Action Space
    `Box(0, 1, (A,))` of the network that was drawn: it changes with `reset`.

    ## Reward, Episode End, Info
    As in `GNNRL-Prune-v0`; `info` also has `network`, the number of the network that was drawn. `widths` is as long as
    the longest plan, with zeros at the end, so that `gym.vector` can stack it.

    ## Arguments
    * `networks`: arguments of `GNNRL-Prune-v0`, one dictionary per network, or environments that are made already.
    * `budgets`: lowest and highest share of the dense cost; drawn evenly between them.

    `reset(options={"network": i, "budget": b})` sets either.

    ## Version History
    * v0: first version.
    """

    metadata = PruneEnv.metadata
    levels, plan_key = PruneEnv.levels, PruneEnv.plan_key

    def __init__(
        self,
        networks: Sequence[Mapping[str, Any] | gym.Env[Any, Any]] = ({},),
        budgets: tuple[float, float] = (0.3, 0.7),
        render_mode: str | None = None,
    ) -> None:
        EzPickle.__init__(self, networks, budgets, render_mode)
        if not networks:
            raise ValueError("networks=[] leaves nothing to prune: give at least one dictionary of PruneEnv arguments.")
        low, high = budgets
        if not 0 < low <= high < 1:
            raise ValueError(f"budgets are a lowest and a highest share in (0, 1), got {tuple(budgets)}.")
        self.render_mode, self.budgets = render_mode, (float(low), float(high))
        self.envs = [_made(network, render_mode) for network in networks]
        for number, env in enumerate(self.envs):
            _check_budget(env, number, self.budgets[0])
        self.inner, self.network_index = self.envs[0], 0
        self.observation_space = self.inner.observation_space
        self.max_nodes = max(env.max_nodes for env in self.envs)
        self.max_edges = max(env.max_edges for env in self.envs)
        self.max_decisions = max(len(env.network.widths) for env in self.envs)

    @property
    def action_space(self) -> spaces.Box:  # type: ignore[override]
        """Of the network that was drawn."""
        return self.inner.action_space  # type: ignore[return-value]

    @property
    def evaluations(self) -> int:
        """Evaluations of all networks since they were made."""
        return sum(evaluator.evaluations for evaluator in {env.evaluator for env in self.envs})

    @property
    def evaluator(self) -> PlanEvaluator:
        """Of the network that was drawn."""
        return self.inner.evaluator

    @property
    def device(self) -> Any:
        """The device that candidates run on."""
        return self.inner.device

    def slots(self, count: int) -> list[PruneManyEnv]:
        """`count` environments with states of their own that share networks, data and evaluators with this one."""
        found = [object.__new__(type(self)) for _ in range(count)]
        for slot in found:
            slot.__dict__.update(self.__dict__)
            slot._np_random = copy.deepcopy(self._np_random)
            slot.envs = [env.slots(1)[0] for env in self.envs]
            slot.inner = slot.envs[self.network_index]
        return found

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[spaces.GraphInstance, dict[str, Any]]:
        """Draw a network and a budget, and begin. Options: `network`, `budget`."""
        super().reset(seed=seed)
        options = options or {}
        if unknown := set(options) - {"network", "budget"}:
            raise ValueError(f"Unknown reset option {sorted(unknown)[0]!r}: there are 'network' and 'budget'.")
        drawn = int(self.np_random.integers(len(self.envs))), float(self.np_random.uniform(*self.budgets))
        index = int(options.get("network", drawn[0]))
        if not 0 <= index < len(self.envs):
            raise ValueError(f"There are {len(self.envs)} networks, from 0: not {index}.")
        self.network_index, self.inner = index, self.envs[index]
        observation, info = self.inner.reset(options={"budget": options.get("budget", drawn[1])})
        return observation, self._info(info)

    def step(self, action: np.ndarray) -> tuple[spaces.GraphInstance, SupportsFloat, bool, bool, dict[str, Any]]:
        """As in `GNNRL-Prune-v0`."""
        observation, reward, terminated, truncated, info = self.inner.step(action)
        return observation, reward, terminated, truncated, self._info(info)

    @property
    def running(self) -> bool:
        """As in `PruneEnv`."""
        return self.inner.running

    def peek(self, action: np.ndarray) -> Ints | None:
        """As in `PruneEnv`."""
        return self.inner.peek(action)

    def render(self) -> Any:
        """The network that was drawn."""
        return self.inner.render()

    def _info(self, info: dict[str, Any]) -> dict[str, Any]:
        widths = np.zeros(self.max_decisions, np.int64)
        widths[: len(info["widths"])] = info["widths"]
        return info | {"network": self.network_index, "widths": widths}


def _made(network: Mapping[str, Any] | gym.Env[Any, Any], render_mode: str | None) -> PruneEnv:
    """The environment of one network: made from arguments, or a slot of the one that is given.

    Raises:
        TypeError: neither arguments nor a pruning environment.
    """
    if isinstance(network, Mapping):
        return PruneEnv(**{"render_mode": render_mode, **network})
    made = network.unwrapped if isinstance(network, gym.Env) else network
    if not isinstance(made, PruneEnv):
        raise TypeError(f"networks holds arguments of GNNRL-Prune-v0, or such environments, got {network!r}.")
    made = made.slots(1)[0]  # the given one keeps its episode, and its way to render
    made.render_mode = render_mode or made.render_mode
    return made


def _check_budget(env: PruneEnv, number: int, lowest: float) -> None:
    """Check that a network can meet the lowest budget, since otherwise some reset would fail, perhaps hours later.

    Raises:
        ValueError: it can't.
    """
    try:
        env._budgets_for(lowest)
    except ValueError as error:
        raise ValueError(f"networks[{number}], with the lowest of the budgets: {error}") from error
