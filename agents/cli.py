"""The command line: `gnnrl search | finetune | evaluate | report | train | early | bogp`, and what packages add."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import entry_points
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agents.bogp_cli import bogp
from agents.cli_common import Device, Run, console, newest_run, of_dense, say, show
from agents.early_cli import early
from agents.refine import evaluate_run, finetune_run
from agents.report_cli import report
from agents.results import SearchResult
from agents.search_cli import search
from agents.train_cli import train
from gnnrl_gym import __version__
from gnnrl_gym.errors import MissingExtra, UnsupportedOperation
from gnnrl_gym.evaluation.finetuning import SCHEDULES

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command()(search)
app.command()(train)


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"gnnrl_gym {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def gnnrl(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Prune neural networks by searching on their graph."""


@app.command()
def finetune(
    run: Run = None,
    epochs: Annotated[int, typer.Option(help="Passes over the train split; the last one counts.")] = 30,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = 0.02,
    schedule: Annotated[str, typer.Option(help=f"Of the learning rate: {', '.join(SCHEDULES)}.")] = "cosine",
    distill: Annotated[float, typer.Option(help="Weight of the dense network's outputs in the loss, up to 1.")] = 0.0,
    images: Annotated[str, typer.Option(help="train, or all: those of the search too.")] = "train",
    seed: Annotated[int, typer.Option()] = 0,
    device: Device = "auto",
) -> None:
    """Train the pruned network of a run further. Interrupted, the same command goes on after the last whole epoch."""
    folder = run or newest_run()
    try:
        show(finetune_run(folder, epochs, learning_rate, device, seed, None, None, schedule, distill, images))
    except KeyboardInterrupt:
        say(f"Interrupted. The same command goes on after the last whole epoch of {folder}.")
        raise


@app.command()
def evaluate(
    run: Run = None,
    device: Device = "auto",
    batch: Annotated[int, typer.Option(help="Images per forward when latency is measured.")] = 1,
) -> None:
    """Reload a run: its accuracy, MACs and parameters again, and its measured latency beside the dense network's."""
    run = run or newest_run()
    again = evaluate_run(run, device, batch)
    table = Table("", "dense", "pruned", "ratio", title=escape(str(run)))
    dense_accuracy = of_dense(SearchResult.load(run), again.dense_accuracy)
    table.add_row("test accuracy", dense_accuracy, f"{again.accuracy:.2%}", "")
    for name, dense, pruned in (("MACs", *again.macs), ("parameters", *again.params)):
        table.add_row(name, f"{dense:,}", f"{pruned:,}", f"{pruned / dense:.1%}")
    dense_ms, pruned_ms = (1000 * seconds for seconds in again.latency)
    table.add_row(f"latency, batch {batch}", f"{dense_ms:.2f} ms", f"{pruned_ms:.2f} ms", f"{pruned_ms / dense_ms:.1%}")
    console.print(table)
    console.print(f"accuracy {again.accuracy!r}, in the record {again.recorded_accuracy!r}")


app.command()(report)
app.command()(early)
app.command()(bogp)


def _add_foreign_commands() -> None:
    """Commands that installed packages bring (`gnnrl bench` is the benchmark suite's): this room knows none of them."""
    for entry in entry_points(group="gnnrl.commands"):
        app.command(entry.name)(entry.load())


def main() -> None:
    """Entry point. What the user can mend is said in a sentence, without a traceback."""
    # SB3 advises the CPU for policies without images; ours is a GNN, and --device says where it runs
    warnings.filterwarnings("ignore", message=".*primarily intended to run on the CPU.*")
    _add_foreign_commands()
    try:
        app()
    except (ValueError, OSError, MissingExtra, UnsupportedOperation) as error:
        Console(stderr=True).print(f"[red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
