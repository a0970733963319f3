"""A graph problem that is no pruning: PPO on small job shops, beside the rules that factories go by."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from agents.policy import GraphPolicy
from agents.results import machine, versions
from agents.sb3 import make_sb3_env
from benchmarks.registry import Benchmark, Options, markdown_table, spread
from benchmarks.searches import check_same, measured_on, side_by_side
from gnnrl_gym.files import read_json
from gnnrl_gym.scheduling import RULES, JobShop, follow
from gnnrl_gym.scheduling.rules import Rule

TRAINED_ON = 6  # jobs and machines
SIZES = {6: 100, 10: 100, 15: 50}  # jobs and machines: problems, none of which was trained on
SLOTS = 8
SETTINGS: dict[str, Any] = {
    "steps": 100_000, "learning_rate": 3e-4, "n_steps": 128, "batch_size": 256, "n_epochs": 4, "gamma": 1.0,
    "log_std_init": -0.5,
}  # fmt: skip
ASKED, WHERE, POLICY = "asked.json", "trained_on.json", "policy.zip"
METHODS = ("random", *RULES, "ppo")


def run(options: Options) -> dict[str, Any]:
    """PPO learns 6 by 6 job shops, each seed in a folder of its own; those that are there are not trained again.

    Raises:
        ValueError: a policy that is there was trained with other settings.
    """
    folders = {
        seed: options.runs / "job-shop" / f"ppo-{seed}" for seed in range(options.seed, options.seed + options.seeds)
    }
    kept = [folder for folder in folders.values() if folder.is_dir()]
    for folder in kept:
        check_same(folder, SETTINGS, ASKED)
    jobs = [(folder, seed) for seed, folder in folders.items() if folder not in kept]
    side_by_side(_train, jobs, options.workers, "policy")
    torch.set_num_threads(1)
    rows = [row for size, count in SIZES.items() for row in _rows(size, problems_of(size, count), folders)]
    where = measured_on([SimpleNamespace(**read_json(folder / WHERE)) for folder in folders.values()])
    return where | {"trained_on": TRAINED_ON, "settings": SETTINGS, "rows": rows}


def _train(folder: Path, seed: int) -> None:
    settings = dict(SETTINGS)
    steps, policy_kwargs = settings.pop("steps"), {"log_std_init": settings.pop("log_std_init")}
    env = make_vec_env(_training_env, SLOTS, seed=seed)
    agent = PPO(GraphPolicy, env, policy_kwargs=policy_kwargs, seed=seed, device="cpu", **settings).learn(steps)
    half = folder.with_name(f".{folder.name}")  # a folder that is there is whole
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    agent.save(half / POLICY)
    for name, content in ((ASKED, SETTINGS), (WHERE, {"machine": machine(), "versions": versions()})):
        (half / name).write_text(json.dumps(content))
    half.rename(folder)


def _training_env() -> gym.Env[Any, Any]:
    return make_sb3_env(gym.make("GNNRL-JobShop-v0", jobs=TRAINED_ON, machines=TRAINED_ON))


def problems_of(size: int, count: int) -> list[JobShop]:
    """Problems of `size` jobs and machines; a training, whose seeds are small, draws no such ones."""
    generator = np.random.default_rng([size, 2**31])
    return [JobShop.random(size, size, generator) for _ in range(count)]


def _rows(size: int, problems: list[JobShop], folders: dict[int, Path]) -> list[dict[str, Any]]:
    """Makespans over lower bounds, the mean over the problems."""
    rows = [_row(size, "random", seed, problems, _at_random(seed)) for seed in folders]
    rows += [_row(size, name, None, problems, _by(rule)) for name, rule in RULES.items()]
    return rows + [_row(size, "ppo", seed, problems, _learned(size, folder)) for seed, folder in folders.items()]


def _row(
    size: int, method: str, seed: int | None, problems: list[JobShop], makespan: Callable[[JobShop], float]
) -> dict[str, Any]:
    ratios = [makespan(problem) / problem.lower_bound for problem in problems]
    return {"size": size, "method": method, "seed": seed, "problems": len(problems), "ratio": float(np.mean(ratios))}


def _by(rule: Rule) -> Callable[[JobShop], float]:
    return lambda problem: follow(rule, problem).bound


def _at_random(seed: int) -> Callable[[JobShop], float]:
    generator = np.random.default_rng(seed)
    return _by(lambda schedule: generator.random(len(schedule.done)))


def _learned(size: int, folder: Path) -> Callable[[JobShop], float]:
    """What a trained policy answers with, without exploration."""
    env = make_sb3_env(gym.make("GNNRL-JobShop-v0", jobs=size, machines=size))
    agent = PPO(GraphPolicy, env, device="cpu")
    agent.policy.load_state_dict(PPO.load(folder / POLICY, device="cpu").policy.state_dict())

    def makespan(problem: JobShop) -> float:
        observation, info = env.reset(options={"problem": problem})
        done = False
        while not done:
            action, _ = agent.predict(observation, deterministic=True)
            observation, _, done, _, info = env.step(action)
        return float(info["makespan"])

    return makespan


def table(record: dict[str, Any]) -> str:
    """A row per method: by how much its makespans are above the lower bound, in percent."""
    sizes = {row["size"]: row["problems"] for row in record["rows"]}
    lines = []
    for method in METHODS:
        cells = []
        for size in sizes:
            found = [row for row in record["rows"] if (row["size"], row["method"]) == (size, method)]
            cells.append(spread([row["ratio"] - 1 for row in found], 1, percent=True))
        lines.append([f"{method} ({len(found)} seeds)" if len(found) > 1 else method, *cells])
    return markdown_table(["", *(f"{size} by {size} ({count} problems)" for size, count in sizes.items())], lines)


BENCHMARK = Benchmark("job-shop", "PPO on job shops, beside priority rules", run, table)
