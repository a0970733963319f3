"""What the commands share: options, which run folder is meant, and how a result is shown."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import typer
from rich.console import Console
from rich.table import Table

from agents.results import FROM_THERE, RESULT, SearchResult, how_to_go_on, written_by
from gnnrl_gym.zoo.data import data_names
from gnnrl_gym.zoo.models import model_names

console = Console()

RUNS = Path("runs")
# defaults that are no values of their own stand in show_default: Rich would take "[default: ...]" for markup
Run = Annotated[
    Path | None,
    typer.Argument(help="Run folder of `gnnrl search` or `gnnrl early`.", show_default="the newest in runs"),
]
Data = Annotated[
    str | None, typer.Option(help="Data name, .npz file or image folder.", show_default="digits, for digits-resnet")
]
Device = Annotated[str, typer.Option(help="auto (the GPU when there is one), cpu or cuda.")]


def say(text: str) -> None:
    """A plain line, not broken: paths in it may hold what Rich takes for markup."""
    console.print(text, soft_wrap=True, markup=False)


def new_folder(name: str) -> Path:
    """A run folder named after a run and the time; runs that are started together have different ones."""
    return RUNS / f"{name}-{datetime.now():%Y%m%d-%H%M%S-%f}"


def quoted(folder: Path) -> str:
    """A path as a shell takes it, in a command that is said to go on with."""
    return shlex.quote(str(folder))


def given(context: typer.Context, name: str) -> bool:
    """Whether the option `name` stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def check_goes_on_alone(context: typer.Context, folder: Path, *allowed: str) -> None:
    """A run that is gone on with keeps what it was asked.

    Args:
        folder: of the run. allowed: parameters that may stand beside --resume.

    Raises:
        ValueError: another option is given too.
    """
    for parameter in context.command.params:
        name = parameter.name or ""
        if given(context, name) and name not in ("resume", *allowed):
            raise ValueError(
                f"{parameter.opts[0]} can't stand beside --resume {folder}, which goes on as it was begun: leave it "
                "out, or begin another run without --resume."
            )


def check_has_a_name(folder: Path, model: str, call: str) -> None:
    """Check that a run can go on from the command line: its network has a name.

    Args:
        folder: of a run to go on with. model: what its record calls the network. call: that goes on in Python.

    Raises:
        ValueError: the run is of a module that no name stands for.
    """
    if model not in model_names():
        raise ValueError(
            f"{str(folder)!r} prunes a module of your own, {model}: go on in Python, with {call}(env, ..., out=..., "
            "resume=True)."
        )


def made_as_begun(kind: str, arguments: dict[str, Any]) -> gym.Env[Any, Any]:
    """The environment of a run that is gone on with.

    Raises:
        ValueError, FileNotFoundError: as `gym.make`; files that are not there may be where the run was begun.
    """
    try:
        return gym.make(kind, **arguments)
    except (ValueError, FileNotFoundError) as error:
        files = [arguments.get(name) for name in ("data", "weights")]
        paths = [str(each) for each in files if each not in (None, *data_names())]
        if not any(repr(path) in str(error) and not Path(path).exists() for path in paths):
            raise
        again = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise again(f"{error}. {FROM_THERE}") from error


@contextlib.contextmanager
def going_on_by(command: str, folder: Path, left: str) -> Iterator[None]:
    """Say where the run is that begins now; and whatever ends it early, with which `command` it goes on, if there is
    the file `left` in its folder."""
    say(f"run folder: {folder}")
    try:
        yield
    except FileExistsError:  # it is another run's
        raise
    except BaseException as error:
        if (folder / left).is_file():
            say(f"{'Interrupted. ' if isinstance(error, KeyboardInterrupt) else ''}To go on: {command}")
        raise


def newest_run() -> Path:
    """The newest folder in `runs` that holds the result of a search.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    found = [path for path in RUNS.glob(f"*/{RESULT}") if written_by(path.parent) not in ("bogp", "train")]
    if found:
        return max(found, key=lambda path: path.stat().st_mtime).parent
    if begun := sorted(path for path in RUNS.glob("*") if written_by(path) in ("search", "early")):
        raise FileNotFoundError(f"No finished run in {str(RUNS)!r}: {how_to_go_on(begun[-1])}, or give a run folder.")
    raise FileNotFoundError(f"No run in {str(RUNS)!r}: run `gnnrl search` first, or give a run folder.")


def of_dense(result: SearchResult, accuracy: float) -> str:
    """The dense network's accuracy, and what it had learned where it was pruned before its training."""
    objective = result.settings.get("objective")
    return f"{accuracy:.2%}" + (f", {'pretrained' if objective == 'pretrained' else 'untrained'}" if objective else "")


def show(result: SearchResult) -> None:
    """Costs and accuracies beside the dense network's, and where the run folder is."""
    table = Table("", "dense", "pruned")
    table.add_row("MACs", "100 %", f"{result.macs_ratio:.1%}")
    table.add_row("parameters", "100 %", f"{result.params_ratio:.1%}")
    if result.memory_ratio is not None:
        table.add_row("peak activations", "100 %", f"{result.memory_ratio:.1%}")
    if result.latency is not None:
        dense, pruned = result.latency["dense_measured"], result.latency["measured"]
        predicted = f"latency (predicted {result.latency['predicted'] / result.latency['dense_predicted']:.1%})"
        table.add_row(predicted, f"{1000 * dense:.2f} ms", f"{1000 * pruned:.2f} ms, {pruned / dense:.1%}")
    table.add_row("search accuracy", "", f"{result.search_accuracy:.2%}")
    table.add_row("test accuracy", of_dense(result, result.dense_test_accuracy), f"{result.test_accuracy:.2%}")
    if result.finetuned_accuracy is not None:
        epochs = f"after {result.finetune_epochs} epochs of fine-tuning"
        table.add_row(epochs, "", f"{result.finetuned_accuracy:.2%}")
    console.print(table)
    say(f"run folder: {result.out}")
