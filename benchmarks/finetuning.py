"""What the plans of a search comparison are worth after fine-tuning, all with the same schedule."""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from agents.refine import finetune_run
from agents.results import RESULT, SearchResult
from benchmarks.registry import Benchmark, Options, markdown_table
from benchmarks.search_comparison import WITHOUT_CHANCE
from gnnrl_gym.zoo.models import DIGITS

METHODS = ("uniform", "sensitivity", "ppo")
LEARNING_RATE = 0.05


def run(options: Options) -> dict[str, Any]:
    """Fine-tunes the finished run folders that `search-comparison` left in the runs folder, seed by seed.

    A method without chance has one plan; its seeds are those of the fine-tuning. Interrupted, it goes on at the epoch
    where it was.
    """
    base = options.runs / f"{options.model or DIGITS}-{options.budget:g}-{options.evaluations}"
    jobs = [(method, seed) for seed in range(options.seed, options.seed + options.seeds) for method in METHODS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        pending = [pool.submit(_finetune, base, options, method, seed) for method, seed in jobs]
        rows = [done.result() for done in tqdm(as_completed(pending), total=len(jobs), unit="network")]
    about = {"model": options.model or DIGITS, "budget": options.budget, "epochs": options.epochs}
    about |= {"learning_rate": LEARNING_RATE, "distill": options.distill}
    return about | {"rows": sorted(rows, key=lambda row: (row["method"], row["seed"]))}


def _finetune(base: Path, options: Options, method: str, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    source = base / f"{method}-{options.seed if method in WITHOUT_CHANCE else seed}"
    folder = base.with_name(f"{base.name}-finetuned-{options.epochs}-{options.distill:g}") / f"{method}-{seed}"
    if not (source / RESULT).is_file():
        raise FileNotFoundError(f"No finished search in {str(source)!r}: run search-comparison first.")
    if not (folder / RESULT).is_file():
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("tensorboard"))
    result = SearchResult.load(folder)
    if result.finetuned_accuracy is None:
        result = finetune_run(folder, options.epochs, LEARNING_RATE, "cpu", seed, distill=options.distill)
    keys = ("macs_ratio", "params_ratio", "test_accuracy", "finetuned_accuracy", "dense_test_accuracy", "widths")
    return {"method": method, "seed": seed} | {key: getattr(result, key) for key in keys}


def table(record: dict[str, Any]) -> str:
    """A row per method: test accuracy before and after."""
    header = ["method", "seeds", "real MACs", "parameters", "test before", f"test after {record['epochs']} epochs"]
    dense = 100 * record["rows"][0]["dense_test_accuracy"]
    rows = [["dense", "", "100 %", "100 %", f"{dense:.1f}", ""]]
    for method in METHODS:
        found = [row for row in record["rows"] if row["method"] == method]
        shares = [f"{statistics.mean(row[key] for row in found):.1%}" for key in ("macs_ratio", "params_ratio")]
        accuracies = [_spread([100 * row[key] for row in found]) for key in ("test_accuracy", "finetuned_accuracy")]
        rows.append([method, str(len(found)), *shares, *accuracies])
    return markdown_table(header, rows)


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


BENCHMARK = Benchmark(
    "finetuning",
    "plans of a search comparison after the same fine-tuning",
    run,
    table,
    variant=lambda options: f"{options.model or DIGITS}-{options.budget:g}",
)
