"""What all searchers share: a wrapper that counts, keeps the best plan, logs, and shows progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from gnnrl_gym.graph.groups import Ints

LOG = "evaluations.jsonl"


class EvaluationsExhausted(Exception):
    """The search has spent its evaluations."""


class PlanRecorder(gym.Wrapper[Any, Any, Any, Any]):
    """Records every evaluated plan of a pruning environment.

    Args:
        env: a pruning environment (`info` has widths, evaluations, search_accuracy, is_success).
        evaluations: how many the search may spend.
        folder: gets `evaluations.jsonl`, a line per evaluation, and TensorBoard curves; or None.
        progress: show a bar with the best accuracy so far.

    Attributes:
        best: the best plan within the budget so far, None before there is one; best_accuracy: its search accuracy.
        accuracies: search accuracy of every evaluation, in order.
    """

    def __init__(
        self, env: gym.Env[Any, Any], evaluations: int, folder: Path | None = None, progress: bool = False
    ) -> None:
        super().__init__(env)
        self.limit = evaluations
        self._log = folder / LOG if folder else None
        self._curves = SummaryWriter(str(folder / "tensorboard")) if folder else None
        self.best: Ints | None = None
        self.best_accuracy = -1.0
        self.accuracies: list[float] = []
        self.steps = 0
        self._start = env.unwrapped.evaluations  # type: ignore[attr-defined]
        self._bar = tqdm(total=evaluations, unit="evaluation", disable=None if progress else True)

    @property
    def spent(self) -> int:
        """Evaluations since this recorder was made, as the environment counts them."""
        return int(self.env.unwrapped.evaluations - self._start)  # type: ignore[attr-defined]

    @property
    def exhausted(self) -> bool:
        """Whether the search is over. Steps are bounded too: a policy may never reach the budget."""
        return self.spent >= self.limit or self.steps >= 10 * self.limit + 500

    def step(self, action: Any) -> Any:
        """Step, and record the plan if it was evaluated.

        Raises:
            EvaluationsExhausted: there is no evaluation left.
        """
        if self.exhausted:
            raise EvaluationsExhausted
        before = self.spent
        result = self.env.step(action)
        self.steps += 1
        if self.spent > before:
            self._record(result[4])
        return result

    def _record(self, info: dict[str, Any]) -> None:
        accuracy = float(info["search_accuracy"])
        self.accuracies.append(accuracy)
        if info["is_success"] and accuracy > self.best_accuracy:
            self.best, self.best_accuracy = np.array(info["widths"]), accuracy
        self._write(accuracy, info)
        self._bar.update()
        self._bar.set_postfix_str(f"best search accuracy {100 * self.best_accuracy:.2f} %")

    def _write(self, accuracy: float, info: dict[str, Any]) -> None:
        if self._log is None or self._curves is None:
            return
        line = {"evaluation": self.spent, "search_accuracy": accuracy, "macs_ratio": info["macs_ratio"]}
        with self._log.open("a") as file:
            file.write(json.dumps(line | {"widths": info["widths"].tolist()}) + "\n")
        self._curves.add_scalar("search/accuracy", accuracy, self.spent)
        self._curves.add_scalar("search/best accuracy", self.best_accuracy, self.spent)

    def close(self) -> None:
        """End the bar. The environment is the caller's: it stays open."""
        self._bar.close()
        if self._curves is not None:
            self._curves.close()
