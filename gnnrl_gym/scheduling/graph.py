"""What is left to be done in a job shop, as a hierarchical graph."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.spaces import GraphInstance
from numpy.typing import NDArray

from gnnrl_gym.scheduling.job_shop import Ints
from gnnrl_gym.scheduling.schedule import Schedule

LEVELS = ("job", "operation", "machine")
NODE_FEATURES = (
    *LEVELS,
    "candidate",  # a job of which one has to come next, its next operation, their machine
    "duration",  # of the operation, or the job's next one; in mean durations of the problem, as are "wait" and "slack"
    "wait",  # from now, when the first candidate could begin, until it can begin or is free
    "slack",  # by how much it could begin later without making the bound of the makespan larger
    "left",  # time from the operation to the end of its job, of the job, on the machine; in lower bounds of the problem
    "count",  # operations that are left, of all that a job or machine has
)
EDGE_FEATURES = (
    "order",  # operation -> the next one of its job
    "on",  # operation -> its machine
    "of",  # operation -> its job
    "next",  # the same edge, where it is the job's next operation
    "at",  # machine -> a job whose next operation it does
)

Columns = dict[str, NDArray[Any]]


def graph_sizes(jobs: int, operations: int, machines: int) -> tuple[int, int]:
    """Numbers of nodes and edges of the graph of an empty schedule, the largest."""
    total = jobs * operations
    return jobs + total + machines, 3 * total


def observe(schedule: Schedule) -> GraphInstance:
    """The jobs, which are the decision nodes, then the operations without a place, then the machines.

    What has its place has no node: all that it means for the rest is when jobs and machines are free.
    """
    left = _Left(schedule)
    levels = (left.jobs(), left.operations(), left.machines())
    nodes = np.concatenate([_table(level, columns) for level, columns in zip(LEVELS, levels, strict=True)])
    links, kinds = left.edges()
    return GraphInstance(nodes, kinds, links)


class _Left:
    """What is left: `job`, `position` in it and `machine` of every operation without a place, [n], job by job."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, operations = schedule, schedule.problem.shape[1]
        self.job, self.position = np.nonzero(np.arange(operations) >= schedule.done[:, None])
        self.machine = schedule.problem.machines[self.job, self.position]
        self.following = self.position == schedule.done[self.job]  # the next of their jobs
        self.candidate = np.zeros(len(schedule.done), dtype=np.bool_)  # of each job, whether it is one
        self.candidate[[] if schedule.complete else schedule.candidates()] = True
        self.begin, self.bound = schedule.earliest(), schedule.bound
        self.now = self.begin[self.candidate].min(initial=self.bound)

    def jobs(self) -> Columns:
        duration = np.zeros(len(self.begin))
        duration[self.job[self.following]] = self._durations()[self.following]
        count = 1 - self.schedule.done / self.schedule.problem.shape[1]
        about = {"candidate": self.candidate, "duration": duration, "count": count}
        return about | self._times(self.begin, self.schedule.left)

    def operations(self) -> Columns:
        durations = self.schedule.problem.durations
        to_end = durations[:, ::-1].cumsum(axis=1)[:, ::-1][self.job, self.position]  # of their jobs
        first = self.begin[self.job] + self.schedule.left[self.job] - to_end  # when they can begin at the earliest
        candidate = self.following & self.candidate[self.job]
        return {"candidate": candidate, "duration": self._durations()} | self._times(first, to_end)

    def machines(self) -> Columns:
        schedule = self.schedule
        everything = np.bincount(schedule.problem.machines.ravel())
        count = np.bincount(self.machine, minlength=len(everything)) / everything.clip(min=1)
        candidate = np.zeros(len(everything))
        candidate[self.machine[self.following & self.candidate[self.job]]] = 1
        return {"candidate": candidate, "count": count} | self._times(schedule.free, schedule.work)

    def edges(self) -> tuple[Ints, NDArray[np.float32]]:
        """Links [m, 2] and their features [m, 5]."""
        jobs, total = len(self.begin), len(self.job)
        here, machine = jobs + np.arange(total), jobs + total + self.machine
        first = np.flatnonzero(self.job[1:] == self.job[:-1])  # of pairs that follow each other in a job
        following = self.following
        pairs = {
            "order": (here[first], here[first + 1]),
            "on": (here, machine),
            "of": (here, self.job),
            "at": (machine[following], self.job[following]),
        }
        links = np.concatenate([np.stack(pair, axis=1) for pair in pairs.values()])
        kind = np.repeat([EDGE_FEATURES.index(name) for name in pairs], [len(pair[0]) for pair in pairs.values()])
        kinds = np.eye(len(EDGE_FEATURES), dtype=np.float32)[kind]
        kinds[kind == EDGE_FEATURES.index("of"), EDGE_FEATURES.index("next")] = following
        return links, kinds

    def _durations(self) -> NDArray[np.float64]:
        durations = self.schedule.problem.durations
        return durations[self.job, self.position] / durations.mean()

    def _times(self, start: Ints, left: Ints) -> Columns:
        unit = self.schedule.problem.durations.mean()
        return {
            "wait": np.maximum(start - self.now, 0) / unit,
            "slack": (self.bound - start - left) / unit,
            "left": left / self.schedule.problem.lower_bound,
        }


def _table(level: str, columns: Columns) -> NDArray[np.float32]:
    """Node features [n, F]; 0 where a level has no such column."""
    table = np.zeros((len(columns["wait"]), len(NODE_FEATURES)), np.float32)
    table[:, NODE_FEATURES.index(level)] = 1
    for name, column in columns.items():
        table[:, NODE_FEATURES.index(name)] = column
    return table
