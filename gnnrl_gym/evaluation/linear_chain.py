"""Scoring masks of a chain of linear layers from what the last mask left: a swap of few weights costs few products."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn

from gnnrl_gym.evaluation.folding import plain
from gnnrl_gym.graph.groups import Kept

MOST_CHANGED = 0.01  # share of the first layer's weights up to which only the difference is computed
REFRESH = 1000  # differences that are added up before the sums are computed anew: rounding stays at rounding


class LinearChain:
    """Flatten, linear layers, ReLU between them, under masks of their weights.

    The first layer's sums are kept for two masks: the last one asked for, and the one it was derived from. Whichever
    is nearer to the next mask is updated by the difference, so a search that swaps a few weights, and goes back to
    where it was when it rejects a swap, never computes the first layer (most of the work) again.

    Args:
        model: see `fits`; never changed.
        images: [N, ...].
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        self._weights = [layer.weight.detach() for layer in layers]
        self._biases = [torch.zeros(1) if m.bias is None else m.bias.detach()[:, None] for m in layers]
        self._ends = np.cumsum([weight.numel() for weight in self._weights])
        self._images = images.flatten(1).T.contiguous()
        self._states: list[tuple[Kept, Tensor]] = []  # first-layer mask and sums [O, N]; the last one asked for last
        self._age = 0

    @staticmethod
    def fits(model: nn.Module, units: dict[str, int]) -> bool:
        """Whether `model` is such a chain on the CPU, and `units` (weight -> entries) are all its weights in order.

        A subclass with a forward of its own, hooks, and layers that run twice compute something else.
        """
        layers = list(model) if isinstance(model, nn.Sequential) and plain(model, nn.Sequential) else []
        if not _alternates(layers) or not all(plain(layer, type(layer)) for layer in layers):
            return False
        weights = {f"{name}.weight": m.weight for name, m in model.named_children() if isinstance(m, nn.Linear)}
        once = len(weights) == len(layers) // 2
        on_cpu = all(weight.device.type == "cpu" for weight in weights.values())
        return once and on_cpu and {name: w.numel() for name, w in weights.items()} == units

    @torch.inference_mode()
    def outputs(self, kept: Kept) -> Tensor:
        """Logits [N, classes] with only the `kept` weights (bool [U])."""
        parts = np.split(kept, self._ends[:-1])
        values = self._first(parts[0])
        for weight, bias, part in zip(self._weights[1:], self._biases[1:], parts[1:], strict=True):
            values = (weight * torch.from_numpy(part).view_as(weight)) @ values.relu() + bias
        return values.T

    def _first(self, kept: Kept) -> Tensor:
        changes = [np.flatnonzero(kept != before) for before, _ in self._states]
        nearest = min(range(len(changes)), key=lambda i: len(changes[i]), default=None)
        self._age += 1
        if nearest is None or len(changes[nearest]) > MOST_CHANGED * len(kept) or self._age % REFRESH == 0:
            weight = self._weights[0]
            sums = (weight * torch.from_numpy(kept).view_as(weight)) @ self._images + self._biases[0]
            self._states = [(kept.copy(), sums)]
            return sums
        base, sums = self._states[nearest]
        sums = sums + self._difference(kept, changes[nearest])
        self._states = [(base, self._states[nearest][1]), (kept.copy(), sums)]
        return sums

    def _difference(self, kept: Kept, changed: Any) -> Tensor:
        weight = self._weights[0].numpy()
        values = weight.reshape(-1)[changed] * np.where(kept[changed], 1, -1).astype(weight.dtype)
        sparse = csr_array((values, np.divmod(changed, weight.shape[1])), shape=weight.shape)
        return torch.from_numpy(sparse @ self._images.numpy())


def _alternates(layers: list[nn.Module]) -> bool:
    kinds = [type(layer) for layer in layers]
    chain = [nn.Flatten, *(nn.Linear if i % 2 == 0 else nn.ReLU for i in range(len(kinds) - 1))]
    return kinds == chain and len(kinds) > 1 and len(kinds) % 2 == 0
