"""`search`: run a searcher on a pruning environment and keep what it found."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from torch import nn

from agents.recorder import EvaluationsExhausted, PlanRecorder, remembered
from agents.results import RESULT, SearchResult, write_atomic
from agents.searchers import SEARCHERS
from gnnrl_gym.envs.budget import in_words
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.evaluation.accuracy import accuracy
from gnnrl_gym.evaluation.threads import fitting_threads
from gnnrl_gym.export import save_slim

SEARCH = "search.json"  # what was asked; result.json is what was found


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
    prune = _checked(env, method, evaluations)
    asked = {"method": method, "evaluations": evaluations, "seed": seed, "environment": _named(prune), **settings}
    folder = _resumed_folder(out, asked) if resume else _new_folder(out)
    if folder:
        write_atomic(folder / SEARCH, lambda file: file.write(json.dumps(asked, default=str).encode()))
        for line in remembered(folder):
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


def _checked(env: gym.Env[Any, Any], method: str, evaluations: int) -> PruneEnv:
    if method not in SEARCHERS:
        raise ValueError(f"Unknown method {method!r}: choose one of {', '.join(SEARCHERS)}.")
    if evaluations < 1:
        raise ValueError(f"evaluations must be at least 1, got {evaluations}.")
    prune = env.unwrapped
    if not isinstance(prune, PruneEnv):
        raise ValueError(f"search needs a GNNRL-Prune-v0 environment, got {type(prune).__name__}.")
    return prune


def _new_folder(out: str | os.PathLike[str] | None) -> Path | None:
    if out is None:
        return None
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{str(folder)!r} is there already and not empty: choose another --out, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _resumed_folder(out: str | os.PathLike[str] | None, asked: dict[str, Any]) -> Path:
    """A folder whose search was the same and is not finished.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: it is not.
    """
    if out is None:
        raise ValueError("resume=True needs out=, the run folder to go on with.")
    folder, before = Path(out), read_search(out)
    if (folder / RESULT).is_file() and not SearchResult.load(folder).interrupted:
        raise FileExistsError(f"The search in {str(folder)!r} is finished: choose another --out.")
    now = json.loads(json.dumps(asked, default=str))
    for key in before.keys() | now.keys():
        if before.get(key) != now.get(key):
            raise ValueError(f"{str(folder)!r} was searched with {key}={before.get(key)!r}, not {now.get(key)!r}.")
    return folder


def read_search(run: str | os.PathLike[str]) -> dict[str, Any]:
    """What was asked of the search in a run folder: method, evaluations, seed, environment, settings.

    Raises:
        FileNotFoundError: no search was begun there.
    """
    path = Path(run) / SEARCH
    if not path.is_file():
        raise FileNotFoundError(f"No search to resume: there is no {str(path)!r}.")
    return dict(json.loads(path.read_text()))


def _named(env: PruneEnv) -> dict[str, Any]:
    """The environment's arguments; modules and data sets by the name of their class."""
    return env.arguments | {"model": _name(env.arguments["model"]), "data": env.data.name}


def _result(env: PruneEnv, recorder: PlanRecorder, method: str, seed: int, seconds: float) -> SearchResult:
    plan = recorder.best
    assert plan is not None
    network, arguments = env.network, env.arguments
    return SearchResult(
        model=_name(arguments["model"]),
        weights=None if arguments["weights"] is None else os.fspath(arguments["weights"]),
        data=env.data.name,
        budget=env.budget if len(env.budgets) == 1 else dict(env.budgets),
        metric=env.metric,
        importance=arguments["importance"],
        method=method,
        seed=seed,
        evaluations=recorder.spent,
        widths=plan.tolist(),
        macs_ratio=network.macs(plan) / network.macs(network.widths),
        params_ratio=network.params(plan) / network.params(network.widths),
        search_accuracy=recorder.best_accuracy,
        test_accuracy=accuracy(env.slim(plan), env.data.test),
        dense_test_accuracy=accuracy(network.model, env.data.test),
        seconds=seconds,
        memory_ratio=network.memory(plan) / network.memory(network.widths),
        latency=env.meter.table.check(plan) if env.meter.table else None,
        settings=_settings(env),
    )


def _settings(env: PruneEnv) -> dict[str, Any]:
    names = ("landing", "max_steps", "floor", "round_to", "granularity", "search_images", "recalibration_images")
    objective = ("objective", "pretrain_epochs", "proxy_steps")
    shape = {"input_shape": list(env.data.input_shape), "num_classes": env.data.num_classes}
    return {name: env.arguments[name] for name in (*names, *objective)} | shape


def _name(model: str | nn.Module) -> str:
    return model if isinstance(model, str) else type(model).__name__
