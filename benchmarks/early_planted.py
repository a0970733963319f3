"""Masks with a known answer: 960 filters of which 480 are planted, and the share of them that a searcher finds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from agents.annealing import annealing
from agents.controls import random
from agents.recorder import EvaluationsExhausted, PlanRecorder
from agents.reinforce import reinforce, sample_subsets
from benchmarks.registry import Benchmark, Options, markdown_table, spread
from gnnrl_gym.pruning.masks import group_of, top_mask

WIDTHS = np.array([64, 128, 256, 512])  # filters of the four-layer network
KEEP, EVALUATIONS, SEEDS = 480, 1000, 5


class PlantedEnv(gym.Env[Any, Any]):
    """One step: choose `KEEP` of the 960 filters; the accuracy is the share of the planted ones among them.

    Args:
        seed: of what is planted.
    """

    plan_key = "mask"
    observation_space = spaces.Box(0.0, 1.0, (1,), np.float32)
    action_space = spaces.Box(0.0, 1.0, (int(WIDTHS.sum()),), np.float32)

    def __init__(self, seed: int) -> None:
        self.group_of, self.keep, self.evaluations = group_of(WIDTHS), KEEP, 0
        self.planted = np.random.default_rng(1000 + seed).permutation(len(self.group_of)) < KEEP

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Nothing to start."""
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        """The overlap of the mask of scores [960], in [0, 1]."""
        mask = top_mask(action, KEEP, WIDTHS)
        overlap = float((mask & self.planted).sum()) / KEEP
        self.evaluations += 1
        info = {"mask": mask, "search_accuracy": overlap, "is_success": True}
        return np.zeros(1, np.float32), overlap, True, False, info


def published(
    recorder: PlanRecorder, seed: int = 0, out: Path | None = None, samples: int = 10, learning_rate: float = 0.4
) -> None:
    """A fixture, kept to show that it does not learn: the published loss, minus the sum of the log-probabilities of
    *all* units times the reward, whichever were chosen. Softmax logits, Adam-free ascent, the rest as `reinforce`."""
    rng, env = np.random.default_rng(seed), recorder.unwrapped
    logits = np.full(len(env.group_of), 0.0) + 0.1 * rng.normal(size=len(env.group_of))  # type: ignore[attr-defined]
    while recorder.left > 1:
        subsets = sample_subsets(logits, KEEP, min(samples, recorder.left - 1), rng)
        masks = np.zeros((len(subsets), len(logits)), np.float32)
        np.put_along_axis(masks, subsets, 1.0, axis=1)
        rewards = [value for value, _ in recorder.play(masks)]
        share = np.exp(logits) / np.exp(logits).sum()
        # d/d logits of sum(log softmax): the same whatever was drawn, so nothing says which units were good
        logits += learning_rate * np.mean(rewards) * (1 - len(logits) * share)
    recorder.play([(np.argsort(np.argsort(logits)) >= len(logits) - KEEP).astype(np.float32)])


METHODS: dict[str, Callable[..., Any]] = {
    "reinforce": reinforce,
    "annealing": annealing,
    "random": random,
    "published loss": published,
}


def search_planted(method: str, seed: int, evaluations: int = EVALUATIONS) -> PlanRecorder:
    """Run a searcher on the mask planted by `seed`."""
    recorder = PlanRecorder(PlantedEnv(seed), evaluations)
    with contextlib.suppress(EvaluationsExhausted):
        METHODS[method](recorder, seed)
    recorder.close()
    return recorder


def run(options: Options) -> dict[str, Any]:
    """Every method on the same `SEEDS` planted masks."""
    rows = []
    for method in METHODS:
        for seed in range(options.seed, options.seed + SEEDS):
            recorder = search_planted(method, seed)
            found = recorder.accuracies
            rows.append(
                {"method": method, "seed": seed, "evaluations": recorder.spent, "best": max(found), "last": found[-1]}
            )
    return {"filters": int(WIDTHS.sum()), "keep": KEEP, "evaluations": EVALUATIONS, "rows": rows}


def table(record: dict[str, Any]) -> str:
    """A row per method: the best mask's overlap, and that of the last one, over the seeds."""
    rows = []
    for method in METHODS:
        runs = [row for row in record["rows"] if row["method"] == method]
        cells = [spread([row[key] for row in runs], 3) for key in ("best", "last")]
        rows.append([method, str(len(runs)), str(runs[0]["evaluations"]), *cells])
    return markdown_table(["method", "seeds", "evaluations", "overlap, best mask", "last mask"], rows)


BENCHMARK = Benchmark("early-planted", "planted masks: what searchers over masks find", run, table)
