"""GNNRL-JobShop-v0: decide who goes first at every contended machine."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gnnrl_gym.checks import check_choice, check_whole
from gnnrl_gym.scheduling.graph import EDGE_FEATURES, LEVELS, NODE_FEATURES, graph_sizes, observe
from gnnrl_gym.scheduling.job_shop import JobShop
from gnnrl_gym.scheduling.rendering import draw_schedule, schedule_text
from gnnrl_gym.scheduling.schedule import Schedule


class JobShopEnv(gym.Env[spaces.GraphInstance, Any]):
    """Schedule a job shop, with as small a makespan as possible.

    ## Description
    J jobs of several operations each, in a fixed order, each on one machine, which does one at a time. A schedule is
    built by the method of Giffler and Thompson (1960): whenever several jobs could go next on a machine, the one with
    the highest priority does; where there is no choice, nobody is asked. What is left to be done is the state, as a
    graph of three levels. Zhang et al., "Learning to Dispatch for Job Shop Scheduling via Deep Reinforcement Learning"
    (NeurIPS 2020), has the setting and the reward; graph and actions are those of this package, so that its graph
    policies learn it as they learn to prune.

    ## Observation Space
    `Graph(Box(9,), Box(5,))`. The first J nodes are the decision nodes, one per job; then the operations that have no
    place in the schedule yet, then the machines. Columns: `gnnrl_gym.scheduling.graph.NODE_FEATURES` and
    `EDGE_FEATURES`. Times are in mean durations or lower bounds of the problem, so that a policy fits any unit.

    ## Action Space
    `Box(0, 1, (J,))`: priorities; component i is of job i. Those of jobs that can't go next don't count. Of equal ones
    the lower job goes first.

    ## Reward
    Minus the growth of the lower bound of the makespan, as a share of the problem's own lower bound (the longest job,
    or the work of the busiest machine). The return is 1 - makespan / lower bound, at most 0.

    ## Episode End
    Terminated when every operation has its place.

    ## Arguments
    * `jobs`, `machines`: of problems that are drawn anew at every reset: every job visits every machine once.
    * `shortest`, `longest`: the bounds of their durations, which are drawn uniformly.
    * `problem`: one `JobShop` that is always the same, instead; the arguments above don't count then.
    * `delay`: whether a machine may wait for a job though another could begin. Without it there is less to decide and
      schedules are better in the mean, but the optimal ones need not be among them
      (`gnnrl_gym.scheduling.Schedule`).
    * `render_mode`: `ansi` or `rgb_array`: a Gantt chart.

    `reset(options={"problem": p})` sets the problem of one episode, of the same size.

    ## Info
    `makespan` (-1 until the schedule is complete), `lower_bound` of the problem, `bound` of the makespan now. The
    attribute `schedule` has everything.

    ## Version History
    * v0: first version.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}
    levels = len(LEVELS)

    def __init__(
        self,
        jobs: int = 6,
        machines: int = 6,
        shortest: int = 1,
        longest: int = 99,
        problem: JobShop | None = None,
        delay: bool = True,
        render_mode: str | None = None,
    ) -> None:
        check_choice("render_mode", render_mode, (None, *self.metadata["render_modes"]))
        check_whole(1, jobs=jobs, machines=machines, shortest=shortest)
        check_whole(shortest, longest=longest)
        self.problem, self.render_mode = _checked(problem), render_mode
        self.longest, self.shortest, self.delay = longest, shortest, delay
        self.shape = (jobs, machines, machines) if problem is None else problem.shape
        self.schedule: Schedule | None = None
        self.max_nodes, self.max_edges = graph_sizes(*self.shape)
        self.observation_space = spaces.Graph(
            spaces.Box(0.0, np.inf, (len(NODE_FEATURES),), np.float32),
            spaces.Box(0.0, 1.0, (len(EDGE_FEATURES),), np.float32),
        )
        self.action_space: spaces.Box = spaces.Box(0.0, 1.0, (self.shape[0],), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[spaces.GraphInstance, dict[str, Any]]:
        """Begin with an empty schedule: of the fixed problem, or else of a new random one.

        Raises:
            ValueError: an unknown option, or a problem of another size; nothing has changed then.
        """
        given = dict(options or {})
        problem = _checked(given.pop("problem", self.problem))
        if given:
            raise ValueError(f"Unknown reset option {sorted(given)[0]!r}: there is 'problem'.")
        if problem is not None and problem.shape != self.shape:
            raise ValueError(
                f"The problem has (jobs, operations of a job, machines) = {problem.shape}, the environment "
                f"{self.shape}: make an environment of this size."
            )
        super().reset(seed=seed)
        if problem is None:
            problem = JobShop.random(self.shape[0], self.shape[2], self.np_random, self.shortest, self.longest)
        self.schedule = Schedule(problem, self.delay)
        self._bound, self._running = self.schedule.bound, True
        self.schedule.dispatch_forced()
        return observe(self.schedule), self._info()

    def step(self, action: Any) -> tuple[spaces.GraphInstance, SupportsFloat, bool, bool, dict[str, Any]]:
        """Dispatch the candidate with the highest priority, and then what has no alternative.

        Raises:
            ValueError: not one finite priority per job; nothing has changed then.
            RuntimeError: no episode is running.
        """
        if self.schedule is None or not self._running:
            raise RuntimeError("No episode is running: call reset() first.")
        priorities = np.asarray(action, np.float64)
        if priorities.shape != self.action_space.shape or not np.isfinite(priorities).all():
            raise ValueError(f"The action has a finite priority for each of {self.shape[0]} jobs, got {action!r}.")
        if not self.schedule.complete:  # it is from the beginning where nothing is contended
            candidates = self.schedule.candidates()
            self.schedule.dispatch(int(candidates[priorities[candidates].argmax()]))
            self.schedule.dispatch_forced()
        before, self._bound = self._bound, self.schedule.bound
        self._running = not self.schedule.complete
        reward = (before - self._bound) / self.schedule.problem.lower_bound
        return observe(self.schedule), reward, not self._running, False, self._info()

    def render(self) -> Any:
        """A Gantt chart of what is decided so far: text, or an image [H, W, 3] of uint8.

        Raises:
            ValueError: made without a render mode.
            RuntimeError: before the first reset.
        """
        if self.render_mode is None:
            raise ValueError("Rendering needs gym.make(..., render_mode='ansi') or 'rgb_array'.")
        if self.schedule is None:
            raise RuntimeError("There is nothing to render: call reset() first.")
        return (schedule_text if self.render_mode == "ansi" else draw_schedule)(self.schedule)

    def _info(self) -> dict[str, Any]:
        assert self.schedule is not None
        makespan = self.schedule.bound if self.schedule.complete else -1
        return {"makespan": makespan, "lower_bound": self.schedule.problem.lower_bound, "bound": self.schedule.bound}


def _checked(problem: Any) -> JobShop | None:
    if problem is not None and not isinstance(problem, JobShop):
        raise ValueError(f"problem must be a gnnrl_gym.scheduling.JobShop, got {type(problem).__name__}.")
    return problem
