"""Candidates in one batch against one by one, on the GPU, and how near that comes to the bandwidth of its memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.registry import Benchmark, Options, markdown_table, of_model, seconds_of
from gnnrl_gym import PrunableNetwork
from gnnrl_gym.evaluation.accuracy import PlanEvaluator, resolve_device
from gnnrl_gym.evaluation.batched import obstacle
from gnnrl_gym.graph.groups import Ints
from gnnrl_gym.zoo import Split, load_model
from gnnrl_gym.zoo.images import MemoryImages
from gnnrl_gym.zoo.models import input_shape_for

NETWORKS = ("resnet20", "resnet56")
ON_GPU = {"plans": 32, "images": 2000, "recalibration_images": 256}
ON_CPU = {"plans": 4, "images": 64, "recalibration_images": 64}  # only to show that it runs
REPEATS = 5
COMPARED = 64  # images
COPIED, COPIES = 1 << 28, 10  # bytes: more than any cache holds


def run(options: Options) -> dict[str, Any]:
    """Random weights and noise images: speed does not depend on them."""
    device = resolve_device("auto")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    size, bandwidth = ON_GPU if gpu else ON_CPU, _copy_bandwidth(device)
    names = [options.model] if options.model else NETWORKS if gpu else NETWORKS[:1]
    rows = [_measure(name, precision, size, device, bandwidth, options.seed)
            for name in names for precision in ("float32", "bfloat16")]  # fmt: skip
    return {"gpu": gpu, **size, "copy_bytes_per_second": bandwidth, "rows": rows}


def _measure(
    name: str, precision: str, size: dict[str, int], device: torch.device, bandwidth: float, seed: int
) -> dict[str, Any]:
    evaluator = _evaluator(name, precision, size, device)
    full = evaluator.network.widths
    rng = np.random.default_rng(seed)
    rounds = [list(rng.integers(full // 4 + 1, full + 1, (size["plans"], len(full)))) for _ in range(REPEATS + 1)]
    ways: dict[str, Callable[[list[Ints]], Any]] = {
        "one_by_one": lambda plans: [evaluator._measure(plan) for plan in plans],
        "batched": lambda plans: _batched(evaluator, plans),
    }
    moved = _moved_bytes(evaluator, lambda: ways["batched"](rounds[0]))
    ways["one_by_one"](rounds[0])  # both have prepared the kernels that they need for any plan
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for plans in rounds[1:]:  # new ones each time, as in a search; by turns: whatever slows the machine slows both
        for way, work in ways.items():
            seconds[way].append(seconds_of(lambda work=work, plans=plans: work(plans)))  # type: ignore[misc]
    median = {f"{way}_seconds": statistics.median(times) for way, times in seconds.items()}
    median["again_seconds"] = seconds_of(lambda: ways["one_by_one"](rounds[-1]))  # kernels of their shapes are there
    return {
        "network": name,
        "precision": precision,
        **median,
        "speedup": median["one_by_one_seconds"] / median["batched_seconds"],
        "activation_bytes": moved,
        "share_of_bound": moved / bandwidth / median["batched_seconds"],
        "relative_difference": _difference(evaluator, rounds[0]),
    }


def _evaluator(name: str, precision: str, size: dict[str, int], device: torch.device) -> PlanEvaluator:
    """An evaluator on noise images that scores candidates of a network by name.

    Raises:
        ValueError: candidates of this network can't be scored in one batch.
    """
    shape = input_shape_for(name)
    network = PrunableNetwork(load_model(name, "random", 10).to(device), torch.zeros(1, *shape, device=device))
    if reason := obstacle(network):
        raise ValueError(f"Candidates of {name} can't be scored in one batch: {reason}.")
    count = max(size["images"], size["recalibration_images"])
    pixels = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % 10
    split = Split(MemoryImages(pixels), labels, (0.5,) * shape[0], (0.25,) * shape[0])
    images = size["recalibration_images"]
    return PlanEvaluator(network, split, split.take(size["images"]), images, device, precision, batched=True)


def _batched(evaluator: PlanEvaluator, plans: Sequence[Ints]) -> list[float]:
    evaluator._scores.clear()
    evaluator.prefetch(plans)
    return [evaluator.score(plan) for plan in plans]


def _difference(evaluator: PlanEvaluator, plans: list[Ints]) -> float:
    """Of the logits in one batch from those one by one, relative. Accuracies of random weights are all alike."""
    candidates, images = evaluator._candidates, evaluator._search[:COMPARED]
    if candidates is None or not evaluator.batched:
        raise RuntimeError("The memory is too small for a batch: the candidates were scored one by one.")
    low = evaluator.dtype == torch.bfloat16
    with torch.inference_mode(), torch.autocast(evaluator.device.type, enabled=False):
        candidates.calibrate(plans, evaluator._calibration)
        with torch.autocast(evaluator.device.type, torch.bfloat16, enabled=low):
            together = candidates.logits(images).float()
        alone = torch.stack([evaluator._outputs(plan, images) for plan in plans])
    return float((together - alone).norm() / alone.norm())


def _moved_bytes(evaluator: PlanEvaluator, work: Callable[[], Any]) -> int:
    """Bytes of activations that `work` can't but move: every convolution and linear layer reads its input and writes
    its output once. What lies between them could be fused with them; weights are small beside a batch."""
    found = [0]

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # autocast reads the input in the output's precision
        found[0] += (inputs[0].numel() + output.numel()) * output.element_size()

    assert evaluator._candidates is not None
    layers = [m for m in evaluator._candidates.model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    work()
    for hook in hooks:
        hook.remove()
    return found[0]


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, those read and those written, of copies on the device: the best of ten times ten."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(COPIES):  # before it waits: a wait takes a tenth of a copy's time
            target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    copy()
    return 2 * COPIES * COPIED / min(seconds_of(copy) for _ in range(10))


def table(record: dict[str, Any]) -> str:
    """A row per network and precision; without a GPU it says so above."""
    rows = [
        [
            f"{row['network']}, {row['precision']}",
            f"{row['one_by_one_seconds']:.2f} s",
            f"{row['again_seconds']:.2f} s",
            f"{row['batched_seconds']:.2f} s",
            f"{row['speedup']:.1f}x",
            f"{row['share_of_bound']:.0%}",
            f"{row['relative_difference']:.0e}",
        ]
        for row in record["rows"]
    ]
    where = record["gpu"] or "No GPU: on the CPU and small, which only shows that it runs"
    title = f"{where}; {record['plans']} plans, {record['images']} images each"
    ways = ["one by one", "again", "one batch", "speed-up"]
    header = ["network", *ways, "share of the copy bandwidth", "outputs differ by"]
    return f"{title}:\n\n{markdown_table(header, rows)}"


BENCHMARK = Benchmark("gpu-evaluation", "candidates in one batch against one by one, on a GPU", run, table, of_model)
