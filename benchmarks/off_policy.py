"""DDPG, TD3 and SAC beside PPO and the controls, on the default environment."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3 import DDPG, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from tqdm import tqdm

from agents.ppo import POLICY
from agents.recorder import LOG
from agents.results import SearchResult
from agents.sb3 import make_sb3_env
from benchmarks.registry import Benchmark, Options, markdown_table, of_budget, of_data, of_evaluations, spread
from benchmarks.search_comparison import SETTINGS, WITHOUT_CHANCE, check_kept, environment_of, searcher_of
from benchmarks.searches import measured_on, searched
from gnnrl_gym.evaluation.accuracy import accuracy
from gnnrl_gym.evaluation.threads import fitting_threads
from gnnrl_gym.zoo.models import DIGITS

METHODS = ("uniform", "random", "ppo-fresh", "ddpg", "td3", "sac")  # ppo-fresh: no general policy to start from
AGENTS: dict[str, type[BaseAlgorithm]] = {"ppo-fresh": PPO, "ddpg": DDPG, "td3": TD3, "sac": SAC}
POINTS = (50, 100, 200, 400)
LAST = 25  # evaluations at the end whose mean says what the agent has learned, not what it happened on


def run(options: Options) -> dict[str, Any]:
    """Every method and seed is a run folder; those that are finished are not run again."""
    base = options.runs / f"off-policy-{of_budget(options)}-{options.evaluations}"
    jobs = [(method, seed) for method in options.methods_of(METHODS) for seed in _seeds(method, options)]
    check_kept(options, [base / f"{method}-{seed}" for method, seed in jobs])
    rows = [_row(options, method, seed, base) for method, seed in tqdm(jobs, unit="search", disable=None)]
    where = measured_on([SearchResult.load(base / f"{method}-{seed}") for method, seed in jobs])
    budget = {"budget": options.budget, "metric": options.metric}
    return where | {"model": options.model or DIGITS, "evaluations": options.evaluations} | budget | {"rows": rows}


def _seeds(method: str, options: Options) -> range:
    return range(options.seed, options.seed + (1 if method in WITHOUT_CHANCE else options.seeds))


def _row(options: Options, method: str, seed: int, base: Path) -> dict[str, Any]:
    folder = base / f"{method}-{seed}"
    environment, settings = environment_of(options, method), SETTINGS.get(method, {})
    result = searched(folder, searcher_of(method), options.evaluations, seed, environment, settings)
    scores = [json.loads(line)["search_accuracy"] for line in (folder / LOG).read_text().splitlines()]
    keys = ("evaluations", "macs_ratio", "search_accuracy", "test_accuracy", "dense_test_accuracy", "seconds", "widths")
    row = {"method": method, "seed": seed} | {key: getattr(result, key) for key in keys}
    row["best_so_far"] = [round(float(best), 6) for best in np.maximum.accumulate(scores)]
    row["last_mean"] = round(statistics.mean(scores[-LAST:]), 6)
    return row | {"greedy_test_accuracy": _greedy(environment, folder, method)}


def _greedy(environment: dict[str, Any], folder: Path, method: str) -> float | None:
    """Test accuracy of the plan that a trained agent answers with, without exploration; None where there is none."""
    if method not in AGENTS:
        return None
    env = gym.make("GNNRL-Prune-v0", **environment)
    agent, inner = AGENTS[method].load(folder / POLICY, device="cpu"), env.unwrapped
    action = agent.predict(make_sb3_env(env).reset()[0], deterministic=True)[0]
    plan = inner.peek((np.clip(action, -1, 1) + 1) / 2)  # type: ignore[attr-defined]
    if plan is None:  # one step of it does not reach the budget
        return None
    with fitting_threads(inner.network):  # type: ignore[attr-defined]
        return accuracy(inner.slim(plan), inner.data.test)  # type: ignore[attr-defined]


def table(record: dict[str, Any]) -> str:
    """A row per method, mean and standard deviation over seeds, in percent."""
    points = [n for n in POINTS if n <= record["evaluations"]]
    ends = [f"mean of the last {LAST}", "test of the best", "test of the greedy plan"]
    rows = []
    for method in METHODS:
        runs = [row for row in record["rows"] if row["method"] == method]
        if not runs:
            continue
        best = [[run["best_so_far"][min(n, run["evaluations"]) - 1] for run in runs] for n in points]
        others = [[run[key] for run in runs] for key in ("last_mean", "test_accuracy", "greedy_test_accuracy")]
        cells = [spread(shares, 1, percent=True) for shares in best + others]
        rows.append([f"{method} ({len(runs)} seeds)" if len(runs) > 1 else method, *cells])
    return markdown_table(["method", *(f"search at {n}" for n in points), *ends], rows)


BENCHMARK = Benchmark(
    "off-policy",
    "DDPG, TD3 and SAC beside PPO and the controls, on the default environment",
    run,
    table,
    variant=lambda options: f"{of_budget(options)}{of_evaluations(options)}{of_data(options)}",
)
