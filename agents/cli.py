"""The command line: `gnnrl search | finetune | evaluate`, and the commands that other packages add."""

from __future__ import annotations

import json
import sys
import time
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import gnnrl_gym  # noqa: F401  (registers the environments)
from agents.bogp_cli import bogp
from agents.early_cli import early
from agents.refine import evaluate_run, finetune_run
from agents.results import RESULT, SearchResult
from agents.run_folder import read_asked
from agents.search import ASKED
from agents.search import search as run_search
from agents.searchers import SEARCHERS
from agents.transfer import save_policy, train_policy
from gnnrl_gym.envs.budget import METRICS, in_words
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.errors import UnsupportedOperation
from gnnrl_gym.evaluation.finetuning import SCHEDULES
from gnnrl_gym.pruning.importance import IMPORTANCES
from gnnrl_gym.zoo.models import DIGITS

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Prune neural networks by searching on their graph.")
console = Console()

Run = Annotated[Path | None, typer.Argument(help="Run folder that `gnnrl search` wrote. [default: the newest in runs]")]
RUNS = Path("runs")
Device = Annotated[str, typer.Option(help="auto (the GPU when there is one), cpu or cuda.")]


@app.command()
def search(
    model: Annotated[str, typer.Option(help="digits-resnet, resnet20/32/44/56/110, or any of torchvision's.")] = DIGITS,
    weights: Annotated[str | None, typer.Option(help="State-dict file, or a torchvision weights name.")] = None,
    data: Annotated[str | None, typer.Option(help="Data name, .npz file or image folder. [default: digits]")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Share of the dense cost that may stay, or several: macs=0.5,latency=0.6. [default: 0.5]"),
    ] = None,
    metric: Annotated[str, typer.Option(help=f"What a plain budget counts: {', '.join(METRICS)}.")] = "macs",
    importance: Annotated[str, typer.Option(help=f"What orders the channels: {', '.join(IMPORTANCES)}.")] = "l2",
    method: Annotated[str, typer.Option(help=f"Searcher: {', '.join(SEARCHERS)}.")] = "ppo",
    evaluations: Annotated[int, typer.Option(help="Candidate plans that may be scored.")] = 400,
    round_to: Annotated[int, typer.Option(help="Widths are multiples of this, or full.")] = 1,
    granularity: Annotated[str, typer.Option(help="channels, unstructured, 2:4 (N:M) or block4x1.")] = "channels",
    search_images: Annotated[int, typer.Option(help="Images of the search split that score a plan.")] = 1000,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal searches.")] = 0,
    policy: Annotated[
        str, typer.Option(help="What ppo starts from: a file of `gnnrl train`, general, none, or auto.")
    ] = "auto",
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/MODEL-METHOD-TIME]")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted search in this run folder.")] = None,
    finetune: Annotated[int, typer.Option(help="Epochs of fine-tuning afterwards; 0 for none.")] = 10,
) -> None:  # fmt: skip
    """Search for the best pruned network within a budget, fine-tune it, report it. Ctrl-C keeps the best so far."""
    if resume is not None:
        _finish(*_resumed(resume), finetune, device)
        return
    if data is None and model != DIGITS:
        raise typer.BadParameter(f"{model} needs --data: a data name, a .npz file or an image folder.")
    if weights is None and model != DIGITS:
        console.print(f"[yellow]No --weights: {model} is pruned with random weights, which says little.[/]")
    folder = out or RUNS / f"{model}-{method}-{time.strftime('%Y%m%d-%H%M%S')}"
    env = gym.make(
        "GNNRL-Prune-v0", model=model, data=data or "digits", weights=weights, budget=_budget(budget or ["0.5"]),
        metric=metric, importance=importance, round_to=round_to, granularity=granularity,
        search_images=search_images, device=device,
    )  # fmt: skip
    inner: PruneEnv = env.unwrapped  # type: ignore[assignment]
    groups, allowed = len(inner.network.widths), in_words(inner.budgets)
    console.print(f"{model}: {groups} groups, budget {allowed}, {evaluations} evaluations")
    settings: dict[str, Any] = {} if method != "ppo" else {"policy": None if policy == "none" else policy}
    _finish(folder, run_search(env, method, evaluations, seed, folder, progress=True, **settings), finetune, device)


def _resumed(folder: Path) -> tuple[Path, SearchResult]:
    """Go on with the search of a run folder as it was asked for."""
    asked = read_asked(folder, ASKED)
    env = gym.make("GNNRL-Prune-v0", **asked.pop("environment"))
    return folder, run_search(env, **asked, out=folder, progress=True, resume=True)


def _finish(folder: Path, result: SearchResult, epochs: int, device: str) -> None:
    """Fine-tune what a search found, and show it."""
    if result.interrupted:
        console.print(f"Interrupted: this is the best so far. To go on: gnnrl search --resume {folder}", soft_wrap=True)
    elif epochs:
        try:
            result = finetune_run(folder, epochs, device=device, seed=result.seed)
        except KeyboardInterrupt:
            later = f"gnnrl finetune {folder} --epochs {epochs} --seed {result.seed}"
            console.print(f"Fine-tuning stopped. It goes on after its last whole epoch: {later}", soft_wrap=True)
    _show(result)


@app.command()
def train(
    networks: Annotated[Path, typer.Argument(help="JSON: a list of GNNRL-Prune-v0 arguments, one for each network.")],
    out: Annotated[Path, typer.Option(help="Policy file.")] = Path("policy.pt"),
    evaluations: Annotated[int, typer.Option(help="Evaluations of the training, over all networks.")] = 3000,
    budgets: Annotated[tuple[float, float], typer.Option(help="Lowest and highest budget.")] = (0.3, 0.7),
    seed: Annotated[int, typer.Option(help="Equal seeds give equal policies.")] = 0,
) -> None:
    """Train one policy on several networks, for `gnnrl search --policy`."""
    rows = [{**row, "max_steps": 1} for row in json.loads(networks.read_text())]
    env = gym.make("GNNRL-PruneMany-v0", networks=rows, budgets=budgets)
    agent = train_policy(env, evaluations, seed, progress=True)
    save_policy(agent, out, {"networks": [row.get("model", DIGITS) for row in rows], "evaluations": evaluations})
    console.print(f"policy: {out}", soft_wrap=True)


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
    settings: dict[str, Any] = {"schedule": schedule, "distill": distill, "images": images}
    _show(finetune_run(run or _newest(), epochs, learning_rate, device, seed, **settings))


@app.command()
def evaluate(
    run: Run = None,
    device: Device = "auto",
    batch: Annotated[int, typer.Option(help="Images per forward when latency is measured.")] = 1,
) -> None:
    """Reload a run: its accuracy, MACs and parameters again, and its measured latency beside the dense network's."""
    run = run or _newest()
    again = evaluate_run(run, device, batch)
    table = Table("", "dense", "pruned", "ratio", title=str(run))
    table.add_row("test accuracy", f"{again.dense_accuracy:.2%}", f"{again.accuracy:.2%}", "")
    for name, dense, pruned in (("MACs", *again.macs), ("parameters", *again.params)):
        table.add_row(name, f"{dense:,}", f"{pruned:,}", f"{pruned / dense:.1%}")
    dense_ms, pruned_ms = (1000 * seconds for seconds in again.latency)
    table.add_row(f"latency, batch {batch}", f"{dense_ms:.2f} ms", f"{pruned_ms:.2f} ms", f"{pruned_ms / dense_ms:.1%}")
    console.print(table)
    console.print(f"accuracy {again.accuracy!r}, in the record {again.recorded_accuracy!r}")


def _budget(texts: list[str]) -> float | dict[str, float]:
    """What --budget says, once or several times: "0.5", or "macs=0.5,latency=0.6"."""
    parts = [part.strip() for text in texts for part in text.split(",")]
    try:
        if len(parts) == 1 and "=" not in parts[0]:
            return float(parts[0])
        found = {name.strip(): float(share) for name, share in (part.split("=") for part in parts)}
    except ValueError as error:
        text = " ".join(texts)
        raise ValueError(f"--budget {text!r}: write a share such as 0.5, or several: macs=0.5,latency=0.6.") from error
    if len(found) < len(parts):
        raise ValueError(f"--budget {' '.join(texts)!r} gives one metric twice: give each once.")
    return found


def _newest() -> Path:
    records = sorted(RUNS.glob(f"*/{RESULT}"), key=lambda path: path.stat().st_mtime)
    if not records:
        raise FileNotFoundError(f"No run in {str(RUNS)!r}: run `gnnrl search` first, or give a run folder.")
    return records[-1].parent


def _show(result: SearchResult) -> None:
    table = Table("", "dense", "pruned")
    table.add_row("MACs", "100 %", f"{result.macs_ratio:.1%}")
    table.add_row("parameters", "100 %", f"{result.params_ratio:.1%}")
    if result.memory_ratio is not None:
        table.add_row("peak activations", "100 %", f"{result.memory_ratio:.1%}")
    if result.latency is not None:
        dense, pruned = (f"{1000 * result.latency[key]:.2f} ms" for key in ("dense_measured", "measured"))
        table.add_row(f"latency (predicted {1000 * result.latency['predicted']:.2f} ms)", dense, pruned)
    table.add_row("search accuracy", "", f"{result.search_accuracy:.2%}")
    table.add_row("test accuracy", f"{result.dense_test_accuracy:.2%}", f"{result.test_accuracy:.2%}")
    if result.finetuned_accuracy is not None:
        epochs = f"after {result.finetune_epochs} epochs of fine-tuning"
        table.add_row(epochs, "", f"{result.finetuned_accuracy:.2%}")
    console.print(table)
    console.print(f"run folder: {result.out}", soft_wrap=True)


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
    except (ValueError, OSError, UnsupportedOperation) as error:
        Console(stderr=True).print(f"[red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
