"""GNNRL-Prune-v0: prune a network under a budget."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any, SupportsFloat

import numpy as np
from gymnasium import spaces
from gymnasium.utils import EzPickle
from torch import nn

from gnnrl_gym.checks import check_choice, check_share, check_whole
from gnnrl_gym.copies import copy_of
from gnnrl_gym.envs.budget import METRICS, Budget, Meter, budgets_by_metric
from gnnrl_gym.envs.landing import land, refill, round_widths, to_steps, to_widths
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
from gnnrl_gym.evaluation.determinism import deterministic
from gnnrl_gym.evaluation.objectives import OBJECTIVES, ObjectiveEvaluator, proxy_of, weights_to_score
from gnnrl_gym.evaluation.training import recipe_for
from gnnrl_gym.graph.groups import Ints
from gnnrl_gym.pruning.granularity import CHANNELS, Granularity
from gnnrl_gym.pruning.importance import IMPORTANCES
from gnnrl_gym.pruning.network import Plans, PrunableNetwork
from gnnrl_gym.pruning.sparsity import make_network
from gnnrl_gym.zoo import DataSplits, load_model
from gnnrl_gym.zoo.models import DIGITS

LANDINGS = ("exact", "free")


class PruneEnv(NetworkEnv, EzPickle):
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
    0 until the end; then minus the Top-1 error on the search split, in [-1, 0]. -1 when the steps run out. Learn with a
    discount of 1 (`gamma=1.0`), or `max_steps=1`: a loss that is put off counts less under any other.

    ## Episode End
    Terminated when the cost is within the budget. Truncated after `max_steps` steps without that; how many are left is
    not part of the observation.
    With `landing="exact"` an action that would cross the budget is scaled back, so the episode lands on the largest
    cost on its way that is not above it; with `landing="free"` it is not (the published behaviour).

    ## Arguments
    * `model`: a name for `load_model`, or an `nn.Module`. Default: the digits network that ships with the package.
    * `data`: a name or path for `load_data`, or `DataSplits`. Default `digits`. Colour images are normalised with
      ImageNet's mean and std; `load_data(..., mean=..., std=...)` takes others, and `DataSplits.of` takes arrays. The
      images of a folder are brought to the size that a named network is usually fed, else to 224 by 224.
    * `weights`: a state-dict file or torchvision weights name, with a model name; a module has its own.
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
    * `latencies`: a file of measured latencies, such as a run folder's `latency.json`; they count, and nothing is
      measured here.

    `reset(options={"budget": b})` sets the budget of one episode, counted by the same metrics.

    ## Info
    `widths`, `macs_ratio`, `params_ratio`, `search_accuracy` (-1 until there is one), `is_success`, `evaluations`
    (in this episode; the attribute `evaluations` counts them since the environment was made, over all its `slots`).
    With a budget of memory or latency also `memory_ratio`, `latency_ratio`.

    ## Version History
    * v0: first version.
    """

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
        latencies: str | os.PathLike[str] | None = None,
    ) -> None:
        self.arguments = own_arguments(locals())
        EzPickle.__init__(self, **self.arguments)
        budgets = self._checked_arguments(budget, metric)
        self.device = resolve_device(device)
        self.data = splits_for(data, model)
        recipe = recipe_for(model).of(epochs=pretrain_epochs)
        self.given = module = self._module(model)
        self.metric, self.landing, self.max_steps, self.render_mode = ",".join(budgets), landing, max_steps, render_mode
        self.network = self._prunable(module)
        self.round_to, full = round_to, self.network.widths
        floors = np.maximum(np.ceil(floor * full).astype(np.int64), self.network.least)
        self._steps_full, self._steps_floor = to_steps(full, round_to), to_steps(floors, round_to)
        self.floors = to_widths(self._steps_floor, full, round_to)
        self.meter = Meter(self.network, budgets, latencies)
        self.meter.check(budgets, self.floors)
        self.budgets = self._default_budgets = budgets
        if objective is not None:  # after the check: training takes its time, and changes no cost
            scored = weights_to_score(module, self.data, objective, recipe, 0, self.device)
            self.network = self.network if scored is module else self._prunable(scored)
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
        self._share = np.ones(len(full))  # that every group keeps
        self._earlier: list[np.ndarray] = []  # the same before each step of the episode
        self._make_spaces(len(full))
        self._restart()

    def _checked_arguments(self, budget: Budget, metric: str) -> dict[str, float]:
        """Shares of the cost by metric, once all that can be checked without data and network is."""
        given = self.arguments
        check_choice("metric", metric, METRICS)
        check_choice("importance", given["importance"], IMPORTANCES)
        check_choice("landing", given["landing"], LANDINGS)
        check_choice("objective", given["objective"], (None, *OBJECTIVES))
        check_choice("render_mode", given["render_mode"], (None, *self.metadata["render_modes"]))
        budgets = budgets_by_metric(budget, metric)
        if given["granularity"] != CHANNELS:
            Granularity.parse(given["granularity"])
            _check_counts_weights(given["granularity"], budgets)
        check_share("floor", given["floor"], "units")
        names = ("max_steps", "round_to", "search_images", "pretrain_epochs", "proxy_steps")
        check_whole(1, **{name: given[name] for name in names})
        check_whole(2, recalibration_images=given["recalibration_images"])
        check_model(given["model"])
        check_weights(given["model"], given["weights"])
        return budgets

    def _module(self, model: str | nn.Module) -> nn.Module:
        """The network as it is given, on the device."""
        if isinstance(model, nn.Module):
            module = copy_of(model)  # the caller's stays where it is
        else:
            weights, objective = self.arguments["weights"], self.arguments["objective"]
            named = "random" if objective and weights is None else weights
            module = load_model(str(model), named, self.data.num_classes)
        check_outputs(module.to(self.device), self.data, self.device)
        return module

    def _prunable(self, module: nn.Module) -> PrunableNetwork:
        importance, images = self.arguments["importance"], self.arguments["recalibration_images"]
        x, y = (part.to(self.device) for part in self.data.train.take(images, seed=1).tensors())
        batch = (x, y) if importance == "taylor" else None
        with deterministic(self.device, attention=True):  # the order of the units is the same again
            return make_network(module.eval(), x[:1], self.arguments["granularity"], importance, batch)

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
        """Remove the share `action` [A] of every group's remaining units.

        Raises:
            RuntimeError: no episode is running.
            ValueError: the action is of another shape, not finite, or has a ratio outside [0, 1]. Nothing has changed
                then.
        """
        landed = self._shrink(self._checked(action))
        self._earlier.append(self._share)
        self._share, self.widths = landed
        self._steps = (self._steps or 0) + 1
        terminated = self.within_budget()
        truncated = not terminated and self._steps >= self.max_steps
        reward = 0.0
        if terminated:
            self._accuracy = self.evaluate(self.widths)
            reward = self._accuracy - 1.0
        elif truncated:
            reward = -1.0
        if terminated or truncated:
            self._steps = None
        return self._observation(), reward, terminated, truncated, self._info()

    # ---- what searchers use -----------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether an episode is running: it has steps left, and has not reached the budget."""
        return self._steps is not None

    def cost_ratio(self, widths: Plans | None = None) -> float:
        """Share of the dense cost, by the budget's metric, of a plan [A] (default: the present one).

        Of several metrics the one whose budget is used up most.
        """
        plan = self._one_plan(widths)
        worst = max(self.budgets, key=lambda metric: self.meter.ratio(metric, plan) / self.budgets[metric])
        return self.meter.ratio(worst, plan)

    def within_budget(self, widths: Plans | None = None) -> bool:
        """Whether a plan [A] (default: the present one) meets all budgets."""
        return self.meter.excess(self._one_plan(widths), self.budgets) <= 0

    def evaluate(self, widths: Plans) -> float:
        """One evaluation: the recalibrated search accuracy in [0, 1] of a plan [A].

        Raises:
            ValueError: `widths` is not a valid plan (all methods that take one raise this); no evaluation is counted
                then.
        """
        plan = self._one_plan(widths)
        self._episode_evaluations += 1
        return self.evaluator.score(plan)

    def plan(self, share: np.ndarray) -> Ints:
        """The plan [A] that keeps the `share` [A] of every group, as this environment rounds widths; no budget."""
        return self._to_widths(round_widths(np.asarray(share, np.float64), self._steps_full, self._steps_floor))

    def slots(self, count: int) -> list[PruneEnv]:
        """`count` environments with states of their own that share network, data and evaluator with this one."""
        found = [object.__new__(type(self)) for _ in range(count)]
        for slot in found:
            slot.__dict__.update(self.__dict__)  # not copy.copy: EzPickle would make everything anew
            slot._np_random = copy.deepcopy(self._np_random)
        return found

    def peek(self, action: np.ndarray) -> Ints | None:
        """The plan that `step(action)` would score, or None where it would score none. Changes nothing.

        Raises:
            RuntimeError, ValueError: as `step`.
        """
        widths = self._shrink(self._checked(action))[1]
        return widths if self.within_budget(widths) else None

    def slim(self, widths: Plans | None = None) -> nn.Module:
        """The recalibrated pruned network of a plan [A] (default: the present one)."""
        return self.evaluator.build(self._one_plan(widths))

    # ---- inside -----------------------------------------------------------------------------------------------

    def _restart(self) -> None:
        self.widths = self.network.widths.copy()
        self._share, self._earlier = np.ones(len(self.widths)), []
        self._accuracy, self._episode_evaluations = NOT_SCORED, 0
        self._steps = None

    def _one_plan(self, widths: Plans | None) -> Ints:
        """A plan as it is given, a list say, as an array [A]; None: the present one."""
        return self.widths if widths is None else self.network.checked_one(widths)

    def _limits(self) -> Mapping[str, float]:
        return self.budgets

    def _checked(self, action: Any) -> np.ndarray:
        if self._steps is None:
            raise RuntimeError("No episode is running: call reset() first.")
        ratios = self._finite(np.asarray(action, np.float64), "ratio per channel group")
        if (ratios < -1e-6).any() or (ratios > 1 + 1e-6).any():
            raise ValueError(f"Pruning ratios lie in [0, 1], got {ratios.min():.4g} to {ratios.max():.4g}.")
        return ratios.clip(0, 1)

    def _shrink(self, ratios: np.ndarray) -> tuple[np.ndarray, Ints]:
        full, floors = self._steps_full, self._steps_floor
        if self.landing == "free":
            share = self._share * (1 - ratios)
            return share, self.plan(share)
        share, steps = land(self._share, ratios, full, floors, self._excess, 0.0)
        if self._earlier and self._excess(steps) <= 0:  # units that left in an earlier step may fit again
            steps = refill(steps, [*self._earlier, self._share], full, floors, self._excess, 0.0)
        return share, self._to_widths(steps)

    def _excess(self, steps: Ints) -> float:
        return self.meter.excess(self._to_widths(steps), self.budgets)

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


def _check_counts_weights(granularity: str, budgets: Mapping[str, float]) -> None:
    """Check that all budgets count parameters, as pruning of single weights needs it.

    Raises:
        ValueError: one counts something that does not change when single weights are removed.
    """
    for metric in budgets:
        if metric != "params":
            raise ValueError(
                f"granularity={granularity!r} removes single weights, which saves parameters, not {metric}: "
                "let the budget count them, with metric='params' (`--metric params`)."
            )
