"""Whether networks of other people's are traced, slimmed and counted exactly: what the coverage benchmarks share."""

from __future__ import annotations

import copy
import json
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.searches import begin_worker
from benchmarks.slimming_exactness import randomise_statistics
from gnnrl_gym import PrunableNetwork
from gnnrl_gym.envs.landing import land
from gnnrl_gym.files import write_atomic

PLANS = 3
BUDGET = 0.5
ABSENT = "not installed"  # of a package: no measurement, so it is asked again
MEMORY, CPU_SECONDS = 16 << 30, 1200  # of one process


def rows(names: Sequence[str], row: Callable[[str], dict[str, Any]], workers: int) -> list[dict[str, Any]]:
    """``row(name)`` of all, so many at a time: each does its work in processes of its own (`isolated`)."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            return list(tqdm(pool.map(row, names), total=len(names), unit="network", disable=None))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def kept(path: Path, measure: Callable[[str, int], Any], name: str, seed: int) -> Any:
    """What `isolated` says, kept in the file `path`: an interrupted measurement goes on where it was."""
    if path.is_file() and (known := json.loads(path.read_text())) != ABSENT:
        return known
    found = json.dumps(isolated(measure, name, seed))
    write_atomic(path, lambda file: file.write(found.encode()))
    return json.loads(found)


def isolated(measure: Callable[[str, int], Any], name: str, seed: int) -> Any:
    """What `measure` says in a process of its own, so that large networks leave no memory behind, or how it failed: a
    row that says so is a result."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_limit) as pool:
        try:
            return pool.submit(measure, name, seed).result()
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:300]}"


def _limit() -> None:
    """A network that takes more than this is an error, not the end of the machine."""
    begin_worker()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))


def prepare(seed: int) -> None:
    """Of a process that measures."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    # the fast path of attention is one fused call that the counter does not see into
    torch.backends.mha.set_fastpath_enabled(False)


def randomise(model: nn.Module) -> nn.Module:
    """Zero heads and near-zero scales would hide mistakes."""
    randomise_statistics(model)
    for path, parameter in model.named_parameters():
        scale = "layer_scale" in path or "gamma" in path
        if scale or not parameter.any():
            nn.init.normal_(parameter, std=0.5 if scale else 0.05)
    return model


def measured(model: nn.Module, x: Tensor, seed: int) -> dict[str, Any]:
    """Of a network in eval mode: groups, share of its MACs in reach, and how exact `PLANS` random plans of it are."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        network = PrunableNetwork(model, x)
    seconds, full = time.perf_counter() - start, network.widths
    unruled = [str(w.message).split(" in ")[0] for w in said if "No channel rule" in str(w.message)]
    dense, rng = network.macs(full), np.random.default_rng(seed)
    least = network.macs(np.ones_like(full)) / dense
    plans = [_plan(network, rng) for _ in range(PLANS)]
    checks = [_check(network, plan, x) for plan in plans]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trace_seconds": seconds,
        "groups": len(full),
        "prunable_macs_share": 1 - least,
        "macs_ratios": [network.macs(plan) / dense for plan in plans],
        "largest_relative_error": max(error for error, _, _ in checks),
        "costs_match": all(costs for _, costs, _ in checks),
        "backward_runs": all(backward for _, _, backward in checks),
        "frozen_operations": sorted({text.split()[-1] for text in unruled}),
    }


def _plan(network: PrunableNetwork, rng: np.random.Generator) -> np.ndarray:
    full = network.widths
    ratios = rng.uniform(0.3, 1, len(full))
    limit = BUDGET * network.macs(full)
    return land(np.ones(len(full)), ratios, full, np.ones_like(full), network.macs, limit)[1]


def _check(network: PrunableNetwork, plan: np.ndarray, x: Tensor) -> tuple[float, bool, bool]:
    """Relative error of slim against mask (in float64 where rounding may hide it), costs, backward in train mode."""
    slim = network.slim(plan).eval()
    # oneDNN's recurrent layers, which the counter passes over, are of single precision
    counted, example = (copy.deepcopy(slim).double(), x.double()) if _is_recurrent(slim) else (slim, x)
    with FlopCounterMode(display=False) as counter:  # which takes no views of parameters under no_grad
        found = counted(example).detach()
    with torch.no_grad():
        error = _relative(found, network.mask(plan).eval()(x))
        if error > 1e-4:
            found = copy.deepcopy(slim).double()(x.double())
            error = _relative(found, network.mask(plan).double().eval()(x.double()))
    params = sum(p.numel() for p in slim.parameters()) == network.params(plan)
    return error, params and counter.get_total_flops() == 2 * network.macs(plan), _backward(slim, x)


def _is_recurrent(model: nn.Module) -> bool:
    return any(isinstance(module, nn.RNNBase) for module in model.modules())


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _backward(slim: nn.Module, x: Tensor) -> bool:
    outputs = slim.train()(torch.cat([x, x]))
    # GoogLeNet and Inception answer with a named tuple of heads while training
    sum(head.sum() for head in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    return all(p.grad is not None for p in slim.parameters())


def cells(row: dict[str, Any]) -> list[str]:
    """Of a table: groups, MACs in reach, MACs kept, largest error, costs; or the error that stands for all."""
    if "error" in row:
        return ["", "", "", row["error"].split(":")[0], ""]
    reach = f"{row['prunable_macs_share']:.0%}"
    left = f"{min(row['macs_ratios']):.0%} to {max(row['macs_ratios']):.0%}"
    costs = "exact" if row["costs_match"] else "OFF"
    return [str(row["groups"]), reach, left, f"{row['largest_relative_error']:.0e}", costs]


COLUMNS = ["groups", "MACs in reach", "MACs kept", "largest error", "costs"]


def passes(row: dict[str, Any]) -> bool:
    return bool(
        "error" not in row and row["largest_relative_error"] <= 1e-4 and row["costs_match"] and row["backward_runs"]
    )
