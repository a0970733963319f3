"""Schedules, built one operation at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gnnrl_gym.scheduling.job_shop import Ints, JobShop


class Schedule:
    """A schedule of a job shop that grows by one operation at a time, each as early as those before it allow.

    Giffler and Thompson (1960), "Algorithms for solving production-scheduling problems": of all next operations take
    the one that could end first. On its machine one of those has to come next that could begin before that end
    (`candidates`). Whatever is chosen, the schedule is active, that is, nothing could begin earlier without something
    else having to wait; and some choices lead to an optimal one. Without `delay` take the one that could begin first
    instead, and one of those that could begin just then: no machine waits while there is something for it to do. Such
    schedules are fewer and better in the mean, but the optimal ones need not be among them.

    Args:
        delay: whether a machine may wait for a job though another could begin.

    Attributes:
        starts: when the operations begin, [J, K]; -1 where that is open.
        done: how many operations of every job have a place, [J].
        ready: when each job's last placed operation ends, [J].
        free: when each machine's does, [machines].
        order: on every machine, the placed operations (job, position) in their order.
    """

    def __init__(self, problem: JobShop, delay: bool = True) -> None:
        self.problem, self.delay = problem, delay
        jobs, operations, machines = problem.shape
        self.starts: Ints = np.full((jobs, operations), -1, dtype=np.int64)
        self.done, self.ready = np.zeros(jobs, dtype=np.int64), np.zeros(jobs, dtype=np.int64)
        self.free = np.zeros(machines, dtype=np.int64)
        self.order: list[list[tuple[int, int]]] = [[] for _ in range(machines)]
        self.left = problem.durations.sum(axis=1)  # of each job, in time
        self.work = problem.work.copy()  # left on each machine

    @property
    def complete(self) -> bool:
        """Whether every operation has its place."""
        return bool(self._finished().all())

    @property
    def bound(self) -> int:
        """No completion has a smaller makespan; the makespan of a complete schedule."""
        return int(max((self.earliest() + self.left).max(), (self.free + self.work).max()))

    def earliest(self) -> Ints:
        """When each job's next operation can begin, [J]; of a finished job, when that ended."""
        free = self.free[self.next_of(self.problem.machines)]
        return np.where(self._finished(), self.ready, np.maximum(self.ready, free))

    def candidates(self) -> Ints:
        """The jobs of which one has to come next, ascending. One alone is no choice.

        Raises:
            RuntimeError: the schedule is complete.
        """
        if self.complete:
            raise RuntimeError("The schedule is complete: nothing is left to be chosen.")
        begin, unfinished = self.earliest(), ~self._finished()
        end = begin + self.next_of(self.problem.durations)
        first = int(np.where(unfinished, end if self.delay else begin, np.iinfo(np.int64).max).argmin())
        machine = self.next_of(self.problem.machines)
        soon = begin < end[first] if self.delay else begin == begin[first]
        return np.flatnonzero(unfinished & soon & (machine == machine[first]))

    def dispatch(self, job: int) -> None:
        """Place the next operation of a job, behind all that its machine has to do already.

        Raises:
            ValueError: the job is finished.
        """
        position = int(self.done[job])
        if position == self.starts.shape[1]:
            raise ValueError(f"Job {job} is finished: choose one of {self.candidates().tolist()}.")
        machine, duration = int(self.problem.machines[job, position]), int(self.problem.durations[job, position])
        start = int(max(self.ready[job], self.free[machine]))
        self.starts[job, position] = start
        self.ready[job] = self.free[machine] = start + duration
        self.done[job] += 1
        self.left[job] -= duration
        self.work[machine] -= duration
        self.order[machine].append((job, position))

    def dispatch_forced(self) -> None:
        """Dispatch as long as there is no choice."""
        while not self.complete and len(chosen := self.candidates()) == 1:
            self.dispatch(int(chosen[0]))

    def next_of(self, table: Ints) -> Ints:
        """The entries of a table [J, K] at the next operation of each job, [J]; at the last one of a finished job."""
        return table[np.arange(len(table)), np.minimum(self.done, table.shape[1] - 1)]

    def _finished(self) -> NDArray[np.bool_]:
        return self.done == self.starts.shape[1]
