"""The runner for searchers that ask for whole plans and are told what they are worth."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from agents.recorder import PlanRecorder


class AskTell(Protocol):
    """A black-box optimiser over actions in the environment's action space."""

    def ask(self) -> np.ndarray:
        """The next actions to try, [K, A]; K = 0 ends the search."""

    def tell(self, actions: np.ndarray, returns: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """What they were worth: returns [K] (higher is better) and the last info of each episode."""


def run_ask_tell(recorder: PlanRecorder, optimizer: AskTell) -> None:
    """Ask and tell until the evaluations are spent (`EvaluationsExhausted`) or nothing is asked for."""
    while not recorder.exhausted and len(actions := optimizer.ask()):
        outcomes = recorder.play(actions)
        optimizer.tell(actions, np.array([value for value, _ in outcomes]), [info for _, info in outcomes])
