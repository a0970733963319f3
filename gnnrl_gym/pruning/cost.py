"""Closed-form integer cost of plans: a sum of products of channel counts, each affine in the widths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gnnrl_gym.errors import UnsupportedOperation
from gnnrl_gym.graph.channels import Channels
from gnnrl_gym.graph.groups import ChannelGroups, Floats, Ints


@dataclass(frozen=True)
class Cost:
    """``sum_t constants[t] * (left[t] . [w, 1]) * (right[t] . [w, 1])`` for widths w.

    Attributes:
        constants: int64 [T].
        left, right: affine channel counts [A + 1, T]. They are floats so that BLAS multiplies them; every channel
            count is far below 2^53, so the counts are exact, and the products are taken in int64.
    """

    constants: Ints
    left: Floats
    right: Floats

    def terms(self, widths: Ints) -> Ints:
        """Cost of every term, int64 [..., T], for widths [..., A]."""
        w = widths.astype(np.float64)
        left = (w @ self.left[:-1] + self.left[-1]).astype(np.int64)
        right = (w @ self.right[:-1] + self.right[-1]).astype(np.int64)
        return np.asarray(self.constants * left * right)

    def total(self, widths: Ints) -> Ints:
        """Cost, int64 [...], for widths [..., A]."""
        return np.asarray(self.terms(widths).sum(-1))


def _cost(rows: list[tuple[int, Ints, Ints]], groups: int) -> Cost:
    if not rows:
        return Cost(np.zeros(0, np.int64), np.zeros((groups + 1, 0)), np.zeros((groups + 1, 0)))
    constants, left, right = zip(*rows, strict=True)
    return Cost(np.array(constants, np.int64), np.stack(left, 1).astype(float), np.stack(right, 1).astype(float))


def macs_cost(channels: Channels, groups: ChannelGroups) -> Cost:
    """Multiply-accumulates; term t is ``channels.products[t]``."""
    rows = []
    for product in channels.products:
        counts = [groups.kept_row(groups.owner[key]) for key in product.factors]
        counts += [_one(groups)] * (2 - len(counts))
        rows.append((product.constant, counts[0], counts[1]))
    return _cost(rows, len(groups.widths))


def params_cost(shapes: dict[str, tuple[int, ...]], groups: ChannelGroups) -> Cost:
    """Parameters; term t is the t-th of `shapes` (name -> shape).

    Raises:
        UnsupportedOperation: one has channels that can go along more than two of its dimensions.
    """
    rows = []
    for name, shape in shapes.items():
        owned = [d for d in range(len(shape)) if (name, d) in groups.owner and (groups.owner[name, d] >= 0).any()]
        if len(owned) > 2:
            raise UnsupportedOperation(
                f"The parameter '{name}' of shape {list(shape)} has channels along {len(owned)} dimensions, and "
                "costs follow two: split it."
            )
        fixed = int(np.prod([s for d, s in enumerate(shape) if d not in owned], dtype=np.int64))
        counts = [groups.kept_row(groups.owner[name, d]) for d in owned] + [_one(groups)] * (2 - len(owned))
        rows.append((fixed, counts[0], counts[1]))
    return _cost(rows, len(groups.widths))


def _one(groups: ChannelGroups) -> Ints:
    return np.eye(len(groups.widths) + 1, dtype=np.int64)[-1]
