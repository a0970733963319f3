"""`SearchResult`: the record of a search, how it is written and read, and the names of the files in a run folder."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agents.provenance import machine, versions
from gnnrl_gym import PrunableNetwork
from gnnrl_gym.export import read_slim, rebuild_slim
from gnnrl_gym.files import check_entries, plain, read_json, write_atomic
from gnnrl_gym.pruning.sparsity import make_network
from gnnrl_gym.zoo import DataSplits, load_data, load_model
from gnnrl_gym.zoo.data import IMAGE_SIZE, data_names
from gnnrl_gym.zoo.models import input_shape_for, model_names

RESULT, WEIGHTS = "result.json", "pruned.pt"
# the file in which each command keeps what it was asked
ASKED_OF = {"search": "search.json", "early": "early.json", "bogp": "bogp.json", "train": "train.json"}
# what found something else than a plan, and where that is
_ELSEWHERE = {"bogp": "see report.md beside it", "train": "the policy is the file beside the folder"}
# of what goes on from a record, its kinds
_ENTRIES = {"model": str, "data": str, "widths": list, "settings": dict}
FROM_THERE = "A run's relative paths count from the folder in which it was begun: do it there."
IN_PYTHON = "agents.refine.evaluate_run(run, model=..., data=...) in Python, likewise finetune_run"


@dataclass
class SearchResult:
    """What a search found; `result.json` holds the same. Accuracies are shares in [0, 1].

    Attributes:
        model, weights, data: as given to the environment; class names where objects were given.
        budget, metric, importance: of the environment; a budget of several metrics is a dictionary.
        method, seed, evaluations: of the search; evaluations as counted by the environment.
        widths: the best plan; dense_widths, group_names: of the dense network's groups, absent from old records.
        macs_ratio, params_ratio, memory_ratio: the plan's real share of the dense cost.
        latency: where the budget counts it, seconds per image: predicted and measured, the dense network's measured
            beside it, and the relative error of the prediction (`LatencyTable.check`).
        search_accuracy, test_accuracy: recalibrated, before fine-tuning.
        dense_test_accuracy: of the network that was pruned.
        finetuned_accuracy, finetune_epochs: on the test split, once there is one.
        untrained_accuracy, control_accuracy: of a network pruned before training (`agents.early`), on the test split:
            without training, and of a random mask with the same counts per layer, trained like it. There,
            `test_accuracy` is the trained one.
        seconds: wall time of the search; where it was resumed, with that of the parts before which left a result.
            interrupted: it was stopped by hand.
        settings: the environment's remaining arguments. versions, machine: where it ran.
    """

    model: str
    weights: str | None
    data: str
    budget: float | dict[str, float]
    metric: str
    importance: str
    method: str
    seed: int
    evaluations: int
    widths: list[int]
    macs_ratio: float
    params_ratio: float
    search_accuracy: float
    test_accuracy: float
    dense_test_accuracy: float
    seconds: float
    memory_ratio: float | None = None
    latency: dict[str, float] | None = None
    interrupted: bool = False
    finetuned_accuracy: float | None = None
    finetune_epochs: int | None = None
    untrained_accuracy: float | None = None
    control_accuracy: float | None = None
    dense_widths: list[int] | None = None
    group_names: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: versions())
    machine: str = field(default_factory=lambda: machine())
    out: str | None = None

    def save(self, folder: Path) -> None:
        """Write `result.json` in `folder`, at once or not at all."""
        record = {key: value for key, value in asdict(self).items() if key != "out"}
        text = json.dumps(record, indent=2, default=plain)
        write_atomic(folder / RESULT, lambda file: file.write(text.encode() + b"\n"))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SearchResult:
        """Read a run folder.

        Raises:
            FileNotFoundError: there is no result in it (yet).
            ValueError: the record is damaged or of another kind.
        """
        path = Path(folder) / RESULT
        if not path.is_file():
            raise FileNotFoundError(_no_result(folder))
        try:
            result = cls(**read_json(path), out=os.fspath(folder))
        except TypeError as error:
            if (command := written_by(folder)) in _ELSEWHERE:
                message = f"{path} was written by `gnnrl {command}`, not by a search: {_ELSEWHERE[command]}."
                raise ValueError(message) from error
            raise ValueError(f"{path} is not the record of a search: {error}") from error
        check_entries(path, vars(result), _ENTRIES)
        return result

    def network(self, model: nn.Module | None = None) -> PrunableNetwork:
        """The dense network with the groups and order that the plan refers to.

        Args:
            model: needed where the search was given an `nn.Module`.

        Raises:
            TypeError: `model` is something else. ValueError: it is needed, but not given.
        """
        if model is not None:
            _check_given("model", model, nn.Module, "the network that was pruned")
        else:
            # what is pruned before training starts from random weights, whatever ships with the package
            weights = "random" if self.settings.get("objective") and self.weights is None else self.weights
            seed = self.settings.get("init_seed", 0)
            try:
                model = load_model(self.model, weights, self.settings["num_classes"], seed=seed)
            except ValueError as error:
                if self.model in model_names():
                    raise
                raise ValueError(f"{error}. The run pruned a module of your own: pass model=, {IN_PYTHON}.") from error
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{error}. {FROM_THERE}") from error
        shape = self.settings.get("input_shape") or input_shape_for(self.model)
        # the order of the units is of no matter here: the run folder says which were kept
        example = torch.zeros(1, *shape, device=next(model.parameters()).device)
        return make_network(model, example, self.settings.get("granularity", "channels"))

    @property
    def dense_is_kept(self) -> bool:
        """Whether `network` is the dense network that was scored: weights that a run trained for it are not kept."""
        return self.settings.get("objective") != "pretrained" or self.weights is not None

    def splits(self, data: DataSplits | None = None) -> DataSplits:
        """The data of the run: images of the same size, normalised alike.

        Args:
            data: needed where the search was given arrays of its own.

        Raises:
            TypeError: `data` is something else. ValueError, FileNotFoundError: as `load_data`.
        """
        if data is not None:
            _check_given("data", data, DataSplits, "gnnrl_gym.zoo.load_data(...)")
            return data
        # absent from old records: the usual ones
        how: dict[str, Any] = {name: self.settings.get(name) for name in ("mean", "std", "flip")}
        size = self.settings.get("input_shape", (IMAGE_SIZE,))[-1]
        try:
            return load_data(self.data, self.settings.get("data_seed", 0), image_size=size, **how)
        except (ValueError, FileNotFoundError) as error:
            if self.data in data_names():
                raise
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            own = f"If the run was given data of your own, pass data=, {IN_PYTHON}"
            raise kind(f"{error}. {own}. {FROM_THERE}") from error

    def pruned(self, model: nn.Module | PrunableNetwork | None = None) -> nn.Module:
        """The pruned network with the weights of the run (fine-tuned ones, once there are), in eval mode.

        Args:
            model: as for `network`, or what that gave; its weights are of no matter.

        Raises:
            ValueError: the file is damaged, or of another network or plan. FileNotFoundError: it is not there.
        """
        saved = read_slim(self.weights_file)
        network = model if isinstance(model, PrunableNetwork) else self.network(model)
        slim = rebuild_slim(network, saved, str(self.weights_file))
        if saved["widths"] is not None and saved["widths"].tolist() != self.widths:  # absent from old files
            raise ValueError(
                f"{str(self.weights_file)!r} holds another plan than {RESULT} beside it: put back the file that belongs"
                " to it, or if the search was interrupted, go on with it (gnnrl search --resume)."
            )
        return slim

    def kept(self) -> Any:
        """Which units the pruned network of the run has, bool [U]."""
        return read_slim(self.weights_file)["kept"].numpy()

    @property
    def weights_file(self) -> Path:
        """Where the run folder keeps the pruned network."""
        if self.out is None:
            raise ValueError("This result has no run folder: search with out=... to keep the pruned network.")
        return Path(self.out) / WEIGHTS


def _check_given(name: str, value: Any, kind: type, such: str) -> None:
    """Check that an argument is an object of the class `kind`.

    Raises:
        TypeError: it is something else, such as a name or a path.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of the class {kind.__name__}, such as {such}, got {value!r:.100}.")


def _no_result(run: str | os.PathLike[str]) -> str:
    command, place = written_by(run), os.fspath(run)
    if command in ("search", "early"):
        return f"The run in {place!r} is not finished: {how_to_go_on(run)}"
    other = f" That of an unfinished `gnnrl {command}` is none." if command else ""
    return f"No {RESULT} in {place!r}: give the folder that `gnnrl search` wrote.{other}"


def how_to_go_on(run: str | os.PathLike[str]) -> str:
    """How to go on with an interrupted run, in words."""
    return f"go on with gnnrl {written_by(run)} --resume {shlex.quote(os.fspath(run))}"


def written_by(run: str | os.PathLike[str]) -> str | None:
    """The command that wrote a run folder, or None if the folder does not say."""
    return next((command for command, name in ASKED_OF.items() if (Path(run) / name).is_file()), None)
