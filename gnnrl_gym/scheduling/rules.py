"""Priority rules: what factories do, and what a learned policy has to beat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gnnrl_gym.scheduling.job_shop import JobShop
from gnnrl_gym.scheduling.schedule import Schedule

Rule = Callable[[Schedule], NDArray[np.float64]]


def shortest_processing_time(schedule: Schedule) -> NDArray[np.float64]:
    """The shortest operation first."""
    return -schedule.next_of(schedule.problem.durations).astype(np.float64)


def longest_processing_time(schedule: Schedule) -> NDArray[np.float64]:
    """The longest operation first."""
    return -shortest_processing_time(schedule)


def most_work_remaining(schedule: Schedule) -> NDArray[np.float64]:
    """The job first that has most left to do, its next operation included."""
    return schedule.left.astype(np.float64)


def most_operations_remaining(schedule: Schedule) -> NDArray[np.float64]:
    """The job first that has most operations left to do."""
    return -schedule.done.astype(np.float64)


def first_come_first_served(schedule: Schedule) -> NDArray[np.float64]:
    """The job first that has waited longest."""
    return -schedule.ready.astype(np.float64)


# by the names of the literature; each gives priorities [J], the highest of the candidates is next
RULES: dict[str, Rule] = {
    "spt": shortest_processing_time,
    "lpt": longest_processing_time,
    "mwkr": most_work_remaining,
    "mopnr": most_operations_remaining,
    "fcfs": first_come_first_served,
}


def follow(rule: Rule, problem: JobShop, delay: bool = True) -> Schedule:
    """The whole schedule that a rule gives; of equal priorities the lower job is first. `delay`: see `Schedule`."""
    schedule = Schedule(problem, delay)
    while not schedule.complete:
        candidates = schedule.candidates()
        schedule.dispatch(int(candidates[rule(schedule)[candidates].argmax()]))
    return schedule
