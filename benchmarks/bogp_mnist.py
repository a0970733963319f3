"""BoGP on MNIST: at 90 % sparsity, what the search finds beside what the pool has anyway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.bogp import ASKED, bogp
from agents.bogp_record import BogpResult, Question, spread
from agents.results import RESULT
from benchmarks.registry import Benchmark, Options, markdown_table
from benchmarks.searches import measured_on
from gnnrl_gym.files import read_json

EVALUATIONS = 30
# masked as a whole, the network overfits: small shifts of the images are worth half a point on the search split
SETTINGS: dict[str, dict[str, Any]] = {
    "mlp-128-128": {"scope": "hidden"},
    "mlp-300-100": {"scope": "network", "shift": 1, "weight_decay": 1e-4, "epochs": 2, "controls": 2},
}


def question(model: str, data: str, seed: int) -> Question:
    """A tenth of the weights, 64 nodes, 300 graphs; a few epochs to score a graph, 15 to report it."""
    return Question(
        model, data, density=0.1, nodes=64, pool_size=300, evaluations=EVALUATIONS, seed=seed, final_epochs=15,
        **{"epochs": 3, "controls": 6, **SETTINGS.get(model, {})},
    )  # fmt: skip


def run(options: Options) -> dict[str, Any]:
    """A run folder per seed (each with a pool of its own); finished ones are not run again, others are resumed.

    Raises:
        ValueError: one that is there was asked something else.
    """
    torch.set_num_threads(1)
    model, data = options.model or "mlp-128-128", options.data or "mnist"
    results = []
    for seed in range(options.seed, options.seed + options.seeds):
        folder = options.runs / f"bogp-{model}-{seed}"
        _check_kept(folder, question(model, data, seed))
        if not (folder / RESULT).is_file():
            bogp(question(model, data, seed), folder, "auto", progress=True, resume=True)
        results.append(BogpResult.load(folder))
    asked = question(model, Path(data).name, options.seed)
    return {**measured_on(results), "model": model, "data": asked.data,
            "scope": asked.scope, "density": asked.density, "nodes": asked.nodes,
            "pool": asked.pool_size, "epochs": asked.epochs, "final_epochs": asked.final_epochs, "shift": asked.shift,
            "weight_decay": asked.weight_decay, "rows": [_row(result) for result in results]}  # fmt: skip


def _check_kept(folder: Path, asked: Question) -> None:
    """What an older version did not ask has its default."""
    if (folder / ASKED).is_file() and (before := Question.of(read_json(folder / ASKED))) != asked:
        raise ValueError(f"{str(folder)!r} was run with {before}, not {asked}: choose another --runs.")


def _row(result: BogpResult) -> dict[str, Any]:
    keys = ("seed", "evaluations", "graph", "edges", "weights_ratio", "params_ratio", "search_accuracy", "descriptors",
            "random_search_accuracy", "trained", "noise", "correlations", "seconds")  # fmt: skip
    return {key: getattr(result, key) for key in keys}


def table(record: dict[str, Any]) -> str:
    """A row per way to choose a graph: mean and standard deviation over all trainings."""
    rows = record["rows"]
    runs, count = len(rows), len(rows[0]["trained"]["random graphs"])
    # measured of the picks of BoGP; the masks of other graphs of a pool keep a little more or less
    kept, limit = f"{100 * max(row['weights_ratio'] for row in rows):.2f} %", f"at most {100 * record['density']:g} %"
    searches = {"bayesian": ("search_accuracy", kept), "random search": ("random_search_accuracy", limit)}
    pools = f"{runs} pool{'s' if runs > 1 else ''}"
    header = [f"{record['model']}, {pools}", "evaluations", "weights kept", "search accuracy", "test accuracy"]
    lines = [["dense", "", "100 %", "", spread(_all(rows, "dense"))]]
    for name, (key, share) in searches.items():
        scores = spread([row[key] for row in rows])
        lines.append([name, str(rows[0]["evaluations"]), share, scores, spread(_all(rows, name))])
    lines.append([f"random graphs, {count} of each pool", "", limit, "", spread(_all(rows, "random graphs"))])
    return markdown_table(header, [*lines, *_noise(rows)])


def _all(rows: list[dict[str, Any]], name: str) -> Any:
    return np.concatenate([np.ravel(row["trained"][name]) for row in rows])


def _noise(rows: list[dict[str, Any]]) -> list[list[str]]:
    """How much there is to find: deviations, in points."""
    titles = {"graphs": "deviation between random graphs", "seeds": "deviation between seeds of one graph"}
    found = {key: [row["noise"][key] for row in rows if row["noise"][key] is not None] for key in titles}
    means = {key: f"{100 * float(np.mean(values)):.2f}" if values else "" for key, values in found.items()}
    return [[title, "", "", "", means[key]] for key, title in titles.items()]


BENCHMARK = Benchmark(
    "bogp-mnist",
    "sparse masks from relational graphs on MNIST: Bayesian optimisation and its controls",
    run,
    table,
    variant=lambda options: options.model or "mlp-128-128",
)
