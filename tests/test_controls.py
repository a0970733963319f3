"""What a learned search has to beat really searches: towards what is better, and sparing what matters."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from agents.controls import CMAES, OnePlusOneES, _cut, sensitivity
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


@pytest.mark.parametrize("settings", [{"floor": 0.5, "budget": 0.6}, {"round_to": 4}])
def test_sensitivity_measures_no_plan_twice(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    env = gym.make("GNNRL-Prune-v0", search_images=10, recalibration_images=4, device="cpu", **settings)
    recorder, paid = PlanRecorder(env, 100), list[tuple[int, ...]]()
    evaluate = recorder.evaluate
    monkeypatch.setattr(recorder, "evaluate", lambda plan: paid.append(tuple(plan)) or evaluate(plan))
    env.reset(seed=0)
    sensitivity(recorder)
    assert len(set(paid)) == len(paid) < 4 * len(paid[0]) and recorder.best is not None


@pytest.mark.parametrize("shares", [(0.8,), (0.8, 0.2), (0.9, 0.8, 0.7), (0.8, 0.6, 0.4, 0.2)])
def test_beyond_what_was_measured_the_slope_goes_on(shares: tuple[float, ...]) -> None:
    """One group's error rises twice as fast as the other's, so wherever one threshold cuts it loses half as much."""
    kept = np.array([1.0, *shares])

    class Env:
        def peek(self, ratios: Any) -> Any:
            return ratios if (1 - ratios).mean() <= 0.3 else None

    found = _cut(np.outer(1 - kept, [1.0, 2.0]), kept, Env())
    assert found == pytest.approx([1 / 15, 8 / 15], abs=1e-3)


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
