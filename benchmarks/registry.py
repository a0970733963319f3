"""Benchmarks by name, and the JSON record each one writes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from agents.provenance import machine, versions
from agents.run_folder import check_writable
from gnnrl_gym.checks import check_choice, check_seed, check_whole
from gnnrl_gym.envs.budget import METRICS
from gnnrl_gym.files import write_atomic
from gnnrl_gym.zoo.models import DIGITS

RESULTS = Path(__file__).parent / "results"
# an installed package keeps the records that it came with
OUT = RESULTS if (RESULTS.parents[1] / "setup.cfg").is_file() else Path("runs/bench/results")


@dataclass(frozen=True)
class Options:
    """What a benchmark may be told on the command line.

    Attributes:
        seed: of everything random.
        model, weights, data: for benchmarks on real networks; None where the benchmark chooses.
        seeds, evaluations, budget, metric: of searches; the budget is a share of the dense cost, counted in the metric.
        workers: processes, each with one thread.
        methods: searchers to run; empty: all of the benchmark's.
        epochs, distill, images: of fine-tuning; the weight of the dense network's outputs in its loss, and whether it
            sees the "train" images or "all", those of the search too.
        runs: folder for the run folders of searches, from which an interrupted benchmark resumes.

    Raises:
        ValueError: a number is out of range, `images` is neither, or the metric is unknown.
    """

    seed: int = 0
    model: str | None = None
    weights: str | None = None
    data: str | None = None
    seeds: int = 3
    evaluations: int = 400
    budget: float = 0.5
    metric: str = "macs"
    workers: int = 1
    epochs: int = 30
    distill: float = 0.0
    images: str = "train"
    methods: tuple[str, ...] = ()
    runs: Path = Path("runs/bench")

    def __post_init__(self) -> None:
        names = ("seeds", "evaluations", "workers", "epochs")
        check_whole(1, **{name: getattr(self, name) for name in names})
        check_seed(seed=self.seed)
        check_choice("images", self.images, ("train", "all"))
        check_choice("metric", self.metric, METRICS)
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill is a weight in [0, 1], got {self.distill!r}.")

    def methods_of(self, known: tuple[str, ...]) -> tuple[str, ...]:
        """The searchers to run, of those that a benchmark knows.

        Raises:
            ValueError: it does not know one, and would leave it out of its table.
        """
        for method in self.methods:
            check_choice("method", method, known)
        return self.methods or known


@dataclass(frozen=True)
class Benchmark:
    """A named measurement.

    Attributes:
        name: on the command line and in front of the JSON's name.
        run: makes the figures, JSON-able, under any keys.
        table: Markdown of a record.
        variant: what is appended to the name of the JSON (a model, say), so that variants stand side by side.
        figure: draws a record into a PNG.
    """

    name: str
    summary: str
    run: Callable[[Options], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    variant: Callable[[Options], str] = lambda options: ""
    figure: Callable[[dict[str, Any], Path], None] | None = None

    def measure(self, options: Options, folder: Path = RESULTS) -> Path:
        """Run it and write `NAME[-VARIANT].json` with seed, machine and versions: the present ones, unless `run`
        gives others.

        Raises:
            NotADirectoryError, PermissionError: nothing can be written in `folder`; said before any work starts.
        """
        path = folder / f"{'-'.join(filter(None, (self.name, self.variant(options))))}.json"
        check_writable(path)
        start = time.perf_counter()
        figures = self.run(options)
        record = {
            "benchmark": self.name,
            "seed": options.seed,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - start, 1),
            "machine": machine(),
            "versions": versions(),
            **figures,
        }
        write_atomic(path, lambda file: file.write(json.dumps(record, indent=1).encode() + b"\n"))
        return path


def of_model(options: Options) -> str:
    """Variant: a measurement of one network must not replace that of all."""
    return options.model or ""


def of_budget(options: Options) -> str:
    """Of run folders and variants: whose plans, and within what budget."""
    metric = "" if options.metric == Options.metric else f"{options.metric}-"
    return f"{options.model or DIGITS}-{metric}{options.budget:g}"


def of_evaluations(options: Options) -> str:
    """Variant: so are searches of another length than the usual one."""
    return "" if options.evaluations == Options.evaluations else f"-{options.evaluations}"


def of_data(options: Options) -> str:
    """Variant: so are measurements on other data than the usual, a file of another name."""
    name = Path(options.data).stem if options.data else ""
    return "" if name in ("", "digits", "cifar10") else f"-{name}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(values: Sequence[float | None], decimals: int, percent: bool = False) -> str:
    """Mean ± standard deviation of what there is, and of how many that is where some are missing; one value alone,
    nothing where there is none."""
    found = [(100 if percent else 1) * value for value in values if value is not None]
    if not found:
        return ""
    deviation = f" ± {statistics.stdev(found):.{decimals}f}" if len(found) > 1 else ""
    missing = f" ({len(found)} of {len(values)})" if len(found) < len(values) else ""
    return f"{statistics.mean(found):.{decimals}f}{deviation}{missing}"


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall-clock seconds; work for a GPU has to wait for it."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def benchmarks() -> dict[str, Benchmark]:
    """All benchmarks by name."""
    from benchmarks import (
        bogp_mnist,
        bogp_planted,
        bogp_retrieval,
        early_planted,
        early_pruning,
        environment_throughput,
        finetuning,
        general_policy,
        gpu_evaluation,
        job_shop,
        latency_prediction,
        off_policy,
        random_networks,
        reward_report,
        search_comparison,
        search_speed,
        slimming_exactness,
        timm_coverage,
        torchvision_coverage,
    )

    found = (
        torchvision_coverage, timm_coverage, slimming_exactness, random_networks, environment_throughput,
        search_comparison, latency_prediction, general_policy, search_speed, gpu_evaluation, finetuning, reward_report,
        off_policy, job_shop,
        early_planted, early_pruning,
        bogp_retrieval, bogp_planted, bogp_mnist,
    )  # fmt: skip
    return {module.BENCHMARK.name: module.BENCHMARK for module in found}
