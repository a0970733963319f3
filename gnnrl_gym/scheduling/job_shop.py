"""Job-shop problems: which operations have to be done, in which order, on which machine, and for how long."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gnnrl_gym.checks import check_whole

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class JobShop:
    """A job-shop problem: J jobs of K operations each, done in their order, each on one machine without a break.

    A machine does one operation at a time. Wanted is the order on every machine with the smallest makespan, the time at
    which the last job ends.

    Args:
        machines: which machine does an operation, [J, K], from 0.
        durations: how long it takes, whole numbers of at least 1 in any unit of time, [J, K].

    Raises:
        ValueError: arrays of other or different shapes, or of something else than such numbers.
    """

    machines: Ints
    durations: Ints

    def __post_init__(self) -> None:
        for name, least in (("machines", 0), ("durations", 1)):
            object.__setattr__(self, name, _whole(name, getattr(self, name), least))
        if self.machines.shape != self.durations.shape:
            raise ValueError(f"machines are {self.machines.shape}, but durations {self.durations.shape}: one for each.")

    @classmethod
    def random(
        cls, jobs: int, machines: int, generator: np.random.Generator, shortest: int = 1, longest: int = 99
    ) -> JobShop:
        """Every job visits every machine once, in random order, for a random time from `shortest` to `longest`: the
        benchmark problems of Taillard (1993), "Benchmarks for basic scheduling problems", section 3.

        Raises:
            ValueError: no job or machine, or no such durations.
        """
        check_whole(1, jobs=jobs, machines=machines, shortest=shortest)
        check_whole(shortest, longest=longest)
        order = np.argsort(generator.random((jobs, machines)), axis=1)
        return cls(order, generator.integers(shortest, longest, (jobs, machines), endpoint=True))

    @classmethod
    def parse(cls, text: str) -> JobShop:
        """Read the standard format: a line with the numbers of jobs and machines; then a line per job, with pairs of
        machine and duration. Lines that don't begin with a number are comments.

        Raises:
            ValueError: another format.
        """
        lines = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
        try:
            (jobs, machines), *rows = [[int(word) for word in line] for line in lines]
            pairs = np.array(rows, dtype=np.int64).reshape(len(rows), -1, 2)
            most = pairs[..., 0].max() + 1  # every machine has work, or a job works on each: else something was lost
            fits = len(rows) == jobs and most <= machines and machines in (most, pairs.shape[1])
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                "A job shop is a line with the numbers of jobs and machines, and then a line for every job with a "
                "machine, counted from 0, and a duration for each of its operations, all jobs with equally many."
            )
        return cls(pairs[..., 0], pairs[..., 1])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> JobShop:
        """`parse` a text file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it has another format.
        """
        return cls.parse(Path(path).read_text(encoding="utf-8"))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of jobs, of operations of a job, and of machines."""
        return (*self.durations.shape, int(self.machines.max()) + 1)

    @cached_property
    def lower_bound(self) -> int:
        """No schedule is shorter: the longest job, or the work of the busiest machine."""
        return int(max(self.durations.sum(axis=1).max(), self.work.max()))

    @cached_property
    def work(self) -> Ints:
        """What there is to do on each machine, in time, [machines]."""
        return np.bincount(self.machines.ravel(), self.durations.ravel()).astype(np.int64)


def _whole(name: str, value: Any, least: int) -> Ints:
    """A copy of a table of whole numbers, read-only."""
    table = np.array(value)
    if table.ndim != 2 or not table.size or not np.issubdtype(table.dtype, np.integer) or table.min() < least:
        raise ValueError(
            f"{name} must be whole numbers of at least {least}: a row for every job, with one for each operation."
        )
    table = table.astype(np.int64)
    table.setflags(write=False)
    return table
