"""Searchers by name. Each drives a `PlanRecorder` until it has spent its evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from agents.ppo import ppo
from agents.recorder import EvaluationsExhausted, PlanRecorder

Searcher = Callable[[PlanRecorder, int, "Path | None"], Any]


def uniform(recorder: PlanRecorder, seed: int = 0, out: Path | None = None) -> None:
    """The control: every group gives up the same share. One plan, one evaluation."""
    shape = recorder.action_space.shape
    run_episode(recorder, iter(lambda: np.ones(shape, np.float32), None))


def random(recorder: PlanRecorder, seed: int = 0, out: Path | None = None) -> None:
    """The control: independent ratios from the whole action space."""
    recorder.action_space.seed(seed)
    while not recorder.exhausted:
        run_episode(recorder, iter(recorder.action_space.sample, None))


def run_episode(recorder: PlanRecorder, actions: Iterator[Any]) -> dict[str, Any]:
    """One episode with the given actions; its last info."""
    _, info = recorder.reset()
    for action in actions:
        _, _, terminated, truncated, info = recorder.step(action)
        if terminated or truncated:
            break
    return info


SEARCHERS: dict[str, Searcher] = {"ppo": ppo, "uniform": uniform, "random": random}

__all__ = ["SEARCHERS", "EvaluationsExhausted", "run_episode"]
