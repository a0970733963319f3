"""The controls: what a learned search has to beat at equal cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cmaes import CMA

from agents.ask_tell import run_ask_tell
from agents.recorder import PlanRecorder

BATCH = 8  # plans that random search asks for at once, so that they can be measured side by side


def uniform(recorder: PlanRecorder, seed: int = 0, out: Path | None = None) -> None:
    """Every group gives up the same share. One plan, one evaluation."""
    env: Any = recorder.unwrapped
    recorder.reset()  # an episode before may have had another budget
    ratios = np.ones(recorder.action_space.shape or (), np.float32)
    if getattr(env, "landing", None) == "free":  # nothing scales them back to the budget
        ratios *= _smallest(lambda ratio: env.peek(ratio * ratios) is not None)
    recorder.play([ratios])


def random(recorder: PlanRecorder, seed: int = 0, out: Path | None = None) -> None:
    """Independent ratios from the whole action space."""
    recorder.action_space.seed(seed)
    while not recorder.exhausted:
        recorder.play([recorder.action_space.sample() for _ in range(BATCH)])


def evolution(
    recorder: PlanRecorder, seed: int = 0, out: Path | None = None, start: float = 0.5, step: float = 0.3
) -> None:
    """(1+1)-ES with the one-fifth success rule, from the uniform plan (`start`) and step size `step`."""
    run_ask_tell(recorder, OnePlusOneES(_size(recorder), seed, start, step))


def cma_es(
    recorder: PlanRecorder, seed: int = 0, out: Path | None = None, start: float = 0.5, step: float = 0.3
) -> None:
    """CMA-ES (Hansen 2016) with the default population, 4 + 3 ln A, from the uniform plan, in the package `cmaes`."""
    run_ask_tell(recorder, CMAES(_size(recorder), seed, start, step))


def sensitivity(
    recorder: PlanRecorder, seed: int = 0, out: Path | None = None, shares: tuple[float, ...] = (0.8, 0.6, 0.4, 0.2)
) -> None:
    """Sensitivity and bisection: prune each group alone to a few `shares`, then let one threshold on the error's rise
    cut every group, as low as the budget asks (as NVIDIA's FastNAS does). No chance in it: `seed` has no part.

    Where there are fewer evaluations than groups times shares, fewer shares are measured; a width that several of them
    come to (at the floor, say) is measured once.
    """
    env: Any = recorder.unwrapped
    recorder.reset()  # an episode before may have had another budget
    full = env.network.widths
    count = min(len(shares), (recorder.limit - 2) // len(full))
    if count < 1:
        raise ValueError(f"sensitivity needs {len(full) + 2} evaluations for {len(full)} groups, not {recorder.limit}.")
    kept = np.array([1.0, *np.array(shares)[np.linspace(0, len(shares) - 1, count).round().astype(int)]])
    plans = [env.plan(np.full(len(full), share)) for share in kept]
    dense = recorder.evaluate(full)
    rise = np.zeros((len(plans), len(full)))
    places = [(row, group) for row in range(1, len(kept)) for group in range(len(full))]
    new = [(row, group) for row, group in places if plans[row][group] < plans[row - 1][group]]
    env.evaluator.prefetch([_alone(full, group, plans[row]) for row, group in new])
    for row, group in new:
        rise[row, group] = dense - recorder.evaluate(_alone(full, group, plans[row]))
    recorder.play([1 - _cut(np.maximum.accumulate(rise), kept, env)])


def _alone(full: np.ndarray, group: int, width: np.ndarray) -> np.ndarray:
    plan = full.copy()
    plan[group] = width[group]
    return plan


def _cut(rise: np.ndarray, kept: np.ndarray, env: Any) -> np.ndarray:
    """Kept share [A] of every group at the smallest threshold on the rise [S, A] whose plan is within the budget."""

    # beyond the last measured share the last slope goes on, so that every budget can be reached
    slope = np.maximum(rise[-1] - rise[-2], 1e-3) / (kept[-2] - kept[-1])
    curves = np.vstack([rise, rise[-1] + slope * kept[-1]])
    curves = curves + 1e-9 * np.arange(len(curves))[:, None]
    at = np.append(kept, 0.0)

    def share(threshold: float) -> np.ndarray:
        return np.array([np.interp(threshold, curves[:, g], at) for g in range(rise.shape[1])])

    # of what is played, not of the share: 1 - (1 - share) is not always the same, and bisection ends where that counts
    return share(_smallest(lambda threshold: env.peek(1 - share(threshold)) is not None, float(curves.max() + 1)))


def _smallest(enough: Callable[[float], bool], high: float = 1.0) -> float:
    """By bisection, the smallest number that is enough, if `high` is."""
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


class OnePlusOneES:
    """(1+1)-ES in the box [0, 1]: a child that is no worse becomes the parent; one success in five keeps the step size.

    Its changes are damped by 1 + A/2 (Igel, Suttorp, Hansen 2007), and it stays above `LEAST`: smaller steps move no
    integer width, and the search would stand still.
    """

    LEAST = 0.05

    def __init__(self, size: int, seed: int, start: float, step: float) -> None:
        self._rng = np.random.default_rng(seed)
        self._parent, self._value, self._step = np.full(size, start), -np.inf, step
        self._damping = 1 + size / 2

    def ask(self) -> np.ndarray:
        """The parent itself first, then a child: [1, A]."""
        if self._value == -np.inf:
            return self._parent[None]
        return np.clip(self._parent + self._step * self._rng.normal(size=len(self._parent)), 0, 1)[None]

    def tell(self, actions: np.ndarray, returns: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """Adapt."""
        first, success = self._value == -np.inf, returns[0] >= self._value
        if success:
            self._parent, self._value = actions[0], returns[0]
        if not first:
            self._step *= np.exp((success - 0.2) / 0.8 / self._damping)
            self._step = max(self._step, self.LEAST)


class CMAES:
    """The package's CMA-ES in the box [0, 1]."""

    def __init__(self, size: int, seed: int, start: float, step: float) -> None:
        bounds = np.tile([0.0, 1.0], (size, 1))
        self._optimizer = CMA(mean=np.full(size, start), sigma=step, bounds=bounds, seed=seed)

    def ask(self) -> np.ndarray:
        """A generation, [K, A]."""
        return np.array([self._optimizer.ask() for _ in range(self._optimizer.population_size)])

    def tell(self, actions: np.ndarray, returns: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """It minimises."""
        self._optimizer.tell([(action, -float(value)) for action, value in zip(actions, returns, strict=True)])


def _size(recorder: PlanRecorder) -> int:
    return int((recorder.action_space.shape or (0,))[0])
