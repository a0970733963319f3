"""Random networks: is the slim one the masked one, does it cost what was said, does it train?"""

from __future__ import annotations

import multiprocessing
import re
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.registry import Benchmark, Options, markdown_table
from benchmarks.searches import begin_worker
from gnnrl_gym import PrunableNetwork, UnsupportedOperation
from gnnrl_gym.graph.groups import Ints
from gnnrl_gym.zoo.random_ingredients import ingredients
from gnnrl_gym.zoo.random_networks import seeded_network

NETWORKS = 1000
PLANS = 6
BATCH = 10  # networks that a worker takes at a time
TOLERANCE = 1e-4  # of slim against mask, relative to the largest value of an output


def run(options: Options) -> dict[str, Any]:
    """Networks of the seeds from ``1000 * seed`` on, `PLANS` plans each."""
    context = multiprocessing.get_context("spawn")
    first = NETWORKS * options.seed
    batches = [range(start, min(start + BATCH, first + NETWORKS)) for start in range(first, first + NETWORKS, BATCH)]
    rows: list[dict[str, Any]] = []
    with tqdm(total=NETWORKS, unit="network", disable=None) as bar:
        pool = ProcessPoolExecutor(options.workers, mp_context=context, initializer=begin_worker)
        try:
            for done in as_completed([pool.submit(_measure_all, batch) for batch in batches]):
                rows += done.result()
                bar.update(len(done.result()))
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C nothing waits for batches that nobody will read
    return {"networks": NETWORKS, "plans": PLANS, **_summary(sorted(rows, key=lambda row: int(row["network"])))}


def _measure_all(seeds: range) -> list[dict[str, Any]]:
    return [_measure(seed) for seed in seeds]


def _measure(seed: int) -> dict[str, Any]:
    model, x = seeded_network(seed)
    row: dict[str, Any] = {"network": seed, "ingredients": dict(ingredients(model)), "mismatches": [], "error": 0.0}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            network = PrunableNetwork(model, x)
        except UnsupportedOperation as refusal:
            return row | {"refused": str(refusal)}
        except Exception as error:
            return row | {"mismatches": [f"{type(error).__name__}: {str(error)[:200]}"]}
    checks = Checks(network, x)
    for plan in random_plans(network, PLANS, seed):
        checks.run(plan)
    return row | {
        "mismatches": checks.mismatches,
        "error": checks.error,
        "changed": checks.changed,
        "groups": len(network.widths),
        "modules": sum(1 for _ in model.modules()),
        "prunable_macs_share": 1 - network.macs(np.ones_like(network.widths)) / network.macs(network.widths),
        "frozen": [_kind(str(warning.message)) for warning in said],
    }


def _kind(message: str) -> str:
    """What is frozen and where, without the folder that the code is in."""
    return " ".join(re.sub(r"\([^()]*/", "(", message).split()[:6])


def random_plans(network: PrunableNetwork, count: int, seed: int) -> Ints:
    """Plans int64 [count, A]: the full one, one unit of everything, then random ones."""
    rng, full = np.random.default_rng(seed), network.widths
    plans = rng.integers(1, full + 1, (count, len(full)))
    plans[:2] = np.stack([full, np.ones_like(full)])[:count]
    return plans


class Checks:
    """All that must hold of any plan of a network.

    Args:
        network: what is checked.
        x: input.

    Attributes:
        mismatches: what did not hold, in words.
        error: the largest relative difference of slim and mask so far; in float64 where float32 exceeds `TOLERANCE`.
        changed: plans that changed the output. Where none does, equality says nothing.
    """

    def __init__(self, network: PrunableNetwork, x: Tensor) -> None:
        self.network, self.x = network, x
        self.mismatches: list[str] = []
        self.error, self.changed = 0.0, 0

    def run(self, plan: Ints) -> None:
        """Check one plan [A]."""
        try:
            slim = self.network.slim(plan).eval()
            self._costs(slim, plan)
            self._outputs(slim, plan)
            self._backward(slim)
        except Exception as error:  # a crash is a mismatch like any other
            self._found(f"{type(error).__name__}: {str(error)[:200]}", plan)

    def _found(self, what: str, plan: Ints) -> None:
        self.mismatches.append(f"{what} at {plan.tolist()}")

    @torch.no_grad()
    def _costs(self, slim: nn.Module, plan: Ints) -> None:
        with FlopCounterMode(display=False) as counter:
            slim(self.x)
        if counter.get_total_flops() != 2 * self.network.macs(plan):
            self._found(f"MACs {self.network.macs(plan)}, counted {counter.get_total_flops() / 2}", plan)
        params = sum(parameter.numel() for parameter in slim.parameters())
        if params != self.network.params(plan):
            self._found(f"parameters {self.network.params(plan)}, counted {params}", plan)

    @torch.no_grad()
    def _outputs(self, slim: nn.Module, plan: Ints) -> None:
        mask, dense = self.network.mask(plan).eval(), _leaves(self.network.model(self.x))
        found, expected = _leaves(slim(self.x)), _leaves(mask(self.x))
        if (plan == self.network.widths).all() and not all(map(torch.equal, found, dense)):
            self._found("full widths are not the dense network", plan)
        self.changed += relative_error(expected, dense) > 10 * TOLERANCE
        error = relative_error(found, expected)
        if error > TOLERANCE:
            found, expected = _leaves(slim.double()(self.x.double())), _leaves(mask.double()(self.x.double()))
            error = relative_error(found, expected)
            slim.float()
        self.error = max(self.error, error)
        if not error <= TOLERANCE:
            self._found(f"slim differs from mask by {error:.1e}", plan)

    def _backward(self, slim: nn.Module) -> None:
        outputs = _leaves(slim.train()(torch.cat([self.x, self.x])))  # BatchNorm can't train on one value
        sum((output.sum() for output in outputs), torch.zeros(())).backward()
        missing = [name for name, p in slim.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        if missing:
            self.mismatches.append(f"no gradient for {missing[0]}")


def _leaves(outputs: Any) -> list[Tensor]:
    return list(tree_leaves(outputs))


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference over all outputs, each relative to its largest value; infinite for other shapes."""
    if [a.shape for a in found] != [b.shape for b in expected]:
        return float("inf")
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in zip(found, expected, strict=True)
    )


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    pruned = [row for row in rows if "groups" in row]
    used: Counter[str] = Counter()
    for row in rows:
        used.update(row["ingredients"].keys())
    frozen: Counter[str] = Counter(text for row in pruned for text in set(row["frozen"]))
    return {
        "pruned": len(pruned),
        "mismatches": [{"network": row["network"], "kind": kind} for row in rows for kind in row["mismatches"]],
        "refused": [{"network": row["network"], "why": row["refused"]} for row in rows if "refused" in row],
        "largest_relative_error": max(row["error"] for row in rows),
        "changed_share": sum(row["changed"] for row in pruned) / (len(pruned) * (PLANS - 1)),
        "prunable_macs_share": float(np.mean([row["prunable_macs_share"] for row in pruned])),
        "groups": float(np.mean([row["groups"] for row in pruned])),
        "modules": float(np.mean([row["modules"] for row in pruned])),
        "ingredients": dict(used.most_common()),
        "frozen": dict(frozen.most_common()),
    }


def table(record: dict[str, Any]) -> str:
    """The figures, one per row."""
    rows = [
        ["networks", f"{record['networks']:,}"],
        ["plans of each", str(record["plans"])],
        ["mismatches", str(len(record["mismatches"]))],
        ["largest relative error of slim against mask", f"{record['largest_relative_error']:.1e}"],
        ["nothing to prune", str(len(record["refused"]))],
        ["plans that change the output", f"{record['changed_share']:.1%}"],
        ["MACs in reach, mean", f"{record['prunable_macs_share']:.1%}"],
        ["channel groups, mean", f"{record['groups']:.1f}"],
        ["kinds of ingredients", str(len(record["ingredients"]))],
    ]
    return markdown_table(["of random networks", ""], rows)


BENCHMARK = Benchmark("random-networks", "slim against mask on 1,000 random networks", run, table)
