"""Does `bayesian` find an optimum that was planted in a pool? And does it harm where descriptors say nothing?"""

from __future__ import annotations

from typing import Any

import numpy as np
from tqdm import tqdm

from agents.bayesian import bayesian, random_graphs
from agents.recorder import PlanRecorder
from benchmarks.registry import Benchmark, Options, markdown_table, spread
from gnnrl_gym.envs.pool import PoolEnv
from gnnrl_gym.relational import GraphPool, make_pool

NODES, EDGES, POOL = 32, 80, 1000
EVALUATIONS, SEEDS = 30, 30
# where the planted graph lies in descriptor space, and the standard deviation of a score (true worths go from 0 to 1)
SETTINGS = (("cone", 0.02), ("unrelated", 0.02))


class PlantedEnv(PoolEnv):
    """A pool in which a graph's true worth, in [0, 1], is known; scores have noise.

    Args:
        landscape: `cone`: worth falls with the distance, in descriptor space, to a planted graph; `unrelated`: the
            same values dealt out to the graphs by chance.
        seed: chooses the planted graph and the noise.
        noise: standard deviation of a score.
    """

    def __init__(self, pool: GraphPool, landscape: str, seed: int, noise: float) -> None:
        super().__init__(pool, action="index")
        rng = np.random.default_rng([seed, 1])  # not the searchers' stream
        self.truth = planted(pool, landscape, rng)
        self.noisy = self.truth + noise * rng.normal(size=len(pool))

    def measure(self, index: int) -> float:
        """The noisy score; the same graph has the same, as with equal training seeds."""
        return float(self.noisy[index])


def planted(pool: GraphPool, landscape: str, rng: np.random.Generator) -> np.ndarray:
    """True worths [P] from 0 to 1; the planted graph has 1."""
    places = pool.standardised[:, pool.varies]
    distances = np.sqrt(np.square(places - places[rng.integers(len(pool))]).mean(1))
    worth = 1 - distances / distances.max()
    return rng.permutation(worth) if landscape == "unrelated" else worth


def regrets(
    pool: GraphPool, landscape: str, noise: float, seed: int, evaluations: int = EVALUATIONS
) -> dict[str, float]:
    """Regret, 1 minus the true worth, of the pick of `bayesian`, of random search's pick (the best score), and of the
    truly best graph among those that random search drew, which it can't know."""
    env = PlantedEnv(pool, landscape, seed, noise)
    found = {}
    for name, searcher in (("bayesian", bayesian), ("random", random_graphs)):
        env.reset(seed=seed)
        recorder = PlanRecorder(env, evaluations)
        searcher(recorder, seed)
        recorder.close()
        found[name] = 1 - float(env.truth[int(recorder.best)])  # type: ignore[arg-type]
    found["oracle"] = 1 - max(float(env.truth[index]) for index in env.seen)
    return found


def run(options: Options) -> dict[str, Any]:
    """Every setting with every seed."""
    pool = make_pool(NODES, EDGES, POOL, options.seed)
    jobs = [(*setting, seed) for setting in SETTINGS for seed in range(options.seed, options.seed + SEEDS)]
    rows = [
        {"landscape": landscape, "noise": noise, "seed": seed, **regrets(pool, landscape, noise, seed)}
        for landscape, noise, seed in tqdm(jobs, unit="search", disable=None)
    ]
    return {"nodes": NODES, "edges": EDGES, "pool": POOL, "evaluations": EVALUATIONS, "rows": rows}


def table(record: dict[str, Any]) -> str:
    """A row per setting."""
    header = [f"planted in {record['pool']} graphs", "noise", "evaluations", "regret of bayesian", "regret of random",
              "best that random drew", "bayesian below random", "below the best drawn"]  # fmt: skip
    rows = []
    for landscape, noise in SETTINGS:
        runs = [row for row in record["rows"] if (row["landscape"], row["noise"]) == (landscape, noise)]
        spreads = [spread([run[name] for run in runs], 3) for name in ("bayesian", "random", "oracle")]
        wins = [sum(run["bayesian"] < run[name] for run in runs) for name in ("random", "oracle")]
        counts = [f"{n} of {len(runs)}" for n in wins]
        rows.append([landscape, f"{noise:g}", str(record["evaluations"]), *spreads, *counts])
    return markdown_table(header, rows)


BENCHMARK = Benchmark("bogp-planted", "Bayesian optimisation against random search on planted optima", run, table)
