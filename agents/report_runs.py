"""What a report reads: run folders, and of each the network's groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from agents.recorder import LOG, read_log
from agents.results import ASKED_OF, RESULT, SearchResult, written_by
from gnnrl_gym.errors import UnsupportedOperation
from gnnrl_gym.files import check_entries, read_json
from gnnrl_gym.zoo.models import RANDOM, model_names

_KINDS: dict[str, type] = {"environment": dict, "method": str, "evaluations": int, "seed": int}
_ASKED: dict[str, dict[str, type]] = {"search": _KINDS, "early": {**_KINDS, "recipe": dict}}
_SHARES = ("macs_ratio", "params_ratio", "search_accuracy", "test_accuracy", "dense_test_accuracy", "seconds")
_MAYBE = ("memory_ratio", "finetuned_accuracy", "untrained_accuracy", "control_accuracy", "finetune_epochs")
_OLD = "How wide the dense network's groups are is not in this older record"
_LATENCIES = ("dense_measured", "measured", "predicted")


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        command: that wrote it, "search" or "early"; None of a folder that does not say. asked: what it was asked, {}
            then.
        result: None of a run that is not finished.
        log: its evaluations, in order.
    """

    folder: Path
    command: str | None
    asked: dict[str, Any]
    result: SearchResult | None
    log: list[dict[str, Any]]

    @property
    def early(self) -> bool:
        """Whether the run prunes before training."""
        return self.command == "early" or (self.result is not None and self.result.metric == "units")

    @property
    def state(self) -> str:
        """How the search ended, in words; "" if it came to its end."""
        if self.result is None:
            return "not finished"
        return "interrupted" if self.result.interrupted else ""

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation of the best plan so far, None until a plan is within the budget."""
        within = [line for line in self.log if line["is_success"]]
        return max(within, key=lambda line: line["search_accuracy"], default=None)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the environment, as far as the folder has them."""
        return self.asked["environment"] if self.asked else self.result.settings if self.result else {}

    def about(self, name: str) -> Any:
        """An entry of the record; before there is one, of what was asked."""
        return getattr(self.result, name) if self.result else {**self.settings, **self.asked}.get(name)


def read_run(folder: Path) -> Run:
    """Read a run folder; it is not changed, and a search may be running in it.

    Raises:
        FileNotFoundError: there is no run. ValueError: it is of another kind, or a file is damaged.
    """
    command = written_by(folder)
    unfinished = command in _ASKED and not (folder / RESULT).is_file()
    result = None if unfinished else SearchResult.load(folder)
    asked: dict[str, Any] = {}
    if command is not None:
        path = folder / ASKED_OF[command]
        asked = read_json(path)
        check_entries(path, asked, _ASKED[command])
        check_entries(path, asked["environment"], {"model": str, "data": str})
        _check_budget(path, asked["environment"])
    if result is not None:
        _check_result(folder / RESULT, result)
    log, _ = read_log(folder, "search_accuracy", "is_success")
    for number, line in enumerate(log, 1):
        check_entries(Path(f"{folder / LOG}, line {number}"), line, {"search_accuracy": Real})
    return Run(folder, command, asked, result, log)


def _check_result(path: Path, result: SearchResult) -> None:
    """Check the entries of a result that a report shows.

    Raises:
        ValueError: one of them is of the wrong type.
    """
    entries = vars(result)
    check_entries(path, entries, {**dict.fromkeys(_SHARES, Real), "versions": dict})
    check_entries(path, entries, {name: Real for name in _MAYBE if entries[name] is not None})
    _check_budget(path, entries)
    if result.latency is not None:
        check_entries(path, entries, {"latency": dict})
        check_entries(path, result.latency, dict.fromkeys(_LATENCIES, Real))
    dense, names = result.dense_widths or result.widths, result.group_names or result.widths
    if len({len(result.widths), len(dense), len(names)}) > 1 or not all(map(_is_width, result.widths, dense)):
        raise ValueError(f"{str(path)!r} is damaged: its widths are no plan of its network.")


def _is_width(kept: Any, full: Any) -> bool:
    return isinstance(kept, int) and isinstance(full, int) and 0 <= kept <= full


def _check_budget(path: Path, entries: dict[str, Any]) -> None:
    """As `_check_result`; `gnnrl early` is asked for a sparsity instead."""
    name = "budget" if "sparsity" not in entries else "sparsity"
    check_entries(path, entries, {name: dict if isinstance(entries.get(name), dict) else Real})
    if isinstance(entries[name], dict):
        check_entries(path, entries[name], dict.fromkeys(entries[name], Real))


@dataclass(frozen=True)
class Groups:
    """The groups of a plan: kept units of each, and, if known, all its units and its name. `why`: why they are not."""

    kept: list[int]
    dense: list[int] | None = None
    names: list[str] | None = None
    why: str = ""


def groups_of(run: Run) -> Groups | None:
    """The plan of a run, or the best so far of an unfinished one; None without a plan, or if masks are searched."""
    if run.result is None:
        kept = (run.best or {}).get("widths")
        why = "How wide the groups of the dense network are is in the record of a finished run."
        return Groups(list(map(int, kept)), why=why) if isinstance(kept, list) else None
    if run.result.dense_widths and run.result.group_names:
        return Groups(run.result.widths, run.result.dense_widths, run.result.group_names)
    return _rebuilt(run.result)


def _rebuilt(result: SearchResult) -> Groups:
    """The groups of an old record, which does not hold them: those of the named network, whatever its weights."""
    if result.model not in model_names():
        return Groups(result.widths, why=f"{_OLD}: {result.model} is a module of your own.")
    try:
        network = replace(result, weights=RANDOM).network()
        if len(network.widths) == len(result.widths):
            return Groups(result.widths, network.widths.tolist(), network.group_names)
        why = f"{result.model} has other groups in this version."
    except (ValueError, KeyError, TypeError, UnsupportedOperation) as error:
        why = str(error)
    return Groups(result.widths, why=f"{_OLD}: {why}")
