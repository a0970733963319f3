"""How well the reward, measured before fine-tuning, ranks plans by their accuracy after it, and on how many images."""

from __future__ import annotations

import dataclasses
import json
import time
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import nn

from benchmarks.registry import Benchmark, Options, markdown_table, of_data
from benchmarks.searches import digests_of, side_by_side
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.evaluation.accuracy import accuracy, logits
from gnnrl_gym.evaluation.finetuning import finetune
from gnnrl_gym.evaluation.precision import fitting_dtype
from gnnrl_gym.files import write_atomic
from gnnrl_gym.zoo.models import DIGITS

ACCURACY, LOSS = "recalibrated accuracy", "recalibrated negative loss"
MEASURES = (ACCURACY, LOSS, "raw accuracy", "raw negative loss")
SIZES = (100, 250, 500, 1000, 2000)
PLANS, IMAGES, RESAMPLES = 72, 4000, 1000
# One schedule for every plan; part of the training images is enough to close most of the gap, in under a minute.
TRAINING: dict[str, Any] = {"epochs": 1, "learning_rate": 0.02, "schedule": "cosine"}
TRAINING_IMAGES = 20_000


def run(options: Options) -> dict[str, Any]:
    """Random plans at one budget. Each is a JSON file in the runs folder; those that are there are not made again.

    Search images only measure the candidates for a reward. The test split is used for the accuracy after fine-tuning,
    which is what this report is about, and decides nothing here. Where the weights have seen the search images in
    their own training, as public CIFAR checkpoints have, scores on them are higher than on new ones.
    """
    env, plans = _plans(options)
    model = options.model or DIGITS
    folder = options.runs / f"reward-report-{model}-{options.budget:g}-{options.seed}"
    paths = [folder / f"plan-{index}.json" for index in range(PLANS)]
    for path, plan in zip(paths, plans, strict=True):
        if path.is_file():
            _row(path, env, plan, options.seed)  # one of other settings is told of before any work
    side_by_side(
        _measure, [(path, options, i) for i, path in enumerate(paths) if not path.is_file()], options.workers, "plan"
    )
    rows = [_row(path, env, plan, options.seed) for path, plan in zip(paths, plans, strict=True)]
    return {"model": model, "budget": options.budget, **_settings(), **correlations(rows), "rows": rows}


@lru_cache(maxsize=1)
def _plans(options: Options) -> tuple[PruneEnv, list[np.ndarray]]:
    """The environment, and the same random plans [A] in every process."""
    given: dict[str, Any] = {
        "model": options.model or DIGITS,
        "weights": options.weights,
        "data": options.data or "digits",
    }
    made = gym.make("GNNRL-Prune-v0", budget=options.budget, **given)
    made.action_space.seed(options.seed)
    made.reset(seed=options.seed)
    env: PruneEnv = made.unwrapped  # type: ignore[assignment]
    found = (env.peek(made.action_space.sample()) for _ in range(10 * PLANS))
    plans = list(islice((plan for plan in found if plan is not None), PLANS))
    if len(plans) < PLANS:
        raise ValueError(f"budget={options.budget} is below what random plans reach: give a higher one.")
    return env, plans


def _measure(path: Path, options: Options, index: int) -> None:
    env, plans = _plans(options)
    _row(path, env, plans[index], options.seed)


def _settings() -> dict[str, Any]:
    return {"training": TRAINING, "training_images": TRAINING_IMAGES, "search_images": IMAGES, "batch": 128}


def _row(path: Path, env: PruneEnv, plan: np.ndarray, seed: int) -> dict[str, Any]:
    """The measured plan [A] of a file, made where it is not there.

    Raises:
        ValueError: the file is of another plan, other settings, weights or data.
    """
    about = {"settings": _settings(), "widths": plan.tolist(), **digests_of(env)}
    if path.is_file():
        row: dict[str, Any] = json.loads(path.read_text())
        if any(row.get(key, value) != value for key, value in about.items()):  # old files have no digests
            raise ValueError(f"{path} was made with other settings: choose another --runs.")
        return row
    start, network = time.perf_counter(), env.network
    slim, scores = _scores(env, plan)
    data = dataclasses.replace(env.data, train=env.data.train.take(TRAINING_IMAGES))
    dtype = fitting_dtype("auto", network, env.device)
    finetune(slim, data, seed=seed, device=env.device, dtype=dtype, **TRAINING)
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
    halves = [accuracy(slim, data.test.select(part)) for part in order.tensor_split(2)]
    row = about | {
        "macs_ratio": network.macs(plan) / network.macs(network.widths),
        "scores": scores,
        "finetuned_halves": halves,  # on the two halves of the test split
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_atomic(path, lambda file: file.write(json.dumps(row).encode()))
    return row


def _scores(env: PruneEnv, plan: np.ndarray) -> tuple[nn.Module, dict[str, dict[str, list[float]]]]:
    """The recalibrated network of a plan [A], and every measure (higher is better) on disjoint sets of every size."""
    split = env.data.search.take(IMAGES)
    images, labels = (tensor.to(env.device) for tensor in split.tensors())
    images = images.contiguous(memory_format=env.evaluator.layout)
    raw = env.network.slim(plan).to(env.device, memory_format=env.evaluator.layout)  # type: ignore[call-overload]
    recalibrated, scores = env.slim(plan), {}
    for name, network in (("recalibrated", recalibrated), ("raw", raw)):
        outputs = logits(network, images)
        correct = (outputs.argmax(1) == labels).float().cpu()
        gain = -F.cross_entropy(outputs, labels, reduction="none").cpu()
        for measure, values in ((f"{name} accuracy", correct), (f"{name} negative loss", gain)):
            scores[measure] = {str(size): _means(values, size) for size in SIZES if size <= len(labels)}
    return recalibrated, scores


def _means(values: torch.Tensor, size: int) -> list[float]:
    """Means over the disjoint sets of `size` that `values` [N] hold."""
    count = len(values) // size
    return [round(float(mean), 6) for mean in values[: count * size].view(count, size).double().mean(1)]


def correlations(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Spearman's rank correlation of every measure with the accuracy after fine-tuning.

    Returns:
        ``spearman[measure][size]``: ``mean`` over the disjoint sets of that size, ``worst`` of them, and a 90 %
        interval of the mean from resampling the plans. ``loss_over_accuracy[size]``: what the recalibrated negative
        loss has over the recalibrated accuracy, with the interval from the same resamples. ``test_halves``: how well
        the accuracies on one half of the test images rank those on the other, which says how much of them is noise.
    """
    tuned = np.array([row["finetuned_halves"] for row in rows])  # [P, 2]
    after, rng = tuned.mean(1), np.random.default_rng(0)
    picks = [rng.integers(0, len(rows), len(rows)) for _ in range(RESAMPLES)]
    found: dict[str, dict[str, Any]] = {measure: {} for measure in MEASURES}
    paired: dict[str, dict[str, float]] = {}
    for size in rows[0]["scores"][MEASURES[0]]:
        resampled: dict[str, np.ndarray] = {}
        for measure in MEASURES:
            scores = np.array([row["scores"][measure][size] for row in rows])  # [P, sets]
            each = _spearman(scores, after)
            resampled[measure] = np.array([np.mean(_spearman(scores[pick], after[pick])) for pick in picks])
            found[measure][size] = _rounded({"mean": each.mean(), "worst": each.min(), **_interval(resampled[measure])})
        gain = found[LOSS][size]["mean"] - found[ACCURACY][size]["mean"]
        paired[size] = _rounded({"mean": gain, **_interval(resampled[LOSS] - resampled[ACCURACY])})
    halves = round(float(_spearman(tuned[:, :1], tuned[:, 1])[0]), 3)
    spread = {"min": after.min(), "mean": after.mean(), "max": after.max(), "std": after.std(ddof=1)}
    return {
        "spearman": found,
        "loss_over_accuracy": paired,
        "test_halves": halves,
        "finetuned_accuracy": {key: round(float(value), 5) for key, value in spread.items()},
    }


def _interval(values: np.ndarray) -> dict[str, Any]:
    """Where 90 % of the resamples lie."""
    return dict(zip(("low", "high"), np.quantile(values, [0.05, 0.95]), strict=True))


def _rounded(values: dict[str, Any]) -> dict[str, float]:
    return {key: round(float(value), 3) for key, value in values.items()}


def _spearman(scores: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Of each column of `scores` [P, S] with `after` [P]; a column whose plans are all equal says nothing: 0."""
    ranks, other = _ranks(scores), _ranks(after)
    spread = np.sqrt((ranks**2).sum(0) * (other**2).sum())
    return np.divide(other @ ranks, spread, out=np.zeros(scores.shape[1]), where=spread > 0)


def _ranks(values: np.ndarray) -> np.ndarray:
    ranks = rankdata(values, axis=0)
    return ranks - ranks.mean(0)


def table(record: dict[str, Any]) -> str:
    """A row per measure, a column per number of search images."""
    found = record["spearman"]
    sizes = list(found[MEASURES[0]])
    rows = [[measure, *(_cell(found[measure][size]) for size in sizes)] for measure in MEASURES]
    after, plans = record["finetuned_accuracy"], len(record["rows"])
    gain = _cell(record["loss_over_accuracy"][sizes[-1]])
    text = (
        f"Spearman's rank correlation with the accuracy after fine-tuning: the mean over disjoint sets of search "
        f"images, and a 90 % interval from resampling the {plans} random plans of {record['model']} at "
        f"{record['budget']:.0%} of its MACs. Fine-tuned ({record['training']['epochs']} pass over "
        f"{record['training_images']:,} images) they have {after['min']:.1%} to {after['max']:.1%} on the test split; "
        f"one half of its images ranks the plans like the other with {record['test_halves']:.2f}. "
        f"On {sizes[-1]} images and the same resamples recalibrated loss has {gain} over recalibrated accuracy."
    )
    return markdown_table(["before fine-tuning", *(f"{size} images" for size in sizes)], rows) + f"\n\n{text}"


def _cell(value: dict[str, float]) -> str:
    return f"{value['mean']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


BENCHMARK = Benchmark(
    "reward-report",
    "which reward before fine-tuning ranks plans as their accuracy after it does",
    run,
    table,
    variant=lambda options: f"{options.model or DIGITS}-{options.budget:g}{of_data(options)}",
)
