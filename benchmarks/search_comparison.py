"""Searchers at equal real cost and equal evaluations, over several seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

from agents.recorder import LATENCIES, LOG
from agents.results import RESULT, SearchResult
from agents.run_folder import finished
from agents.search import ASKED
from benchmarks.registry import Benchmark, Options, markdown_table, of_budget, of_data, of_evaluations, spread
from benchmarks.searches import asked_of, check_digests, check_same, digests_of, measured_on, searched, side_by_side
from benchmarks.torch_pruning_control import NAME as OUTSIDE
from benchmarks.torch_pruning_control import control
from gnnrl_gym.files import read_json, write_atomic
from gnnrl_gym.pruning.latency import LatencyTable
from gnnrl_gym.zoo.models import DIGITS

METHODS = ("uniform", OUTSIDE, "random", "sensitivity", "es", "cma-es", "ppo-steps", "ppo-fresh", "ppo")
# Under a budget of parameters, too, or with half of every group kept: no rows beside the others, but plans for
# `finetuning`.
OTHER_PLANS = ("ppo-params", "ppo-floor")
# Within other budgets than of MACs.
ELSEWHERE = tuple(method for method in METHODS if method != OUTSIDE)
# "fresh": not from the general policy. "steps" takes several small ones to the budget, as published, instead of one.
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo-fresh": {"policy": None},
    "ppo-steps": {"policy": None, "n_steps": 4, "policy_kwargs": {"initial_mean": -0.7}},
}
ENVIRONMENTS: dict[str, dict[str, Any]] = {"ppo-steps": {"max_steps": 10}, "ppo-floor": {"floor": 0.5}}
WITHOUT_CHANCE = ("uniform", OUTSIDE, "sensitivity")
NAMES = {"macs": "MACs", "params": "parameters", "memory": "memory", "latency": "latency"}  # of metrics, in titles
REPEATS = 100  # forwards behind a measured latency
POINTS = (50, 100, 200, 400)  # evaluations at which the table shows the best plan so far


def run(options: Options) -> dict[str, Any]:
    """Every method and seed is a run folder; those that are finished are not run again.

    `--methods` chooses what is run; the record holds every finished run of the folder that has the record's budget.

    Raises:
        ValueError: one of them was made with other arguments.
    """
    base = options.runs / f"{of_budget(options)}-{options.evaluations}"
    methods = options.methods_of(METHODS + OTHER_PLANS if options.metric == "macs" else ELSEWHERE)
    jobs = [(options, method, seed, base) for method in methods for seed in _seeds(method, options)]
    # those of other methods than are run now are in the record too
    check_kept(options, [folder for method in METHODS + OTHER_PLANS for folder in base.glob(f"{method}-[0-9]*")])
    side_by_side(_search, jobs, options.workers, "search")
    folders = [path.parent for method in METHODS for path in sorted(base.glob(f"{method}-[0-9]*/{RESULT}"))]
    folders = [folder for folder in folders if finished(folder)]
    rows = [_row(folder) for folder in folders]
    if options.metric == "latency" and folders:
        rows = [row | found for row, found in zip(rows, _latencies(folders), strict=True)]
    return {
        **measured_on([SearchResult.load(folder) for folder in folders if not folder.name.startswith(OUTSIDE)]),
        "model": options.model or DIGITS,
        "budget": options.budget,
        "metric": options.metric,
        "evaluations": options.evaluations,
        "threads_per_search": 1,
        "rows": rows,
    }


def _seeds(method: str, options: Options) -> range:
    """Some give the same plan whatever the seed."""
    return range(options.seed, options.seed + (1 if method in WITHOUT_CHANCE else options.seeds))


def check_kept(options: Options, folders: Sequence[Path]) -> None:
    """Whether run folders METHOD-SEED are of the searches that are asked for; said before any work.

    Raises:
        ValueError: one was run with something else, or with other weights or data of the same names.
    """
    kept = {folder: folder.name.rpartition("-")[0] for folder in sorted(folders) if (folder / ASKED).is_file()}
    for folder, method in kept.items():
        check_same(folder, asked_of(*_asked(options, method, _seed_of(folder, method))))
    if kept:  # all have the weights and data of the first
        check_digests(list(kept), environment_of(options, next(iter(kept.values()))))


def _seed_of(folder: Path, method: str) -> int:
    """Fine-tuned with another seed, a plan without chance is still that of its one search."""
    return int(read_json(folder / ASKED)["seed"] if method in WITHOUT_CHANCE else folder.name.rpartition("-")[2])


def _asked(options: Options, method: str, seed: int) -> tuple[str, int, int, dict[str, Any], dict[str, Any]]:
    settings = SETTINGS.get(method, {})
    return searcher_of(method), options.evaluations, seed, environment_of(options, method), settings


def _search(options: Options, method: str, seed: int, base: Path) -> None:
    folder, asked = base / f"{method}-{seed}", _asked(options, method, seed)
    if method != OUTSIDE:
        searched(folder, *asked)
    elif not finished(folder):
        _control(gym.make("GNNRL-Prune-v0", **environment_of(options, method)), folder, asked_of(*asked))


def environment_of(options: Options, method: str) -> dict[str, Any]:
    """Arguments of `GNNRL-Prune-v0`."""
    given = {"model": options.model or DIGITS, "weights": options.weights, "data": options.data or "digits"}
    budget = {"macs": options.budget, "params": options.budget} if method == "ppo-params" else options.budget
    metric = {} if options.metric == Options.metric else {"metric": options.metric}
    return given | {"budget": budget} | metric | ENVIRONMENTS.get(method, {})


def searcher_of(method: str) -> str:
    """ "ppo-fresh", "ppo-steps", "ppo-params" and "ppo-floor" are ways to use the searcher ppo."""
    return "ppo" if method.startswith("ppo") else method


def _control(env: gym.Env[Any, Any], folder: Path, asked: dict[str, Any]) -> None:
    """Only where it is installed: it is no dependency."""
    try:
        row = control(env.unwrapped)  # type: ignore[arg-type]
    except ImportError:
        return
    asked = asked | {"environment": asked["environment"] | digests_of(env)}
    for name, content in ((ASKED, asked), (RESULT, row)):
        write_atomic(folder / name, lambda file, content=content: file.write(json.dumps(content).encode()))  # type: ignore[misc]


def _row(folder: Path) -> dict[str, Any]:
    if folder.name.startswith(OUTSIDE):
        row: dict[str, Any] = json.loads((folder / RESULT).read_text())
        return row
    result = SearchResult.load(folder)
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    # sensitivity also measures plans that are over the budget
    best = np.maximum.accumulate([line["search_accuracy"] if line["is_success"] else 0.0 for line in lines])
    keys = ("method", "seed", "evaluations", "macs_ratio", "params_ratio", "search_accuracy", "test_accuracy")
    more = ("dense_test_accuracy", "seconds", "widths")
    found = {key: getattr(result, key) for key in keys + more}
    found |= {"method": folder.name.rpartition("-")[0], "best_so_far": [round(float(b), 6) for b in best]}
    found |= {"memory_ratio": result.memory_ratio, "plans": len({tuple(line["widths"]) for line in lines})}
    return found | {"racing_share": _racing_share([line["search_accuracy"] for line in lines])}


def _latencies(folders: Sequence[Path]) -> list[dict[str, float]]:
    """Shares of the dense network's latency, predicted in each run and measured anew side by side: when a search ended,
    others were running beside it."""
    results = [SearchResult.load(folder) for folder in folders]
    network = results[0].network()
    torch.set_num_threads(1)  # as in the search
    with threadpool_limits(1):
        table = LatencyTable(network, REPEATS, kept=folders[0] / LATENCIES)
        dense, *measured = table.measure(np.stack([network.widths, *(result.widths for result in results)]))
    predicted = [found["predicted"] / found["dense_predicted"] for result in results if (found := result.latency)]
    return [
        {"predicted_latency_ratio": guess, "measured_latency_ratio": seconds / dense}
        for guess, seconds in zip(predicted, measured, strict=True)
    ]


def _racing_share(scores: list[float]) -> float:
    """Share of the scoring that a race leaves which stops a candidate once its errors are as many as all of the best's
    so far, as then it can't win; its errors being spread evenly over the images."""
    best = np.maximum.accumulate([0.0, *scores[:-1]])
    return round(float(np.mean(np.minimum(1, (1 - best) / np.maximum(1 - np.array(scores), 1e-9)))), 4)


def table(record: dict[str, Any]) -> str:
    """A row per method, mean and standard deviation over seeds."""
    points = [n for n in POINTS if n <= record["evaluations"]]
    costs = _costs(record)
    header = ["method", "evaluations", *costs, *(f"search at {n}" for n in points), "test, not fine-tuned"]
    rows = []
    for method in METHODS:
        runs = [row for row in record["rows"] if row["method"] == method]
        if not runs:
            continue
        cells = [f"{method} ({len(runs)} seeds)" if len(runs) > 1 else method, str(runs[0]["evaluations"])]
        cells += [f"{statistics.mean(map(cost, runs)):.2%}" for cost in costs.values()]
        best = [[r["best_so_far"][min(n, len(r["best_so_far"])) - 1] or None for r in runs] for n in points]
        shares = [*best, [r["test_accuracy"] for r in runs]]  # no plan within the budget yet: an empty cell
        rows.append([*cells, *(spread(values, 1, percent=True) for values in shares)])
    dense = [row["dense_test_accuracy"] for row in record["rows"] if "dense_test_accuracy" in row]  # all the same
    return markdown_table(
        header, [["dense", "", *["100 %"] * len(costs), *[""] * len(points), spread(dense[:1], 1, percent=True)], *rows]
    )


def _costs(record: dict[str, Any]) -> dict[str, Callable[[dict[str, Any]], float]]:
    """Columns of a table: real MACs and, where the budget counts something else, that."""
    found: dict[str, Callable[[dict[str, Any]], float]] = {"real MACs": lambda row: row["macs_ratio"]}
    match record.get("metric", "macs"):  # old records have none
        case "params":
            found["parameters"] = lambda row: row["params_ratio"]
        case "memory":
            found["memory"] = lambda row: row["memory_ratio"]
        case "latency":
            found["predicted latency"] = lambda row: row["predicted_latency_ratio"]
            found["measured latency"] = lambda row: row["measured_latency_ratio"]
    return found


def figure(record: dict[str, Any], path: Path) -> None:
    """Best search accuracy over evaluations: the mean of the seeds, and a band from the worst to the best."""
    canvas = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = canvas.add_subplot()
    for method in METHODS:
        runs = [row["best_so_far"] for row in record["rows"] if row["method"] == method]
        if not runs:
            continue
        curves = 100 * np.array([run + [run[-1]] * (record["evaluations"] - len(run)) for run in runs])
        curves[curves == 0] = np.nan  # no plan within the budget yet: no line
        places = np.arange(1, curves.shape[1] + 1)
        axes.plot(places, curves.mean(0), label=method)
        axes.fill_between(places, curves.min(0), curves.max(0), alpha=0.2)
    counted = NAMES[record.get("metric", "macs")]
    title = f"{record['model']} at {record['budget']:.0%} of its {counted}, before fine-tuning"
    axes.set(xlabel="evaluations", ylabel="best search accuracy, %", title=title)
    axes.legend(loc="lower right")
    write_atomic(path, lambda file: canvas.savefig(file, format="png"))


BENCHMARK = Benchmark(
    "search-comparison",
    "searchers at equal real cost and equal evaluations",
    run,
    table,
    variant=lambda options: f"{of_budget(options)}{of_evaluations(options)}{of_data(options)}",
    figure=figure,
)
