"""Does the latency table say how long the network that is built takes?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks.registry import Benchmark, Options, markdown_table
from gnnrl_gym import PrunableNetwork
from gnnrl_gym.graph.groups import Ints
from gnnrl_gym.pruning.latency import LatencyTable
from gnnrl_gym.zoo import load_model
from gnnrl_gym.zoo.models import input_shape_for

NETWORKS = ("resnet18", "mobilenet_v2", "resnet20", "resnet56")
PLANS = 3
MACS = (0.3, 0.8)  # between which shares of the dense MACs the plans lie
LIMIT = 0.15  # relative error that is promised


def run(options: Options) -> dict[str, Any]:
    """A table made anew for each network, batch 1, one thread; then plans that it has not seen."""
    names = [options.model] if options.model else NETWORKS
    torch.set_num_threads(1)
    with threadpool_limits(1):
        networks = [_measure(name, options.seed) for name in names]
    return {"threads": 1, "batch": 1, "limit": LIMIT, "networks": networks}


def _measure(name: str, seed: int) -> dict[str, Any]:
    image = torch.randn(1, *input_shape_for(name), generator=torch.Generator().manual_seed(seed))
    network = PrunableNetwork(load_model(name, weights="random", seed=seed), image)
    table = LatencyTable(network, refresh=True)
    # another stream than the calibration's: none of its plans comes again
    plans = np.stack([network.widths, *random_plans(network, np.random.default_rng([seed, 1]))])
    measured, predicted = np.array(table.measure(plans)), table.predict(plans)
    rows = [
        {
            "macs_ratio": network.macs(plan) / network.macs(network.widths),
            "measured_ms": 1000 * seconds,
            "predicted_ms": 1000 * guess,
            "relative_error": guess / seconds - 1,
            "widths": plan.tolist(),
        }
        for plan, seconds, guess in zip(plans, measured, predicted, strict=True)
    ]
    return {"network": name, "dense": rows[0], "plans": rows[1:]}


def random_plans(network: PrunableNetwork, rng: np.random.Generator) -> list[Ints]:
    """Plans whose groups keep different shares, and whose MACs lie within the bounds."""
    full, found = network.widths, list[Ints]()
    while len(found) < PLANS:
        share = rng.uniform(rng.uniform(0.2, 0.8), 1, len(full))
        plan = np.maximum(np.round(share * full), 1).astype(np.int64)
        if MACS[0] <= network.macs(plan) / network.macs(full) <= MACS[1]:
            found.append(plan)
    return found


def table(record: dict[str, Any]) -> str:
    """A row per network and plan; shares of the dense network's latency are what a budget counts."""
    header = ["network", "plan", "MACs", "measured", "predicted", "error", "measured share", "predicted share"]
    rows = [
        [
            network["network"],
            "dense" if number == 0 else str(number),
            f"{row['macs_ratio']:.1%}",
            f"{row['measured_ms']:.2f} ms",
            f"{row['predicted_ms']:.2f} ms",
            f"{row['relative_error']:+.1%}",
            *(f"{row[kind] / network['dense'][kind]:.1%}" for kind in ("measured_ms", "predicted_ms")),
        ]
        for network in record["networks"]
        for number, row in enumerate([network["dense"], *network["plans"]])
    ]
    return markdown_table(header, rows)


BENCHMARK = Benchmark("latency-prediction", "predicted against measured latency of networks that are built", run, table)
