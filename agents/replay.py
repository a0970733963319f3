"""The command lines that make a run again, from its record."""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.early_cli import early
from agents.provenance import environment_arguments
from agents.results import SearchResult
from agents.search_cli import search
from gnnrl_gym.envs.mask import MaskEnv
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.evaluation.training import recipe_for
from gnnrl_gym.zoo.data import data_names
from gnnrl_gym.zoo.models import model_names

# always said, so that the command reads well and outlives other defaults
_SAID = ("model", "data", "budget", "sparsity", "method", "evaluations", "seed")


@dataclass(frozen=True)
class _Command:
    """A command of `gnnrl`, and the environment that it makes."""

    name: str
    options: Callable[..., Any]
    env: type


_COMMANDS = {"search": _Command("search", search, PruneEnv), "early": _Command("early", early, MaskEnv)}


class NotACommand(ValueError):
    """What a run was asked can't be said on the command line; the message says what."""


def replay(folder: Path, command: str, asked: Mapping[str, Any], result: SearchResult) -> list[str]:
    """The commands that make a finished run again in the same folder, with the same files and versions.

    Args:
        command: that wrote it, "search" or "early". asked: what its file of `ASKED_OF` holds.

    Raises:
        NotACommand: it was begun in Python with something that no option stands for, or its record is too old.
    """
    given = dict(asked)
    environment = environment_arguments(given.pop("environment", None) or {})
    _check_has_names(environment, result)
    if command == "early":
        given, environment = _early(given, environment)
    words = _options(_COMMANDS[command], {**environment, **given})
    words += ["--finetune", "0"] if command == "search" else []
    out = os.fspath(folder)
    first = shlex.join(["gnnrl", command, *words, "--out", out])
    return [first, *(_finetune(out, how, environment) for how in _finetuning(result))]


def _check_has_names(environment: Mapping[str, Any], result: SearchResult) -> None:
    """Check that the command line can name the network and the data of a run.

    Raises:
        NotACommand: there is no name or path for the network or the data.
    """
    if environment.get("model") not in model_names():
        raise NotACommand(f"its network, {result.model}, is a module of your own")
    data = str(environment.get("data"))
    if data not in data_names() and not (Path(data).suffix == ".npz" or os.sep in data or Path(data).is_dir()):
        raise NotACommand(f"its data, {data}, were given in Python")
    if result.settings.get("data_seed"):
        raise NotACommand(f"its data were split with the seed {result.settings['data_seed']}")
    if result.latency is not None:
        raise NotACommand("its plans land by latencies that were measured when it was begun")


def _early(given: dict[str, Any], environment: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `gnnrl early` says in other words: one seed for all, and of the recipe the epochs."""
    recipe, usual = given.pop("recipe", None) or {}, recipe_for(environment["model"])
    if recipe != usual.of(epochs=recipe.get("epochs")).record():
        raise NotACommand("it was trained by a recipe of its own")
    if environment.pop("init_seed", None) != given.get("seed"):
        raise NotACommand("the seed of the initial weights is another than that of the search")
    return {**given, "epochs": recipe["epochs"]}, environment


def _options(command: _Command, given: Mapping[str, Any]) -> list[str]:
    """Words for what is `given`, where it is not what the command does anyway."""
    options = inspect.signature(command.options).parameters
    usual = inspect.signature(command.env).parameters
    words: list[str] = []
    for name in sorted(given, key=lambda name: _SAID.index(name) if name in _SAID else len(_SAID)):
        value = given[name]
        if name in options and (name in _SAID or value != options[name].default):
            words += _option(name, value)
        elif name not in options and (name not in usual or value != usual[name].default):
            raise NotACommand(f"it was begun in Python with {name}={value!r}")
    return words


def _option(name: str, value: Any) -> list[str]:
    option = "--" + name.replace("_", "-")
    if value is False:
        return [option.replace("--", "--no-")]
    if isinstance(value, dict):
        value = ",".join(f"{metric}={share}" for metric, share in value.items())
    return [option, "none" if value is None else str(value)]  # None: of --policy alone, others have it by default


def _finetuning(result: SearchResult) -> list[dict[str, Any]]:
    """How the run was fine-tuned, one after the other.

    Raises:
        NotACommand: the record does not say it.
    """
    found = result.settings.get("finetuning", [])
    if sum(how["epochs"] for how in found) != (result.finetune_epochs or 0):
        raise NotACommand("it does not hold how the network was fine-tuned")
    return list(found)


def _finetune(out: str, how: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    how = {**how, "device": how.get("device", environment.get("device", "auto"))}  # older records do not say it
    words = [word for name, value in how.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return shlex.join(["gnnrl", "finetune", out, *words])
