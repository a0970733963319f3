"""What a step of the environment costs besides the accuracy evaluation, on one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.registry import Benchmark, Options, markdown_table, of_model
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.zoo import DataSplits, Split, load_model
from gnnrl_gym.zoo.images import MemoryImages
from gnnrl_gym.zoo.models import input_shape_for

NETWORKS = ("digits-resnet", "resnet20", "resnet56", "mobilenet_v2")


def run(options: Options) -> dict[str, Any]:
    """Every network named above on noise images: no accuracy is looked at."""
    names = [options.model] if options.model else NETWORKS
    torch.set_num_threads(1)
    with threadpool_limits(1):
        return {"threads": 1, "rows": [_measure(name, options.seed) for name in names]}


def _measure(name: str, seed: int) -> dict[str, Any]:
    start = time.perf_counter()
    env = PruneEnv(load_model(name, "random", 10), _noise(name), search_images=2, recalibration_images=2, device="cpu")
    made, rng = time.perf_counter() - start, np.random.default_rng(seed)
    network, size = env.network, len(env.network.widths)
    env.evaluate = lambda widths: 0.5  # type: ignore[method-assign]  # everything but the accuracy is measured
    plans = rng.integers(1, network.widths + 1, (10_000, size))

    def step() -> None:
        env.reset()
        env.step(rng.uniform(0.5, 1, size))

    reset, both = _median_ms(env.reset, 100), _median_ms(step, 100)
    return {
        "network": name,
        "groups": size,
        "nodes": env.max_nodes,
        "edges": env.max_edges,
        "make_seconds": made,
        "step_ms": both - reset,
        "graph_ms": _median_ms(lambda: network.graph(plans[0]), 100),
        "slim_ms": _median_ms(lambda: network.slim(plans[0]), 20),
        "macs_of_10000_plans_ms": _median_ms(lambda: network.macs(plans), 10),
    }


def _median_ms(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def _noise(name: str) -> DataSplits:
    shape = input_shape_for(name)
    images = torch.randint(0, 256, (2, shape[0], min(shape[1], 64), min(shape[2], 64)), dtype=torch.uint8)
    labels: Tensor = torch.arange(2)
    split = Split(MemoryImages(images), labels, (0.5,) * shape[0], (0.5,) * shape[0])
    return DataSplits("noise", split, split, split, 10, images.shape[1:], flip=False)  # type: ignore[arg-type]


def table(record: dict[str, Any]) -> str:
    """A row per network."""
    header = ["network", "groups", "nodes", "edges", "step", "graph", "slim", "MACs of 10,000 plans"]
    rows = [
        [
            row["network"],
            str(row["groups"]),
            str(row["nodes"]),
            str(row["edges"]),
            *(f"{row[key]:.2f} ms" for key in ("step_ms", "graph_ms", "slim_ms")),
            f"{row['macs_of_10000_plans_ms']:.0f} ms",
        ]
        for row in record["rows"]
    ]
    return markdown_table(header, rows)


BENCHMARK = Benchmark("environment-throughput", "cost of a step without the accuracy evaluation", run, table, of_model)
