"""Pruning before training: what each way to choose the mask is worth, with the control that settles it beside it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from tqdm import tqdm

from agents.early import ASKED, early
from agents.results import RESULT, SearchResult
from benchmarks.registry import Benchmark, Options, markdown_table, of_evaluations, spread
from benchmarks.searches import asked_of, check_same, measured_on, side_by_side
from gnnrl_gym.evaluation.training import RECIPES

MLP, CNN = "mlp-300-100", "cnn-4"


@dataclass(frozen=True)
class Job:
    """One way to choose a mask. `evaluations`: None for as many as the benchmark is given. `late`: after all others."""

    method: str
    sparsity: float
    objective: str = "untrained"
    evaluations: int | None = 1
    late: bool = False

    @property
    def name(self) -> str:
        """Of its run folders, without the seed."""
        budget = "" if self.evaluations is None else f"-{self.evaluations}"
        return f"{self.sparsity:g}-{self.method}-{self.objective}{budget}"


DENSE = Job("dense", 0.0)
# in the order of what they are needed for: an interrupted benchmark has the first ones
JOBS = {
    MLP: [
        DENSE,
        Job("random", 0.9),
        Job("annealing", 0.9, evaluations=None),
        Job("snip", 0.9),
        Job("lottery", 0.9, "pretrained"),  # the dense run is its training
        Job("random", 0.9, evaluations=None, late=True),
    ],
    CNN: [
        DENSE,
        *(
            job
            for sparsity in (0.5, 0.7)
            for job in (
                Job("random", sparsity),
                Job("annealing", sparsity, "pretrained", None),
                Job("annealing", sparsity, "untrained", None),
            )
        ),
        *(Job("reinforce", sparsity, "pretrained", None) for sparsity in (0.5, 0.7)),
        Job("random", 0.47),  # about the MACs of what REINFORCE keeps at 0.5
        *(Job("magnitude", sparsity, "pretrained", late=True) for sparsity in (0.5, 0.7)),
        *(Job("snip", sparsity, late=True) for sparsity in (0.5, 0.7)),
    ],
}
SEARCH_IMAGES = {MLP: 6000, CNN: 1000}


def run(options: Options) -> dict[str, Any]:
    """Every job and seed is a run folder; those that are finished are not run again. `--methods` chooses what is run
    besides the dense networks. The record holds what is finished, and says what is missing; so it does after Ctrl-C.

    Raises:
        ValueError: an unknown model or method, or a run that is there was made with other arguments.
    """
    model = options.model or MLP
    if model not in JOBS:
        raise ValueError(f"early-pruning knows {', '.join(JOBS)}, not {model!r}.")
    methods = {DENSE.method, *options.methods_of(tuple(dict.fromkeys(job.method for job in JOBS[model])))}
    base = options.runs / f"early-{model}-{options.evaluations}"
    seeds = range(options.seed, options.seed + options.seeds)
    jobs = [(job, seed) for late in (False, True) for seed in seeds for job in JOBS[model] if job.late == late]
    for job, seed in jobs:
        _check_kept(options, model, job, seed, base)
    chosen = [(job, seed) for job, seed in jobs if job.method in methods and not _finished(base, job, seed)]
    try:
        _run_all(chosen, options, model, base)
    except KeyboardInterrupt:
        if not any(_finished(base, job, seed) for job, seed in jobs):
            raise  # a record of nothing would replace one that is there
        print("Stopped: the record holds the runs that are finished.")
    done = [(job, seed) for job, seed in jobs if _finished(base, job, seed)]
    return {
        **measured_on([SearchResult.load(_folder(base, job, seed)) for job, seed in done]),
        "model": model,
        "evaluations": options.evaluations,
        "threads_per_run": 1,
        "recipe": RECIPES[model].record(),
        "missing": [f"{job.name}-{seed}" for job, seed in jobs if (job, seed) not in done],
        "rows": [_row(_folder(base, job, seed)) for job, seed in done],
    }


def _run_all(jobs: list[tuple[Job, int]], options: Options, model: str, base: Path) -> None:
    if options.workers == 1:
        torch.set_num_threads(1)
        for job, seed in tqdm(jobs, unit="run", disable=None):
            _run(options, model, job, seed, base)
        return
    # the dense networks first: others start from their weights
    for wave in ([j for j in jobs if j[0] == DENSE], [j for j in jobs if j[0] != DENSE]):
        side_by_side(_run, [(options, model, job, seed, base) for job, seed in wave], options.workers, "run")


def _folder(base: Path, job: Job, seed: int) -> Path:
    return base / f"{job.name}-{seed}"


def _finished(base: Path, job: Job, seed: int) -> bool:
    return (_folder(base, job, seed) / RESULT).is_file()


def _environment(options: Options, model: str, job: Job, seed: int) -> dict[str, Any]:
    """Arguments of `GNNRL-Mask-v0`, without the weights of the dense run, which lie beside it."""
    return {
        "model": model,
        "data": options.data or {MLP: "mnist", CNN: "cifar10"}[model],
        "sparsity": job.sparsity,
        "objective": job.objective,
        "init_seed": seed,
        "search_images": SEARCH_IMAGES[model],
        "device": "cpu",
    }


def _check_kept(options: Options, model: str, job: Job, seed: int, base: Path) -> None:
    folder, settings = _folder(base, job, seed), {"recipe": RECIPES[model].record(), "control": True}
    if (folder / ASKED).is_file():
        environment, evaluations = _environment(options, model, job, seed), job.evaluations or options.evaluations
        check_same(folder, asked_of(job.method, evaluations, seed, environment, settings), ASKED)


def _run(options: Options, model: str, job: Job, seed: int, base: Path) -> None:
    folder = _folder(base, job, seed)
    trained = _folder(base, DENSE, seed) / "pruned.pt"
    weights = str(trained) if job.objective == "pretrained" else None
    env = gym.make("GNNRL-Mask-v0", **_environment(options, model, job, seed), weights=weights)
    begun = (folder / ASKED).is_file()
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)  # left by a version that could not go on
    early(env, job.method, job.evaluations or options.evaluations, seed, folder, resume=begun)


def _row(folder: Path) -> dict[str, Any]:
    result = SearchResult.load(folder)
    keys = ("method", "seed", "evaluations", "macs_ratio", "params_ratio", "search_accuracy", "untrained_accuracy")
    more = ("test_accuracy", "control_accuracy", "seconds", "widths", "machine")
    curve = json.loads((folder / "curve.json").read_text())
    settings = {key: result.settings[key] for key in ("sparsity", "objective")}
    return {key: getattr(result, key) for key in keys + more} | settings | {"first_search_accuracy": curve[0]}


def table(record: dict[str, Any]) -> str:
    """A row per way to choose: MACs of the dense network's and test accuracies, mean and standard deviation over seeds;
    the control beside them."""
    shown = {"untrained_accuracy": "test, untrained", "test_accuracy": "test, trained", "control_accuracy": "control"}
    if any(row["macs_ratio"] < 1 for row in record["rows"]):  # equally many filters have unequal costs
        shown = {"macs_ratio": "MACs, %", **shown}
    header = ["sparsity", "mask", "objective", "evaluations", "seeds", *shown.values()]
    rows = []
    for job in sorted(JOBS[record["model"]], key=lambda job: job.sparsity):
        budget = job.evaluations or record["evaluations"]
        wanted = (job.sparsity, job.method, job.objective)
        runs = [r for r in record["rows"] if (r["sparsity"], r["method"], r["objective"]) == wanted]
        runs = [r for r in runs if (r["evaluations"] > 1) == (budget > 1)]
        if not runs:
            continue
        figures = [spread([r[key] for r in runs], 2, percent=True) for key in shown]
        objective = job.objective if job.evaluations is None else ""
        rows.append([f"{job.sparsity:.0%}", job.method, objective, str(budget), str(len(runs)), *figures])
    text = markdown_table(header, rows)
    missing = Counter(run.rpartition("-")[0] for run in record["missing"])
    names = ", ".join(f"{job} ({count})" for job, count in missing.items())
    return f"{text}\n\nNot measured yet, and how many seeds of it: {names}." if missing else text


BENCHMARK = Benchmark(
    "early-pruning",
    "pruning before training: annealing, REINFORCE, SNIP, lottery tickets, and random filters with the same counts",
    run,
    table,
    variant=lambda options: f"{options.model or MLP}{of_evaluations(options)}",
)
