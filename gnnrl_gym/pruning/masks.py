"""Masks: which single units of a network are kept, chosen over all layers together.

A mask is bool [U], the units numbered group by group (layer by layer) as in `PrunableNetwork.widths`, so that
``network.slimmer.mask(kept)`` and ``network.slimmer.slim(kept)`` build its network, and ``widths_of`` its plan.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from gnnrl_gym.graph.groups import Ints, Kept
from gnnrl_gym.pruning.network import PrunableNetwork
from gnnrl_gym.pruning.sparsity import SparseNetwork


def group_of(widths: Ints) -> Ints:
    """Group of every unit, int64 [U], from the full widths [A]."""
    return np.repeat(np.arange(len(widths)), widths)


def kept_units(widths: Ints, sparsity: float) -> int:
    """How many units stay at a sparsity: U minus the share `sparsity` of them, rounded to the nearest.

    Raises:
        ValueError: `sparsity` is not in [0, 1), or leaves fewer units than there are groups.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the share of units that go, in [0, 1), got {sparsity}.")
    units = int(widths.sum())
    keep = units - round(sparsity * units)
    if keep < len(widths):
        digits = len(str(2 * units))  # enough to tell units apart; rounded down, since what is said has to be allowed
        most = (units - len(widths)) * 10**digits // units / 10**digits
        raise ValueError(
            f"sparsity={sparsity} leaves {keep} of {units} units, but each of the {len(widths)} layers keeps one: "
            f"give {most:.{digits}g} at most."
        )
    return keep


def top_mask(scores: npt.ArrayLike, keep: int, widths: Ints) -> Kept:
    """Bool [U]: the `keep` highest of `scores` [U], but at least the best one of every group.

    Equal scores: the first units stay. Without that one rule on groups it is the plain top-k.
    """
    values = np.asarray(scores)
    positive = values > 0
    kept = positive if np.count_nonzero(positive) == keep else _highest(values, keep)  # a mask is its own top-k
    empty = np.flatnonzero(widths_of(kept, widths) == 0)
    if not len(empty):
        return np.asarray(kept)
    starts = np.cumsum(widths) - widths
    firsts = [start + int(np.argmax(values[start : start + w])) for start, w in zip(starts, widths, strict=True)]
    lifted = values.astype(np.float64)
    lifted[firsts] = np.inf
    return _highest(lifted, keep)


def _highest(values: npt.NDArray[Any], keep: int) -> Kept:
    if keep == len(values):
        return np.ones(len(values), np.bool_)
    threshold = np.partition(values, len(values) - keep)[len(values) - keep]
    kept = values > threshold
    ties = np.flatnonzero(values == threshold)
    kept[ties[: keep - np.count_nonzero(kept)]] = True
    return np.asarray(kept)


def digest(kept: Kept) -> str:
    """32 hexadecimal digits, the same for equal masks and, in all likelihood, others for others."""
    return hashlib.blake2b(np.packbits(kept).tobytes(), digest_size=16).hexdigest()


def widths_of(kept: Kept, widths: Ints) -> Ints:
    """Kept units of every group, int64 [A]."""
    return np.add.reduceat(kept, np.cumsum(widths) - widths, dtype=np.int64)


def same_counts(kept: Kept, widths: Ints, rng: np.random.Generator) -> Kept:
    """A random mask with as many units in every group as `kept` has: the control that tells whether a mask says more
    than how much of each layer stays (Frankle et al. 2021, "Pruning Neural Networks at Initialization", section 5)."""
    parts = np.split(kept, np.cumsum(widths)[:-1])
    return np.concatenate([rng.permutation(part) for part in parts])


def zeros_held(network: PrunableNetwork, module: nn.Module, kept: Kept) -> contextlib.AbstractContextManager[None]:
    """While `module`, built with `kept`, trains: removed weights stay zero. Removed filters are not there at all."""
    if isinstance(network, SparseNetwork):
        return network.zeros_held(module, kept)
    return contextlib.nullcontext()
