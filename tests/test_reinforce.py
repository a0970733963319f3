"""REINFORCE over masks: the distribution, its gradient, and the estimator, each against enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from agents.recorder import PlanRecorder
from agents.reinforce import (
    Reinforce,
    advantages,
    log_probability,
    policy_gradient,
    reinforce,
    sample_subsets,
    score_function,
)
from benchmarks.early_planted import KEEP, METHODS, PlantedEnv, search_planted

LOGITS = np.array([0.3, -1.2, 0.8, 0.0, 1.5])
SUBSETS = [np.array(s) for s in itertools.permutations(range(5), 3)]


def expected_return(logits: np.ndarray, worth: dict[tuple[int, ...], float]) -> float:
    return sum(math.exp(log_probability(logits, s)) * worth[tuple(s)] for s in SUBSETS)


def worths(seed: int = 0) -> dict[tuple[int, ...], float]:
    """A return for every set; not a sum over units, so that interactions count."""
    rng = np.random.default_rng(seed)
    of_set = {frozenset(s.tolist()): float(rng.normal()) for s in SUBSETS}
    return {tuple(s.tolist()): of_set[frozenset(s.tolist())] for s in SUBSETS}


def numerical_gradient(f: object, at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    assert callable(f)
    return np.array([(f(at + step * e) - f(at - step * e)) / (2 * step) for e in np.eye(len(at))])


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_probabilities_of_all_ordered_subsets_sum_to_one(keep: int) -> None:
    found = [log_probability(LOGITS, np.array(s)) for s in itertools.permutations(range(5), keep)]
    assert math.fsum(map(math.exp, found)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5])
def test_probability_is_the_product_of_the_draws(keep: int) -> None:
    """Of every ordered subset, drawn one after the other in proportion to exp(logit) among those left."""
    weights = dict(enumerate(np.exp(LOGITS)))
    for subset in itertools.permutations(range(5), keep):
        left, chance = dict(weights), 1.0
        for unit in subset:
            chance *= left[unit] / sum(left.values())
            del left[unit]
        assert log_probability(LOGITS, np.array(subset)) == pytest.approx(math.log(chance), abs=1e-12)


def test_the_order_counts() -> None:
    assert log_probability(LOGITS, np.array([4, 0])) != pytest.approx(log_probability(LOGITS, np.array([0, 4])))


@pytest.mark.parametrize("subset", [[4, 0, 1], [1, 3, 2], [0, 1, 2, 3, 4]])
def test_score_function_is_the_gradient(subset: list[int]) -> None:
    chosen = np.array(subset)
    numeric = numerical_gradient(lambda logits: log_probability(logits, chosen), LOGITS)
    np.testing.assert_allclose(score_function(LOGITS, chosen), numeric, atol=1e-8)


def test_large_logits_do_not_overflow() -> None:
    logits = 1000 * LOGITS
    assert np.isfinite(score_function(logits, np.array([4, 2, 0]))).all()
    assert np.isfinite(log_probability(logits, np.array([1, 3, 0])))


def test_gumbel_top_k_draws_that_distribution() -> None:
    draws = 40_000
    found = sample_subsets(LOGITS, 3, draws, np.random.default_rng(0))
    counts = {tuple(s.tolist()): 0 for s in SUBSETS}
    for subset in found:
        counts[tuple(subset.tolist())] += 1
    for subset in SUBSETS:
        p = math.exp(log_probability(LOGITS, subset))
        assert abs(counts[tuple(subset.tolist())] - draws * p) < 5 * math.sqrt(draws * p * (1 - p)) + 1


def test_estimator_is_unbiased() -> None:
    """The mean of many leave-one-out estimates of 3 samples each is the exact gradient, within 5 standard errors."""
    worth, rng = worths(), np.random.default_rng(1)
    exact = numerical_gradient(lambda logits: expected_return(logits, worth), LOGITS)
    drawn = sample_subsets(LOGITS, 3, 3 * 6000, rng).reshape(6000, 3, 3)
    estimates = np.array(
        [policy_gradient(LOGITS, s, advantages(np.array([worth[tuple(o.tolist())] for o in s]))) for s in drawn]
    )
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert np.abs(exact).max() > 0.1
    assert (np.abs(estimates.mean(0) - exact) < 5 * error).all()


def test_baseline_is_of_the_others() -> None:
    np.testing.assert_allclose(advantages(np.array([1.0, 2.0, 6.0])), [1 - 4, 2 - 3.5, 6 - 1.5])


def test_it_asks_for_masks_and_the_mode_last() -> None:
    policy = Reinforce(6, 2, evaluations=9, seed=0, samples=4)
    sizes = []
    for _ in range(3):
        masks = policy.ask()
        sizes.append(len(masks))
        assert (masks.sum(1) == 2).all() and set(np.unique(masks)) == {0.0, 1.0}
        policy.tell(masks, masks[:, 0] - masks[:, 1], [{}] * len(masks))
    assert sizes == [4, 4, 1]
    assert masks[0].nonzero()[0].tolist() == sorted(policy.mode().tolist())
    assert policy.logits[0] > policy.logits[1]


def test_equal_returns_teach_nothing() -> None:
    policy = Reinforce(6, 2, 9, 0)
    policy.tell(policy.ask(), np.full(8, 0.5), [{}] * 8)
    assert (policy.logits == 0).all()


def test_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="leave-one-out"):
        Reinforce(6, 2, 9, 0, samples=1)


def test_it_finds_a_planted_mask_and_the_published_loss_does_not() -> None:
    found = {method: search_planted(method, 7).accuracies for method in METHODS}
    assert {len(accuracies) for accuracies in found.values()} == {1000}
    assert max(found["reinforce"]) >= 0.75
    assert max(found["annealing"]) >= 0.70
    assert max(found["random"]) <= 0.58
    assert found["published loss"][-1] <= 0.55  # its policy, in the end
    assert abs(np.mean(found["published loss"]) - 0.5) < 0.01


def test_equal_seeds_give_equal_searches() -> None:
    runs = []
    for seed in (0, 0, 1):
        recorder = PlanRecorder(PlantedEnv(0), 31)
        reinforce(recorder, seed)
        runs.append(recorder.accuracies)
        assert recorder.spent == 31 and recorder.best is not None and recorder.best.sum() == KEEP
    assert runs[0] == runs[1] != runs[2]
