"""`gnnrl search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import typer
from rich.markup import escape

import gnnrl_gym  # noqa: F401  (registers the environments)
from agents.cli_common import (
    Data,
    Device,
    check_goes_on_alone,
    check_has_a_name,
    console,
    given,
    going_on_by,
    made_as_begun,
    new_folder,
    quoted,
    say,
    show,
)
from agents.provenance import environment_arguments
from agents.recorder import LATENCIES, LOG
from agents.refine import finetune_run
from agents.run_folder import free_folder, read_asked
from agents.search import ASKED, check_request
from agents.search import search as run_search
from agents.searchers import plan_searchers
from gnnrl_gym.checks import check_whole
from gnnrl_gym.envs.budget import METRICS, in_words
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.evaluation.accuracy import accuracy
from gnnrl_gym.evaluation.workers import check_workers
from gnnrl_gym.pruning.importance import IMPORTANCES
from gnnrl_gym.zoo.models import DIGITS


def search(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="digits-resnet, resnet20/32/44/56/110, or any of torchvision's.")] = DIGITS,
    weights: Annotated[str | None, typer.Option(help="State-dict file, or a torchvision weights name.")] = None,
    data: Data = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="Share of the dense cost that may stay, or several: macs=0.5,latency=0.6.", show_default="0.5"
        ),
    ] = None,
    metric: Annotated[str, typer.Option(help=f"What a plain budget counts: {', '.join(METRICS)}.")] = "macs",
    importance: Annotated[str, typer.Option(help=f"What orders the channels: {', '.join(IMPORTANCES)}.")] = "l2",
    method: Annotated[str, typer.Option(help=f"Searcher: {', '.join(plan_searchers())}.")] = "ppo",
    evaluations: Annotated[int, typer.Option(help="Candidate plans that may be scored.")] = 400,
    floor: Annotated[float, typer.Option(help="Share of every group's units that always stays.")] = 0.1,
    round_to: Annotated[int, typer.Option(help="Widths are multiples of this, or full; a head is one unit.")] = 1,
    granularity: Annotated[
        str, typer.Option(help="channels, or with --metric params: unstructured, 2:4 (N:M) or block4x1.")
    ] = "channels",
    search_images: Annotated[int, typer.Option(help="Images of the search split that score a plan.")] = 1000,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal searches.")] = 0,
    policy: Annotated[
        str,
        typer.Option(help="What ppo starts from: a file of `gnnrl train`, general, none; auto: general for channels."),
    ] = "auto",
    device: Device = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Threads that score plans side by side, on a CPU.", show_default="all cores")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Score plans on a Ray cluster instead: its address, auto, or local.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/MODEL-METHOD-TIME")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted search in this run folder.")] = None,
    finetune: Annotated[int, typer.Option(help="Epochs of fine-tuning afterwards; 0 for none.")] = 10,
) -> None:  # fmt: skip
    """Search for the best pruned network within a budget, fine-tune it, report it. Ctrl-C keeps the best so far."""
    check_whole(0, finetune=finetune)
    check_workers(workers, ray)
    if resume is not None:
        check_goes_on_alone(context, resume, "finetune", "workers", "ray")
        _go_on(resume, finetune, workers=workers, ray=ray)
        return
    if given(context, "metric") and any("=" in text for text in budget or []):
        raise ValueError("--metric is for a plain --budget: name the metrics in --budget alone.")
    if data is None and model != DIGITS:
        raise typer.BadParameter(f"{model} needs --data: a data name, a .npz file or an image folder.")
    start = None if policy == "none" else policy
    check_request(method, evaluations, seed, start)
    folder = free_folder(out or new_folder(f"{model}-{method}"))
    if weights is None and model != DIGITS:
        console.print(f"[yellow]No --weights: {escape(model)} is pruned with random weights, which says little.[/]")
    env = gym.make(
        "GNNRL-Prune-v0", model=model, data=data or "digits", weights=weights, budget=_budget(budget or ["0.5"]),
        metric=metric, importance=importance, floor=floor, round_to=round_to, granularity=granularity,
        search_images=search_images, device=device,
    )  # fmt: skip
    settings = {"policy": start} if method == "ppo" else {}
    _run(env, folder, finetune, method=method, evaluations=evaluations, seed=seed, workers=workers, ray=ray, **settings)


def _go_on(folder: Path, finetune: int, **how: Any) -> None:
    """With the search of a run folder as it was asked for."""
    asked = read_asked(folder, ASKED, environment=dict, method=str, evaluations=int, seed=int)
    arguments = environment_arguments(asked.pop("environment"))
    check_has_a_name(folder, arguments["model"], "agents.search")
    if (folder / LATENCIES).is_file():
        arguments["latencies"] = folder / LATENCIES
    _run(made_as_begun("GNNRL-Prune-v0", arguments), folder, finetune, **asked, **how, resume=True)


def _run(env: gym.Env[Any, Any], folder: Path, finetune: int, **asked: Any) -> None:
    """Search, fine-tune what was found, and show it."""
    inner: PruneEnv = env.unwrapped  # type: ignore[assignment]
    device = inner.arguments["device"]
    _say_what_is_pruned(inner, asked["evaluations"])
    again = f"gnnrl search --resume {quoted(folder)} --finetune {finetune}"
    with going_on_by(again, folder, LOG):
        result = run_search(env, **asked, out=folder, progress=True)
    stopped = result.interrupted
    if stopped:
        say(f"Interrupted: this is the best so far. To go on: {again}")
    elif finetune:
        try:
            result = finetune_run(folder, finetune, device=device, seed=result.seed)
        except KeyboardInterrupt:
            stopped = True
            again = f"gnnrl finetune {quoted(folder)} --epochs {finetune} --seed {result.seed} --device {device}"
            say(f"Fine-tuning stopped. It goes on after its last whole epoch: {again}")
    show(result)
    if stopped:
        raise typer.Exit(130)  # as a shell expects of Ctrl-C: what was to come next does not begin


def _say_what_is_pruned(env: PruneEnv, evaluations: int) -> None:
    """Wrong weights or a wrong normalisation show in the dense network's accuracy, before anything is spent."""
    groups, allowed = len(env.network.widths), in_words(env.budgets)
    dense = accuracy(env.network.model, env.data.search.take(env.arguments["search_images"]))
    say(f"{env.arguments['model']}: {groups} groups, budget {allowed}, {evaluations} evaluations")
    say(f"dense network: search accuracy {dense:.2%}")


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
