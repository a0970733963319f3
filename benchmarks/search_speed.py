"""How fast candidates are scored, against the convolutions alone; and how fast PPO learns from them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from agents.ppo import make_ppo
from agents.sb3 import make_sb3_env
from benchmarks.registry import Benchmark, Options, markdown_table, of_data, of_model, seconds_of
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.evaluation.accuracy import CPU_BATCH
from gnnrl_gym.evaluation.folding import fold
from gnnrl_gym.zoo import load_data, load_model

NETWORK = "resnet20"  # the usual one
PLANS, SCORED = 5, 400
UPDATE_STATES, UPDATE_EPOCHS = 100, 10


def run(options: Options) -> dict[str, Any]:
    """`--data` is CIFAR-10, `--model` and `--weights` a network for it; the update is that on ResNet-56's graph."""
    if not options.data:
        raise ValueError("search-speed needs --model, --weights and --data.")
    given: dict[str, Any] = {"model": options.model or NETWORK, "weights": options.weights, "data": options.data}
    rows = [_against_the_limit(precision, given, options.seed) for precision in ("float32", "bfloat16")]
    return {
        "model": given["model"],
        "threads": torch.get_num_threads(),
        "rows": rows,
        "side_by_side": _side_by_side(given, options.seed),
        "update_seconds": _update_seconds(options),
    }


def _against_the_limit(precision: str, given: dict[str, Any], seed: int) -> dict[str, Any]:
    """Seconds on one thread of slim + recalibrate + score, and of the same convolutions back to back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    env: Any = gym.make("GNNRL-Prune-v0", precision=precision, device="cpu", **given).unwrapped
    evaluator, ours, limit = env.evaluator, 0.0, 0.0
    for plan in _plans(env, PLANS, seed):
        evaluator._measure(plan)  # the first of a shape also prepares its kernels
        ours += seconds_of(lambda plan=plan: evaluator._measure(plan))  # type: ignore[misc]
        network = fold(evaluator.build(plan), evaluator._pairs)
        limit += sum(_limit(network, images, evaluator.dtype) for images in (evaluator._calibration, evaluator._search))
    torch.set_num_threads(before)
    return {"precision": precision, "seconds": ours / PLANS, "limit_seconds": limit / PLANS, "share": limit / ours}


def _limit(network: nn.Module, images: Tensor, dtype: torch.dtype) -> float:
    """Seconds of the network's convolutions and linear layers alone, on inputs that lie ready, batch by batch."""
    calls: list[tuple[nn.Module, Tensor]] = []
    layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(lambda layer, x, y: calls.append((layer, x[0].to(dtype)))) for layer in layers]
    with torch.inference_mode():
        network(images[:CPU_BATCH])
        for hook in hooks:
            hook.remove()
        network.to(dtype)

        def batches(count: int) -> None:
            for layer, x in calls * count:
                layer(x)

        batches(1)
        count = len(images) // CPU_BATCH
        seconds = seconds_of(lambda: batches(count)) * len(images) / (CPU_BATCH * count)
        network.float()
    return seconds


def _side_by_side(given: dict[str, Any], seed: int) -> dict[str, Any]:
    """400 plans with 2,000 search images, as a search scores them: ten at a time, on all threads."""
    env: Any = gym.make("GNNRL-Prune-v0", search_images=2000, device="cpu", **given).unwrapped
    plans = _plans(env, SCORED, seed)
    parts = [plans[at : at + 10] for at in range(0, SCORED, 10)]
    return {"plans": SCORED, "images": 2000, "seconds": seconds_of(lambda: [env.evaluator.prefetch(p) for p in parts])}


def _update_seconds(options: Options) -> float:
    """Seconds of one PPO update: 100 different states of ResNet-56, ten epochs, on all threads."""
    data = load_data(options.data or "digits")
    inner = PruneEnv(load_model("resnet56"), data, search_images=1, recalibration_images=2, device="cpu")
    inner.evaluator._scores = _Constant()  # only the update is timed
    # a budget drawn at every reset makes the states different: equal ones would be read once
    env = make_sb3_env(gym.make("GNNRL-PruneMany-v0", networks=[inner]))
    agent = make_ppo(env, options.seed, "cpu", n_steps=UPDATE_STATES, batch_size=UPDATE_STATES, n_epochs=UPDATE_EPOCHS)
    agent.learn(UPDATE_STATES)
    return min(seconds_of(agent.train) for _ in range(3))


class _Constant(dict[bytes, float]):
    """Knows every plan's score."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: bytes) -> float:
        return 0.5


def _plans(env: Any, count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    while len(found) < count:
        env.reset()
        if (plan := env.peek(rng.uniform(0.2, 1, env.action_space.shape))) is not None:
            found.append(plan)
    return found


def table(record: dict[str, Any]) -> str:
    """What was measured, a line each."""
    rows = [
        [
            f"{record['model']}, one plan, {row['precision']}, one thread",
            f"{1000 * row['seconds']:.0f} ms",
            f"{row['share']:.0%} of its convolutions' throughput",
        ]
        for row in record["rows"]
    ]
    side, threads = record["side_by_side"], record["threads"]
    label = f"{side['plans']} plans, {side['images']} images each, {threads} threads"
    rows.append([label, f"{side['seconds']:.0f} s", f"{side['plans'] / side['seconds']:.1f} plans per second"])
    label = f"PPO update, {UPDATE_STATES} states of ResNet-56, {UPDATE_EPOCHS} epochs, {threads} threads"
    rows.append([label, f"{record['update_seconds']:.2f} s", ""])
    return markdown_table(["what", "time", ""], rows)


def _variant(options: Options) -> str:
    """The usual network's record has no name of a network."""
    return f"{'' if options.model == NETWORK else of_model(options)}{of_data(options)}".removeprefix("-")


BENCHMARK = Benchmark(
    "search-speed", "scoring against the convolutions alone, and the PPO update", run, table, variant=_variant
)
