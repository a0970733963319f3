"""Searchers by name. Each drives a `PlanRecorder` until it has spent its evaluations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from agents.controls import cma_es, evolution, random, sensitivity, uniform
from agents.ppo import ppo
from agents.recorder import PlanRecorder

Searcher = Callable[[PlanRecorder, int, "Path | None"], Any]

SEARCHERS: dict[str, Searcher] = {
    "ppo": ppo,
    "uniform": uniform,
    "random": random,
    "sensitivity": sensitivity,
    "es": evolution,
    "cma-es": cma_es,
}
