"""Pruning before training, the whole of it: search a mask, prune, rewind, train, test."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from agents import one_shot
from agents.annealing import annealing
from agents.controls import random
from agents.early_training import default_recipe, train_mask, train_mask_once
from agents.provenance import common_keys, environment_record, settings_record
from agents.recorder import EvaluationsExhausted, PlanRecorder, remembered
from agents.reinforce import reinforce
from agents.results import ASKED_OF, SearchResult
from agents.run_folder import begun
from gnnrl_gym.checks import check_choice, check_seed, check_whole
from gnnrl_gym.envs.mask import MaskEnv
from gnnrl_gym.evaluation.determinism import deterministic
from gnnrl_gym.evaluation.threads import fitting_threads
from gnnrl_gym.evaluation.training import Recipe
from gnnrl_gym.files import write_atomic
from gnnrl_gym.pruning.masks import same_counts, widths_of

ASKED, CURVE = ASKED_OF["early"], "curve.json"


def dense(recorder: PlanRecorder, seed: int = 0, out: Path | None = None) -> None:
    """Nothing goes: for sparsity 0."""
    recorder.play([np.ones(recorder.action_space.shape or (), np.float32)])


METHODS: dict[str, Callable[..., Any]] = {
    "reinforce": reinforce,
    "annealing": annealing,
    "random": random,
    "magnitude": one_shot.magnitude,
    "snip": one_shot.snip,
    "grasp": one_shot.grasp,
    "synflow": one_shot.synflow,
    "lottery": one_shot.lottery,
    "dense": dense,
}
WITHOUT_CONTROL = ("dense", "random")  # theirs would be random units of random counts once more


def early(
    env: gym.Env[Any, Any],
    method: str = "annealing",
    evaluations: int = 1000,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    recipe: Recipe | None = None,
    control: bool = True,
    progress: bool = False,
    resume: bool = False,
    **settings: Any,
) -> SearchResult:
    """Search a mask of a `GNNRL-Mask-v0` environment, rewind the pruned network to the initial weights, train it, and
    test it: the test split is used here alone, after the last epoch.

    Args:
        env: from `gym.make("GNNRL-Mask-v0", ...)`.
        method: one of `METHODS`. evaluations: masks that may be scored.
        seed: of the searcher and of the training.
        out: run folder: `result.json`, `pruned.pt`, `evaluations.jsonl` (of masks of more than 20,000 units it has a
            digest), and `curve.json` (search accuracy of every evaluation).
        recipe: of the training; default: the model's in `RECIPES`.
        control: train a random mask with the same counts per layer too (`control_accuracy`), equally.
        resume: `out` holds an interrupted run of the same kind, which ends as if it had never stopped. Its search is
            gone through again with what it measured; its training is not repeated once it was done.
        settings: of the searcher.

    Raises:
        ValueError: unknown method, no evaluation, an environment of another kind, an image that can't be read, or a
            run to resume that was made with other settings.
        FileExistsError: `out` holds a run already; with `resume`, a finished one.
        FileNotFoundError: with `resume`, `out` holds no run.
    """
    mask_env = _checked(env, method, evaluations, seed)
    evaluations, seed = int(evaluations), int(seed)  # NumPy's are no seeds to some generators
    chosen = recipe or default_recipe(mask_env)
    asked: dict[str, Any] = {"method": method, "evaluations": evaluations, "seed": seed, "recipe": chosen.record()}
    asked |= {"control": control, "environment": environment_record(mask_env), **settings}
    if method == "lottery":  # trains the dense network as the one that stays will be
        settings = {"recipe": chosen, **settings}
    with begun(out, asked, resume, ASKED) as folder:
        start = time.perf_counter()
        recorder = search_mask(env, method, evaluations, seed, folder, progress, **settings)
    seconds, mask = time.perf_counter() - start, np.asarray(recorder.best, np.bool_)
    accuracies = train_mask_once(mask_env, mask, chosen, seed, folder)
    result = _result(mask_env, recorder, accuracies, method=method, seed=seed, seconds=seconds, recipe=chosen)
    if control and method not in WITHOUT_CONTROL:
        other = same_counts(mask, mask_env.network.widths, np.random.default_rng(seed))
        result.control_accuracy = train_mask(mask_env, other, chosen, seed).trained
    if folder:
        result.out = str(folder)
        write_atomic(folder / CURVE, lambda file: file.write(json.dumps(recorder.accuracies).encode()))
        result.save(folder)
    return result


def check_request(method: str, evaluations: int, seed: int, sparsity: float) -> None:
    """Check what a run of pruning before training is asked for.

    Raises:
        ValueError: unknown method, a number out of range, or something to prune for `dense`.
    """
    check_choice("method", method, tuple(METHODS))
    check_whole(1, evaluations=evaluations)
    check_seed(seed=seed)
    if method == "dense" and sparsity:
        raise ValueError("The method 'dense' prunes nothing: give it sparsity 0.")


def search_mask(
    env: gym.Env[Any, Any],
    method: str,
    evaluations: int,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> PlanRecorder:
    """Run a searcher on a mask environment; the recorder has the best mask and the accuracies. What `folder` knows
    from an interrupted run is not measured again."""
    mask_env: Any = env.unwrapped
    env.reset(seed=seed)  # whatever was searched before
    for line in remembered(folder, "mask", "search_accuracy") if folder else ():
        mask_env.evaluator.remember(line["mask"], line["search_accuracy"])
    recorder = PlanRecorder(env, evaluations, folder, progress)
    try:
        threads, same = fitting_threads(mask_env.network), deterministic(mask_env.device)
        with contextlib.suppress(EvaluationsExhausted), threads, same:
            METHODS[method](recorder, seed, folder, **settings)
    finally:
        recorder.close()
    return recorder


def _checked(env: gym.Env[Any, Any], method: str, evaluations: int, seed: int) -> MaskEnv:
    inner = env.unwrapped
    if not isinstance(inner, MaskEnv):
        raise ValueError(f"early needs a GNNRL-Mask-v0 environment, got {type(inner).__name__}.")
    check_request(method, evaluations, seed, inner.arguments["sparsity"])
    for split in (inner.data.train, inner.data.test):
        split.check_readable()
    return inner


def _result(
    env: MaskEnv, recorder: PlanRecorder, accuracies: tuple[float, float], recipe: Recipe, **keys: Any
) -> SearchResult:
    names = ("sparsity", "objective", "init_seed", "pretrain_epochs", "proxy_steps", "search_images")
    settings = settings_record(env, *names, "recalibration_images", "precision")
    untrained, trained = accuracies
    return SearchResult(
        **common_keys(env, widths_of(np.asarray(recorder.best, np.bool_), env.network.widths)),
        **keys,
        budget=env.keep / len(env.group_of),
        metric="units",
        importance="none",
        evaluations=recorder.spent,
        search_accuracy=recorder.best_accuracy,
        untrained_accuracy=untrained,
        test_accuracy=trained,
        settings={**settings, "granularity": env.granularity, "recipe": recipe.record()},
    )
