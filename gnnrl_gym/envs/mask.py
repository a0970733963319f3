"""GNNRL-Mask-v0: choose which units of an untrained network stay."""

from __future__ import annotations

import copy
import os
from functools import cached_property
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import EzPickle
from torch import nn

from gnnrl_gym.envs.rendering import draw_plan, plan_table
from gnnrl_gym.evaluation.accuracy import resolve_device
from gnnrl_gym.evaluation.objectives import MaskEvaluator, proxy_of, weights_to_score
from gnnrl_gym.evaluation.training import recipe_for
from gnnrl_gym.graph.features import EDGE_FEATURES, LEVELS, NODE_FEATURES
from gnnrl_gym.graph.groups import Ints
from gnnrl_gym.pruning.masks import Kept, group_of, kept_units, top_mask, widths_of
from gnnrl_gym.pruning.network import PrunableNetwork
from gnnrl_gym.pruning.sparsity import CHANNELS, make_network
from gnnrl_gym.zoo import DataSplits, load_data, load_model
from gnnrl_gym.zoo.early import EARLY
from gnnrl_gym.zoo.models import DIGITS

NOT_SCORED = -1.0  # not NaN: equal infos must compare equal


class MaskEnv(gym.Env[spaces.GraphInstance, np.ndarray], EzPickle):
    """Choose which filters, or weights, of a network stay, at a fixed sparsity and before it is trained.

    ## Description
    The problem of pruning at initialisation (Frankle and Carbin 2019; Lee et al. 2019): the network that stays is
    trained afterwards from the same initial weights (`rewound`). One step chooses a mask; its score says how good the
    masked network is without that training, by one of three objectives. The test split has no part in it.

    ## Observation Space
    `Graph(Box(F,), Box(E,))`, the graph of `GNNRL-Prune-v0`: dense after `reset`, at the mask's widths after `step`.

    ## Action Space
    `Box(0, 1, (U,))`: a score for every unit, numbered layer by layer. The highest stay, exactly `keep` of all of them
    together and at least one in every layer; of equal scores the first. A mask of zeros and ones is its own choice.

    ## Reward
    Minus the Top-1 error on the search split, in [-1, 0]:
    * `untrained`: with the initial weights.
    * `pretrained`: with the weights after `pretrain_epochs` epochs of training the dense network.
    * `proxy`: after `proxy_steps` steps of training the masked network from its initial weights.
    BatchNorm statistics are re-estimated on training images first.

    ## Episode End
    Terminated after one step.

    ## Arguments
    * `model`: a name for `load_model`, or an `nn.Module`, which is taken with its weights as the initial ones. Default:
      the structure of the digits network that ships with the package.
    * `data`: a name or path for `load_data`, or `DataSplits`. Default `digits`.
    * `sparsity`: share of the units that go, in [0, 1).
    * `objective`: `untrained`, `pretrained` or `proxy`.
    * `granularity`: `channels` (filters), or `unstructured` (weights). None: what the model is made for, which is
      `unstructured` for `mlp-300-100`, else channels.
    * `init_seed`: of the initial weights of a named model.
    * `weights`: for `pretrained`, a state-dict file, if the dense network has been trained before.
    * `pretrain_epochs`, `proxy_steps`: of these objectives; both train with the model's recipe
      (`gnnrl_gym.evaluation.training.RECIPES`).
    * `search_images`, `recalibration_images`: how many images score a mask, and re-estimate its statistics.
    * `precision`: of the scoring: `float32`, `bfloat16`, or `auto`.
    * `device`: `auto`, `cpu`, `cuda`.
    * `render_mode`: `ansi` or `rgb_array`: the layers with what is kept.

    ## Info
    `mask` (bool [U]), `widths` (kept units of every layer), `macs_ratio`, `params_ratio`, `search_accuracy` (-1 until
    there is one), `is_success`, `evaluations` (in this episode; the attribute counts them since the environment was
    made).

    ## Version History
    * v0: first version.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 1}
    levels = len(LEVELS)
    plan_key = "mask"

    def __init__(
        self,
        model: str | nn.Module = DIGITS,
        data: str | os.PathLike[str] | DataSplits = "digits",
        sparsity: float = 0.5,
        objective: str = "untrained",
        granularity: str | None = None,
        init_seed: int = 0,
        weights: str | os.PathLike[str] | None = None,
        pretrain_epochs: int = 2,
        proxy_steps: int = 200,
        search_images: int = 1000,
        recalibration_images: int = 256,
        precision: str = "auto",
        device: str = "auto",
        render_mode: str | None = None,
    ) -> None:
        self.arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        EzPickle.__init__(self, **self.arguments)
        _check(render_mode, (None, *self.metadata["render_modes"]), "render_mode")
        _check_numbers(pretrain_epochs, proxy_steps, search_images, recalibration_images)
        if weights is not None and objective != "pretrained":
            raise ValueError(f"weights are those that 'pretrained' scores; {objective!r} starts from init_seed.")
        self.device, self.render_mode, self.objective = resolve_device(device), render_mode, objective
        self.data = data if isinstance(data, DataSplits) else load_data(data)
        self.initial = self._initial(model).to(self.device).eval()
        self.recipe = recipe_for(model).of(epochs=pretrain_epochs)
        self.granularity = granularity or _granularity(model)
        self.network = self._prunable(self._scored(weights))
        self.keep = kept_units(self.network.widths, sparsity)
        self.group_of = group_of(self.network.widths)
        proxy = proxy_of(objective, proxy_steps, self.recipe, init_seed)
        search = self.data.search.take(search_images)
        self.evaluator = MaskEvaluator(
            self.network, self.data, search, recalibration_images, self.device, precision, proxy=proxy
        )
        self._spaces()
        self._restart()

    def _initial(self, model: str | nn.Module) -> nn.Module:
        if isinstance(model, nn.Module):
            return copy.deepcopy(model)  # it may move to another device here
        return load_model(model, "random", self.data.num_classes, seed=self.arguments["init_seed"])

    def _scored(self, weights: str | os.PathLike[str] | None) -> nn.Module:
        """The network that the objective scores: the initial one, or what training made of it."""
        model = self.arguments["model"]
        if weights is not None and isinstance(model, str):
            return load_model(model, weights, self.data.num_classes).to(self.device)
        if weights is not None:
            raise ValueError("weights go with a model by name; give a module trained as it is to score.")
        seed = self.arguments["init_seed"]
        return weights_to_score(self.initial, self.data, self.objective, self.recipe, seed, self.device).eval()

    def _prunable(self, module: nn.Module) -> PrunableNetwork:
        x, _ = self.data.train.take(2, seed=1).tensors()
        try:
            with torch.no_grad():
                outputs = module(x.to(self.device))
        except RuntimeError as error:
            shape = self.data.input_shape
            raise ValueError(f"The network does not take images of {self.data.name!r}, {shape}: {error}") from error
        if outputs.shape != (2, self.data.num_classes):
            wanted = (2, self.data.num_classes)
            raise ValueError(f"The network has outputs {tuple(outputs.shape)} for 2 images instead of {wanted}.")
        return make_network(module, x[:1].to(self.device), self.granularity)

    def _spaces(self) -> None:
        self.observation_space = spaces.Graph(
            spaces.Box(-4.0, 4.0, (len(NODE_FEATURES),), np.float32),
            spaces.Box(-4.0, 4.0, (len(EDGE_FEATURES),), np.float32),
        )
        self.action_space = spaces.Box(0.0, 1.0, (len(self.group_of),), np.float32)
        self.network.graph_builder.set_sensitivity(self.evaluator.sensitivity())
        builder = self.network.graph_builder
        self.max_nodes, self.max_edges = builder.nodes, len(builder.edges)

    # ---- Gymnasium ------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[spaces.GraphInstance, dict[str, Any]]:
        """Back to the dense network. There are no options."""
        super().reset(seed=seed)
        if options:
            raise ValueError(f"Unknown reset option {sorted(options)[0]!r}: there are none.")
        self._restart()
        self._running = True
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[spaces.GraphInstance, SupportsFloat, bool, bool, dict[str, Any]]:
        """Score the mask of the highest of `action` [U]. The episode ends."""
        if not self._running:
            raise RuntimeError("No episode is running: call reset() first.")
        self.evaluate(self.mask_of(action))
        self._running = False
        return self._observation(), self._accuracy - 1.0, True, False, self._info()

    def render(self) -> Any:
        """The layers with what is kept: text, or an image uint8 [H, W, 3]."""
        if self.render_mode is None:
            raise ValueError("Rendering needs gym.make(..., render_mode='ansi') or 'rgb_array'.")
        draw = plan_table if self.render_mode == "ansi" else draw_plan
        return draw(self.network, self.widths, {"units": self.keep / len(self.group_of)}, self._accuracy)

    # ---- what searchers use -----------------------------------------------------------------------------------

    @property
    def evaluations(self) -> int:
        """Evaluations since the environment was made."""
        return self.evaluator.evaluations

    @property
    def widths(self) -> Ints:
        """Kept units of every layer, int64 [A]."""
        return widths_of(self.mask, self.network.widths)

    def mask_of(self, action: Any) -> Kept:
        """Bool [U]: the mask of scores [U], with `keep` units and at least one in every layer.

        Raises:
            ValueError: another shape, NaN or infinity.
        """
        scores = np.asarray(action)
        if scores.shape != self.action_space.shape:
            raise ValueError(f"The action must have shape {self.action_space.shape}, one score per unit.")
        if not np.isfinite(scores).all():
            raise ValueError(f"The action holds NaN or infinity at component {np.argmin(np.isfinite(scores))}.")
        return top_mask(scores, self.keep, self.network.widths)

    def evaluate(self, mask: Kept) -> float:
        """One evaluation: the search accuracy in [0, 1] of a mask bool [U], by the objective."""
        self.mask, self._accuracy = mask, self.evaluator.score(mask)
        self._episode_evaluations += 1
        return self._accuracy

    @cached_property
    def initial_network(self) -> PrunableNetwork:
        """The network with its initial weights, with the units of `network`."""
        return self.network if self.network.model is self.initial else self._prunable(self.initial)

    def rewound(self, mask: Kept) -> nn.Module:
        """The pruned network of a mask bool [U] with its initial weights, to be trained (weights: in `zeros_held`)."""
        return self.initial_network.slimmer.slim(mask)

    # ---- inside -----------------------------------------------------------------------------------------------

    def _restart(self) -> None:
        self.mask = np.ones(len(self.group_of), np.bool_)
        self._accuracy, self._episode_evaluations, self._running = NOT_SCORED, 0, False

    def _observation(self) -> spaces.GraphInstance:
        return self.network.graph(self.widths, self.keep / len(self.group_of))

    def _info(self) -> dict[str, Any]:
        network, widths = self.network, self.widths
        return {
            "mask": self.mask.copy(),
            "widths": widths,
            "macs_ratio": network.macs(widths) / network.macs(network.widths),
            "params_ratio": network.params(widths) / network.params(network.widths),
            "search_accuracy": self._accuracy,
            "is_success": self._accuracy != NOT_SCORED,
            "evaluations": self._episode_evaluations,
        }


def _granularity(model: str | nn.Module) -> str:
    return EARLY[model].granularity if isinstance(model, str) and model in EARLY else CHANNELS


def _check(value: Any, allowed: tuple[Any, ...], name: str) -> None:
    if value not in allowed:
        raise ValueError(f"Unknown {name} {value!r}: choose one of {', '.join(map(str, allowed))}.")


def _check_numbers(pretrain_epochs: int, proxy_steps: int, search_images: int, images: int) -> None:
    if min(pretrain_epochs, proxy_steps, search_images) < 1 or images < 2:
        raise ValueError(
            "pretrain_epochs, proxy_steps and search_images must be at least 1, recalibration_images at least 2."
        )
