"""Simulated annealing over masks: Metropolis' rule, what it converges to, and what it asks for."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest

from agents.annealing import PROBES, Annealing, acceptance, annealing, initial_temperature
from agents.recorder import PlanRecorder
from benchmarks.early_planted import KEEP, PlantedEnv

GROUPS = np.array([0, 0, 0, 1, 1, 1])


def run(search: Annealing, worth: dict[frozenset[int], float], steps: int) -> list[frozenset[int]]:
    states = []
    for _ in range(steps):
        masks = search.ask()
        value = worth[frozenset(masks[0].nonzero()[0].tolist())]
        search.tell(masks, np.array([value]), [{}])
        states.append(frozenset(np.flatnonzero(search.mask).tolist()))
    return states


def worths(seed: int = 0) -> dict[frozenset[int], float]:
    rng = np.random.default_rng(seed)
    return {frozenset(s): float(rng.normal()) for s in itertools.combinations(range(6), 3)}


def test_acceptance_is_metropolis() -> None:
    assert acceptance(0.0, 0.1) == acceptance(0.3, 0.1) == acceptance(0.0, 0.0) == 1.0
    assert acceptance(-0.2, 0.1) == pytest.approx(math.exp(-2))
    assert acceptance(-0.2, 0.0) == 0.0


@pytest.mark.parametrize("loss", [0.05, 0.3])
def test_a_worse_mask_is_taken_with_metropolis_probability(loss: float) -> None:
    """Exactly where the searcher's own draw lies below exp(-loss / temperature)."""
    taken = 0
    for seed in range(200):
        search = Annealing(GROUPS, 3, 9, seed, sizes=(0.0, 0.0))  # 9 evaluations: none is spent on probes
        search.tell(search.ask(), np.array([1.0]), [{}])
        search.temperature, before = 0.2, search.mask.copy()
        proposal = search.ask()
        search.temperature = 0.2  # moves that would empty a group cool, too
        draw = copy.deepcopy(search._rng).random()
        search.tell(proposal, np.array([1.0 - loss]), [{}])
        assert (search.mask != before).any() == (draw < math.exp(-loss / 0.2))
        taken += int((search.mask != before).any())
    assert 0 < taken < 200


def test_the_median_move_is_taken_half_the_times() -> None:
    temperature = initial_temperature([0.1, 0.3, 0.7])
    assert acceptance(-0.3, temperature) == pytest.approx(0.5)
    assert initial_temperature([0.0, 0.0, 0.0, 0.2]) == pytest.approx(0.2 / math.log(2))  # plateaus don't freeze it
    assert initial_temperature([0.0]) == 0.0


def test_stationary_distribution_at_a_fixed_temperature() -> None:
    """Over masks with a unit in both groups (18 of 20), visits are as exp(return / temperature)."""
    worth, steps = worths(), 20_000
    search = Annealing(GROUPS, 3, steps, seed=1, sizes=(0.0, 0.0), cooling=1.0)
    visited = run(search, worth, steps)[1000:]
    allowed = [s for s in worth if {0, 1} == {int(GROUPS[u]) for u in s}]
    weights = {s: math.exp(worth[s] / search.temperature) for s in allowed}
    assert set(visited) <= set(allowed) and len(allowed) == 18
    for state in allowed:
        share = weights[state] / sum(weights.values())
        assert visited.count(state) / len(visited) == pytest.approx(share, abs=0.025)


def test_it_finds_the_best_mask() -> None:
    worth = worths(3)
    best = max((s for s in worth if len({int(GROUPS[u]) for u in s}) == 2), key=worth.__getitem__)
    search = Annealing(GROUPS, 3, 400, seed=0, sizes=(0.0, 0.0))
    assert run(search, worth, 400)[-1] == best


def test_probes_measure_and_then_it_cools_on_schedule() -> None:
    search = Annealing(GROUPS, 3, 500, seed=0, cooling=0.01)
    worth = worths()
    states = run(search, worth, 1 + PROBES)
    assert len(set(states)) == 1  # no move while it measures
    hottest = search.temperature
    assert hottest > 0
    run(search, worth, 500 - 1 - PROBES)
    assert 0.009 * hottest < search.temperature < 0.02 * hottest


def test_moves_are_swaps_that_shrink() -> None:
    groups = np.zeros(400, np.int64)
    search = Annealing(groups, 200, 300, seed=0, sizes=(0.1, 0.0), cooling=0.01)
    sizes = []
    for step in range(300):
        before, masks = search.mask.copy(), search.ask()
        assert masks.shape == (1, 400) and masks.sum() == 200
        sizes.append(int((before & (masks[0] == 0)).sum()))
        search.tell(masks, np.array([float(step)]), [{}])  # every move is taken
    assert sizes[0] == 0 and sizes[1] == 20 and sizes[-1] == 1
    assert sizes[1:] == sorted(sizes[1:], reverse=True)


def test_start_has_a_unit_everywhere() -> None:
    groups = np.repeat(np.arange(10), [1, 1, 1, 1, 1, 1, 1, 1, 1, 91])
    for seed in range(20):
        mask = Annealing(groups, 10, 50, seed).mask
        assert mask.sum() == 10 and len(np.unique(groups[mask])) == 10


def test_equal_seeds_give_equal_searches() -> None:
    runs = []
    for seed in (0, 0, 1):
        recorder = PlanRecorder(PlantedEnv(0), 60)
        annealing(recorder, seed)
        runs.append(recorder.accuracies)
        assert recorder.spent == 60 and recorder.best is not None and recorder.best.sum() == KEEP
    assert runs[0] == runs[1] != runs[2]
