"""What a choice of units is worth before the pruned network has been trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gnnrl_gym.checks import check_choice
from gnnrl_gym.copies import copy_of
from gnnrl_gym.evaluation.accuracy import PlanEvaluator
from gnnrl_gym.evaluation.linear_chain import LinearChain
from gnnrl_gym.evaluation.training import Recipe, train
from gnnrl_gym.graph.groups import Floats, Ints, Kept
from gnnrl_gym.pruning.masks import digest, zeros_held
from gnnrl_gym.pruning.network import PrunableNetwork
from gnnrl_gym.zoo import DataSplits

OBJECTIVES = ("untrained", "pretrained", "proxy")


def weights_to_score(
    model: nn.Module, data: DataSplits, objective: str, recipe: Recipe, seed: int, device: torch.device
) -> nn.Module:
    """The network whose masks an objective scores: `model` itself, or for ``pretrained`` a copy of it that was trained
    by `recipe`.

    Raises:
        ValueError: an unknown objective.
    """
    check_choice("objective", objective, OBJECTIVES)
    return train(copy_of(model), data, recipe, seed, device) if objective == "pretrained" else model


def proxy_of(objective: str | None, steps: int, recipe: Recipe, seed: int) -> tuple[int, Recipe, int] | None:
    """What `ObjectiveEvaluator` trains each candidate by, if anything.

    Raises:
        ValueError: `steps` is below 1.
    """
    if objective != "proxy":
        return None
    if steps < 1:
        raise ValueError(f"proxy_steps must be at least 1, got {steps}.")
    return steps, recipe, seed


class ObjectiveEvaluator(PlanEvaluator):
    """Scores plans (widths [A]) or masks (bool [U]): slim -> (train a little) -> recalibrate -> accuracy.

    Args:
        network: the network with the weights that are scored (`weights_to_score`).
        data: train split, for recalibration and the proxy's training.
        options: of `PlanEvaluator`: the search split, `recalibration_images`, `device`, `precision`.
        proxy: for the objective ``proxy``: how many steps of which recipe come before the score, and their seed, the
            same for every candidate.
    """

    def __init__(
        self, network: PrunableNetwork, data: DataSplits, *options: Any, proxy: tuple[int, Recipe, int] | None = None
    ) -> None:
        super().__init__(network, data.train, *options)
        self._proxy = None if proxy is None else (data, *proxy)

    def _cut(self, plan: Ints | Kept) -> nn.Module:
        kept = np.asarray(plan, np.bool_) if plan.dtype == np.bool_ else self.network.kept(plan)
        with torch.inference_mode(False):  # what is made in it can't be trained
            module = self._fast(self.network.slimmer.slim(kept))
        if self._proxy:
            data, steps, recipe, seed = self._proxy
            with zeros_held(self.network, module, kept):
                train(module, data, recipe, seed, self.device, steps)
        return module

    def prefetch(self, plans: Sequence[Ints]) -> None:
        """As before; but threads don't train networks side by side, since dropout draws from one source for all."""
        if not self._proxy or (self.workers and self.workers.apart):
            super().prefetch(plans)

    def sensitivity(self) -> Floats:
        """As before, of the weights as they are: nothing is trained."""
        proxy, self._proxy = self._proxy, None
        try:
            return super().sensitivity()
        finally:
            self._proxy = proxy


class MaskEvaluator(ObjectiveEvaluator):
    """`ObjectiveEvaluator` of masks (bool [U]); those of a chain of linear layers are scored from the last one's."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        units = getattr(self.network.slimmer, "units", {})
        chain = not self._proxy and self.device.type == "cpu" and LinearChain.fits(self.network.model, units)
        self._chain = LinearChain(self.network.model, self._search) if chain else None

    def score(self, plan: Ints | Kept) -> float:
        """One evaluation: Top-1 accuracy in [0, 1] of a mask bool [U] on the search images. Equal masks get the same
        score."""
        self.evaluations += 1
        key = digest(np.asarray(plan, np.bool_)).encode()
        if key not in self._scores:
            self._scores[key] = self._measure(plan)
        return self._scores[key]

    def begin(self) -> None:
        """Begin a new search. A chain forgets earlier masks and their scores, since the rounding of its sums depends on
        the masks before."""
        if self._chain is not None:
            self._chain = LinearChain(self.network.model, self._search)
            self._scores.clear()

    def remember(self, plan: Ints | Kept | str, accuracy: float) -> None:
        """Take the score of a mask (bool [U], or its `digest`) that an earlier run has measured.

        Not that of a chain: how its sums are rounded depends on the masks before, so equal scores need them all again.
        """
        if self._chain is None:
            key = plan if isinstance(plan, str) else digest(np.asarray(plan, np.bool_))
            self._scores[key.encode()] = accuracy

    def _measure(self, plan: Ints | Kept) -> float:
        if self._chain is None:
            return super()._measure(plan)  # type: ignore[arg-type]
        predicted = self._chain.outputs(np.asarray(plan, np.bool_)).argmax(1)
        return int((predicted == self._labels).sum()) / len(self._labels)
