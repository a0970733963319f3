"""A graph problem that is no pruning: PPO on small job shops, beside the rules that factories go by."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from agents.policy import GraphPolicy
from agents.provenance import machine, versions
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
DELAYS = {True: "", False: "-no-delay"}  # and what the folders of policies are called
Builder = Callable[[JobShop], float]  # the makespan of the schedule that a method builds


def run(options: Options) -> dict[str, Any]:
    """PPO learns 6 by 6 job shops, each seed in a folder of its own; those that are there are not trained again.

    Raises:
        ValueError: a policy that is there was trained with other settings.
    """
    jobs = [(_folder(options, seed, delay), seed, delay) for delay in DELAYS for seed in _seeds(options)]
    for folder, *_ in jobs:
        if folder.is_dir():
            check_same(folder, SETTINGS, ASKED)
    side_by_side(_train, [job for job in jobs if not job[0].is_dir()], options.workers, "policy")
    torch.set_num_threads(1)
    rows = [row for size in SIZES for delay in DELAYS for row in _rows(options, size, delay)]
    where = measured_on([SimpleNamespace(**read_json(folder / WHERE)) for folder, *_ in jobs])
    return where | {"trained_on": TRAINED_ON, "settings": SETTINGS, "rows": rows}


def _seeds(options: Options) -> range:
    return range(options.seed, options.seed + options.seeds)


def _folder(options: Options, seed: int, delay: bool) -> Path:
    return options.runs / "job-shop" / f"ppo{DELAYS[delay]}-{seed}"


def _train(folder: Path, seed: int, delay: bool) -> None:
    settings = dict(SETTINGS)
    steps, policy_kwargs = settings.pop("steps"), {"log_std_init": settings.pop("log_std_init")}
    env = make_vec_env(lambda: _env(TRAINED_ON, delay), SLOTS, seed=seed)
    agent = PPO(GraphPolicy, env, policy_kwargs=policy_kwargs, seed=seed, device="cpu", **settings).learn(steps)
    half = folder.with_name(f".{folder.name}")  # a folder that is there is whole
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    agent.save(half / POLICY)
    for name, content in ((ASKED, SETTINGS), (WHERE, {"machine": machine(), "versions": versions()})):
        (half / name).write_text(json.dumps(content))
    half.rename(folder)


def _env(size: int, delay: bool) -> gym.Env[Any, Any]:
    return make_sb3_env(gym.make("GNNRL-JobShop-v0", jobs=size, machines=size, delay=delay))


def problems_of(size: int) -> list[JobShop]:
    """Problems of `size` jobs and machines; a training, whose seeds are small, draws no such ones."""
    generator = np.random.default_rng([size, 2**31])
    return [JobShop.random(size, size, generator) for _ in range(SIZES[size])]


def _rows(options: Options, size: int, delay: bool) -> list[dict[str, Any]]:
    """Makespans over lower bounds, the mean over the problems."""
    builders: list[tuple[str, int | None, Builder]] = []
    builders += [("random", seed, _at_random(seed, delay)) for seed in _seeds(options)]
    builders += [(name, None, _by(rule, delay)) for name, rule in RULES.items()]
    builders += [("ppo", seed, _learned(_folder(options, seed, delay), size, delay)) for seed in _seeds(options)]
    problems, rows = problems_of(size), []
    for method, seed, makespan in builders:
        ratio = float(np.mean([makespan(problem) / problem.lower_bound for problem in problems]))
        about = {"size": size, "delay": delay, "method": method, "seed": seed, "problems": len(problems)}
        rows.append(about | {"ratio": ratio})
    return rows


def _by(rule: Rule, delay: bool) -> Builder:
    return lambda problem: follow(rule, problem, delay).bound


def _at_random(seed: int, delay: bool) -> Builder:
    generator = np.random.default_rng(seed)
    return _by(lambda schedule: generator.random(len(schedule.done)), delay)


def _learned(folder: Path, size: int, delay: bool) -> Builder:
    """What a trained policy answers with, without exploration."""
    env = _env(size, delay)
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
    for delay, method in product(DELAYS, METHODS):
        found = [row for row in record["rows"] if (row["delay"], row["method"]) == (delay, method)]
        seeds = len({row["seed"] for row in found})
        name = f"{method}{'' if delay else ', no delay'}{f' ({seeds} seeds)' if seeds > 1 else ''}"
        cells = [spread([row["ratio"] - 1 for row in found if row["size"] == size], 1, percent=True) for size in sizes]
        lines.append([name, *cells])
    return markdown_table(["", *(f"{size} by {size} ({count} problems)" for size, count in sizes.items())], lines)


BENCHMARK = Benchmark("job-shop", "PPO on job shops, beside priority rules", run, table)
