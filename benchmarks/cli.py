"""`gnnrl bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.registry import OUT, Options, benchmarks
from benchmarks.tables import draw, rebuild
from gnnrl_gym.envs.budget import METRICS

PAGES = ("README.md", "docs")
PICTURES = Path("docs/images")


def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Benchmarks to run; none lists them.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    model: Annotated[str | None, typer.Option(help="Only this network.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Its weights, for searches; for general-policy the folder of all.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Data name, .npz file or image folder, for searches.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds per searcher.")] = 3,
    evaluations: Annotated[int, typer.Option(help="Evaluations per search.")] = 400,
    budget: Annotated[float, typer.Option(help="Share of the dense cost.")] = 0.5,
    metric: Annotated[str, typer.Option(help=f"Of searches' cost: {', '.join(METRICS)}.")] = "macs",
    methods: Annotated[str, typer.Option(help="Searchers to run, comma-separated; empty: all.")] = "",
    workers: Annotated[int, typer.Option(help="Searches side by side, one thread each.")] = 1,
    epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning.")] = 30,
    distill: Annotated[float, typer.Option(help="Weight of the dense network's outputs in fine-tuning.")] = 0.0,
    images: Annotated[str, typer.Option(help="Of fine-tuning: train, or all, the search's too.")] = "train",
    runs: Annotated[Path, typer.Option(help="Run folders of searches; finished ones are kept.")] = Path("runs/bench"),
    out: Annotated[Path, typer.Option(help="Folder of the JSON records, also for --tables.")] = OUT,
    tables: Annotated[bool, typer.Option(help="Rebuild tables and pictures of README.md and docs/.")] = False,
) -> None:
    """Run benchmarks, each of which writes one JSON record; or list them."""
    known = benchmarks()
    if unknown := [name for name in names or [] if name not in known]:
        raise ValueError(f"Unknown benchmark {unknown[0]!r}: choose from {', '.join(known)}.")
    options = Options(
        seed, model, weights, data, seeds, evaluations, budget, metric, workers, epochs, distill, images,
        _split(methods), runs,
    )  # fmt: skip
    for name in names or []:
        typer.echo(f"{name}: {known[name].measure(options, out)}")
    if tables:
        pages = [path for place in PAGES for path in _pages(Path(place))]
        if not pages:
            raise FileNotFoundError(f"No {' or '.join(PAGES)} here: run --tables in the repository.")
        for page in pages:
            typer.echo(f"{page}: {rebuild(page, out)} tables")
        for picture in draw(PICTURES, out):
            typer.echo(str(picture))
    if not names and not tables:
        for benchmark in known.values():
            typer.echo(f"{benchmark.name:<24} {benchmark.summary}")


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _pages(place: Path) -> list[Path]:
    return sorted(place.glob("*.md")) if place.is_dir() else [place] if place.is_file() else []
