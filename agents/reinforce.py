"""REINFORCE over masks: a policy that draws ordered subsets, and learns which units belong in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agents.ask_tell import run_ask_tell
from agents.recorder import PlanRecorder

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def reinforce(
    recorder: PlanRecorder, seed: int = 0, out: Path | None = None, samples: int = 10, learning_rate: float = 0.4
) -> None:
    """REINFORCE (Williams 1992) with one logit per unit; the last evaluation is of the policy's mode."""
    env: Any = recorder.unwrapped
    size = len(env.group_of)
    run_ask_tell(recorder, Reinforce(size, env.keep, recorder.limit, seed, samples, learning_rate))


class Reinforce:
    """A Plackett-Luce policy over ordered subsets of `keep` of `size` units, trained by gradient ascent on the expected
    return.

    A subset is drawn one unit after the other without replacement, each in proportion to exp(logit) among those left
    (all at once by Gumbel-top-k: Kool et al. 2019, section 3). The gradient of an update is the mean over its samples
    of advantage times the gradient of the exact log-probability of the ordered subset; a sample's advantage is its
    return minus the mean of the others' (leave-one-out: unbiased), divided by their spread, which only scales a step.

    Args:
        size: units, U. keep: of a subset. evaluations: how many subsets will be asked for altogether.
        samples: subsets per update, at least 2. learning_rate: of the logits; the advantages have spread 1.

    Attributes:
        logits: of the units, float64 [U]; all equal at first.
    """

    def __init__(
        self, size: int, keep: int, evaluations: int, seed: int, samples: int = 10, learning_rate: float = 0.4
    ) -> None:
        if samples < 2:
            raise ValueError(f"The leave-one-out baseline needs at least 2 samples per update, got {samples}.")
        self.logits, self.keep = np.zeros(size), keep
        self._rng, self._samples, self._rate = np.random.default_rng(seed), samples, learning_rate
        self._left = evaluations
        self._subsets = np.zeros((0, keep), np.int64)

    def ask(self) -> np.ndarray:
        """Masks float32 [K, U] of the next subsets; at last, the mode alone."""
        count = max(min(self._samples, self._left - 1), 1)
        last = self._left <= 1
        self._subsets = self.mode()[None] if last else sample_subsets(self.logits, self.keep, count, self._rng)
        self._left -= count
        masks = np.zeros((count, len(self.logits)), np.float32)
        np.put_along_axis(masks, self._subsets, 1.0, axis=1)
        return masks

    def tell(self, actions: np.ndarray, returns: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """One step up the gradient estimate; a single return, or equal ones, change nothing."""
        if len(returns) < 2 or np.ptp(returns) == 0:
            return
        self.logits += self._rate * policy_gradient(self.logits, self._subsets, advantages(returns) / returns.std())

    def mode(self) -> Ints:
        """The most likely ordered subset [keep]: the highest logits."""
        return np.argsort(-self.logits, kind="stable")[: self.keep]


def sample_subsets(logits: Floats, keep: int, count: int, rng: np.random.Generator) -> Ints:
    """Ordered subsets int64 [count, keep] of the Plackett-Luce distribution: the highest logits plus Gumbel noise."""
    perturbed = logits + rng.gumbel(size=(count, len(logits)))
    if keep < len(logits):
        highest = np.argpartition(-perturbed, keep, axis=1)[:, :keep]
    else:
        highest = np.broadcast_to(np.arange(keep), (count, keep))
    order = np.argsort(-np.take_along_axis(perturbed, highest, axis=1), axis=1)
    return np.take_along_axis(highest, order, axis=1)


def log_probability(logits: Floats, subset: Ints) -> float:
    """Exact log-probability of drawing `subset` [keep] in this order."""
    left = _log_left(logits, subset)
    return float((logits[subset] - left).sum())


def score_function(logits: Floats, subset: Ints) -> Floats:
    """Gradient [U] of `log_probability` with respect to the logits."""
    drawn = np.logaddexp.accumulate(-_log_left(logits, subset))  # log of the summed chances per exp(logit)
    chances = np.full(len(logits), drawn[-1])  # of units that were there at every draw
    chances[subset] = drawn  # of those that were there until they were drawn
    gradient = -np.exp(logits + chances)
    gradient[subset] += 1.0
    return gradient


def _log_left(logits: Floats, subset: Ints) -> Floats:
    """Log of the summed exp(logit) of the units not drawn yet, before each draw, [keep]."""
    rest = np.delete(logits, subset)
    last = np.logaddexp.reduce(rest) if len(rest) else -np.inf
    return np.logaddexp.accumulate(np.append(last, logits[subset][::-1]))[1:][::-1]


def advantages(returns: Floats) -> Floats:
    """Each of `returns` [K] minus the mean of the others."""
    count = len(returns)
    return (returns - returns.mean()) * count / (count - 1)


def policy_gradient(logits: Floats, subsets: Ints, weights: Floats) -> Floats:
    """Mean over `subsets` [K, keep] of weight times score function, [U]; with weights = `advantages`, the unbiased
    estimate of the gradient of the expected return."""
    return np.mean([w * score_function(logits, s) for w, s in zip(weights, subsets, strict=True)], axis=0)
