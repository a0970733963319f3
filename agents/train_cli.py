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
from agents.run_folder import check_writable
from agents.transfer import ASKED, save_policy, train_policy
from gnnrl_gym.checks import check_seed, check_whole
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.zoo.models import DIGITS


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
    if out.exists():
        raise FileExistsError(f"{str(out)!r} is there already: choose another --out, or remove it.")
    check_writable(out)
    rows = [{**row, "max_steps": 1} for row in read_networks(networks)]
    env = gym.make("GNNRL-PruneMany-v0", networks=rows, budgets=budgets)
    log = out.with_name(f"{out.name}.training")
    begun = (log / ASKED).is_file()
    try:
        agent = train_policy(env, evaluations, seed, progress=True, out=log, resume=begun)
    except KeyboardInterrupt:
        if (log / LOG).is_file():
            say(f"Interrupted. What was measured is in {log}; the same command goes on from there.")
        raise
    save_policy(agent, out, {"networks": [row.get("model", DIGITS) for row in rows], "evaluations": evaluations})
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
    known = list(inspect.signature(PruneEnv).parameters)
    for number, row in enumerate(rows, 1):
        for key in row.keys() - set(known):
            near = difflib.get_close_matches(key, known, n=1) or known
            raise ValueError(f"{str(path)!r}: network {number} has an unknown {key!r}; near it: {', '.join(near)}.")
    return rows
