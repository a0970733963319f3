"""From pruning ratios to integer widths, landing just under a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from gnnrl_gym.graph.groups import Floats, Ints


def round_widths(share: Floats, full: Ints, floors: Ints) -> Ints:
    """Integer widths for the kept `share` [A] of `full` widths, never below `floors`."""
    return np.maximum(np.floor(share * full + 0.5).astype(np.int64), floors)


def to_steps(widths: Ints, round_to: int) -> Ints:
    """Number of steps of `round_to` units that each width needs, rounded up."""
    return -(-widths // round_to)


def to_widths(steps: Ints, full: Ints, round_to: int) -> Ints:
    """Steps -> widths: multiples of `round_to`, but never above the full width."""
    return np.minimum(steps * round_to, full)


def land(
    share: Floats, action: Floats, full: Ints, floors: Ints, cost: Callable[[Ints], float], limit: float
) -> tuple[Floats, Ints]:
    """Shrink `share` by ``1 - t * action`` with the smallest t in [0, 1] whose cost is within `limit`.

    While t grows, units leave one at a time, at exactly known moments. Bisection over that sequence finds the first
    prefix within the limit: the largest cost on the ray that is not above it, also where many groups shrink at the
    same t. A unit that owns channels all over the network may leave a gap below the limit: units of other groups, the
    last to have left, come back where they fit, so that plans are compared at equal cost. (Of those that left in this
    call: after several, `refill` brings back the others.)

    Args:
        share: kept share of every group now, [A].
        action: pruning ratios [A] in [0, 1].
        full, floors: widths of the dense network, and the smallest allowed, [A].
        cost: cost of a plan [A]; never rises when a width falls.
        limit: the budget in units of that cost.

    Returns:
        The new share and widths. When even t = 1 is above the limit: those at t = 1.
    """
    start, end = round_widths(share, full, floors), round_widths(share * (1 - action), full, floors)
    moments, groups = _departures(share * full, action, start, end)
    size = len(full)

    def after(count: int) -> Ints:
        return start - np.bincount(groups[:count], minlength=size)

    if cost(end) > limit:
        return share * (1 - action), end
    low, high = -1, len(groups)  # after(high) is within the limit, after(low) is not (or there is none)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(after(middle)) <= limit else (middle, high)
    t = moments[high - 1] if high else 0.0
    return share * (1 - t * action), _fill(after(high), groups[:high], cost, limit)


def _fill(widths: Ints, departed: Ints, cost: Callable[[Ints], float], limit: float) -> Ints:
    """Give the units of `departed` back to their groups, last first, where the cost stays within `limit`."""
    full: set[int] = set()  # groups whose next unit does not fit, and never will
    for group in departed[::-1].tolist():
        if group in full:
            continue
        widths[group] += 1
        if cost(widths) > limit:
            widths[group] -= 1
            full.add(group)
    return widths


def refill(
    widths: Ints, shares: Sequence[Floats], full: Ints, floors: Ints, cost: Callable[[Ints], float], limit: float
) -> Ints:
    """Give back what several calls of `land` have removed, and the last of them made superfluous: the units that left
    in the earlier ones, last first, where the cost of `widths` [A] stays within `limit`.

    Args:
        widths: of the last call.
        shares: kept shares [A] before each call, in order.
        full, floors, cost, limit: as for `land`.
    """
    departed = []
    for before, after in pairwise(shares):
        action = 1 - np.divide(after, before, out=np.ones_like(before), where=before > 0)
        ends = (round_widths(share, full, floors) for share in (before, after))
        departed.append(_departures(before * full, action, *ends)[1])
    return _fill(widths.copy(), np.concatenate(departed), cost, limit)


def _departures(kept: Floats, action: Floats, start: Ints, end: Ints) -> tuple[Floats, Ints]:
    """When (t) and in which group each unit leaves, in order of t."""
    groups = np.repeat(np.arange(len(kept)), start - end)
    nth = np.arange(len(groups)) - np.repeat(np.cumsum(start - end) - (start - end), start - end)
    width_before = start[groups] - nth
    # the width rounds down once kept * (1 - t * action) falls below width - 1/2
    moments = (1 - (width_before - 0.5) / kept[groups]) / action[groups]
    order = np.argsort(moments, kind="stable")
    return np.clip(moments[order], 0, 1), groups[order]
