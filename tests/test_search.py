"""agents.search: what it spends, what it keeps, and that it replays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import count_params
from torch import Tensor

from agents import SearchResult, search
from agents.controls import _cut
from agents.progress import Progress
from agents.recorder import PlanRecorder
from agents.refine import evaluate_run, finetune_run
from agents.searchers import SEARCHERS
from gnnrl_gym.evaluation.accuracy import accuracy
from gnnrl_gym.zoo import Split, load_data, load_model

Env = gym.Env[Any, Any]
KEYS = {
    "model", "data", "budget", "metric", "method", "seed", "evaluations", "widths", "macs_ratio", "params_ratio",
    "search_accuracy", "test_accuracy", "finetuned_accuracy", "versions",
}  # fmt: skip
EVALUATIONS = {"uniform": 1, "random": 21, "ppo": 21, "sensitivity": 20, "es": 21, "cma-es": 21}


@pytest.fixture(scope="module", params=EVALUATIONS)
def run(request: pytest.FixtureRequest, digits_env: Env, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """A small search with every method, in a run folder."""
    return search(digits_env, request.param, 21, seed=1, out=tmp_path_factory.mktemp("runs") / request.param)


def folder(run: SearchResult) -> Path:
    assert run.out is not None
    return Path(run.out)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "evaluations.jsonl").read_text().splitlines()]


def test_spends_what_it_was_given_and_keeps_the_budget(run: SearchResult, digits_env: Env) -> None:
    network = digits_env.unwrapped.network  # type: ignore[attr-defined]
    assert run.evaluations == EVALUATIONS[run.method]
    assert run.macs_ratio == network.macs(run.widths) / network.macs(network.widths) <= run.budget == 0.5
    assert run.params_ratio == network.params(run.widths) / network.params(network.widths)


def test_every_evaluation_has_a_line_and_the_best_is_kept(run: SearchResult) -> None:
    logged = lines(folder(run))
    assert [line["evaluation"] for line in logged] == list(range(1, run.evaluations + 1))
    best = max((line for line in logged if line["is_success"]), key=lambda line: line["search_accuracy"])
    assert run.search_accuracy == best["search_accuracy"]
    assert run.widths == best["widths"]


def test_record_is_complete(run: SearchResult) -> None:
    record = json.loads((folder(run) / "result.json").read_text())
    assert set(record) >= KEYS
    assert record["finetuned_accuracy"] is None
    assert (record["model"], record["data"], record["metric"], record["seed"]) == ("digits-resnet", "digits", "macs", 1)
    assert {"python", "torch", "gnnrl_gym"} <= set(record["versions"])
    for key in ("search_accuracy", "test_accuracy", "dense_test_accuracy"):
        assert 0 <= record[key] <= 1


def test_result_replays(run: SearchResult) -> None:
    again, test = SearchResult.load(folder(run)), load_data("digits").test
    assert again == run
    pruned = again.pruned()
    assert accuracy(pruned, test) == run.test_accuracy
    assert again.dense_test_accuracy == accuracy(load_model("digits-resnet"), test)
    assert count_params(pruned) == again.network().params(run.widths)


def test_evaluate_agrees_with_the_record(run: SearchResult) -> None:
    measured = evaluate_run(folder(run), "cpu", batch=2)
    assert measured.accuracy == measured.recorded_accuracy == run.test_accuracy
    assert measured.macs[1] / measured.macs[0] == run.macs_ratio
    assert measured.params[1] / measured.params[0] == run.params_ratio
    assert min(measured.latency) > 0


def test_pruned_needs_a_folder(digits_env: Env) -> None:
    with pytest.raises(ValueError, match="out="):
        search(digits_env, "uniform", 1).pruned()


@pytest.mark.parametrize("method", ["random", "ppo", "es", "cma-es"])
def test_seeds_decide(digits_env: Env, tmp_path: Path, method: str) -> None:
    plans = []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        search(digits_env, method, 5, seed=seed, out=tmp_path / name)
        plans.append([(line["widths"], line["search_accuracy"]) for line in lines(tmp_path / name)])
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]
    assert len({str(widths) for widths, _ in plans[0]}) > 1


@pytest.mark.parametrize("method", ["es", "random", "ppo"])
def test_numbers_of_numpy_are_numbers(tmp_path: Path, method: str) -> None:
    settings = {"budget": np.float32(0.5), "search_images": np.int64(50), "recalibration_images": np.int64(16)}
    env = gym.make("GNNRL-Prune-v0", device="cpu", **settings)
    result = search(env, method, np.int64(2), np.int64(1), out=tmp_path / "run")  # type: ignore[arg-type]
    again = SearchResult.load(tmp_path / "run")
    assert replace(again, out=None) == replace(result, out=None)
    asked = json.loads((tmp_path / "run" / "search.json").read_text())
    assert (asked["evaluations"], asked["seed"], asked["environment"]["search_images"]) == (2, 1, 50)


def test_ppo_settings_reach_the_agent(digits_env: Env) -> None:
    with pytest.raises(TypeError, match="no_such_setting"):
        search(digits_env, "ppo", 2, no_such_setting=3)


# ---- what is refused -------------------------------------------------------------------------------------------


def test_unknown_method_lists_the_known(digits_env: Env) -> None:
    with pytest.raises(ValueError, match="uniform, random"):
        search(digits_env, "guess", 2)


@pytest.mark.parametrize("evaluations", [0, -3])
def test_no_evaluations_raise(digits_env: Env, evaluations: int) -> None:
    with pytest.raises(ValueError, match="evaluations"):
        search(digits_env, "uniform", evaluations)


def test_wrappers_that_the_slots_of_a_search_would_lack_raise(digits_env: Env) -> None:
    rescaled = gym.wrappers.RescaleAction(digits_env, np.float32(-1), np.float32(1))
    doubled = gym.wrappers.TransformReward(digits_env, lambda reward: 2 * float(reward))
    shorter = gym.wrappers.TimeLimit(digits_env, 3)
    for env in (rescaled, doubled, shorter):
        with pytest.raises(ValueError, match=f"without {type(env).__name__}.*max_steps"):
            search(env, "ppo", 2)


def test_other_environments_raise() -> None:
    with pytest.raises(ValueError, match="GNNRL-Prune-v0"):
        search(gym.make("CartPole-v1"), "random", 2)


@pytest.mark.parametrize("occupy", [lambda p: (p.mkdir(), (p / "x").touch()), lambda p: p.touch()])
def test_occupied_folder_raises_and_stays(digits_env: Env, tmp_path: Path, occupy: Callable[[Path], Any]) -> None:
    out = tmp_path / "run"
    occupy(out)
    before, spent = sorted(tmp_path.rglob("*")), digits_env.unwrapped.evaluations  # type: ignore[attr-defined]
    with pytest.raises(FileExistsError, match="run"):
        search(digits_env, "uniform", 1, out=out)
    assert sorted(tmp_path.rglob("*")) == before
    assert digits_env.unwrapped.evaluations == spent  # type: ignore[attr-defined]


def test_empty_folder_is_taken(digits_env: Env, tmp_path: Path) -> None:
    assert search(digits_env, "uniform", 1, out=tmp_path).out == str(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": "digits-resnet"}', '{"unknown": 1}'])
def test_damaged_record_raises(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=r"result\.json"):
        SearchResult.load(tmp_path)


def test_missing_record_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gnnrl search"):
        SearchResult.load(tmp_path)


# ---- the test split --------------------------------------------------------------------------------------------


def watched(split: Split, seen: Callable[[], Any]) -> Split:
    """The split, telling `seen` whenever its images are read."""

    class Watched(Split):
        def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
            seen()
            return super().batch(indices)

    return Watched(split.images, split.labels, split.mean, split.std)


@pytest.mark.parametrize("method", ["random", "ppo"])
def test_test_split_is_touched_only_after_the_last_evaluation(method: str) -> None:
    data = load_data("digits")
    touched: list[int] = []
    inner: Any = None

    def seen() -> None:
        assert inner is not None, "touched when the environment was made"
        touched.append(inner.evaluations)

    env = gym.make(
        "GNNRL-Prune-v0", data=replace(data, test=watched(data.test, seen)), search_images=50,
        recalibration_images=32, device="cpu",
    )  # fmt: skip
    inner = env.unwrapped
    search(env, method, 4)
    assert touched and set(touched) == {4}


# ---- afterwards ------------------------------------------------------------------------------------------------


def test_the_pruned_network_of_another_plan_is_refused(digits_env: Env, tmp_path: Path) -> None:
    for method, name in (("uniform", "run"), ("random", "other")):
        search(digits_env, method, 1, out=tmp_path / name)
    shutil.copy(tmp_path / "other" / "pruned.pt", tmp_path / "run")
    for again in (evaluate_run, lambda out: finetune_run(out, 1)):
        with pytest.raises(ValueError, match=r"pruned\.pt' holds another plan than result\.json"):
            again(tmp_path / "run")


def test_finetuning_is_recorded_and_adds_up(digits_env: Env, tmp_path: Path) -> None:
    result = search(digits_env, "uniform", 1, out=tmp_path / "run")
    for epochs in (1, 2):
        tuned = finetune_run(tmp_path / "run", 1, device="cpu")
        assert tuned.finetune_epochs == epochs
        assert [how["epochs"] for how in tuned.settings["finetuning"]] == [1] * epochs
        assert tuned == SearchResult.load(tmp_path / "run")
        assert accuracy(tuned.pruned(), load_data("digits").test) == tuned.finetuned_accuracy
    assert (tuned.finetuned_accuracy or 0) > result.test_accuracy
    assert (tuned.test_accuracy, tuned.widths) == (result.test_accuracy, result.widths)
    assert evaluate_run(tmp_path / "run", "cpu").recorded_accuracy == tuned.finetuned_accuracy


def test_finetuning_is_seeded(digits_env: Env, tmp_path: Path) -> None:
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        search(digits_env, "uniform", 1, out=tmp_path / name)
        states.append(finetune_run(tmp_path / name, 1, device="cpu", seed=seed).pruned().state_dict()["conv1.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_no_epochs_raise(run: SearchResult) -> None:
    with pytest.raises(ValueError, match="epochs"):
        finetune_run(folder(run), 0)


@pytest.mark.parametrize("importance", ["taylor", "random", "bn-scale", "l1"])
def test_runs_of_every_importance_replay(tmp_path: Path, importance: str) -> None:
    env = gym.make("GNNRL-Prune-v0", importance=importance, search_images=50, recalibration_images=40, device="cpu")
    result = search(env, "uniform", 1, out=tmp_path / "run")
    pruned = SearchResult.load(tmp_path / "run").pruned()
    assert accuracy(pruned, load_data("digits").test) == result.test_accuracy


def test_what_is_pruned_before_training_replays_with_its_random_weights(tmp_path: Path) -> None:
    env = gym.make("GNNRL-Prune-v0", objective="untrained", search_images=50, recalibration_images=40, device="cpu")
    result = search(env, "uniform", 1, out=tmp_path / "run")
    again = SearchResult.load(tmp_path / "run")
    assert accuracy(again.network().model, load_data("digits").test) == result.dense_test_accuracy < 0.5


def test_own_module_and_data_replay_with_the_module(tmp_path: Path) -> None:
    model, data = load_model("digits-resnet", "random", seed=4), load_data("digits")
    env = gym.make("GNNRL-Prune-v0", model=model, data=data, search_images=50, recalibration_images=40, device="cpu")
    result = search(env, "uniform", 1, out=tmp_path / "run")
    again = SearchResult.load(tmp_path / "run")
    assert again.model == "CifarResNet"
    with pytest.raises(ValueError, match="model="):
        again.pruned()
    assert accuracy(again.pruned(model), data.test) == result.test_accuracy
    assert evaluate_run(tmp_path / "run", "cpu", model=model, data=data).accuracy == result.test_accuracy


@pytest.mark.parametrize(("given", "said"), [({"model": "resnet20"}, "Module"), ({"data": "digits"}, "DataSplits")])
def test_names_for_objects_of_ones_own_are_refused(run: SearchResult, given: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=f"must be of the class {said}, .*, got '"):
        evaluate_run(folder(run), "cpu", **given)


def test_accuracies_are_exact_shares(run: SearchResult) -> None:
    count = 100  # search images of the environment
    assert run.search_accuracy in {correct / count for correct in range(count + 1)}
    assert np.isclose(run.test_accuracy * 400, round(run.test_accuracy * 400))


# ---- sensitivity -----------------------------------------------------------------------------------------------


def test_sensitivity_keeps_to_the_rounding_of_widths(tmp_path: Path) -> None:
    few: dict[str, Any] = {"search_images": 30, "recalibration_images": 16, "device": "cpu"}
    env = gym.make("GNNRL-Prune-v0", budget=0.9, round_to=8, **few)
    full = env.unwrapped.network.widths  # type: ignore[attr-defined]
    recorder = PlanRecorder(env, 5 * len(full) + 2, tmp_path)
    SEARCHERS["sensitivity"](recorder, 0, None)
    plans = np.array([line["widths"] for line in lines(tmp_path)])
    assert len(plans) == 2 + (full // 8 - 1).sum()  # every smaller multiple of each group, once
    assert ((plans % 8 == 0) | (plans == full)).all()


@pytest.mark.parametrize(("method", "settings"), [("sensitivity", {}), ("ppo", {"policy": None})])
def test_an_episode_before_has_no_part(digits_env: Env, method: str, settings: dict[str, Any]) -> None:
    def found() -> tuple[list[int], Any]:
        result = search(digits_env, method, 20, **settings)
        return result.widths, result.budget

    before = found()
    digits_env.reset(options={"budget": 0.2})
    assert found() == before


def test_equal_shares_land_on_the_budget_under_a_free_landing() -> None:
    found = [search(gym.make("GNNRL-Prune-v0", landing=way), "uniform", 1) for way in ("free", "exact")]
    ratios = [result.macs_ratio for result in found]
    assert 0.4 < ratios[0] <= ratios[1] <= 0.5  # the exact landing gives back what still fits
    shares = found[0].widths / gym.make("GNNRL-Prune-v0").unwrapped.network.widths  # type: ignore[attr-defined]
    assert np.ptp(shares) < 0.1


def linear(left: float) -> float:
    return 1e-3 * left


@pytest.mark.parametrize("method", ["ppo", "ddpg", "sac"])
def test_schedules_that_would_stand_still_raise(digits_env: Env, method: str) -> None:
    with pytest.raises(ValueError, match="learning_rate is a function"):
        search(digits_env, method, 4, learning_rate=linear)


# ---- what is played, counted and said ----------------------------------------------------------------------------


@pytest.mark.parametrize("landing", ["free", "exact"])
def test_what_sensitivity_cuts_is_within_the_budget_as_it_is_played(landing: str) -> None:
    """Where bisection ends, a width is at the edge of rounding, and 1 - (1 - share) may fall on the other side."""
    env: Any = gym.make("GNNRL-Prune-v0", landing=landing, search_images=10, recalibration_images=4).unwrapped
    kept, rng = np.array([1.0, 0.8, 0.6, 0.4, 0.2]), np.random.default_rng(0)
    for budget in np.linspace(0.06, 0.5, 60):
        env.reset(options={"budget": float(budget)})
        rise = np.maximum.accumulate(30 * rng.random((5, len(env.network.widths))))  # steep: bisection ends at the edge
        assert env.peek(1 - _cut(rise, kept, env)) is not None


def test_small_steps_don_t_end_a_search(tmp_path: Path) -> None:
    """A policy may never reach the budget; one that does so slowly is not given up."""
    env = gym.make("GNNRL-Prune-v0", budget=0.5, max_steps=1000, search_images=10, recalibration_images=4)
    recorder = PlanRecorder(env, 5)
    recorder.play(np.full((5, env.action_space.shape[0]), 0.002))  # type: ignore[index]
    assert len(recorder.accuracies) == 5


def test_an_evaluation_that_is_interrupted_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env: Any = gym.make("GNNRL-Prune-v0", search_images=10, recalibration_images=4, device="cpu")
    measure, calls = env.unwrapped.evaluator._measure, []

    def interrupted(plan: Any) -> float:
        calls.append(plan)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return float(measure(plan))

    monkeypatch.setattr(env.unwrapped.evaluator, "_measure", interrupted)
    monkeypatch.setattr(env.unwrapped.evaluator, "prefetch", lambda plans: None)
    result = search(env, "random", 20, out=tmp_path / "run")
    assert result.interrupted and result.evaluations == len(lines(tmp_path / "run")) == 3


def test_a_free_landing_starts_from_no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The general one has learned that its plans are scaled back to the budget."""
    adapted = []
    monkeypatch.setattr("agents.ppo._adapt", lambda agent, policy: adapted.append(policy))
    for landing in ("free", "exact"):
        search(gym.make("GNNRL-Prune-v0", landing=landing, search_images=10, budget=0.9), "ppo", 3)
        assert len(adapted) == (landing == "exact")


def test_no_more_plans_are_measured_than_may_be_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr("agents.sb3.prefetch", lambda slots, ratios: sizes.append(len(slots)))
    search(gym.make("GNNRL-Prune-v0", search_images=10, recalibration_images=4), "ppo", 12)
    assert len(sizes) > 1 and sum(sizes) == 11  # the mean plan comes first, and 11 are no whole number of batches


def test_the_last_line_says_how_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress(400, "evaluation")
    bar.at(1, "found")
    assert not capsys.readouterr().err
    bar.close()
    bar.close()
    assert capsys.readouterr().err == "1/400 evaluations, found\n"


def test_a_run_is_measured_and_fine_tuned_with_one_tracing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes seconds where literals have to be found."""
    search(gym.make("GNNRL-Prune-v0", search_images=10, recalibration_images=4), "uniform", out=tmp_path / "run")
    traced, make = [], SearchResult.network
    monkeypatch.setattr(SearchResult, "network", lambda *given: traced.append(1) or make(*given))
    evaluate_run(tmp_path / "run", "cpu")
    finetune_run(tmp_path / "run", 1, device="cpu")
    assert len(traced) == 2
