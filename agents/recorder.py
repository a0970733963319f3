"""What all searchers share: a wrapper that counts, keeps the best plan, logs, and shows progress."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker
from torch.utils.tensorboard import SummaryWriter

from agents.progress import Progress
from gnnrl_gym.envs.prune_vector import prefetch
from gnnrl_gym.graph.groups import Ints
from gnnrl_gym.pruning.masks import digest

LOG = "evaluations.jsonl"
LATENCIES = "latency.json"  # that the plans of a run were landed by
MOST_UNITS = 20_000  # masks of more are logged by their digest: a line of 266,200 weights would have a megabyte


class EvaluationsExhausted(Exception):
    """The search has spent its evaluations."""


class PlanRecorder(gym.Wrapper[Any, Any, Any, Any]):
    """Records every evaluated plan of an environment, and stops the search when its evaluations are spent.

    The environment counts its `evaluations`, and its `info` has `search_accuracy`, `is_success` and the plan, under
    the name that its attribute `plan_key` gives.

    Args:
        env: the environment.
        evaluations: how many the search may spend.
        folder: gets `evaluations.jsonl`, a line per evaluation, and TensorBoard curves; or None. Evaluations that an
            interrupted run has left there are gone through again (from memory, see `remembered`) before new lines
            are written.
        progress: show a bar with the best accuracy so far; where there is no terminal, a line every tenth of the way.

    Attributes:
        best: the best plan within the budget so far, None before there is one; best_accuracy: its search accuracy.
        accuracies: search accuracy of every evaluation, in order.
    """

    def __init__(
        self, env: gym.Env[Any, Any], evaluations: int, folder: Path | None = None, progress: bool = False
    ) -> None:
        super().__init__(env)
        self.plan_key = str(getattr(env.unwrapped, "plan_key", "widths"))
        self.limit = evaluations
        self._log = folder / LOG if folder else None
        self._known = remembered(folder, self.plan_key) if folder else []
        self._size = _size_of(self._log)
        # flushed often: a Ctrl-C within its queue leaves its thread asleep until then, and `close` waits for it
        self._curves = SummaryWriter(str(folder / "tensorboard"), flush_secs=2) if folder else None
        self.best: Ints | None = None
        self.best_accuracy = -1.0
        self.accuracies: list[float] = []
        self._idle = 0  # steps since the last evaluation
        self._start = env.unwrapped.evaluations  # type: ignore[attr-defined]
        self._bar = Progress(evaluations, "evaluation", shown=progress)

    @property
    def spent(self) -> int:
        """Evaluations since this recorder was made, as the environment counts them."""
        return int(self.env.unwrapped.evaluations - self._start)  # type: ignore[attr-defined]

    @property
    def left(self) -> int:
        """Evaluations that may still be spent."""
        return max(self.limit - self.spent, 0)

    @property
    def exhausted(self) -> bool:
        """Whether the search is over. Steps without an evaluation are bounded: a policy may never reach the budget."""
        return self.spent >= self.limit or self._idle >= 10 * self.limit + 500

    def step(self, action: Any) -> Any:
        """Step, and record the plan if it was evaluated.

        Raises:
            EvaluationsExhausted: there is no evaluation left.
        """
        return self.step_in(self.env, action)

    def step_in(self, env: gym.Env[Any, Any], action: Any) -> Any:
        """`step` of one of the environment's slots."""
        if self.exhausted:
            raise EvaluationsExhausted
        before = self.spent
        result = env.step(action)
        self._idle += 1
        if self.spent > before:
            self._idle = 0
            self._record(result[4])
        return result

    def play(self, actions: Sequence[Any] | np.ndarray) -> list[tuple[float, dict[str, Any]]]:
        """An episode for each of `actions` [K, A], which is repeated until the end: (return, last info) of each.

        Raises:
            EvaluationsExhausted: the evaluations ended on the way; those before count.
        """
        self.reset()
        if hasattr(self.unwrapped, "slots"):  # what comes first is measured side by side
            prefetch([self.unwrapped] * len(actions[: self.left]), np.asarray(actions)[: self.left])
        return [self._episode(action) for action in actions]

    def _episode(self, action: Any) -> tuple[float, dict[str, Any]]:
        self.reset()
        total = 0.0
        while True:
            _, reward, terminated, truncated, info = self.step(action)
            total += float(reward)
            if terminated or truncated:
                return total, dict(info)

    def evaluate(self, widths: Ints) -> float:
        """Spend one evaluation on a plan [A] of a pruning environment, within the budget or not: its accuracy.

        Raises:
            EvaluationsExhausted: there is no evaluation left.
        """
        if self.exhausted:
            raise EvaluationsExhausted
        env: Any = self.unwrapped
        accuracy = float(env.evaluate(widths))
        ratio = env.meter.ratio("macs", widths)
        within = env.within_budget(widths)
        self._record({"widths": widths, "search_accuracy": accuracy, "macs_ratio": ratio, "is_success": within})
        return accuracy

    def _record(self, info: dict[str, Any]) -> None:
        accuracy = float(info["search_accuracy"])
        self.accuracies.append(accuracy)
        if info["is_success"] and accuracy > self.best_accuracy:
            self.best, self.best_accuracy = np.array(info[self.plan_key]), accuracy
        self._write(accuracy, info)
        best = "none within the budget yet" if self.best is None else f"{100 * self.best_accuracy:.2f} %"
        self._bar.at(len(self.accuracies), f"best search accuracy {best}")

    def _write(self, accuracy: float, info: dict[str, Any]) -> None:
        if self._log is None or self._curves is None:
            return
        line = {"evaluation": self.spent, "search_accuracy": accuracy, "is_success": bool(info["is_success"])}
        line |= {key: float(value) for key, value in info.items() if key.endswith("_ratio")}
        line |= {"network": info["network"]} if "network" in info else {}  # of several
        line |= {self.plan_key: _logged(np.asarray(info[self.plan_key]))}
        if self.spent <= len(self._known):
            self._check_known(line)
            return
        self._check_alone(self._log)
        with self._log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._size = _size_of(self._log)
        self._curves.add_scalar("search/accuracy", accuracy, self.spent)
        if self.best is not None:
            self._curves.add_scalar("search/best accuracy", self.best_accuracy, self.spent)

    def _check_known(self, line: dict[str, Any]) -> None:
        if line[self.plan_key] != self._known[self.spent - 1][self.plan_key]:
            others = "settings, versions, threads or device"
            if "latency_ratio" in line and self._log and not self._log.with_name(LATENCIES).is_file():
                others += f", or once its measured latencies are lost (there is no {LATENCIES})"
            raise ValueError(
                f"Evaluation {self.spent} of the interrupted run was of another plan than now: it can't be resumed "
                f"with other {others}. Start it anew with another --out."
            )

    def _check_alone(self, log: Path) -> None:
        if _size_of(log) != self._size:
            raise ValueError(
                f"{str(log)!r} is not as this search left it: another one writes there too. This one ends, so that the "
                "run stays whole; let the other end, or interrupt it and go on with --resume."
            )

    def close(self) -> None:
        """End the bar. The environment is the caller's: it stays open."""
        self._bar.close()
        if self._curves is not None:
            self._curves.close()


def check_wrappers(what: str, env: gym.Env[Any, Any]) -> None:
    """Check that `env` has no wrapper that would be lost when its slots are used.

    Args:
        what: who uses the slots of an environment, which have no wrappers; for the message.

    Raises:
        ValueError: `env` has another wrapper than gym.make's own and the recorder.
    """
    while isinstance(env, gym.Wrapper):
        if not isinstance(env, (OrderEnforcing, PassiveEnvChecker, PlanRecorder)):
            raise ValueError(
                f"{what} takes the environment as gym.make makes it, without {type(env).__name__}: leave that out. "
                "What bounds the steps of an episode is its argument max_steps."
            )
        env = env.env


class SlotRecorder(gym.Wrapper[Any, Any, Any, Any]):
    """One of several slots that are searched together: they share a `PlanRecorder`."""

    def __init__(self, slot: gym.Env[Any, Any], recorder: PlanRecorder) -> None:
        super().__init__(slot)
        self.recorder = recorder

    def step(self, action: Any) -> Any:
        """As `PlanRecorder.step`."""
        return self.recorder.step_in(self.env, action)


def _size_of(log: Path | None) -> int:
    """Bytes of a file, 0 of one that is not there."""
    return log.stat().st_size if log is not None and log.is_file() else 0


def _logged(plan: np.ndarray) -> Any:
    return plan.tolist() if plan.size <= MOST_UNITS else digest(plan)


def remembered(folder: Path, *entries: str) -> list[dict[str, Any]]:
    """The evaluations of a run folder that is gone on with, as `read_log`. A half-written last line is cut off.

    Raises:
        ValueError: a line is damaged.
    """
    found, whole = read_log(folder, *entries)
    if (folder / LOG).is_file():
        with (folder / LOG).open("r+b") as file:
            file.truncate(whole)
    return found


def read_log(folder: Path, *entries: str) -> tuple[list[dict[str, Any]], int]:
    """The evaluations of a run folder, as `evaluations.jsonl` holds them, and how many bytes their lines have. A
    half-written last line, of a run that was killed or is running, does not count.

    Args:
        entries: what every line must have.

    Raises:
        ValueError: a line is damaged.
    """
    path, found = folder / LOG, []
    if not path.is_file():
        return [], 0
    whole = 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"Line {len(found) + 1} of {str(path)!r} is damaged: {error}") from error
        if not isinstance(found[-1], dict) or not found[-1].keys() >= set(entries):
            raise ValueError(f"Line {len(found)} of {str(path)!r} is damaged: it is no record of an evaluation.")
        whole += len(line)
    return found, whole
