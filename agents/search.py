"""`search`: run a searcher on a pruning environment and keep what it found."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from torch import nn

from agents.provenance import common_keys, environment_record, settings_record
from agents.recorder import EvaluationsExhausted, PlanRecorder, check_wrappers, remembered
from agents.results import ASKED_OF, SearchResult
from agents.run_folder import begun, keep_latencies, seconds_before
from agents.searchers import SEARCHERS, plan_searchers
from agents.transfer import read_policy
from gnnrl_gym.checks import check_choice, check_seed, check_whole
from gnnrl_gym.envs.budget import in_words
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.evaluation.accuracy import accuracy
from gnnrl_gym.evaluation.determinism import deterministic, randomness_kept
from gnnrl_gym.evaluation.threads import fitting_threads
from gnnrl_gym.evaluation.workers import scored_by
from gnnrl_gym.export import save_slim

ASKED = ASKED_OF["search"]


def search(
    env: gym.Env[Any, Any],
    method: str = "ppo",
    evaluations: int = 400,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
    resume: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    **settings: Any,
) -> SearchResult:
    """Search for the best plan within the budget of a `GNNRL-Prune-v0` environment.

    The test split is used once, after the search, on the chosen plan. Ctrl-C ends the search early with the best
    plan so far.

    An interrupted search is resumed by going through it again: equal seeds give equal plans, and what was measured
    is remembered, so it is soon where it was and ends as if it had never stopped.

    Args:
        env: the environment, from `gym.make`.
        method: one of `agents.searchers.plan_searchers`.
        evaluations: how many candidate plans may be scored.
        seed: of the searcher; equal seeds give equal searches.
        out: run folder for `result.json`, `pruned.pt`, `evaluations.jsonl` and what the method logs. It must not
            hold a run already. A search that fails before its first evaluation leaves nothing there.
        progress: show a bar on a terminal, elsewhere a line every tenth of the way.
        resume: `out` may hold an interrupted run of the same search. Its latencies count, in `env` from then on.
        workers, ray: who measures the plans on CPUs, as in `gnnrl_gym.evaluation.workers.scored_by`: so many threads,
            or a Ray cluster at this address. No part of the result: a run may be resumed with others.
        settings: passed on to the searcher.

    Raises:
        ValueError: unknown method, no evaluation, an environment of another kind or with wrappers that `gym.make` does
            not put there, a test image that can't be read, a run to resume that was made with other settings, weights
            or data, or no such workers.
        MissingExtra: Ray is not installed.
        FileExistsError: `out` holds a run.
        KeyboardInterrupt: interrupted before a plan within the budget was scored.
    """
    prune = _checked(env, method, evaluations, seed)
    evaluations, seed = int(evaluations), int(seed)  # NumPy's are no seeds to some generators
    env.reset(seed=seed)  # an episode before may have had a budget of its own
    environment = environment_record(prune)
    asked = {"method": method, "evaluations": evaluations, "seed": seed, "environment": environment, **settings}
    with begun(out, asked, resume, ASKED) as folder:
        start = time.perf_counter()
        keep_latencies(folder, [prune])
        with scored_by(prune.evaluator, workers, ray):
            recorder, interrupted = _searched(env, prune, method, evaluations, seed, folder, progress, settings)
        seconds = seconds_before(folder) + time.perf_counter() - start
        assert recorder.best is not None
        slim = prune.slim(recorder.best)  # once: what is kept is what was tested
        result = _result(prune, recorder, method, seed, seconds, slim)
    result.interrupted = interrupted
    if folder:
        result.out = str(folder)
        save_slim(result.weights_file, prune.network, recorder.best, slim)
        result.save(folder)
    return result


def check_request(method: str, evaluations: int, seed: int, policy: str | os.PathLike[str] | None = None) -> None:
    """Check what a search is asked for.

    Args:
        policy: what the method starts from, as for `agents.ppo.ppo`.

    Raises:
        ValueError: unknown method, a number out of range, or a policy for a method that takes no policy.
        FileNotFoundError: there is no such policy.
    """
    check_choice("method", method, plan_searchers())
    check_whole(1, evaluations=evaluations)
    check_seed(seed=seed)
    if policy is None or policy == "auto":
        return
    if method != "ppo":
        raise ValueError(f"policy={os.fspath(policy)!r} is for the method 'ppo' alone, {method!r} starts from none.")
    read_policy(policy)


def _searched(
    env: gym.Env[Any, Any], prune: PruneEnv, method: str, evaluations: int, seed: int, folder: Path | None,
    progress: bool, settings: dict[str, Any],
) -> tuple[PlanRecorder, bool]:  # fmt: skip
    """Run the searcher: a recorder with a plan, and whether it was interrupted."""
    for line in remembered(folder, "widths", "search_accuracy") if folder else ():
        prune.evaluator.remember(np.array(line["widths"]), line["search_accuracy"])
    recorder, interrupted = PlanRecorder(env, evaluations, folder, progress), False
    try:
        threads, same = fitting_threads(prune.network), deterministic(prune.device)
        kept = randomness_kept()
        with contextlib.closing(recorder), contextlib.suppress(EvaluationsExhausted), threads, same, kept:
            SEARCHERS[method](recorder, seed, folder, **settings)
    except KeyboardInterrupt:  # also a second one, while the recorder is closed
        if recorder.best is None:
            raise
        interrupted = True
    if recorder.best is None:
        allowed = in_words(prune.budgets)
        raise ValueError(f"{method} never reached the budget, {allowed}: give it more evaluations or steps.")
    return recorder, interrupted


def _checked(env: gym.Env[Any, Any], method: str, evaluations: int, seed: int) -> PruneEnv:
    check_request(method, evaluations, seed)
    prune = env.unwrapped
    if not isinstance(prune, PruneEnv):
        raise ValueError(f"search needs a GNNRL-Prune-v0 environment, got {type(prune).__name__}.")
    check_wrappers("search", env)
    prune.data.test.check_readable()
    return prune


def _result(
    env: PruneEnv, recorder: PlanRecorder, method: str, seed: int, seconds: float, slim: nn.Module
) -> SearchResult:
    plan = recorder.best
    assert plan is not None
    names = ("landing", "max_steps", "floor", "round_to", "granularity", "search_images", "recalibration_images",
             "objective", "pretrain_epochs", "proxy_steps", "precision")  # fmt: skip
    return SearchResult(
        **common_keys(env, plan),
        budget=env.budget if len(env.budgets) == 1 else dict(env.budgets),
        metric=env.metric,
        importance=env.arguments["importance"],
        method=method,
        seed=seed,
        evaluations=len(recorder.accuracies),  # without one that was interrupted
        search_accuracy=recorder.best_accuracy,
        test_accuracy=accuracy(slim, env.data.test),
        seconds=seconds,
        latency=env.meter.table.check(plan) if env.meter.table else None,
        settings=settings_record(env, *names),
    )
