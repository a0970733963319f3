"""One policy trained on small networks, applied at once to networks it never saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from agents.ppo import make_ppo, play_mean
from agents.provenance import digest_of_data
from agents.recorder import PlanRecorder
from agents.sb3 import PruneVecEnv
from agents.transfer import read_policy, start_from, train_to_file
from benchmarks.registry import Benchmark, Options, markdown_table
from benchmarks.training_networks import NETWORKS, trained
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.evaluation.accuracy import accuracy
from gnnrl_gym.zoo import DataSplits, load_data

UNSEEN = ("resnet20", "resnet56")
BUDGETS = (0.5, 0.35)
EPOCHS, IMAGES = 6, 15_000  # of the small networks' own training


def run(options: Options) -> dict[str, Any]:
    """`--data` is CIFAR-10, `--weights` the folder of resnet20_cifar10.pt and resnet56_cifar10.pt.

    The small networks and the policy are kept in the runs folder (`general.pt`); `--evaluations` are those of the
    policy's training.
    """
    if not (options.data and options.weights):
        raise ValueError("general-policy needs --data (CIFAR-10) and --weights (the folder of the ResNets' weights).")
    torch.set_num_threads(1)
    data, path = load_data(options.data), options.runs / "general-policy" / f"general-{options.seed}.pt"
    facts = {"networks": ["digits-resnet", *NETWORKS], "evaluations": options.evaluations}
    about = facts | {"data_digest": digest_of_data(data), "epochs": EPOCHS, "images": IMAGES}
    if path.is_file():
        _check_kept(path, about)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        train_to_file(_training(options, data), path, options.evaluations, options.seed, about)
    rows = [_row(name, budget, options, data, path) for name in UNSEEN for budget in BUDGETS]
    return facts | {"rows": rows}


def _check_kept(path: Path, about: dict[str, Any]) -> None:
    """Check that a policy file was trained with what `about` says.

    Raises:
        ValueError: it was not. Entries that the file lacks, as those of older versions do, are not checked.
    """
    found = read_policy(path)[1]
    for key, value in about.items():
        if found.get(key, value) != value:
            raise ValueError(f"{str(path)!r} was trained with {key}={found[key]}, not {value}: choose another --runs.")


def _training(options: Options, data: DataSplits) -> gym.Env[Any, Any]:
    few: dict[str, Any] = {"max_steps": 1, "search_images": 300, "recalibration_images": 128, "device": "cpu"}
    folder = options.runs / "training-networks"
    envs = [PruneEnv(trained(name, data, folder, EPOCHS, IMAGES), data, **few) for name in NETWORKS]
    return gym.make("GNNRL-PruneMany-v0", networks=[PruneEnv(**few), *envs])


def _row(name: str, budget: float, options: Options, data: DataSplits, path: Path) -> dict[str, Any]:
    weights = Path(str(options.weights)) / f"{name}_cifar10.pt"
    env = gym.make("GNNRL-Prune-v0", model=name, weights=str(weights), data=data, budget=budget, device="cpu")
    inner: Any = env.unwrapped
    found: dict[str, Any] = {"network": name, "budget": budget}
    for method in ("uniform", "policy"):
        recorder = PlanRecorder(env, 1)
        if method == "policy":
            agent = make_ppo(PruneVecEnv(recorder, 2), device="cpu", batch_size=2)
            start_from(agent, path)
            play_mean(agent, recorder)
        else:
            recorder.play([np.ones(env.action_space.shape or (), np.float32)])
        assert recorder.best is not None
        found[method] = {
            "search_accuracy": recorder.best_accuracy,
            "test_accuracy": accuracy(inner.slim(recorder.best), data.test),
            "macs_ratio": inner.meter.ratio("macs", recorder.best),
            "widths": recorder.best.tolist(),
        }
    return found


def table(record: dict[str, Any]) -> str:
    """Test accuracy before fine-tuning: the uniform plan, and the policy's first."""
    header = ["network, never seen in training", "budget", "uniform", "policy, no evaluation spent", "gain"]
    rows = []
    for row in record["rows"]:
        uniform, policy = (100 * row[method]["test_accuracy"] for method in ("uniform", "policy"))
        cells = [row["network"], f"{row['budget']:.0%}", f"{uniform:.1f}", f"{policy:.1f}", f"{policy - uniform:+.1f}"]
        rows.append(cells)
    return markdown_table(header, rows)


BENCHMARK = Benchmark("general-policy", "a policy trained on other networks, applied at once", run, table)
