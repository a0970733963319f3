"""Every classification network of torchvision: traced, slimmed, exact? Torch-Pruning beside it, where installed."""

from __future__ import annotations

import copy
import json
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from agents.results import write_atomic
from benchmarks.registry import Benchmark, Options, markdown_table, of_model
from benchmarks.searches import begin_worker
from benchmarks.slimming_exactness import randomise_statistics
from gnnrl_gym import PrunableNetwork
from gnnrl_gym.envs.landing import land

PLANS = 3
BUDGET = 0.5
ABSENT = "not installed"  # of Torch-Pruning: no measurement, so it is asked again
MEMORY, CPU_SECONDS = 16 << 30, 600  # of one process
# the smallest images that the network takes, to save time: channels, not pixels, are what is checked
_SIZES = {"vit_h_14": 56, "vit_": 224, "maxvit": 224, "swin_v2": 256, "swin": 224, "inception": 299, "googlenet": 128}


def run(options: Options) -> dict[str, Any]:
    """Each network in processes of its own, so that the large ones leave no memory behind and a crash is one row.

    Rows are kept in the runs folder: an interrupted measurement goes on where it was.
    """
    names = [options.model] if options.model else torchvision.models.list_models(module=torchvision.models)
    folder = options.runs / f"torchvision-coverage{f'-{options.seed}' if options.seed else ''}"
    rows = []
    with tqdm(names, unit="network") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            rows.append(_row(folder, name, options.seed))
    return {"plans": PLANS, "budget": BUDGET, "rows": rows}


def _row(folder: Path, name: str, seed: int) -> dict[str, Any]:
    theirs = _kept(folder / f"{name}.torch-pruning.json", _torch_pruning, name, seed)
    found = _kept(folder / f"{name}.json", _measure, name, seed)
    row = {"network": name, "image": _size(name), "torch_pruning": theirs}
    return row | (found if isinstance(found, dict) else {"error": found})


def _kept(path: Path, measure: Callable[[str, int], Any], name: str, seed: int) -> Any:
    if path.is_file() and (known := json.loads(path.read_text())) != ABSENT:
        return known
    found = json.dumps(_isolated(measure, name, seed))
    write_atomic(path, lambda file: file.write(found.encode()))
    return json.loads(found)


def _isolated(measure: Callable[[str, int], Any], name: str, seed: int) -> Any:
    """What `measure` says in a process of its own, or how it failed: a row that says so is a result."""
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


def _size(name: str) -> int:
    return next((size for start, size in _SIZES.items() if name.startswith(start)), 64)


def _prepared(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    # the fast path of attention is one fused call that the counter does not see into
    torch.backends.mha.set_fastpath_enabled(False)
    return _build(name), torch.randn(1, 3, _size(name), _size(name))


def _measure(name: str, seed: int) -> dict[str, Any]:
    model, x = _prepared(name, seed)
    return {"parameters": sum(p.numel() for p in model.parameters())} | _ours(model, x, seed)


def _build(name: str) -> nn.Module:
    heads: dict[str, Any] = {"aux_logits": True, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit_"):
        heads = {"image_size": _size(name)}
    model = torchvision.models.get_model(name, weights=None, **heads).eval()
    randomise_statistics(model)
    for path, parameter in model.named_parameters():
        if not parameter.any() or "layer_scale" in path:  # zero heads and near-zero scales would hide mistakes
            nn.init.normal_(parameter, std=0.5 if "layer_scale" in path else 0.05)
    return model


def _ours(model: nn.Module, x: Tensor, seed: int) -> dict[str, Any]:
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
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            found = slim(x)
        error = _relative(found, network.mask(plan).eval()(x))
        if error > 1e-4:
            found = copy.deepcopy(slim).double()(x.double())
            error = _relative(found, network.mask(plan).double().eval()(x.double()))
    params = sum(p.numel() for p in slim.parameters()) == network.params(plan)
    return error, params and counter.get_total_flops() == 2 * network.macs(plan), _backward(slim, x)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _backward(slim: nn.Module, x: Tensor) -> bool:
    outputs = slim.train()(torch.cat([x, x]))
    # GoogLeNet and Inception answer with a named tuple of heads while training
    sum(head.sum() for head in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    return all(p.grad is not None for p in slim.parameters())


def _torch_pruning(name: str, seed: int) -> str:
    """ "ok", "not installed", or an error: how Torch-Pruning removes channels and runs forward and backward."""
    try:
        import torch_pruning
    except ImportError:
        return ABSENT
    model, x = _prepared(name, seed)
    ignored = [m for m in model.modules() if 1000 in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))]
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        x,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.3,
        ignored_layers=ignored,
    )
    pruner.step()
    model.eval()(x).sum().backward()
    return "ok"


def table(record: dict[str, Any]) -> str:
    """A row per network, and how many pass."""
    header = ["network", "image", "groups", "MACs in reach", "MACs kept", "largest error", "costs", "Torch-Pruning"]
    rows = []
    for row in record["rows"]:
        theirs = "ok" if row["torch_pruning"] == "ok" else row["torch_pruning"].split(":")[0]
        if "error" in row:
            rows.append([row["network"], str(row["image"]), "", "", "", row["error"].split(":")[0], "", theirs])
            continue
        kept = f"{min(row['macs_ratios']):.0%} to {max(row['macs_ratios']):.0%}"
        reach, error = f"{row['prunable_macs_share']:.0%}", f"{row['largest_relative_error']:.0e}"
        costs = "exact" if row["costs_match"] else "OFF"
        rows.append([row["network"], str(row["image"]), str(row["groups"]), reach, kept, error, costs, theirs])
    passed = sum(_passes(row) for row in record["rows"])
    others = sum(row["torch_pruning"] == "ok" for row in record["rows"])
    rows.append([f"**pass, of {len(rows)}**", "", "", "", "", f"**{passed}**", "", f"**{others}**"])
    return markdown_table(header, rows)


def _passes(row: dict[str, Any]) -> bool:
    return bool(
        "error" not in row and row["largest_relative_error"] <= 1e-4 and row["costs_match"] and row["backward_runs"]
    )


BENCHMARK = Benchmark("torchvision-coverage", "all of torchvision, Torch-Pruning beside it", run, table, of_model)
