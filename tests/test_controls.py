"""What a learned search has to beat really searches: towards what is better, and sparing what matters."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from agents.controls import CMAES, OnePlusOneES, sensitivity
from agents.recorder import PlanRecorder


@pytest.mark.parametrize("kind", [CMAES, OnePlusOneES])
def test_what_is_told_leads_nearer_to_the_optimum(kind: Any) -> None:
    optimizer, distances = kind(6, 0, 0.5, 0.3), list[float]()
    while len(distances) < 200:
        actions = optimizer.ask()
        found = np.square(actions - 0.2).sum(1)
        optimizer.tell(actions, -found, [{}] * len(actions))
        distances += found.tolist()
    assert np.mean(distances[-10:]) < 0.1 * np.mean(distances[:10])


def test_sensitivity_spares_the_group_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    env = gym.make("GNNRL-Prune-v0", search_images=10, recalibration_images=4, device="cpu")
    inner: Any = env.unwrapped
    full, evaluator = inner.network.widths, inner.evaluator

    def score(widths: Any) -> float:
        evaluator.evaluations += 1
        return float(widths[4] / full[4])  # nothing else counts

    monkeypatch.setattr(evaluator, "score", score)
    monkeypatch.setattr(evaluator, "prefetch", lambda plans: None)
    recorder = PlanRecorder(env, 4 * len(full) + 2)
    env.reset(seed=0)
    sensitivity(recorder)
    assert recorder.accuracies[-1] > 0.9
    assert recorder.best is not None and inner.within_budget(recorder.best)
