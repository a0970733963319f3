"""What a budget counts: one metric of a plan's cost, or several at once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from gnnrl_gym.checks import check_choice
from gnnrl_gym.graph.groups import Ints
from gnnrl_gym.pruning.latency import LatencyTable
from gnnrl_gym.pruning.network import PrunableNetwork

METRICS = ("macs", "params", "memory", "latency")
Budget = float | Mapping[str, float]


def budgets_by_metric(budget: Budget, metric: str) -> dict[str, float]:
    """A budget as given -> share of the dense cost by metric; a plain number counts `metric`.

    Raises:
        ValueError: an unknown metric, or a share that is no number in (0, 1).
    """
    found: dict[str, Any] = dict(budget) if isinstance(budget, Mapping) else {metric: budget}
    if not found:
        raise ValueError("budget={} counts nothing: give a number, or shares by metric such as {'macs': 0.5}.")
    for name, share in found.items():
        check_choice("metric", name, METRICS)
        if not isinstance(share, Real) or not 0 < float(share) < 1:
            raise ValueError(f"budget is a share of the dense cost in (0, 1), got {share!r} for {name}.")
    return {name: float(share) for name, share in found.items()}


def in_words(budgets: Mapping[str, float]) -> str:
    """ "0.5 of macs and 0.6 of latency"."""
    return " and ".join(f"{share:g} of {metric}" for metric, share in budgets.items())


class Meter:
    """Costs of plans of one network by metric. Latency is measured only where it is asked for.

    Args:
        latencies: file of measured figures, see `kept` of `LatencyTable`.

    Attributes:
        dense: cost of the dense network by metric.
        table: the latency table, None without latency.
    """

    def __init__(
        self, network: PrunableNetwork, metrics: Iterable[str], latencies: str | os.PathLike[str] | None = None
    ) -> None:
        self.table = LatencyTable(network, kept=latencies) if "latency" in metrics else None
        self._costs: dict[str, Callable[[Ints], Any]] = {
            "macs": network.macs, "params": network.params, "memory": network.memory
        }  # fmt: skip
        if self.table is not None:
            self._costs["latency"] = self.table.predict
        self.dense = {metric: cost(network.widths) for metric, cost in self._costs.items()}

    def ratio(self, metric: str, widths: Ints) -> float:
        """Share of the dense cost of a plan [A]."""
        return float(self._costs[metric](widths) / self.dense[metric])

    def excess(self, widths: Ints, budgets: Mapping[str, float]) -> float:
        """How far a plan [A] is above the budget that it exceeds most, in shares of the dense cost.

        At most 0 where all are met. The difference of two floats has the right sign however close they are, so that
        what lands within a budget is within it.
        """
        return max(self.ratio(metric, widths) - budget for metric, budget in budgets.items())

    def check(self, budgets: Mapping[str, float], floors: Ints) -> None:
        """Check that the smallest plan allowed, `floors` [A], meets every budget.

        Raises:
            ValueError: it does not meet one of them.
        """
        for metric, budget in budgets.items():
            least = self.ratio(metric, floors)
            if not least <= budget:
                raise ValueError(
                    f"budget={budget} can't be met: it must be below 1 and at least {_up(least)}, the {metric} share "
                    "that is left at the floors. Lower `floor` or `round_to`, or raise `budget`."
                )


def _up(share: float) -> float:
    """To four digits, and not below: what is said to suffice must."""
    return math.ceil(share * 1e4) / 1e4
