"""The searcher `bayesian`: it beats random search on a planted optimum, repeats itself, and says what it needs."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from toy_env import ToyGraphEnv

import agents.bayesian as module
from agents.bayesian import PoolOptimizer, bayesian, random_graphs
from agents.recorder import PlanRecorder
from benchmarks import bogp_planted, bogp_retrieval
from benchmarks.bogp_planted import PlantedEnv, planted, regrets
from benchmarks.registry import Options
from gnnrl_gym.relational import GraphPool, make_pool

HAVE = importlib.util.find_spec("botorch") is not None
needs_botorch = pytest.mark.skipif(not HAVE, reason='needs botorch: pip install -e ".[bayesian]"')


@pytest.fixture(scope="module")
def pool() -> GraphPool:
    return make_pool(16, 32, 300)


def searched(pool: GraphPool, searcher: Any, evaluations: int, seed: int, noise: float = 0.02) -> Any:
    env = PlantedEnv(pool, "cone", 0, noise)
    env.reset(seed=0)
    recorder = PlanRecorder(env, evaluations)
    searcher(recorder, seed)
    return env, recorder


@needs_botorch
def test_regret_is_below_randoms(pool: GraphPool) -> None:
    found = [regrets(pool, "cone", 0.02, seed, 16) for seed in range(2)]
    assert all(row["bayesian"] < row["random"] for row in found)
    assert np.mean([row["bayesian"] for row in found]) < 0.5 * np.mean([row["random"] for row in found])


@needs_botorch
def test_equal_seeds_equal_searches(pool: GraphPool) -> None:
    runs = []
    for seed, state in ((1, 0), (1, 1), (2, 0)):
        torch.manual_seed(state)  # of everything else in the process: no part of a search
        runs.append(list(searched(pool, bayesian, 18, seed)[0].seen.items()))
        assert torch.equal(torch.get_rng_state(), torch.manual_seed(state).get_state())
    assert runs[0] == runs[1] != runs[2]


@needs_botorch
def test_spends_its_evaluations_on_different_graphs_until_the_pool_is_empty(pool: GraphPool) -> None:
    env, recorder = searched(pool, bayesian, 11, 0)
    assert recorder.spent == env.evaluations == len(env.seen) == 11
    few = GraphPool(pool.graphs[:9])
    env, recorder = searched(few, bayesian, 30, 0)
    assert recorder.spent == len(env.seen) == 9


@needs_botorch
def test_descriptor_actions_lead_to_the_same_search(pool: GraphPool) -> None:
    def graphs(action: str) -> list[int]:
        env = PlantedEnv(pool, "cone", 0, 0.02)
        env.action = action
        env.reset(seed=0)
        bayesian(PlanRecorder(env, 10), 0)
        return list(env.seen)

    assert graphs("index") == graphs("descriptors")


@needs_botorch
@pytest.mark.parametrize("start", [2, 8])
def test_each_first_graph_is_asked_for_once_whatever_is_answered(
    pool: GraphPool, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment that has seen them answers with the nearest unseen graphs instead."""
    env, modelled = PlantedEnv(pool, "cone", 0, 0.02), list[int]()
    env.action = "descriptors"
    env.reset(seed=0)
    random_graphs(PlanRecorder(env, 8), 0)

    def promising(_: Any, unseen: list[int]) -> int:
        modelled.append(unseen[0])
        return unseen[0]

    monkeypatch.setattr(PoolOptimizer, "_most_promising", promising)
    bayesian(PlanRecorder(env, 12), 0, start=start)
    assert len(modelled) == 12 - start and len(env.seen) == 8 + 12


@needs_botorch
def test_the_posterior_mean_picks_better_than_the_best_score_where_scores_are_noisy(pool: GraphPool) -> None:
    truths = []
    for seed in range(16):
        env = PlantedEnv(pool, "cone", seed, 0.1)
        optimizer = PoolOptimizer(env, 0)
        optimizer.scores = {index: env.measure(index) for index in range(0, 300, 5)}
        lucky = max(optimizer.scores, key=lambda index: optimizer.scores[index])
        truths.append((env.truth[optimizer.pick()], env.truth[lucky]))
    picked, lucky = np.mean(truths, axis=0)
    assert picked > lucky + 0.02


def test_random_graphs_come_in_random_order_and_none_twice(pool: GraphPool) -> None:
    env, recorder = searched(pool, random_graphs, 30, 0)
    assert recorder.spent == len(env.seen) == 30
    assert int(recorder.best) == max(env.seen, key=lambda index: env.seen[index])
    assert list(env.seen) != list(searched(pool, random_graphs, 30, 1)[0].seen)


def test_planted_worths(pool: GraphPool) -> None:
    cone, unrelated = (planted(pool, name, np.random.default_rng(0)) for name in ("cone", "unrelated"))
    assert cone.max() == 1 and cone.min() == 0 and not np.array_equal(cone, unrelated)
    np.testing.assert_array_equal(np.sort(cone), np.sort(unrelated))


def test_tables(pool: GraphPool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"landscape": name, "noise": noise, "seed": seed, "bayesian": 0.1, "random": 0.2, "oracle": 0.1 * seed}
            for name, noise in bogp_planted.SETTINGS for seed in range(3)]  # fmt: skip
    text = bogp_planted.table({"pool": 300, "evaluations": 30, "rows": rows})
    assert "| cone | 0.02 | 30 | 0.100 ± 0.000 | 0.200 ± 0.000 | 0.100 ± 0.100 | 3 of 3 | 1 of 3 |" in text
    monkeypatch.setattr(bogp_retrieval, "make_pool", lambda *_: pool)
    record = bogp_retrieval.run(Options())
    assert (record["by_name"], record["same_order"], record["harmless"]) == (1, 1, [1])
    assert "| nine descriptors by name, fields in any order | 100.0 % |" in bogp_retrieval.table(record)


def test_without_botorch_the_extra_is_named(pool: GraphPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gnnrl_gym\[bayesian\]"):
        searched(pool, bayesian, 5, 0)


def test_an_environment_without_a_pool_is_refused() -> None:
    env = ToyGraphEnv()
    env.evaluations = 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="GNNRL-Relational-v0"):
        bayesian(PlanRecorder(env, 5), 0)
