"""`gnnrl bogp`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown

from agents.bogp import ASKED
from agents.bogp import bogp as run_bogp
from agents.bogp_record import Question, report
from agents.cli_common import Device, check_goes_on_alone, console, going_on_by, new_folder, quoted, say
from agents.run_folder import read_asked
from gnnrl_gym.relational.masks import SCOPES


def bogp(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="mlp-H1-H2-..., or any model name of `gnnrl search`.")] = "mlp-64-64",
    data: Annotated[str, typer.Option(help="Data name, .npz file or image folder.")] = "digits",
    density: Annotated[float, typer.Option(help="Share of the weights that stays.")] = 0.25,
    scope: Annotated[str, typer.Option(help=f"Of which weights: {', '.join(SCOPES)}.")] = "hidden",
    nodes: Annotated[int, typer.Option(help="Nodes of a relational graph.")] = 16,
    pool_size: Annotated[int, typer.Option(help="Graphs to choose from.")] = 64,
    evaluations: Annotated[int, typer.Option(help="Graphs that each search may train and score.")] = 30,
    epochs: Annotated[int, typer.Option(help="Of the training behind an evaluation.")] = 5,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Of SGD.")] = 5e-4,
    shift: Annotated[int, typer.Option(help="Pixels by which training images are shifted at random.")] = 0,
    train_seeds: Annotated[int, typer.Option(help="Trainings behind an evaluation.")] = 1,
    final_epochs: Annotated[int, typer.Option(help="Of the training at the end; the last one counts.")] = 20,
    final_seeds: Annotated[int, typer.Option(help="Trainings of each graph at the end.")] = 3,
    controls: Annotated[int, typer.Option(help="Random graphs of the pool that are trained beside.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the pool and the searches.")] = 0,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/bogp-MODEL-TIME")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted run in this folder.")] = None,
) -> None:
    """Find the relational graph whose sparse masks train best, by Bayesian optimisation; train and report it."""
    if resume is not None:
        check_goes_on_alone(context, resume, "device")
        _run(Question.of(read_asked(resume, ASKED)), resume, device, resume=True)
        return
    question = Question(
        model, data, density, scope, nodes, pool_size, epochs, learning_rate, weight_decay, shift,
        train_seeds, evaluations, seed, final_epochs, final_seeds, controls,
    )  # fmt: skip
    folder = out or new_folder(f"bogp-{model}")
    _run(question, folder, device, resume=False)


def _run(question: Question, folder: Path, device: str, resume: bool) -> None:
    more = "" if device == "auto" else f" --device {device}"
    with going_on_by(f"gnnrl bogp --resume {quoted(folder)}{more}", folder, ASKED):
        result = run_bogp(question, folder, device, progress=True, resume=resume)
    console.print(Markdown(report(result)))
    say(f"run folder: {folder}")
