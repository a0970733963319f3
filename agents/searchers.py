"""Searchers by name. Each drives a `PlanRecorder` until it has spent its evaluations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from agents.ppo import ppo
from agents.recorder import EvaluationsExhausted, PlanRecorder

Searcher = Callable[[PlanRecorder, int, "Path | None"], Any]


def uniform(recorder: PlanRecorder, seed: int = 0, out: Path | None = None) -> None:
    """The control: every group gives up the same share. One plan, one evaluation."""
    shape = recorder.action_space.shape
    run_episode(recorder, lambda: np.ones(shape, np.float32))


def random(recorder: PlanRecorder, seed: int = 0, out: Path | None = None) -> None:
    """The control: independent ratios from the whole action space."""
    recorder.action_space.seed(seed)
    while not recorder.exhausted:
        run_episode(recorder, recorder.action_space.sample)


def run_episode(recorder: PlanRecorder, next_action: Callable[[], Any]) -> dict[str, Any]:
    """One episode, an action at a time; its last info."""
    recorder.reset()
    while True:
        _, _, terminated, truncated, info = recorder.step(next_action())
        if terminated or truncated:
            return dict(info)


SEARCHERS: dict[str, Searcher] = {"ppo": ppo, "uniform": uniform, "random": random}

__all__ = ["SEARCHERS", "EvaluationsExhausted", "run_episode"]
