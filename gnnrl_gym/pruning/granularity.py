"""What single weights are removed as, entries, blocks or N of every M (`Granularity`), and how (`WeightMasker`)."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gnnrl_gym.copies import copy_of
from gnnrl_gym.graph.groups import Kept

CHANNELS, UNSTRUCTURED = "channels", "unstructured"


@dataclass(frozen=True)
class Granularity:
    """What one unit is: a tile of `rows` consecutive outputs times `columns` consecutive inputs of a layer, at one
    position of its kernel, of which all entries but the `stay` largest are zero once the unit is removed.

    Rows and columns that fill no whole tile belong to no unit: they stay.
    """

    rows: int = 1
    columns: int = 1
    stay: int = 0

    @classmethod
    def parse(cls, text: str) -> Granularity:
        """``unstructured``; ``block4x1``: 4 outputs x 1 input; ``2:4``: 2 of every 4 inputs stay.

        Raises:
            ValueError: anything else.
        """
        text = str(text)  # None, say: as any other mistake
        if text == UNSTRUCTURED:
            return cls()
        if (block := re.fullmatch(r"block(\d+)x(\d+)", text)) and int(block[1]) * int(block[2]) > 1:
            return cls(int(block[1]), int(block[2]))
        if (pattern := re.fullmatch(r"(\d+):(\d+)", text)) and 0 < int(pattern[1]) < int(pattern[2]):
            return cls(1, int(pattern[2]), int(pattern[1]))
        raise ValueError(
            f"Unknown granularity {text!r}: choose {CHANNELS}, unstructured, a block such as block4x1 (outputs x "
            "inputs), or N:M such as 2:4 (N of M inputs stay)."
        )

    def units(self, shape: tuple[int, ...]) -> int:
        """Whole tiles of a weight [O, I, *kernel]."""
        return (shape[0] // self.rows) * (shape[1] // self.columns) * math.prod(shape[2:])

    def tiles(self, weight: Tensor) -> Tensor:
        """The tiles [units, rows * columns] of a weight [O, I, *kernel]; a view where a tile is one entry."""
        r, c = self.rows, self.columns
        outputs, inputs, *kernel = weight.shape
        whole = weight[: outputs // r * r, : inputs // c * c]
        split = whole.reshape(outputs // r, r, inputs // c, c, *kernel)
        return split.movedim((1, 3), (-2, -1)).reshape(-1, r * c)

    def untile(self, tiles: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `tiles`, zero in the entries of no tile."""
        r, c = self.rows, self.columns
        outputs, inputs, *kernel = shape
        split = tiles.reshape(outputs // r, inputs // c, *kernel, r, c).movedim((-2, -1), (1, 3))
        result = tiles.new_zeros(shape)
        result[: outputs // r * r, : inputs // c * c] = split.reshape(outputs // r * r, inputs // c * c, *kernel)
        return result

    def leaving(self, tiles: Tensor) -> Tensor:
        """Bool [units, size]: the entries that go with a unit, all but the `stay` largest of its tile."""
        if not self.stay:
            return torch.ones_like(tiles, dtype=torch.bool)
        largest = tiles.abs().topk(self.stay, dim=1).indices
        return torch.ones_like(tiles, dtype=torch.bool).scatter(1, largest, False)

    def scores(self, weight: Tensor) -> Tensor:
        """Norm of what goes with each unit, [units]; on the CPU, so that devices agree on the order."""
        tiles = self.tiles(weight.detach().cpu().float())
        return (tiles * self.leaving(tiles)).norm(dim=1) if tiles.shape[1] > 1 else tiles[:, 0].abs()


class WeightMasker:
    """Zeroes removed units in copies of a network; for weights, unlike channels, slim and mask are one thing.

    Args:
        model: the dense network; never changed.
        granularity: what a unit is.
        units: layer weight -> number of its units. Units are numbered layer by layer.
    """

    def __init__(self, model: nn.Module, granularity: Granularity, units: dict[str, int]) -> None:
        self.model, self.granularity, self.units = model, granularity, units

    def mask(self, kept: Kept) -> nn.Module:
        """Copy in which the entries of the units that are not `kept` (bool [U]) are zero."""
        model = copy_of(self.model)
        for parameter, gone in self._removed(model, kept):
            leaving = gone[:, None] & self.granularity.leaving(self.granularity.tiles(parameter.detach()))
            with torch.no_grad():
                parameter.masked_fill_(self.granularity.untile(leaving, tuple(parameter.shape)), 0)
        return model

    slim = mask

    def _removed(self, model: nn.Module, kept: Kept) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The weight of every layer of `model`, and which of its units are gone, bool [units]."""
        parameters = dict(model.named_parameters())
        ends = np.cumsum(list(self.units.values()))
        if kept.shape != (ends[-1],):
            raise ValueError(f"kept is one bool per unit, [{ends[-1]}], got {kept.shape}.")
        for name, gone in zip(self.units, np.split(~kept, ends[:-1]), strict=True):
            yield parameters[name], torch.from_numpy(gone).to(parameters[name].device)

    @contextlib.contextmanager
    def zeros_held(self, module: nn.Module, kept: Kept) -> Iterator[None]:
        """Inside, training leaves the zeros of removed units zero, whatever code does the training.

        `module` was built with `kept` (bool [U]). Gradients of its zeros are zeroed as they arrive. An optimiser that
        works entry by entry (SGD with momentum and weight decay, Adam, AdamW) then leaves an entry that is zero
        exactly there, provided that it is made in here: it may hold no momentum of before.

        Raises:
            ValueError: `module` has not the zeros that `kept` says.
        """
        handles = []
        for parameter, gone in self._removed(module, kept):
            zeros = gone[:, None] & (self.granularity.tiles(parameter.detach()) == 0)
            if bool((zeros.sum(1) < gone * (zeros.shape[1] - self.granularity.stay)).any()):
                raise ValueError("The network is not zero where this plan removes weights: build it with this plan.")
            if parameter.requires_grad:
                held = self.granularity.untile(zeros, tuple(parameter.shape))
                handles.append(parameter.register_post_accumulate_grad_hook(_zero_gradient(held)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _zero_gradient(held: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:  # filled, not multiplied: infinity times 0 is NaN (a loss scaler's overflow)
            parameter.grad.masked_fill_(held.to(parameter.grad.device), 0)

    return hook
