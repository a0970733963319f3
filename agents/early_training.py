"""What a mask is worth once the network that it leaves is trained from its initial weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from agents.results import WEIGHTS
from gnnrl_gym.envs.mask import MaskEnv
from gnnrl_gym.evaluation.accuracy import accuracy
from gnnrl_gym.evaluation.threads import fitting_threads
from gnnrl_gym.evaluation.training import Recipe, recipe_for, train
from gnnrl_gym.export import save_kept
from gnnrl_gym.files import read_json, write_atomic
from gnnrl_gym.graph.groups import Kept
from gnnrl_gym.pruning.masks import zeros_held
from gnnrl_gym.pruning.recalibration import recalibrate

TRAINED = "trained.json"


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


def train_mask(env: MaskEnv, mask: Kept, recipe: Recipe, seed: int) -> Outcome:
    """Rewind the network of a mask bool [U] to its initial weights, train it, and test it before and after."""
    images, _ = env.data.train.take(env.arguments["recalibration_images"], seed=1).tensors()
    module = env.rewound(mask).to(env.device)
    untrained = accuracy(recalibrate(module, images.to(env.device)), env.data.test)
    module = env.rewound(mask).to(env.device)
    with zeros_held(env.initial_network, module, mask), fitting_threads(env.network):
        train(module, env.data, recipe, seed, env.device)
    return Outcome(untrained, accuracy(module, env.data.test), module)


def train_mask_once(env: MaskEnv, mask: Kept, recipe: Recipe, seed: int, folder: Path | None) -> tuple[float, float]:
    """Untrained and trained accuracy of `train_mask`. With a run folder the trained network is kept in it, and an
    interrupted run that has come so far reads them there."""
    if folder and (folder / TRAINED).is_file():
        known = read_json(folder / TRAINED)
        return known["untrained_accuracy"], known["test_accuracy"]
    outcome = train_mask(env, mask, recipe, seed)
    if folder:
        save_kept(folder / WEIGHTS, env.network, mask, outcome.module)
        found = {"untrained_accuracy": outcome.untrained, "test_accuracy": outcome.trained}
        write_atomic(folder / TRAINED, lambda file: file.write(json.dumps(found).encode()))
    return outcome.untrained, outcome.trained


def default_recipe(env: MaskEnv) -> Recipe:
    """The recipe of the environment's model by name, else the general one."""
    return recipe_for(env.arguments["model"])
