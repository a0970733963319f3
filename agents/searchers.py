"""Searchers by name. Each drives a `PlanRecorder` until it has spent its evaluations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from agents.bayesian import bayesian
from agents.controls import cma_es, evolution, random, sensitivity, uniform
from agents.off_policy import ddpg, sac, td3
from agents.ppo import ppo
from agents.recorder import PlanRecorder

Searcher = Callable[[PlanRecorder, int, "Path | None"], Any]

SEARCHERS: dict[str, Searcher] = {
    "ppo": ppo,
    "ddpg": ddpg,
    "td3": td3,
    "sac": sac,
    "uniform": uniform,
    "random": random,
    "sensitivity": sensitivity,
    "es": evolution,
    "cma-es": cma_es,
    "bayesian": bayesian,  # of a pool: GNNRL-Relational-v0
}


def plan_searchers() -> tuple[str, ...]:
    """Names of those that search plans of `GNNRL-Prune-v0`: all but the one that needs a pool."""
    return tuple(name for name in SEARCHERS if name != "bayesian")
