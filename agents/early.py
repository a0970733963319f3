"""Pruning before training, the whole of it: search a mask, prune, rewind, train, test."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from agents import one_shot
from agents.annealing import annealing
from agents.controls import random
from agents.recorder import EvaluationsExhausted, PlanRecorder
from agents.reinforce import reinforce
from agents.results import SearchResult, write_atomic
from agents.search import _new_folder
from gnnrl_gym.envs.mask import MaskEnv
from gnnrl_gym.evaluation.accuracy import accuracy
from gnnrl_gym.evaluation.threads import fitting_threads
from gnnrl_gym.evaluation.training import Recipe, recipe_for, train
from gnnrl_gym.pruning.masks import Kept, same_counts, widths_of, zeros_held
from gnnrl_gym.pruning.network import PrunableNetwork
from gnnrl_gym.pruning.recalibration import recalibrate

CURVE, WEIGHTS_LIMIT = "curve.json", 20_000  # above so many units no plan is written per evaluation


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


@dataclass(frozen=True)
class Outcome:
    """What a mask is worth. Accuracies on the test split, in [0, 1].

    Attributes:
        untrained: with the initial weights, BatchNorm recalibrated.
        trained: after training from them, last epoch. module: then, in eval mode.
    """

    untrained: float
    trained: float
    module: nn.Module


def early(
    env: gym.Env[Any, Any],
    method: str = "annealing",
    evaluations: int = 1000,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    recipe: Recipe | None = None,
    control: bool = True,
    progress: bool = False,
    **settings: Any,
) -> SearchResult:
    """Search a mask of a `GNNRL-Mask-v0` environment, rewind the pruned network to the initial weights, train it, and
    test it: the test split is used here alone, after the last epoch.

    Args:
        env: from `gym.make("GNNRL-Mask-v0", ...)`.
        method: one of `METHODS`. evaluations: masks that may be scored.
        seed: of the searcher and of the training.
        out: run folder: `result.json`, `pruned.pt`, `curve.json` (search accuracy of every evaluation), and for up to
            20,000 units the masks in `evaluations.jsonl`.
        recipe: of the training; default: the model's in `RECIPES`.
        control: train a random mask with the same counts per layer too (`control_accuracy`), equally.
        settings: of the searcher.

    Raises:
        ValueError: unknown method, no evaluation, or an environment of another kind.
        FileExistsError: `out` holds a run.
    """
    mask_env = _checked(env, method, evaluations)
    folder, start = _new_folder(out), time.perf_counter()
    recorder = search_mask(env, method, evaluations, seed, folder, progress, **settings)
    seconds = time.perf_counter() - start
    mask, chosen = np.asarray(recorder.best, np.bool_), recipe or default_recipe(mask_env)
    outcome = train_mask(mask_env, mask, chosen, seed)
    result = _result(mask_env, recorder, method, seed, seconds, outcome, chosen)
    if control and method not in ("dense", "random"):  # theirs would be random filters of random counts once more
        other = same_counts(mask, mask_env.network.widths, np.random.default_rng(seed))
        result.control_accuracy = train_mask(mask_env, other, chosen, seed).trained
    if folder:
        result.out = str(folder)
        save_mask(result.weights_file, mask_env.network, mask, outcome.module)
        text = json.dumps(recorder.accuracies).encode()
        write_atomic(folder / CURVE, lambda file: file.write(text))
        result.save(folder)
    return result


def search_mask(
    env: gym.Env[Any, Any],
    method: str,
    evaluations: int,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> PlanRecorder:
    """Run a searcher on a mask environment; the recorder has the best mask and the accuracies."""
    mask_env: Any = env.unwrapped
    logged = folder if len(mask_env.group_of) <= WEIGHTS_LIMIT else None
    recorder = PlanRecorder(env, evaluations, logged, progress)
    try:
        with contextlib.suppress(EvaluationsExhausted), fitting_threads(mask_env.network):
            METHODS[method](recorder, seed, folder, **settings)
    finally:
        recorder.close()
    return recorder


def train_mask(env: MaskEnv, mask: Kept, recipe: Recipe, seed: int) -> Outcome:
    """Rewind the network of a mask bool [U] to its initial weights, train it, test it before and after."""
    images, _ = env.data.train.take(env.arguments["recalibration_images"], seed=1).tensors()
    module = env.rewound(mask).to(env.device)
    untrained = accuracy(recalibrate(module, images.to(env.device)), env.data.test)
    module = env.rewound(mask).to(env.device)
    with zeros_held(env.initial_network, module, mask), fitting_threads(env.network):
        train(module, env.data, recipe, seed, env.device)
    return Outcome(untrained, accuracy(module, env.data.test), module)


def default_recipe(env: MaskEnv) -> Recipe:
    """The recipe of the environment's model by name, else the general one."""
    return recipe_for(env.arguments["model"])


def save_mask(path: Path, network: PrunableNetwork, mask: Kept, module: nn.Module) -> None:
    """Write the pruned network of any mask bool [U] in the form of `gnnrl_gym.export.save_slim`."""
    content = {
        "kept": torch.from_numpy(mask),
        "widths": torch.from_numpy(widths_of(mask, network.widths)),
        "granularity": getattr(network, "granularity", "channels"),
        "state_dict": {key: value.detach().cpu().clone() for key, value in module.state_dict().items()},
    }
    write_atomic(path, lambda file: torch.save(content, file))


def _checked(env: gym.Env[Any, Any], method: str, evaluations: int) -> MaskEnv:
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}: choose one of {', '.join(METHODS)}.")
    if evaluations < 1:
        raise ValueError(f"evaluations must be at least 1, got {evaluations}.")
    if not isinstance(env.unwrapped, MaskEnv):
        raise ValueError(f"early needs a GNNRL-Mask-v0 environment, got {type(env.unwrapped).__name__}.")
    if method == "dense" and env.unwrapped.keep < len(env.unwrapped.group_of):
        raise ValueError("The method 'dense' prunes nothing: give it sparsity 0.")
    return env.unwrapped


def _result(
    env: MaskEnv, recorder: PlanRecorder, method: str, seed: int, seconds: float, outcome: Outcome, recipe: Recipe
) -> SearchResult:
    network, arguments = env.network, env.arguments
    widths = widths_of(np.asarray(recorder.best, np.bool_), network.widths)
    model, weights = arguments["model"], arguments["weights"]
    return SearchResult(
        model=model if isinstance(model, str) else type(model).__name__,
        weights=None if weights is None else os.fspath(weights),
        data=env.data.name,
        budget=env.keep / len(env.group_of),
        metric="units",
        importance="none",
        method=method,
        seed=seed,
        evaluations=recorder.spent,
        widths=widths.tolist(),
        macs_ratio=network.macs(widths) / network.macs(network.widths),
        params_ratio=network.params(widths) / network.params(network.widths),
        search_accuracy=recorder.best_accuracy,
        test_accuracy=outcome.trained,
        dense_test_accuracy=accuracy(network.model, env.data.test),
        seconds=seconds,
        memory_ratio=network.memory(widths) / network.memory(network.widths),
        untrained_accuracy=outcome.untrained,
        settings=_settings(env, recipe),
    )


def _settings(env: MaskEnv, recipe: Recipe) -> dict[str, Any]:
    names = ("sparsity", "objective", "init_seed", "pretrain_epochs", "proxy_steps", "search_images")
    shape = {"input_shape": list(env.data.input_shape), "num_classes": env.data.num_classes}
    recorded = {name: env.arguments[name] for name in (*names, "recalibration_images")}
    return {**recorded, "granularity": env.granularity, **shape, "recipe": recipe.record()}
