"""GNNRL-Mask-v0: choose which units of an untrained network stay."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, SupportsFloat

import numpy as np
from gymnasium import spaces
from gymnasium.utils import EzPickle
from torch import nn

from gnnrl_gym.checks import check_choice, check_seed, check_share, check_whole
from gnnrl_gym.copies import copy_of
from gnnrl_gym.envs.network import (
    NOT_SCORED,
    NetworkEnv,
    check_model,
    check_outputs,
    check_weights,
    own_arguments,
    splits_for,
)
from gnnrl_gym.evaluation.accuracy import resolve_device
from gnnrl_gym.evaluation.objectives import OBJECTIVES, MaskEvaluator, proxy_of, weights_to_score
from gnnrl_gym.evaluation.training import recipe_for
from gnnrl_gym.graph.groups import Kept
from gnnrl_gym.pruning.granularity import CHANNELS, UNSTRUCTURED
from gnnrl_gym.pruning.masks import group_of, kept_units, top_mask, widths_of
from gnnrl_gym.pruning.network import PrunableNetwork
from gnnrl_gym.pruning.sparsity import make_network
from gnnrl_gym.zoo import DataSplits, load_model
from gnnrl_gym.zoo.early import EARLY
from gnnrl_gym.zoo.models import DIGITS

GRANULARITIES = (CHANNELS, UNSTRUCTURED)


class MaskEnv(NetworkEnv, EzPickle):
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
    A component acts on a unit, not on a node, so the graph policies of `agents` don't fit here: the searchers of
    `gnnrl early` do.

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
    * `data`: a name or path for `load_data`, or `DataSplits`. Default `digits`. Colour images are normalised with
      ImageNet's mean and std; `load_data(..., mean=..., std=...)` takes others, and `DataSplits.of` takes arrays. The
      images of a folder are brought to the size that a named network is usually fed, else to 224 by 224.
    * `sparsity`: share of the units that go, in [0, 1).
    * `objective`: `untrained`, `pretrained` or `proxy`.
    * `granularity`: `channels` (filters), or `unstructured` (weights). None: what the model is made for, which is
      `unstructured` for `mlp-300-100`, else channels.
    * `init_seed`: of the initial weights of a named model.
    * `weights`: for `pretrained`, a state-dict file, if the dense network has been trained before, from the initial
      weights of this `init_seed`: a mask is rewound to them.
    * `pretrain_epochs`, `proxy_steps`: of these objectives; both train with the model's recipe
      (`gnnrl_gym.evaluation.training.RECIPES`).
    * `search_images`, `recalibration_images`: how many images score a mask, and re-estimate its statistics.
    * `precision`: of the scoring: `float32`, `bfloat16`, or `auto`; chains of linear layers are always scored in
      float32 on a CPU.
    * `device`: `auto`, `cpu`, `cuda`.
    * `render_mode`: `ansi` or `rgb_array`: the layers with what is kept.

    ## Info
    `mask` (bool [U]), `widths` (kept units of every layer), `macs_ratio`, `params_ratio`, `search_accuracy` (-1 until
    there is one), `is_success`, `evaluations` (in this episode; the attribute counts them since the environment was
    made).

    ## Version History
    * v0: first version.
    """

    evaluator: MaskEvaluator
    plan_key = "mask"  # where `info` has it
    acts_on_nodes = False

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
        self.arguments = own_arguments(locals())
        EzPickle.__init__(self, **self.arguments)
        self._check_arguments()
        self.arguments["init_seed"] = init_seed = int(init_seed)  # NumPy's are no seeds to some generators
        self.device, self.render_mode, self.objective = resolve_device(device), render_mode, objective
        self.data = splits_for(data, model)
        self.granularity = granularity or _granularity(model)
        self.initial = self._initial(model)
        self.initial_network = self._prunable(self.initial)
        self.keep = kept_units(self.initial_network.widths, sparsity)
        self.group_of = group_of(self.initial_network.widths)
        self.recipe = recipe_for(model).of(epochs=pretrain_epochs)
        self.network = self._scored_network(model, weights)
        self.given = self.initial if weights is None else self.network.model
        search, proxy = self.data.search.take(search_images), proxy_of(objective, proxy_steps, self.recipe, init_seed)
        self.evaluator = MaskEvaluator(
            self.network, self.data, search, recalibration_images, self.device, precision, proxy=proxy
        )
        self._make_spaces(len(self.group_of))
        self._restart()

    def _check_arguments(self) -> None:
        given = self.arguments
        check_choice("objective", given["objective"], OBJECTIVES)
        check_choice("granularity", given["granularity"], (None, *GRANULARITIES))
        check_choice("render_mode", given["render_mode"], (None, *self.metadata["render_modes"]))
        check_share("sparsity", given["sparsity"], "units")
        check_whole(1, **{name: given[name] for name in ("pretrain_epochs", "proxy_steps", "search_images")})
        check_whole(2, recalibration_images=given["recalibration_images"])
        check_seed(init_seed=given["init_seed"])
        if given["weights"] is not None and given["objective"] != "pretrained":
            raise ValueError(f"weights are those that 'pretrained' scores, not {given['objective']!r}: leave them out.")
        check_model(given["model"])
        check_weights(given["model"], given["weights"])

    def _initial(self, model: str | nn.Module) -> nn.Module:
        """The network with its initial weights, in eval mode, on the device."""
        if isinstance(model, nn.Module):
            module = copy_of(model)  # the caller's stays where it is
        else:
            module = load_model(model, "random", self.data.num_classes, seed=self.arguments["init_seed"])
        check_outputs(module.to(self.device), self.data, self.device)
        return module.eval()

    def _scored_network(self, model: str | nn.Module, weights: str | os.PathLike[str] | None) -> PrunableNetwork:
        """The network that the objective scores: the initial one, or what training made of it."""
        if weights is not None:
            return self._prunable(load_model(str(model), weights, self.data.num_classes).to(self.device))
        seed = self.arguments["init_seed"]
        scored = weights_to_score(self.initial, self.data, self.objective, self.recipe, seed, self.device)
        return self.initial_network if scored is self.initial else self._prunable(scored.eval())

    def _prunable(self, module: nn.Module) -> PrunableNetwork:
        x, _ = self.data.train.take(1, seed=1).tensors()
        return make_network(module, x.to(self.device), self.granularity)

    # ---- Gymnasium ------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[spaces.GraphInstance, dict[str, Any]]:
        """Back to the dense network. A seed begins a new search. There are no options."""
        super().reset(seed=seed)
        if options:
            raise ValueError(f"Unknown reset option {sorted(options)[0]!r}: there are none.")
        if seed is not None:
            self.evaluator.begin()
        self._restart()
        self._running = True
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[spaces.GraphInstance, SupportsFloat, bool, bool, dict[str, Any]]:
        """Score the mask that keeps the units with the highest scores in `action` [U]. The episode ends.

        Raises:
            RuntimeError: no episode is running.
            ValueError: the action is of another shape or not finite; nothing has changed then. Any finite score counts,
                also one outside [0, 1].
        """
        if not self._running:
            raise RuntimeError("No episode is running: call reset() first.")
        self.evaluate(self.mask_of(action))
        self._running = False
        return self._observation(), self._accuracy - 1.0, True, False, self._info()

    # ---- what searchers use -----------------------------------------------------------------------------------

    def mask_of(self, action: Any) -> Kept:
        """Bool [U]: the mask of scores [U], with `keep` units and at least one in every layer.

        Raises:
            ValueError: another shape, NaN or infinity.
        """
        return top_mask(self._finite(action, "score per unit"), self.keep, self.network.widths)

    def evaluate(self, mask: Kept) -> float:
        """One evaluation: the search accuracy in [0, 1] of a mask bool [U], by the objective.

        Raises:
            ValueError: `mask` is of another shape, or not only of True and False (1 and 0). No evaluation is counted
                then.
        """
        mask = self._checked_mask(mask)
        self._accuracy = self.evaluator.score(mask)
        self.mask, self.widths = mask, widths_of(mask, self.network.widths)
        self._episode_evaluations += 1
        return self._accuracy

    def rewound(self, mask: Kept) -> nn.Module:
        """The pruned network of a mask bool [U] with its initial weights, to be trained (weights: in `zeros_held`)."""
        return self.initial_network.slimmer.slim(self._checked_mask(mask))

    # ---- inside -----------------------------------------------------------------------------------------------

    def _restart(self) -> None:
        self.mask, self.widths = np.ones(len(self.group_of), np.bool_), self.network.widths.copy()
        self._accuracy, self._episode_evaluations, self._running = NOT_SCORED, 0, False

    def _checked_mask(self, mask: Any) -> Kept:
        """A mask [U] as it is given, of zeros and ones say, as bool.

        Raises:
            ValueError: another shape, or something else than zeros and ones.
        """
        values = np.asarray(mask)
        if values.shape != self.mask.shape or not ((values == 0) | (values == 1)).all():
            wanted = f"A mask says of each of {len(self.mask)} units whether it stays: True or False, shape"
            raise ValueError(f"{wanted} {self.mask.shape}; got {values.dtype} of shape {values.shape}.")
        return values.astype(np.bool_)

    def _limits(self) -> Mapping[str, float]:
        return {"units": self.keep / len(self.group_of)}

    def _observation(self) -> spaces.GraphInstance:
        return self.network.graph(self.widths, self.keep / len(self.group_of))

    def _info(self) -> dict[str, Any]:
        network, widths = self.network, self.widths
        return {
            "mask": self.mask.copy(),
            "widths": widths.copy(),
            "macs_ratio": network.macs(widths) / network.macs(network.widths),
            "params_ratio": network.params(widths) / network.params(network.widths),
            "search_accuracy": self._accuracy,
            "is_success": self._accuracy != NOT_SCORED,
            "evaluations": self._episode_evaluations,
        }


def _granularity(model: str | nn.Module) -> str:
    return EARLY[model].granularity if isinstance(model, str) and model in EARLY else CHANNELS
