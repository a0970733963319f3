"""Pruning before training, the whole of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from agents import cli
from agents.early import CURVE, METHODS, early, train_mask
from agents.recorder import LOG
from agents.results import RESULT, SearchResult
from benchmarks import early_planted, early_pruning
from gnnrl_gym.evaluation.accuracy import accuracy
from gnnrl_gym.evaluation.training import Recipe, train
from gnnrl_gym.pruning.masks import top_mask, zeros_held
from gnnrl_gym.zoo import load_data, load_model

SHORT = Recipe(epochs=1)
SMALL: dict[str, Any] = {"search_images": 50, "recalibration_images": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def env() -> Any:
    return gym.make("GNNRL-Mask-v0", **SMALL)


@pytest.fixture(scope="module")
def weights_env() -> Any:
    return gym.make("GNNRL-Mask-v0", granularity="unstructured", sparsity=0.9, **SMALL)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dense"])
def test_every_method_gives_an_exact_mask_and_a_record(env: Any, method: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = {"recipe": SHORT, "control": method == "annealing"}
    result = early(env, method, evaluations=12, seed=1, out=folder, **settings)
    inner = env.unwrapped
    assert sum(result.widths) == inner.keep and min(result.widths) >= 1
    assert (result.control_accuracy is not None) == (method == "annealing")
    record = json.loads((folder / RESULT).read_text())
    assert record["untrained_accuracy"] == result.untrained_accuracy is not None
    assert record["test_accuracy"] == accuracy(SearchResult.load(folder).pruned(), inner.data.test)
    curve = json.loads((folder / CURVE).read_text())
    assert len(curve) == record["evaluations"] == len((folder / LOG).read_text().splitlines())
    assert max(curve) == record["search_accuracy"]
    assert len(curve) == (12 if method in ("reinforce", "annealing", "random") else 1)
    with pytest.raises(FileExistsError):
        early(env, method, evaluations=1, out=folder)


def test_seeds_decide(env: Any) -> None:
    results = [early(env, "annealing", 8, seed, recipe=SHORT) for seed in (0, 0, 1)]
    figures = [(r.widths, r.search_accuracy, r.test_accuracy, r.control_accuracy) for r in results]
    assert figures[0] == figures[1] != figures[2]


def test_training_starts_from_the_initial_weights_and_zeros_stay(weights_env: Any) -> None:
    inner = weights_env.unwrapped
    rng = np.random.default_rng(0)
    mask = top_mask(rng.random(len(inner.group_of)), inner.keep, inner.network.widths)
    start = inner.rewound(mask)
    initial, names = load_model("digits-resnet", "random", 10), list(inner.network.slimmer.units)

    def weights(module: torch.nn.Module) -> torch.Tensor:
        parameters = dict(module.named_parameters())
        return torch.cat([parameters[name].detach().flatten() for name in names])

    kept = torch.from_numpy(mask)
    assert torch.equal(weights(start), weights(initial) * kept)
    outcome = train_mask(inner, mask, SHORT, seed=0)
    assert (weights(outcome.module)[~kept] == 0).all()
    assert (weights(outcome.module)[kept] != weights(initial)[kept]).float().mean() > 0.9
    with zeros_held(inner.initial_network, start, mask):
        train(start, inner.data, SHORT, 0)
    for name, value in start.state_dict().items():  # and the same again, from the same seed
        assert torch.equal(value, outcome.module.state_dict()[name])
    free = inner.rewound(mask)
    train(free, inner.data, SHORT, 0)
    assert (weights(free)[~kept] != 0).any()


def test_the_search_does_not_see_the_test_split(env: Any) -> None:
    other = load_data("digits")
    object.__setattr__(other, "test", other.search)
    changed = gym.make("GNNRL-Mask-v0", data=other, **SMALL)
    found = [early(e, "annealing", 8, 0, recipe=SHORT, control=False) for e in (env, changed)]
    assert found[0].widths == found[1].widths and found[0].search_accuracy == found[1].search_accuracy
    assert found[0].test_accuracy != found[1].test_accuracy


def test_wrong_requests(env: Any) -> None:
    for arguments, word in (
        ({"method": "oracle"}, "method"),
        ({"evaluations": 0}, "evaluations"),
        ({"method": "dense"}, "sparsity 0"),
    ):
        with pytest.raises(ValueError, match=word):
            early(env, **arguments)
    with pytest.raises(ValueError, match="GNNRL-Mask-v0"):
        early(early_planted.PlantedEnv(0))


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    folder = tmp_path / "run"
    arguments = ["early", "--method", "snip", "--sparsity", "0.4", "--epochs", "1", "--search-images", "50"]
    done = CliRunner().invoke(cli.app, [*arguments, "--out", str(folder)])
    assert done.exit_code == 0, done.output
    result = SearchResult.load(folder)
    assert result.settings["sparsity"] == 0.4 and result.control_accuracy is not None
    assert f"{result.test_accuracy:.2%}" in done.output


def test_the_trained_dense_network_is_what_pretrained_scores(tmp_path: Path) -> None:
    dense = gym.make("GNNRL-Mask-v0", sparsity=0.0, init_seed=3, **SMALL)
    result = early(dense, "dense", 1, 0, tmp_path / "dense", SHORT)
    assert result.macs_ratio == 1.0 and result.control_accuracy is None
    weights = str(result.weights_file)
    env = gym.make("GNNRL-Mask-v0", objective="pretrained", init_seed=3, weights=weights, sparsity=0.0, **SMALL)
    assert accuracy(env.unwrapped.network.model, dense.unwrapped.data.test) == result.test_accuracy


# ---- benchmarks --------------------------------------------------------------------------------------------------


def test_table_of_runs_that_are_finished() -> None:
    row = {
        "sparsity": 0.9, "method": "annealing", "objective": "untrained", "evaluations": 100, "seed": 0,
        "untrained_accuracy": 0.6, "test_accuracy": 0.97, "control_accuracy": 0.96,
    }  # fmt: skip
    record = {
        "model": "mlp-300-100", "evaluations": 100, "missing": ["0.9-snip-untrained-1-0"],
        "rows": [row, {**row, "seed": 1, "test_accuracy": 0.98}],
    }  # fmt: skip
    text = early_pruning.table(record)
    assert "| 90% | annealing | untrained | 100 | 2 | 60.00 ± 0.00 | 97.50 ± 0.71 | 96.00 ± 0.00 |" in text
    assert "Not measured yet: 0.9-snip-untrained-1-0" in text


def test_benchmark_of_another_model_is_refused() -> None:
    from benchmarks.registry import Options

    with pytest.raises(ValueError, match="resnet20"):
        early_pruning.run(Options(model="resnet20"))
