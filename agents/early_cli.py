"""`gnnrl early`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import typer
from rich.table import Table

import gnnrl_gym  # noqa: F401  (registers the environments)
from agents.cli_common import (
    Data,
    Device,
    check_goes_on_alone,
    check_has_a_name,
    console,
    going_on_by,
    made_as_begun,
    new_folder,
    quoted,
    say,
)
from agents.early import ASKED, METHODS, check_request
from agents.early import early as run_early
from agents.provenance import environment_arguments
from agents.results import SearchResult
from agents.run_folder import free_folder, read_asked
from gnnrl_gym.evaluation.objectives import OBJECTIVES
from gnnrl_gym.evaluation.training import Recipe, recipe_for
from gnnrl_gym.zoo.early import EARLY
from gnnrl_gym.zoo.models import DIGITS

SPARSITY = 0.5


def early(
    context: typer.Context,
    model: Annotated[str, typer.Option(help=f"{', '.join(EARLY)}, or any other that `gnnrl search` takes.")] = DIGITS,
    data: Data = None,
    method: Annotated[str, typer.Option(help=f"What chooses: {', '.join(METHODS)}.")] = "annealing",
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the units that go.", show_default=f"{SPARSITY}; dense: 0")
    ] = None,
    objective: Annotated[str, typer.Option(help=f"What scores a mask: {', '.join(OBJECTIVES)}.")] = "untrained",
    granularity: Annotated[
        str | None, typer.Option(help="channels or unstructured.", show_default="the model's")
    ] = None,
    evaluations: Annotated[int, typer.Option(help="Masks that may be scored.")] = 1000,
    epochs: Annotated[int | None, typer.Option(help="Of training afterwards.", show_default="the model's")] = None,
    weights: Annotated[str | None, typer.Option(help="For pretrained: a state dict, trained from this --seed.")] = None,
    pretrain_epochs: Annotated[int, typer.Option(help="Of the dense network, for pretrained.")] = 2,
    proxy_steps: Annotated[int, typer.Option(help="Of the masked network, for proxy.")] = 200,
    search_images: Annotated[int, typer.Option(help="Images of the search split that score a mask.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the initial weights, the search and the training.")] = 0,
    control: Annotated[bool, typer.Option(help="Train random units with the same counts per layer too.")] = True,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/MODEL-early-METHOD-TIME")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted run in this folder.")] = None,
) -> None:
    """Prune a network before training: search a mask, prune, rewind to the initial weights, train, test."""
    if resume is not None:
        check_goes_on_alone(context, resume)
        _go_on(resume)
        return
    if data is None and model != DIGITS:
        raise typer.BadParameter(f"{model} needs --data: a data name, a .npz file or an image folder.")
    share = sparsity if sparsity is not None else (0.0 if method == "dense" else SPARSITY)
    folder = out or new_folder(f"{model}-early-{method}")
    recipe = recipe_for(model).of(epochs=epochs)
    check_request(method, evaluations, seed, share)
    free_folder(folder)  # before the environment, which may train the dense network first
    env = gym.make(
        "GNNRL-Mask-v0", model=model, data=data or "digits", sparsity=share, objective=objective,
        granularity=granularity, init_seed=seed, weights=weights, pretrain_epochs=pretrain_epochs,
        proxy_steps=proxy_steps, search_images=search_images, device=device,
    )  # fmt: skip
    _run(env, folder, method=method, evaluations=evaluations, seed=seed, recipe=recipe, control=control)


def _go_on(folder: Path) -> None:
    """With the run of a folder as it was asked for."""
    asked = read_asked(folder, ASKED, environment=dict, recipe=dict)
    try:
        recipe = Recipe(**asked.pop("recipe"))
    except TypeError as error:
        raise ValueError(f"{str(folder / ASKED)!r} is damaged, its 'recipe' is none: {error}") from error
    arguments = environment_arguments(asked.pop("environment"))
    check_has_a_name(folder, arguments["model"], "agents.early.early")
    env = made_as_begun("GNNRL-Mask-v0", arguments)
    _run(env, folder, **asked, recipe=recipe, resume=True)


def _run(env: gym.Env[Any, Any], folder: Path, **asked: Any) -> None:
    with going_on_by(f"gnnrl early --resume {quoted(folder)}", folder, ASKED):
        result = run_early(env, out=folder, progress=True, **asked)
    _show(result)


def _show(result: SearchResult) -> None:
    table = Table("", "share", title=f"{result.model}, {result.method}: {result.budget:.1%} of its units stay")
    rows = {
        "MACs": result.macs_ratio,
        "parameters": result.params_ratio,
        "search accuracy": result.search_accuracy,
        "test accuracy, untrained": result.untrained_accuracy,
        "test accuracy, trained": result.test_accuracy,
        "control: random units, same counts": result.control_accuracy,
    }
    for name, value in rows.items():
        table.add_row(name, "" if value is None else f"{value:.2%}")
    console.print(table)
    say(f"run folder: {result.out}")
