"""Simulated annealing over masks: swaps of kept and removed units, accepted by Metropolis' rule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agents.ask_tell import run_ask_tell
from agents.recorder import PlanRecorder
from gnnrl_gym.graph.groups import Kept

PROBES = 20  # moves that measure the initial temperature


def annealing(
    recorder: PlanRecorder,
    seed: int = 0,
    out: Path | None = None,
    sizes: tuple[float, float] = (0.02, 0.0005),
    cooling: float = 0.003,
) -> None:
    """Simulated annealing from a random mask; see `Annealing`. The score uses the same search images every time."""
    env: Any = recorder.unwrapped
    run_ask_tell(recorder, Annealing(env.group_of, env.keep, recorder.limit, seed, sizes, cooling))


class Annealing:
    """Simulated annealing (Kirkpatrick et al. 1983) over masks with `keep` units and at least one in every group.

    A move swaps n kept units for n removed ones, both drawn uniformly over the whole network, so that a move and its
    way back are equally likely and Metropolis' rule is exact: a better mask is taken, a worse one by d with the
    probability exp(-d / temperature). A swap that would empty a group is not asked for: the mask stays.

    The first moves only measure: the initial temperature is the median change of the score that they make, over ln 2,
    which takes every other such change for the worse. Temperature and n then fall geometrically with the evaluations.
    A swap that would empty a group counts as one, so where most would (few units left in many groups) they fall sooner.

    Args:
        group_of: group of every unit, [U]. keep: units of a mask. evaluations: how many there are.
        sizes: n at the start and at the end, as shares of `keep` (at least 1 unit).
        cooling: the last temperature as a share of the initial one.

    Attributes:
        mask: where the search is, bool [U]. value: its return. temperature: now; 0 before it is measured.
    """

    def __init__(
        self,
        group_of: npt.NDArray[np.int64],
        keep: int,
        evaluations: int,
        seed: int,
        sizes: tuple[float, float] = (0.02, 0.0005),
        cooling: float = 0.003,
    ) -> None:
        self._rng, self._group_of, self._keep = np.random.default_rng(seed), group_of, keep
        self._groups = int(group_of.max()) + 1
        self._sizes, self._cooling = [max(share * keep, 1.0) for share in sizes], cooling
        self._probes: list[float] = []
        self._wanted = min(PROBES, evaluations // 10)
        self._total, self._moves = max(evaluations - 1 - self._wanted, 1), 0
        self.mask, self.value, self.temperature, self._hottest = self._start(), -math.inf, 0.0, 0.0

    def ask(self) -> np.ndarray:
        """The starting mask first, then a neighbour of the present one: float32 [1, U]."""
        if self.value == -math.inf:
            return self.mask[None].astype(np.float32)
        proposal = self._neighbour()
        while (np.bincount(self._group_of[proposal], minlength=self._groups) == 0).any():
            self._advance()  # a rejected move, which costs no evaluation
            proposal = self._neighbour()
        return proposal[None].astype(np.float32)

    def tell(self, actions: np.ndarray, returns: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """Take the move or leave it."""
        proposal, value = actions[0] > 0, float(returns[0])
        if self.value == -math.inf:
            self.value = value
        elif len(self._probes) < self._wanted:
            self._probes.append(abs(value - self.value))
            self._hottest = self.temperature = initial_temperature(self._probes)
        else:
            if self._rng.random() < acceptance(value - self.value, self.temperature):
                self.mask, self.value = proposal, value
            self._advance()

    def _advance(self) -> None:
        self._moves += 1
        self.temperature = self._hottest * self._cooling ** min(self._moves / self._total, 1.0)

    def _start(self) -> Kept:
        """A random mask with at least one unit in every group."""
        scores = self._rng.random(len(self._group_of))
        for group in range(self._groups):
            members = np.flatnonzero(self._group_of == group)
            scores[members[scores[members].argmax()]] += 1.0
        mask = np.zeros(len(scores), np.bool_)
        mask[np.argpartition(-scores, self._keep - 1)[: self._keep]] = True
        return mask

    def _neighbour(self) -> Kept:
        kept, gone = np.flatnonzero(self.mask), np.flatnonzero(~self.mask)
        first, last = self._sizes
        size = min(round(first * (last / first) ** min(self._moves / self._total, 1.0)), len(kept), len(gone))
        proposal = self.mask.copy()
        proposal[self._rng.choice(kept, size, replace=False)] = False
        proposal[self._rng.choice(gone, size, replace=False)] = True
        return proposal


def initial_temperature(changes: list[float]) -> float:
    """The temperature at which the median of `changes` is accepted half of the time (if that median is 0: the median of
    the changes that are not 0)."""
    median = float(np.median(changes))
    if median == 0.0:
        median = float(np.median([change for change in changes if change] or [0.0]))
    return median / math.log(2)


def acceptance(gain: float, temperature: float) -> float:
    """Metropolis: the probability to take a move that raises the return by `gain`."""
    if gain >= 0:
        return 1.0
    return math.exp(gain / temperature) if temperature > 0 else 0.0
