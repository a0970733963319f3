"""Measured latency: a table per operation, made once on this machine, and what it predicts for any plan.

Every operation that computes is measured alone, at several channel counts (`operation_grids`). What this leaves out
(calls of modules, views, other caches, odd channel counts) is put right by forwards of a few pruned networks: a factor
and a constant. The dense network, whose counts are not odd, may be faster than these say, and is measured, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import nnls

from gnnrl_gym.checks import check_whole
from gnnrl_gym.files import cache_folder, check_entries, locked, read_json, write_atomic
from gnnrl_gym.graph.groups import Floats
from gnnrl_gym.pruning.network import PrunableNetwork
from gnnrl_gym.pruning.operation_grids import SHARES, Grid, OperationGrids, as_grid, measured_at, vector_size
from gnnrl_gym.pruning.timing import Operation, operations, place, take_turns

LAYOUT = 3  # of the grids: those in files of another layout were measured at other counts, and are not read
CALIBRATED = (0.3, 0.45, 0.6, 0.75, 0.9)  # mean shares of the plans whose networks scale the table
SPREAD = 0.1  # of the shares around that mean
ODD = 0.2  # of a network's time is the most that odd channel counts cost; what is measured beyond that is noise
UNSTEADY = 0.3  # relative error of the table on what it was fitted to, above which the machine must have been busy
LEAST_SHARE = 0.01  # of a network's time that its operations take; where they seem to take less, it is noise


class LatencyTable:
    """Seconds of one forward of the example input, for any plan.

    Predictions never fall when a width grows. They hold for this machine, device, number of threads and version of
    torch; measurements are kept in a file of that name and reused, also by other networks with the same layers. If
    several processes measure at once, the figures of the first to finish count, so that all of them predict alike.

    Args:
        network: the dense network; it is measured where its parameters are, and on its example input (batch included).
        repeats: how often everything is measured; medians count.
        cache: folder of the measurements. Default `~/.cache/gnnrl_gym/latency`. Where nothing can be written, it warns.
        refresh: measure anew even what the cache holds.
        kept: file with the `figures` of this network, of here or elsewhere: they count, and nothing is measured.

    Raises:
        ValueError: `repeats` is no whole number of at least 1, or `kept` is damaged or has no figures of this network.
        FileNotFoundError: `kept` is not there.
    """

    def __init__(
        self,
        network: PrunableNetwork,
        repeats: int = 20,
        cache: str | os.PathLike[str] | None = None,
        refresh: bool = False,
        kept: str | os.PathLike[str] | None = None,
    ) -> None:
        check_whole(1, repeats=repeats)
        self.network, self.repeats, self._refresh = network, repeats, refresh
        self.device = next(network.model.parameters()).device
        self.place = place(self.device)
        name = hashlib.sha256(f"{self.place} {SHARES} {LAYOUT}".encode()).hexdigest()[:16]
        self._file = (Path(cache) if cache else cache_folder() / "latency") / f"{name}.json"
        self._operations = operations(network.trace, network.channels, network.groups)
        self._vector = vector_size(self.device)
        known = self._kept(Path(kept)) if kept is not None else {} if refresh else self._read()
        self._alone = OperationGrids(self._operations, self._measured(known), self._vector)
        found: list[float] = known.get(self._key) or self._calibrated()
        self._factor, self._constant, self._dense = found

    # ---- prediction -------------------------------------------------------------------------------------------

    def predict(self, widths: npt.ArrayLike) -> Any:
        """Seconds of a plan [A]: float, or float64 [B] for [B, A]."""
        plans = self.network.checked(widths)
        whole = (plans == self.network.widths).all(-1)
        # odd counts may make a network slower than the dense one: no use to anybody, and predictions would fall
        seconds = np.minimum(self._factor * self._alone.seconds(plans) + self._constant, self._dense)
        seconds = np.where(whole, self._dense, seconds)
        return float(seconds) if seconds.ndim == 0 else seconds

    # ---- measurement ------------------------------------------------------------------------------------------

    def _measured(self, known: dict[str, Any]) -> dict[str, Grid]:
        """Grid of seconds of every operation by key; alike ones are measured once."""
        missing = {op.key: op for op in self._operations if op.key not in known}
        if missing:
            known = known | self._write(self._measure(missing.values()))
        return known

    def _measure(self, ops: Iterable[Operation]) -> dict[str, Grid]:
        memory: dict[str, torch.Tensor] = {}
        grids: dict[str, dict[tuple[int, int], float]] = {}
        ops, calls = list(ops), {}
        # point by point through all operations, so that they take turns as in a forward
        for points in zip(*(measured_at(op, self._vector) for op in ops), strict=True):
            for op, counts in zip(ops, points, strict=True):
                call = op.call(counts, memory, self.device)
                if (op.key, counts) not in calls and _runs(call):
                    calls[op.key, counts] = call
        seconds = take_turns(list(calls.values()), self.repeats, self.device)
        for (key, counts), value in zip(calls, seconds, strict=True):
            grids.setdefault(key, {})[counts] = value
        return {op.key: as_grid(op, grids.get(op.key, {}), self._vector) for op in ops}

    @cached_property
    def _key(self) -> str:
        """Of the network as a whole."""
        text = [f"{op.key} {[row.tolist() for row in op.rows]}" for op in self._operations]
        return f"network {hashlib.sha256(' '.join(text).encode()).hexdigest()[:16]}"

    def _calibrated(self) -> list[float]:
        """Factor and constant with the least relative error on a few pruned networks, and the seconds of the dense one:
        as measured, but no more than factor and constant say, and not much less.

        Neither the factor is negative nor the prediction for the smallest plan. The constant may be: operations that
        are measured alone count the call of each.
        """
        full, rng = self.network.widths, np.random.default_rng(0)
        shares = np.array(CALIBRATED)[:, None] + rng.uniform(-SPREAD, SPREAD, (len(CALIBRATED), len(full)))
        plans = np.vstack([full, np.maximum(np.round(shares * full), 1).astype(np.int64)])
        measured, alone = np.array(self.measure(plans)), self._alone.seconds(plans)
        factor, constant = self._fitted(measured, alone)
        said = factor * alone + constant
        self._warn_if_unsteady(said / measured - 1)
        dense = float(np.clip(measured[0], (1 - ODD) * said[0], said[0]))
        counts: list[float] = self._write({self._key: [factor, constant, dense]})[self._key]
        return counts

    def _fitted(self, measured: Floats, alone: Floats) -> tuple[float, float]:
        """Factor and constant, of the seconds of the dense network and pruned ones, and of their operations alone."""
        least = float(self._alone.seconds(np.ones_like(self.network.widths)))
        columns = np.stack([alone[1:] - least, np.ones(len(alone) - 1)], 1) / measured[1:, None]
        factor, smallest = nnls(columns, np.ones(len(columns)))[0].tolist()
        if factor * (alone[0] - least) < LEAST_SHARE * measured[0]:  # so no pruning would ever save time
            return float(measured[0] / alone[0]), 0.0
        return factor, smallest - factor * least

    def _warn_if_unsteady(self, errors: Floats) -> None:
        """errors: relative ones of what the table says of the networks that it was fitted to."""
        if (worst := np.abs(errors).max()) > UNSTEADY:
            warnings.warn(
                f"The latencies measured here don't agree with each other ({worst:.0%} off): is the machine busy? "
                f"Predictions are as coarse. To measure again when it is not, delete {str(self._file)!r}.",
                stacklevel=2,
            )

    def measure(self, plans: npt.ArrayLike) -> list[float]:
        """Median seconds of one forward of each network of `plans` [B, A], really built; they take turns."""
        built = [self.network.slim(plan).to(self.device).eval() for plan in self.network.checked(plans)]
        return take_turns(built, self.repeats, self.device, self.network.example_input)

    def check(self, widths: npt.ArrayLike) -> dict[str, float]:
        """Predicted and measured seconds of a plan [A] and of the dense network beside it, and the relative error of
        the plan's prediction."""
        plan, full = self.network.checked(widths), self.network.widths
        measured, dense = self.measure(np.stack([plan, full]))
        predicted = self.predict(plan)
        return {
            "predicted": predicted,
            "measured": measured,
            "dense_predicted": self.predict(full),
            "dense_measured": dense,
            "relative_error": predicted / measured - 1,
        }

    # ---- cache ------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Any]:
        try:
            found = read_json(self._file).get("seconds")
        except (OSError, ValueError):  # missing, or damaged: measured again
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, new: dict[str, Any]) -> dict[str, Any]:
        """What counts, by key: where another process was faster, its figures, which it predicts with already."""
        seconds = new
        try:
            with locked(self._file):
                there = self._read()
                seconds = there | new if self._refresh else new | there
                record = {"place": self.place, "shares": SHARES, "seconds": seconds}
                write_atomic(self._file, lambda file: file.write(json.dumps(record).encode()))
        except OSError as error:  # a cache saves time only
            _warn_unwritable(str(self._file.parent), str(error))
        return seconds

    # ---- a run's own ------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        """All that predictions are made from, under a name for this network: what a file that is `kept` holds."""
        seconds: dict[str, Any] = self._alone.figures() | {self._key: [self._factor, self._constant, self._dense]}
        return {f"{self._key} {LAYOUT}": {"place": self.place, "vector": self._vector, "seconds": seconds}}

    def _kept(self, path: Path) -> dict[str, Any]:
        """The seconds in a file of `figures`. They are those of their machine, and so are the vectors."""
        found, name = read_json(path), f"{self._key} {LAYOUT}"
        if name not in found:
            raise ValueError(
                f"{str(path)!r} has no latencies of this network for these versions of gnnrl_gym and torch."
            )
        check_entries(path, found, {name: dict})
        check_entries(path, found[name], {"place": str, "vector": int, "seconds": dict})
        self.place, self._vector = found[name]["place"], found[name]["vector"]
        seconds: dict[str, Any] = found[name]["seconds"]
        check_entries(path, seconds, dict.fromkeys([self._key, *(op.key for op in self._operations)], list))
        return seconds


@cache
def _warn_unwritable(folder: str, reason: str) -> None:
    """Once for each folder."""
    warnings.warn(
        f"Measured latencies can't be kept in {folder!r}, so they will be measured again: {reason}.", stacklevel=2
    )


def _runs(call: Any) -> bool:
    try:
        with torch.inference_mode():
            call()
    except Exception:  # whatever an operation raises that only fits the full number of channels
        return False
    return True
