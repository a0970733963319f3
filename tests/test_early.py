"""Pruning before training, the whole of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from agents import cli, early_training
from agents.cli_common import of_dense
from agents.early import CURVE, METHODS, early, search_mask
from agents.early_training import train_mask
from agents.recorder import LOG
from agents.refine import evaluate_run, finetune_run
from agents.results import RESULT, SearchResult
from benchmarks import early_planted, early_pruning
from gnnrl_gym.evaluation.accuracy import accuracy
from gnnrl_gym.evaluation.linear_chain import LinearChain
from gnnrl_gym.evaluation.training import Recipe, train
from gnnrl_gym.pruning.masks import top_mask, widths_of, zeros_held
from gnnrl_gym.zoo import load_data, load_model

SHORT = Recipe(epochs=1)
SMALL: dict[str, Any] = {"search_images": 50, "recalibration_images": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def env() -> Any:
    return gym.make("GNNRL-Mask-v0", **SMALL)


@pytest.fixture(scope="module")
def weights_env() -> Any:
    return gym.make("GNNRL-Mask-v0", granularity="unstructured", sparsity=0.9, **SMALL)


def test_the_lottery_is_trained_like_the_network_that_stays(env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes: list[Recipe] = []

    def noted(model: Any, data: Any, recipe: Recipe, *args: Any, **settings: Any) -> Any:
        recipes.append(recipe)
        return train(model, data, recipe, *args, **settings)

    for module in ("one_shot", "early_training"):
        monkeypatch.setattr(f"agents.{module}.train", noted)
    early(env, "lottery", 1, recipe=SHORT, control=False)
    assert recipes == [SHORT, SHORT]


class Normed(nn.Module):
    """Its BatchNorm can't train on one image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 8, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x).flatten(1)))


def test_a_run_is_evaluated_with_a_module_in_training_mode(tmp_path: Path) -> None:
    data, settings = load_data("digits"), {"objective": "pretrained", "pretrain_epochs": 1, **SMALL}
    env = gym.make("GNNRL-Mask-v0", model=Normed(), data=data, **settings)
    early(env, "random", 1, out=tmp_path, recipe=SHORT, control=False)
    module = Normed().train()
    assert evaluate_run(tmp_path, "cpu", model=module, data=data).latency[0] > 0
    assert module.training


class Stateful(Normed):
    """Keeps something else than tensors in its state."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 1}


@pytest.mark.parametrize("method", ["random", "synflow"])
def test_a_state_that_holds_more_than_tensors(tmp_path: Path, method: str) -> None:
    env = gym.make("GNNRL-Mask-v0", model=Stateful(), data=load_data("digits"), **SMALL)
    result = early(env, method, 1, out=tmp_path, recipe=SHORT, control=False)
    assert accuracy(result.pruned(Stateful()), load_data("digits").test) == result.test_accuracy


def test_seeds_of_numpy_are_seeds(tmp_path: Path) -> None:
    env = gym.make("GNNRL-Mask-v0", init_seed=np.int64(3), **SMALL)
    early(env, "random", np.int64(2), np.int64(1), tmp_path, SHORT, control=False)  # type: ignore[arg-type]
    found = SearchResult.load(tmp_path)
    assert (found.seed, found.settings["init_seed"]) == (1, 3)


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


def test_the_control_has_the_counts_of_the_mask_and_other_units(env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[np.ndarray] = []
    real = early_training.train_mask

    def seen(env_: Any, mask: np.ndarray, *rest: Any) -> Any:
        trained.append(mask)
        return real(env_, mask, *rest)

    monkeypatch.setattr("agents.early.train_mask", seen)
    monkeypatch.setattr(early_training, "train_mask", seen)
    result = early(env, "annealing", 5, 0, recipe=SHORT)
    mask, control = trained
    full = env.unwrapped.network.widths
    assert widths_of(mask, full).tolist() == widths_of(control, full).tolist() == result.widths
    assert (mask != control).any()


def test_seeds_decide(env: Any) -> None:
    results = [early(env, "annealing", 8, seed, recipe=SHORT) for seed in (0, 0, 1)]
    figures = [(r.widths, r.search_accuracy, r.test_accuracy, r.control_accuracy) for r in results]
    assert figures[0] == figures[1] != figures[2]


def test_a_search_does_not_depend_on_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(self: LinearChain, kept: Any, changed: Any) -> Any:  # so that what was scored before matters at once
        return 0.5 * exact(self, kept, changed)

    exact = LinearChain._difference
    monkeypatch.setattr(LinearChain, "_difference", rounded)
    monkeypatch.setattr("gnnrl_gym.evaluation.linear_chain.REFRESH", 7)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    envs = [gym.make("GNNRL-Mask-v0", model=model, granularity="unstructured", **SMALL) for _ in range(2)]
    search_mask(envs[0], "annealing", 60, seed=1)
    curves = [search_mask(env, "annealing", 60, seed=0).accuracies for env in envs]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("recipe", [SHORT, Recipe(1, 1e-3, weight_decay=1.0, optimizer="adamw")])
def test_training_starts_from_the_initial_weights_and_zeros_stay(weights_env: Any, recipe: Recipe) -> None:
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
    outcome = train_mask(inner, mask, recipe, seed=0)
    assert (weights(outcome.module)[~kept] == 0).all()
    assert (weights(outcome.module)[kept] != weights(initial)[kept]).float().mean() > 0.9
    with zeros_held(inner.initial_network, start, mask):
        train(start, inner.data, recipe, 0)
    for name, value in start.state_dict().items():  # and the same again, from the same seed
        assert torch.equal(value, outcome.module.state_dict()[name])
    free = inner.rewound(mask)
    train(free, inner.data, recipe, 0)
    assert (weights(free)[~kept] != 0).any()


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer.*sgd, adamw"):
        Recipe(epochs=1, optimizer="lion")


# ---- going on after a kill ---------------------------------------------------------------------------------------


def chain_env() -> Any:
    """Weights of a chain of linear layers, whose scores come from the mask before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    return gym.make("GNNRL-Mask-v0", model=model, granularity="unstructured", sparsity=0.8, **SMALL)


def killed_at(evaluation: int | None, env: Any, out: Path, patch: pytest.MonkeyPatch, **settings: Any) -> None:
    """A run that dies at an evaluation, or, at None, while it trains the control."""
    evaluator, score, left = env.unwrapped.evaluator, env.unwrapped.evaluator.score, [evaluation]

    def dying_score(mask: np.ndarray) -> float:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] = None if left[0] is None else left[0] - 1
        return float(score(mask))

    def dying_control(*_: Any) -> None:
        raise KeyboardInterrupt

    with patch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(evaluator, "score", dying_score)
        if evaluation is None:
            patched.setattr("agents.early.train_mask", dying_control)
        early(env, out=out, **settings)
    evaluator._scores.clear()  # another process remembers nothing
    assert not (out / RESULT).exists()


@pytest.mark.parametrize("made", ["filters", "weights", "digests", "chain"])
@pytest.mark.parametrize("evaluation", [7, None])
def test_resumed_equals_uninterrupted(
    env: Any, weights_env: Any, made: str, evaluation: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"method": "annealing", "evaluations": 12, "seed": 1, "recipe": SHORT}
    if made == "digests":
        monkeypatch.setattr("agents.recorder.MOST_UNITS", 100)
    chosen, fresh = (chain_env(), chain_env()) if made == "chain" else (env if made == "filters" else weights_env,) * 2
    whole = early(chosen, out=tmp_path / "whole", **asked)
    chosen.unwrapped.evaluator._scores.clear()
    killed_at(evaluation, fresh, tmp_path / "killed", monkeypatch, **asked)
    resumed = early(chain_env() if made == "chain" else fresh, out=tmp_path / "killed", resume=True, **asked)
    for file in (CURVE, LOG):
        assert (tmp_path / "killed" / file).read_text() == (tmp_path / "whole" / file).read_text()
    assert replace(resumed, out=None, seconds=0.0) == replace(whole, out=None, seconds=0.0)
    weights = [result.pruned(fresh.unwrapped.initial).state_dict() for result in (whole, resumed)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_what_was_measured_and_trained_is_not_done_again(
    env: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"method": "random", "evaluations": 8, "seed": 2, "recipe": SHORT}
    env.unwrapped.evaluator._scores.clear()
    killed_at(None, env, tmp_path / "run", monkeypatch, **{**asked, "method": "annealing"})
    measured, trained = [], []
    measure, train_ = env.unwrapped.evaluator._measure, early_training.train
    monkeypatch.setattr(env.unwrapped.evaluator, "_measure", lambda mask: measured.append(mask) or measure(mask))
    monkeypatch.setattr(early_training, "train", lambda *a: trained.append(a) or train_(*a))
    early(env, out=tmp_path / "run", resume=True, **{**asked, "method": "annealing"})
    assert not measured and len(trained) == 1  # the control


def test_another_run_is_not_resumed(env: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"method": "annealing", "evaluations": 8, "recipe": SHORT}
    killed_at(5, env, tmp_path / "run", monkeypatch, **asked)
    for changes, said in (({"seed": 4}, "seed=0, not 4"), ({"recipe": Recipe(epochs=2)}, "recipe: epochs=1, not 2")):
        with pytest.raises(ValueError, match=said):
            early(env, out=tmp_path / "run", resume=True, **{**asked, **changes})
    with pytest.raises(FileExistsError, match="--resume"):
        early(env, out=tmp_path / "run", **asked)
    with pytest.raises(FileNotFoundError, match="No run to resume"):
        early(env, out=tmp_path / "other", resume=True, **asked)
    early(env, out=tmp_path / "run", resume=True, **asked)
    with pytest.raises(FileExistsError, match="finished"):
        early(env, out=tmp_path / "run", resume=True, **asked)


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


def test_command_line_goes_on_after_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--method", "annealing", "--evaluations", "6", "--epochs", "1", "--search-images", "50", "--seed", "3",
               "--device", "cpu", "--out"]  # fmt: skip
    invoke = CliRunner().invoke
    assert invoke(cli.app, ["early", *options, str(tmp_path / "whole")]).exit_code == 0

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("agents.early.train_mask_once", killed)
        stopped = invoke(cli.app, ["early", *options, str(tmp_path / "run")])
    assert stopped.exit_code == 130 and f"gnnrl early --resume {tmp_path / 'run'}" in stopped.output
    done = invoke(cli.app, ["early", "--resume", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    whole, resumed = (SearchResult.load(tmp_path / name) for name in ("whole", "run"))
    assert replace(resumed, out=None, seconds=0.0) == replace(whole, out=None, seconds=0.0)


def test_no_way_on_is_named_where_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("agents.early.search_mask", killed)  # before the first evaluation
    stopped = CliRunner().invoke(cli.app, ["early", "--device", "cpu", "--out", str(tmp_path / "run")])
    assert stopped.exit_code == 130 and not (tmp_path / "run").exists()
    assert "--resume" not in stopped.output


MISTAKES = {
    "method": (("--method", "oracle"), "choose one of reinforce"),
    "evaluations": (("--evaluations", "0"), "evaluations"),
    "epochs": (("--epochs", "0"), "epochs must"),
    "seed": (("--seed", "-1"), "seed must"),
    "a seed too large": (("--seed", "99999999999999999999999"), "seed must"),
    "dense, but sparse": (("--method", "dense", "--sparsity", "0.5"), "sparsity 0"),
    "an occupied folder": (("--out", "."), "not empty"),
    "no run to resume": (("--resume", "nowhere"), "nowhere"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_said_before_the_environment_is_made(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("the environment was made, which may train")

    monkeypatch.setattr("agents.early_cli.gym.make", work)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    arguments, said = MISTAKES[mistake]
    failed = CliRunner().invoke(cli.app, ["early", *arguments]).exception
    assert isinstance(failed, (ValueError, OSError)) and said in str(failed)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_trained_dense_network_is_what_pretrained_scores(tmp_path: Path) -> None:
    dense = gym.make("GNNRL-Mask-v0", sparsity=0.0, init_seed=3, **SMALL)
    result = early(dense, "dense", 1, 0, tmp_path / "dense", SHORT)
    assert result.macs_ratio == 1.0 and result.control_accuracy is None
    weights = str(result.weights_file)
    env = gym.make("GNNRL-Mask-v0", objective="pretrained", init_seed=3, weights=weights, sparsity=0.0, **SMALL)
    assert accuracy(env.unwrapped.network.model, dense.unwrapped.data.test) == result.test_accuracy


@pytest.mark.parametrize("changes", [{}, {"init_seed": 5, "granularity": "unstructured"}])
def test_a_record_replays_the_network_with_its_initial_weights(changes: dict[str, Any], tmp_path: Path) -> None:
    env = gym.make("GNNRL-Mask-v0", **{**SMALL, **changes})
    result = early(env, "random", 1, 0, tmp_path / "run", SHORT)
    replayed = SearchResult.load(tmp_path / "run").network().model
    assert accuracy(replayed, env.unwrapped.data.test) == result.dense_test_accuracy < 0.5
    said = CliRunner().invoke(cli.app, ["evaluate", str(tmp_path / "run"), "--device", "cpu"]).output
    assert f"{result.dense_test_accuracy:.2%}, untrained" in said


def test_a_dense_network_that_was_trained_for_the_run_is_not_taken_for_another(tmp_path: Path) -> None:
    env = gym.make("GNNRL-Mask-v0", objective="pretrained", pretrain_epochs=2, **SMALL)
    result = early(env, "random", 1, 0, tmp_path / "run", SHORT)
    assert evaluate_run(tmp_path / "run").dense_accuracy == result.dense_test_accuracy
    assert of_dense(result, 0.5) == "50.00%, pretrained"
    with pytest.raises(ValueError, match=r"dense network of .* is not trained"):
        finetune_run(tmp_path / "run", 1, distill=0.5)


def test_a_run_with_a_module_of_ones_own_goes_on_in_python(tmp_path: Path) -> None:
    asked = {"recipe": SHORT.record(), "environment": {"model": "Mine"}}
    (tmp_path / "early.json").write_text(json.dumps(asked))
    ran = CliRunner().invoke(cli.app, ["early", "--resume", str(tmp_path)])
    assert isinstance(ran.exception, ValueError) and "agents.early.early(env" in str(ran.exception)


# ---- benchmarks --------------------------------------------------------------------------------------------------


def test_table_of_runs_that_are_finished() -> None:
    row = {
        "sparsity": 0.9, "method": "annealing", "objective": "untrained", "evaluations": 100, "seed": 0,
        "untrained_accuracy": 0.6, "test_accuracy": 0.97, "control_accuracy": 0.96, "macs_ratio": 1.0,
    }  # fmt: skip
    record = {
        "model": "mlp-300-100", "evaluations": 100, "missing": ["0.9-snip-untrained-1-0"],
        "rows": [row, {**row, "seed": 1, "test_accuracy": 0.98}],
    }  # fmt: skip
    text = early_pruning.table(record)
    assert "| 90% | annealing | untrained | 100 | 2 | 60.00 ± 0.00 | 97.50 ± 0.71 | 96.00 ± 0.00 |" in text
    assert "how many seeds of it: 0.9-snip-untrained-1 (1)." in text and "MACs" not in text
    record["rows"].append({**row, "seed": 2, "macs_ratio": 0.7})  # equally many filters, unequal costs
    assert "| 100 | 3 | 90.00 ± 17.32 | 60.00" in early_pruning.table(record)


def test_benchmark_of_another_model_is_refused() -> None:
    from benchmarks.registry import Options

    with pytest.raises(ValueError, match="resnet20"):
        early_pruning.run(Options(model="resnet20"))
