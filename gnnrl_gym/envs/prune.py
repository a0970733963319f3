"""GNNRL-Prune-v0: prune a network under a budget."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import EzPickle
from torch import nn

from gnnrl_gym.envs.budget import METRICS, Budget, Meter, budgets_by_metric
from gnnrl_gym.envs.landing import land, round_widths, to_steps, to_widths
from gnnrl_gym.envs.rendering import draw_plan, plan_table
from gnnrl_gym.evaluation.accuracy import resolve_device
from gnnrl_gym.evaluation.objectives import ObjectiveEvaluator, proxy_of, weights_to_score
from gnnrl_gym.evaluation.training import recipe_for
from gnnrl_gym.graph.features import EDGE_FEATURES, LEVELS, NODE_FEATURES
from gnnrl_gym.graph.groups import Ints
from gnnrl_gym.pruning.network import PrunableNetwork
from gnnrl_gym.pruning.sparsity import make_network
from gnnrl_gym.zoo import DataSplits, load_data, load_model
from gnnrl_gym.zoo.models import DIGITS

LANDINGS = ("exact", "free")
NOT_SCORED = -1.0  # not NaN: equal infos must compare equal


class PruneEnv(gym.Env[spaces.GraphInstance, np.ndarray], EzPickle):
    """Prune a network to a budget, keep its accuracy.

    ## Description
    The state is the network as a hierarchical graph, pruned as far as it is now. An action gives every channel group
    the share of its remaining units to remove, the least important first. Once the network's cost is within the
    budget the episode ends: the network is really cut (`slim`), its BatchNorm statistics are re-estimated on training
    images (`recalibrate`), and its accuracy on the search split is the reward. Yu, Mazaheri and Jannesari (ICML 2022),
    section 4, with costs counted on integer channels and a reward from images set apart for the search.

    ## Observation Space
    `Graph(Box(F,), Box(E,))`. The first A nodes are the decision nodes, one per channel group, then operations,
    layers, blocks, the network. Columns: `gnnrl_gym.graph.features.NODE_FEATURES` and `EDGE_FEATURES`.

    ## Action Space
    `Box(0, 1, (A,))`: pruning ratios; component i acts on node i.

    ## Reward
    0 until the end; then minus the Top-1 error on the search split, in [-1, 0]. -1 when the steps run out.

    ## Episode End
    Terminated when the cost is within the budget. Truncated after `max_steps` steps without that.
    With `landing="exact"` an action that would cross the budget is scaled back, so the episode lands on the largest
    cost on its way that is not above it; with `landing="free"` it is not (the published behaviour).

    ## Arguments
    * `model`: a name for `load_model`, or an `nn.Module`. Default: the digits network that ships with the package.
    * `data`: a name or path for `load_data`, or `DataSplits`. Default `digits`.
    * `weights`: a state-dict file or torchvision weights name, with a model name.
    * `budget`: the share of the dense cost that is allowed, in (0, 1); or shares by metric, all of which have to be
      met, such as `{"macs": 0.5, "latency": 0.6}`.
    * `metric`: what a single number counts: `macs`, `params`, `memory` (peak of the activations, see
      `gnnrl_gym.pruning.memory`) or `latency` (of one image, predicted by a table that is measured here once and
      cached, see `gnnrl_gym.pruning.latency`).
    * `importance`: what orders the units: l1, l2, bn-scale, taylor, random.
    * `landing`: `exact` or `free`. `max_steps`: steps before truncation.
    * `floor`: share of every group's units that always stays (at least one unit does).
    * `round_to`: widths are multiples of it, or full. A group with fewer units than that stays whole.
    * `granularity`: what a ratio removes: `channels`, or entries of single layers: `unstructured`, `2:4` (any N:M),
      `block4x1` (any size); these save parameters only, so they go with `metric="params"`.
    * `search_images`, `recalibration_images`: how many images score a plan, and re-estimate its statistics.
    * `precision`: of the scoring: `float32`, `bfloat16`, or `auto`, the latter where it is worth it. Networks that
      are handed out are float32.
    * `device`: `auto`, `cpu`, `cuda`.
    * `render_mode`: `ansi` or `rgb_array`: the groups with what is kept and what it costs.
    * `objective`: None scores the network as it is given. To prune before training, as in `GNNRL-Mask-v0`: `untrained`,
      `pretrained` (after `pretrain_epochs` epochs) or `proxy` (each plan after `proxy_steps` steps of training). They
      start from random weights where a named model is given no others.

    `reset(options={"budget": b})` sets the budget of one episode, counted by the same metrics.

    ## Info
    `widths`, `macs_ratio`, `params_ratio`, `search_accuracy` (-1 until there is one), `is_success`, `evaluations`
    (in this episode; the attribute `evaluations` counts them since the environment was made, over all its `slots`).
    With a budget of memory or latency also `memory_ratio`, `latency_ratio`.

    ## Version History
    * v0: first version.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 1}
    levels = len(LEVELS)
    plan_key = "widths"  # where `info` has the plan

    def __init__(
        self,
        model: str | nn.Module = DIGITS,
        data: str | os.PathLike[str] | DataSplits = "digits",
        weights: str | os.PathLike[str] | None = None,
        budget: Budget = 0.5,
        metric: str = "macs",
        importance: str = "l2",
        landing: str = "exact",
        max_steps: int = 5,
        floor: float = 0.1,
        round_to: int = 1,
        granularity: str = "channels",
        search_images: int = 1000,
        recalibration_images: int = 256,
        precision: str = "auto",
        device: str = "auto",
        render_mode: str | None = None,
        objective: str | None = None,
        pretrain_epochs: int = 2,
        proxy_steps: int = 200,
    ) -> None:
        self.arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        EzPickle.__init__(self, **self.arguments)
        _check(metric, METRICS, "metric")
        _check(landing, LANDINGS, "landing")
        _check(render_mode, (None, *self.metadata["render_modes"]), "render_mode")
        budgets = budgets_by_metric(budget, metric)
        _check_numbers(floor, max_steps, round_to, search_images, recalibration_images)
        self.device = resolve_device(device)
        self.data = data if isinstance(data, DataSplits) else load_data(data)
        # a module of the caller's is copied: it may move to another device here
        own = copy.deepcopy(model) if isinstance(model, nn.Module) else None
        named = "random" if objective and weights is None else weights
        module = (load_model(str(model), named, self.data.num_classes) if own is None else own).to(self.device)
        recipe = recipe_for(model).of(epochs=pretrain_epochs)
        if objective is not None:
            module = weights_to_score(module, self.data, objective, recipe, 0, self.device)
        self.metric, self.landing, self.max_steps, self.render_mode = ",".join(budgets), landing, max_steps, render_mode
        self.network = self._prunable(module, importance, recalibration_images)
        self.round_to, full = round_to, self.network.widths
        floors = np.maximum(np.ceil(floor * full).astype(np.int64), self.network.least)
        self._steps_full, self._steps_floor = to_steps(full, round_to), to_steps(floors, round_to)
        self.floors = to_widths(self._steps_floor, full, round_to)
        self.meter = Meter(self.network, budgets)
        self.meter.check(budgets, self.floors)
        self.budgets = self._default_budgets = budgets
        self.evaluator = ObjectiveEvaluator(
            self.network,
            self.data,
            self.data.search.take(search_images),
            recalibration_images,
            self.device,
            precision,
            proxy=proxy_of(objective, proxy_steps, recipe, 0),
        )
        self._steps: int | None = None  # None: no episode is running
        self._episode_evaluations = 0
        self._spaces()
        self._restart()

    def _prunable(self, module: nn.Module, importance: str, images: int) -> PrunableNetwork:
        x, y = self.data.train.take(images, seed=1).tensors()
        x, y = x.to(self.device), y.to(self.device)
        try:
            with torch.no_grad():
                outputs = module.eval()(x[:1])
        except RuntimeError as error:
            raise ValueError(
                f"The network does not take the images of {self.data.name!r}, shape {self.data.input_shape}: {error}"
            ) from error
        if outputs.ndim != 2 or outputs.shape[1] != self.data.num_classes:
            raise ValueError(
                f"The network answers with shape {tuple(outputs.shape)}, but {self.data.name!r} has "
                f"{self.data.num_classes} classes: use a network with that many outputs."
            )
        batch = (x, y) if importance == "taylor" else None
        return make_network(module, x[:1], self.arguments["granularity"], importance, batch)

    def _spaces(self) -> None:
        count = len(self.network.widths)
        self.observation_space = spaces.Graph(
            spaces.Box(-4.0, 4.0, (len(NODE_FEATURES),), np.float32),
            spaces.Box(-4.0, 4.0, (len(EDGE_FEATURES),), np.float32),
        )
        self.action_space = spaces.Box(0.0, 1.0, (count,), np.float32)
        self.network.graph_builder.set_sensitivity(self.evaluator.sensitivity())
        builder = self.network.graph_builder
        self.max_nodes, self.max_edges = builder.nodes, len(builder.edges)

    @property
    def budget(self) -> float:
        """The budget; of several the tightest, which is what the graph shows."""
        return min(self.budgets.values())

    def _budgets_for(self, budget: Budget) -> dict[str, float]:
        """Budgets of one episode: a number where there is one metric, else shares of the same metrics."""
        if not isinstance(budget, Mapping) and len(self._default_budgets) > 1:
            raise ValueError(f"budget={budget} could be of {self.metric}: give a dictionary with a share for each.")
        budgets = budgets_by_metric(budget, self.metric)
        if set(budgets) != set(self._default_budgets):
            raise ValueError(f"This environment's budget counts {self.metric}, not {','.join(budgets)}: make another.")
        self.meter.check(budgets, self.floors)
        return budgets

    # ---- Gymnasium ------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[spaces.GraphInstance, dict[str, Any]]:
        """Back to the dense network. Options: `budget` for this episode."""
        super().reset(seed=seed)
        options = options or {}
        if unknown := set(options) - {"budget"}:
            raise ValueError(f"Unknown reset option {sorted(unknown)[0]!r}: the only one is 'budget'.")
        budgets = self._budgets_for(options["budget"]) if "budget" in options else self._default_budgets
        self.budgets = budgets
        self._restart()
        self._steps = 0
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[spaces.GraphInstance, SupportsFloat, bool, bool, dict[str, Any]]:
        """Remove the share `action` [A] of every group's remaining units."""
        ratios = self._checked(action)
        self._share, self.widths = self._shrink(ratios)
        self._steps = (self._steps or 0) + 1
        terminated = self.within_budget()
        truncated = not terminated and self._steps >= self.max_steps
        reward = 0.0
        if terminated:
            reward = self.evaluate(self.widths) - 1.0
        elif truncated:
            reward = -1.0
        if terminated or truncated:
            self._steps = None
        return self._observation(), reward, terminated, truncated, self._info()

    def render(self) -> Any:
        """The groups with what is kept and what it costs: text, or an image uint8 [H, W, 3]."""
        if self.render_mode is None:
            raise ValueError("Rendering needs gym.make(..., render_mode='ansi') or 'rgb_array'.")
        draw = plan_table if self.render_mode == "ansi" else draw_plan
        return draw(self.network, self.widths, self.budgets, self._accuracy)

    # ---- what searchers use -----------------------------------------------------------------------------------

    def cost_ratio(self, widths: Ints | None = None) -> float:
        """Share of the dense cost, by the budget's metric, of a plan [A] (default: the present one).

        Of several metrics the one whose budget is used up most.
        """
        plan = self.widths if widths is None else widths
        worst = max(self.budgets, key=lambda metric: self.meter.ratio(metric, plan) / self.budgets[metric])
        return self.meter.ratio(worst, plan)

    def within_budget(self, widths: Ints | None = None) -> bool:
        """Whether a plan [A] (default: the present one) meets all budgets."""
        plan = self.widths if widths is None else widths
        return all(self.meter.ratio(metric, plan) <= budget for metric, budget in self.budgets.items())

    @property
    def evaluations(self) -> int:
        """Evaluations since the environment was made; its slots count together."""
        return self.evaluator.evaluations

    def evaluate(self, widths: Ints) -> float:
        """One evaluation: the recalibrated search accuracy in [0, 1] of a plan [A]."""
        self._episode_evaluations += 1
        self._accuracy = self.evaluator.score(widths)
        return self._accuracy

    def slots(self, count: int) -> list[PruneEnv]:
        """`count` environments with states of their own that share network, data and evaluator with this one."""
        found = [object.__new__(type(self)) for _ in range(count)]
        for slot in found:
            slot.__dict__.update(self.__dict__)  # not copy.copy: EzPickle would make everything anew
        return found

    def peek(self, action: np.ndarray) -> Ints | None:
        """The plan that `step(action)` would score, or None where it would score none. Changes nothing."""
        widths = self._shrink(self._checked(action))[1]
        return widths if self.within_budget(widths) else None

    def slim(self, widths: Ints | None = None) -> nn.Module:
        """The recalibrated pruned network of a plan [A] (default: the present one)."""
        return self.evaluator.build(self.widths if widths is None else widths)

    # ---- inside -----------------------------------------------------------------------------------------------

    def _restart(self) -> None:
        self.widths = self.network.widths.copy()
        self._share = np.ones(len(self.widths))
        self._accuracy, self._episode_evaluations = NOT_SCORED, 0
        self._steps = None

    def _checked(self, action: Any) -> np.ndarray:
        if self._steps is None:
            raise RuntimeError("No episode is running: call reset() first.")
        ratios = np.asarray(action, np.float64)
        shape = self.action_space.shape
        if ratios.shape != shape:
            raise ValueError(f"The action must have shape {shape}, one ratio per channel group, got {ratios.shape}.")
        if not np.isfinite(ratios).all():
            raise ValueError(f"The action holds NaN or infinity at component {np.argmin(np.isfinite(ratios))}.")
        if (ratios < -1e-6).any() or (ratios > 1 + 1e-6).any():
            raise ValueError(f"Pruning ratios lie in [0, 1], got {ratios.min():.4g} to {ratios.max():.4g}.")
        return ratios.clip(0, 1)

    def _shrink(self, ratios: np.ndarray) -> tuple[np.ndarray, Ints]:
        full, floors = self._steps_full, self._steps_floor
        if self.landing == "free":
            share = self._share * (1 - ratios)
            return share, self._to_widths(round_widths(share, full, floors))
        cost, limit = self.meter.landing(self.budgets)
        share, steps = land(self._share, ratios, full, floors, lambda steps: cost(self._to_widths(steps)), limit)
        return share, self._to_widths(steps)

    def _to_widths(self, steps: Ints) -> Ints:
        return to_widths(steps, self.network.widths, self.round_to)

    def _observation(self) -> spaces.GraphInstance:
        return self.network.graph(self.widths, self.budget)

    def _info(self) -> dict[str, Any]:
        metrics = dict.fromkeys(("macs", "params", *self._default_budgets))
        return {
            "widths": self.widths.copy(),
            **{f"{metric}_ratio": self.meter.ratio(metric, self.widths) for metric in metrics},
            "search_accuracy": self._accuracy,
            "is_success": self.within_budget(),
            "evaluations": self._episode_evaluations,
        }


def _check(value: Any, allowed: tuple[Any, ...], name: str) -> None:
    if value not in allowed:
        raise ValueError(f"Unknown {name} {value!r}: choose one of {', '.join(map(str, allowed))}.")


def _check_numbers(floor: float, max_steps: int, round_to: int, search_images: int, images: int) -> None:
    if not 0 <= floor < 1:
        raise ValueError(f"floor is a share of units in [0, 1), got {floor}.")
    if not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to is a whole number of units, at least 1, got {round_to!r}.")
    if min(max_steps, search_images) < 1 or images < 2:
        raise ValueError("max_steps and search_images must be at least 1, recalibration_images at least 2.")
