"""`gnnrl train`."""

from __future__ import annotations

import difflib
import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import typer

import gnnrl_gym  # noqa: F401  (registers the environments)
from agents.cli_common import say
from agents.recorder import LOG
from agents.transfer import train_to_file, training_folder
from gnnrl_gym.checks import check_seed, check_whole
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.zoo.models import DIGITS

_OF_THE_TRAINING = {"budget": "budgets are drawn between the two of --budgets", "max_steps": "episodes have one step"}


def train(
    networks: Annotated[Path, typer.Argument(help="JSON: a list of GNNRL-Prune-v0 arguments, one for each network.")],
    out: Annotated[Path, typer.Option(help="Policy file; none that is there already.")] = Path("policy.pt"),
    evaluations: Annotated[int, typer.Option(help="Evaluations of the training, over all networks.")] = 3000,
    budgets: Annotated[tuple[float, float], typer.Option(help="Lowest and highest budget.")] = (0.3, 0.7),
    seed: Annotated[int, typer.Option(help="Equal seeds give equal policies.")] = 0,
) -> None:
    """Train one policy on several networks, for `gnnrl search --policy`. After Ctrl-C the same command goes on."""
    check_whole(1, evaluations=evaluations)
    check_seed(seed=seed)
    log = training_folder(out)  # before the networks are made, which takes its time
    rows = [{**row, "max_steps": 1} for row in read_networks(networks)]
    env = gym.make("GNNRL-PruneMany-v0", networks=rows, budgets=budgets)
    about = {"networks": [row.get("model", DIGITS) for row in rows], "evaluations": evaluations}
    try:
        train_to_file(env, out, evaluations, seed, about)
    except KeyboardInterrupt:
        if (log / LOG).is_file():
            say(f"Interrupted. What was measured is in {log}; the same command goes on from there.")
        raise
    say(f"policy: {out}, its evaluations and curves: {log}")


def read_networks(path: Path) -> list[dict[str, Any]]:
    """The arguments of `GNNRL-Prune-v0` for each network, from a JSON file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no JSON, or something else than a list of such arguments.
    """
    try:
        rows = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"No file {str(path)!r}: give a JSON list of GNNRL-Prune-v0 arguments.") from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}.") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{str(path)!r} must hold a list with an object for each network, such as "
            '[{"model": "resnet20", "data": "cifar10"}].'
        )
    known = [name for name in inspect.signature(PruneEnv).parameters if name not in _OF_THE_TRAINING]
    for number, row in enumerate(rows, 1):
        for key in row.keys() & _OF_THE_TRAINING.keys():
            raise ValueError(f"{str(path)!r}: network {number} has {key!r}, but {_OF_THE_TRAINING[key]}: leave it out.")
        for key in row.keys() - set(known):
            near = difflib.get_close_matches(key, known, n=1) or known
            raise ValueError(f"{str(path)!r}: network {number} has an unknown {key!r}; near it: {', '.join(near)}.")
    return rows
