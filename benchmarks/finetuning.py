"""What the plans of a search comparison are worth after fine-tuning, all with the same schedule."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from agents.provenance import machine, versions
from agents.refine import finetune_run
from agents.results import RESULT, SearchResult
from agents.run_folder import finished
from benchmarks.published_count import published_ratio
from benchmarks.registry import Benchmark, Options, markdown_table, of_budget, of_data, of_evaluations, spread
from benchmarks.search_comparison import WITHOUT_CHANCE, check_kept
from benchmarks.searches import measured_on, side_by_side
from gnnrl_gym.evaluation.accuracy import accuracy
from gnnrl_gym.files import read_json, write_atomic
from gnnrl_gym.zoo.models import DIGITS

METHODS = ("uniform", "random", "sensitivity", "ppo", "ppo-params", "ppo-floor")
LEARNING_RATE = 0.05
TRAIN_IMAGES = 10_000  # how many training images say how well they are fitted
SHARES = ("macs_ratio", "published_ratio", "params_ratio")
WHERE = "finetuned_on.json"  # of a run folder; what its result says is of the search


def run(options: Options) -> dict[str, Any]:
    """Fine-tunes the finished run folders that `search-comparison` left in the runs folder, seed by seed.

    A method without chance has one plan; its seeds are those of the fine-tuning. Interrupted, it goes on at the epoch
    where it was. `--methods` chooses what is run; the record holds every finished run that differs in the number of
    epochs at most: a schedule of one epoch and one of thirty stand side by side.

    Raises:
        FileNotFoundError: one of the searches is not there.
        ValueError: one of the runs is of other weights or data; said before any work.
    """
    base = options.runs / f"{of_budget(options)}-{options.evaluations}"
    tuned = base.with_name(f"{base.name}-finetuned-{options.epochs}-{_how(options)}")
    seeds = range(options.seed, options.seed + options.seeds)
    jobs = [(options, method, seed) for seed in seeds for method in options.methods_of(METHODS)]
    work = [(_source(base, *job), tuned / f"{job[1]}-{job[2]}", *job) for job in jobs]
    check_kept(options, [*(job[0] for job in work), *_folders(base, options)])
    side_by_side(_finetune, work, options.workers, "network")
    rows = {folder: row for folder in _folders(base, options) if (row := _row(folder))}
    about = {"model": options.model or DIGITS, "budget": options.budget, "learning_rate": LEARNING_RATE}
    about |= {"distill": options.distill, "images": options.images}
    return measured_on([_where(folder) for folder in rows]) | about | {"rows": list(rows.values())}


def _folders(base: Path, options: Options) -> list[Path]:
    """Run folders of any number of epochs, method by method."""
    tuned = f"{base.name}-finetuned-*-{_how(options)}"
    return [path.parent for method in METHODS for path in sorted(base.parent.glob(f"{tuned}/{method}-[0-9]*/{RESULT}"))]


def _how(options: Options) -> str:
    """Of run folders and record: what decides the outcome besides the epochs, in short."""
    return f"{options.distill:g}{'-all' if options.images == 'all' else ''}"


def _source(base: Path, options: Options, method: str, seed: int) -> Path:
    source = base / f"{method}-{options.seed if method in WITHOUT_CHANCE else seed}"
    if not finished(source):
        raise FileNotFoundError(f"No finished search in {str(source)!r}: run search-comparison first.")
    return source


def _finetune(source: Path, folder: Path, options: Options, method: str, seed: int) -> None:
    if not (folder / RESULT).is_file():
        half = folder.with_name(f".{folder.name}")  # a copy that is cut off must not look like a whole one
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(source, half, ignore=shutil.ignore_patterns("tensorboard*"))
        half.rename(folder)
    if SearchResult.load(folder).finetuned_accuracy is None:
        settings: dict[str, Any] = {"distill": options.distill, "images": options.images}
        finetune_run(folder, options.epochs, LEARNING_RATE, "cpu", seed, **settings)
        where = json.dumps({"machine": machine(), "versions": versions()})
        write_atomic(folder / WHERE, lambda file: file.write(where.encode()))


def _where(folder: Path) -> Any:
    """Machine and versions of a fine-tuning, which an older version did not keep."""
    unknown = {"machine": "unknown", "versions": dict.fromkeys(versions(), "unknown")}
    return SimpleNamespace(**(read_json(folder / WHERE) if (folder / WHERE).is_file() else unknown))


def _row(folder: Path) -> dict[str, Any] | None:
    """None while it is not fine-tuned to the end."""
    result = SearchResult.load(folder)
    if result.finetuned_accuracy is None:
        return None
    method, _, seed = folder.name.rpartition("-")
    network = result.network()
    slim = result.pruned(network)
    counted = published_ratio(network.model, slim, network.example_input[0])
    fitted = accuracy(slim, result.splits().train.take(TRAIN_IMAGES))
    keys = ("macs_ratio", "params_ratio", "test_accuracy", "finetuned_accuracy", "dense_test_accuracy", "widths")
    about = {"method": method, "seed": int(seed), "epochs": result.finetune_epochs, "published_ratio": counted}
    about["train_accuracy"] = fitted
    return about | {key: getattr(result, key) for key in keys}


def table(record: dict[str, Any]) -> str:
    """A row per method: test accuracy before, and after every number of epochs; at the end on training images."""
    lengths = sorted({row["epochs"] for row in record["rows"]})
    costs = ["real MACs", "FLOPs, published count", "parameters"]
    after = [f"after {epochs} epoch{'s' * (epochs > 1)}" for epochs in lengths]
    header = ["method", "seeds", *costs, "test before", *after, f"training images {after[-1]}"]
    dense = 100 * record["rows"][0]["dense_test_accuracy"]
    rows = [["dense", "", *["100 %"] * 3, f"{dense:.1f}", *[""] * (len(lengths) + 1)]]
    for method in METHODS:
        if found := [row for row in record["rows"] if row["method"] == method]:
            rows.append([method, *_cells(found, lengths)])
    return markdown_table(header, rows)


def _cells(found: list[dict[str, Any]], lengths: list[int]) -> list[str]:
    """Seeds, costs and accuracies of one method's rows. A plan that was fine-tuned twice is one plan before."""
    plans = list({tuple(row["widths"]): row for row in found}.values())
    after = [[row["finetuned_accuracy"] for row in found if row["epochs"] == epochs] for epochs in lengths]
    counts = [len(values) for values in after]
    shares = [f"{statistics.mean(row[key] for row in plans):.1%}" for key in SHARES]
    fitted = [row["train_accuracy"] for row in found if row["epochs"] == lengths[-1]]
    accuracies = [[row["test_accuracy"] for row in plans], *after, fitted]
    return [
        " to ".join(map(str, sorted({min(counts), max(counts)}))),
        *shares,
        *(spread(values, 2, percent=True) for values in accuracies),
    ]


BENCHMARK = Benchmark(
    "finetuning",
    "plans of a search comparison after the same fine-tuning",
    run,
    table,
    variant=lambda options: f"{of_budget(options)}-distill-{_how(options)}{of_evaluations(options)}{of_data(options)}",
)
