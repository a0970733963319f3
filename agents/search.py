"""`search`: run a searcher on a pruning environment and keep what it found."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import gymnasium as gym
import numpy as np

from agents.recorder import EvaluationsExhausted, PlanRecorder, remembered
from agents.results import SearchResult, common_keys, environment_record, settings_record
from agents.run_folder import begin
from agents.searchers import SEARCHERS
from gnnrl_gym.checks import check_choice, check_seed, check_whole
from gnnrl_gym.envs.budget import in_words
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.evaluation.accuracy import accuracy
from gnnrl_gym.evaluation.threads import fitting_threads
from gnnrl_gym.export import save_slim

ASKED = "search.json"


def search(
    env: gym.Env[Any, Any],
    method: str = "ppo",
    evaluations: int = 400,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
    resume: bool = False,
    **settings: Any,
) -> SearchResult:
    """Search for the best plan within the budget of a `GNNRL-Prune-v0` environment.

    The test split is used once, after the search, on the chosen plan. Ctrl-C ends the search early with the best
    plan so far.

    An interrupted search is resumed by going through it again: equal seeds give equal plans, and what was measured
    is remembered, so it is soon where it was and ends as if it had never stopped.

    Args:
        env: the environment, from `gym.make`.
        method: one of `agents.searchers.SEARCHERS`.
        evaluations: how many candidate plans may be scored.
        seed: of the searcher; equal seeds give equal searches.
        out: run folder for `result.json`, `pruned.pt`, `evaluations.jsonl` and what the method logs. It must not
            hold a run already.
        progress: show a bar on a terminal.
        resume: `out` may hold an interrupted run of the same search.
        settings: passed on to the searcher.

    Raises:
        ValueError: unknown method, no evaluation, an environment of another kind, or a run to resume that was made
            with other settings.
        FileExistsError: `out` holds a run.
        KeyboardInterrupt: interrupted before the first evaluation was done.
    """
    prune = _checked(env, method, evaluations, seed)
    environment = environment_record(prune)
    asked = {"method": method, "evaluations": evaluations, "seed": seed, "environment": environment, **settings}
    folder = begin(out, asked, resume, ASKED)
    for line in remembered(folder) if folder else ():
        prune.evaluator.remember(np.array(line["widths"]), line["search_accuracy"])
    recorder = PlanRecorder(env, evaluations, folder, progress)
    start, interrupted = time.perf_counter(), False
    try:
        with contextlib.suppress(EvaluationsExhausted), fitting_threads(prune.network):
            SEARCHERS[method](recorder, seed, folder, **settings)
    except KeyboardInterrupt:
        if recorder.best is None:
            raise
        interrupted = True
    finally:
        recorder.close()
    if recorder.best is None:
        allowed = in_words(prune.budgets)
        raise ValueError(f"{method} never reached the budget, {allowed}: give it more evaluations or steps.")
    result = _result(prune, recorder, method, seed, time.perf_counter() - start)
    result.interrupted = interrupted
    if folder:
        result.out = str(folder)
        save_slim(result.weights_file, prune.network, recorder.best, prune.slim(recorder.best))
        result.save(folder)
    return result


def _checked(env: gym.Env[Any, Any], method: str, evaluations: int, seed: int) -> PruneEnv:
    check_choice("method", method, tuple(SEARCHERS))
    check_whole(1, evaluations=evaluations)
    check_seed(seed=seed)
    prune = env.unwrapped
    if not isinstance(prune, PruneEnv):
        raise ValueError(f"search needs a GNNRL-Prune-v0 environment, got {type(prune).__name__}.")
    return prune


def _result(env: PruneEnv, recorder: PlanRecorder, method: str, seed: int, seconds: float) -> SearchResult:
    plan = recorder.best
    assert plan is not None
    names = ("landing", "max_steps", "floor", "round_to", "granularity", "search_images", "recalibration_images",
             "objective", "pretrain_epochs", "proxy_steps")  # fmt: skip
    return SearchResult(
        **common_keys(env, plan),
        budget=env.budget if len(env.budgets) == 1 else dict(env.budgets),
        metric=env.metric,
        importance=env.arguments["importance"],
        method=method,
        seed=seed,
        evaluations=recorder.spent,
        search_accuracy=recorder.best_accuracy,
        test_accuracy=accuracy(env.slim(plan), env.data.test),
        seconds=seconds,
        latency=env.meter.table.check(plan) if env.meter.table else None,
        settings=settings_record(env, *names),
    )
