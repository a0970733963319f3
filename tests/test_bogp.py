"""`gnnrl bogp`: the whole run, its record, its resumption, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import agents.bayesian as bayesian_module
import agents.bogp as module
from agents import cli
from agents.bogp import ASKED, bogp
from agents.bogp_record import BogpResult, Question, report
from benchmarks import bogp_mnist
from gnnrl_gym.errors import MissingExtra
from gnnrl_gym.relational.training import make_network
from gnnrl_gym.zoo import load_data

QUESTION = Question("mlp-16-16", density=0.5, nodes=8, pool_size=14, epochs=2, evaluations=10, final_epochs=2,
                    final_seeds=2, controls=3)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[BogpResult, Path]:
    pytest.importorskip("botorch", reason='needs botorch: pip install -e ".[bayesian]"')
    folder = tmp_path_factory.mktemp("bogp") / "run"
    return bogp(QUESTION, folder, "cpu"), folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "evaluations.jsonl").read_text().splitlines()]


def test_record_is_complete_and_reloads(run: tuple[BogpResult, Path]) -> None:
    result, folder = run
    assert BogpResult.load(folder) == result
    assert (result.model, result.data, result.method, result.evaluations) == ("mlp-16-16", "digits", "bayesian", 10)
    assert result.weights_ratio <= result.budget == 0.5
    assert result.test_accuracy == np.mean(result.trained["bayesian"])
    assert result.random_test_accuracy == pytest.approx(np.mean(result.trained["random graphs"]))
    assert np.shape(result.trained["random graphs"]) == (3, 2) and len(result.trained["dense"]) == 2
    assert {"torch", "numpy"} <= set(result.versions)


def test_both_searches_spend_the_same(run: tuple[BogpResult, Path]) -> None:
    result, folder = run
    for name in ("bayesian", "random"):
        logged = lines(folder / name)
        assert [line["evaluation"] for line in logged] == list(range(1, 11))
        assert len({line["graph"] for line in logged}) == 10
    scores = {line["graph"]: line["search_accuracy"] for line in lines(folder / "bayesian")}
    assert scores[result.graph] == result.search_accuracy
    assert result.random_search_accuracy == max(line["search_accuracy"] for line in lines(folder / "random"))


def test_the_test_split_sees_each_trained_network_once_and_with_fresh_seeds(run: tuple[BogpResult, Path]) -> None:
    trained = [(line["graph"], line["seed"]) for line in lines(run[1] / "trained")]
    assert len(trained) == len(set(trained))
    assert {seed for _, seed in trained} == {1, 2}  # the search trained with 0


def test_saved_weights_are_those_of_the_pick(run: tuple[BogpResult, Path]) -> None:
    result, folder = run
    data = load_data("digits")
    model = make_network("mlp-16-16", data, 0)
    model.load_state_dict(torch.load(folder / "pruned.pt", weights_only=True))
    images, labels = data.test.tensors()
    with torch.no_grad():
        found = int((model(images).argmax(1) == labels).sum()) / len(labels)
    assert found == result.trained["bayesian"][0]
    assert int((model[3].weight != 0).sum()) == round(result.weights_ratio * 256)  # type: ignore[index]


def test_report_has_the_controls(run: tuple[BogpResult, Path]) -> None:
    result, folder = run
    text = (folder / "report.md").read_text()
    assert text == report(result)
    for said in ("dense", "bayesian", "random search", "3 random graphs", f"{100 * result.search_accuracy:.2f}"):
        assert said in text


def test_a_deviation_of_one_training_is_not_said_to_be_none_at_all(run: tuple[BogpResult, Path]) -> None:
    accuracies = np.array([[0.5, 0.7], [0.6, 0.6]])  # graphs, seeds
    assert module._deviation(accuracies.T) == pytest.approx(np.std([0.5, 0.7], ddof=1) / 2)
    assert module._deviation(accuracies[:, :1].T) is None
    single = replace(run[0], noise={"graphs": None, "seeds": 0.01})
    assert "1.00 points; between graphs: not measured" in report(single)
    text = bogp_mnist.table({"model": "mlp-16-16", "density": 0.5, "rows": [bogp_mnist._row(single)]})
    assert "| deviation between random graphs |  |  |  |  |" in text


def test_a_question_holds_what_its_record_can(tmp_path: Path) -> None:
    asked = replace(QUESTION, data=tmp_path, seed=np.int64(3), learning_rate=np.float32(0.5))  # type: ignore[arg-type]
    assert json.loads(json.dumps(asdict(asked))) == asdict(
        replace(QUESTION, data=str(tmp_path), seed=3, learning_rate=0.5)
    )
    for name, value in (("model", torch.nn.Linear(64, 10)), ("data", load_data("digits"))):
        with pytest.raises(ValueError, match=rf"^{name} must be a name.*GNNRL-Relational-v0"):
            replace(QUESTION, **{name: value})


@pytest.mark.parametrize("seed", [-1, 0.5, 2**32])
def test_a_seed_that_is_none_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed must be a whole number from 0"):
        replace(QUESTION, seed=seed)


def test_equal_seeds_equal_runs_also_after_a_kill(
    run: tuple[BogpResult, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings: list[int | None] = []
    real = module._train

    def killed(*arguments: Any) -> float:
        trainings.append(arguments[2])
        if len(trainings) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "_train", killed)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        bogp(QUESTION, folder, "cpu")
    with pytest.raises(FileExistsError):
        bogp(QUESTION, folder, "cpu")
    log = folder / "bayesian" / "evaluations.jsonl"
    log.write_bytes(log.read_bytes()[:-30])  # a line that was cut off
    again = bogp(QUESTION, folder, "cpu", resume=True)
    assert replace(again, seconds=0) == replace(run[0], seconds=0)
    done = len(lines(folder / "trained"))
    assert len(trainings) == done + 1  # what was done before the kill was not done again


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_fails_before_its_first_score_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    pytest.importorskip("botorch", reason='needs botorch: pip install -e ".[bayesian]"')

    def failing(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("gnnrl_gym.relational.training.Trainer.train", failing)
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
    with pytest.raises(RuntimeError, match="out of memory"):
        bogp(QUESTION, folder, "cpu")
    assert folder.exists() == there and not list(tmp_path.glob("run/*"))


def test_another_question_is_not_resumed(run: tuple[BogpResult, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run[1], folder)
    with pytest.raises(FileExistsError):
        bogp(QUESTION, folder, "cpu", resume=True)
    (folder / "result.json").unlink()
    with pytest.raises(ValueError, match=r"density=0\.5, not 0\.6"):
        bogp(replace(QUESTION, density=0.6), folder, "cpu", resume=True)
    asked = json.loads((folder / ASKED).read_text())
    asked["environment"]["data_digest"] = "of other labels"
    (folder / ASKED).write_text(json.dumps(asked))
    with pytest.raises(ValueError, match=r"other labels, size or normalisation of the images \(mlp-16-16 on digits"):
        bogp(QUESTION, folder, "cpu", resume=True)
    with pytest.raises(FileNotFoundError, match="no finished run"):
        BogpResult.load(folder)
    del asked["environment"]  # a run of before there were digests
    (folder / ASKED).write_text(json.dumps(asked))
    assert bogp(QUESTION, folder, "cpu", resume=True).trained == run[0].trained


def test_command(tmp_path: Path) -> None:
    pytest.importorskip("botorch", reason='needs botorch: pip install -e ".[bayesian]"')
    arguments = {"model": "mlp-16-16", "density": 0.5, "nodes": 8, "pool-size": 6, "evaluations": 4, "epochs": 1,
                 "final-epochs": 1, "final-seeds": 2, "controls": 2, "device": "cpu",
                 "out": tmp_path / "run"}  # fmt: skip
    options = [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
    shown = CliRunner().invoke(cli.app, ["bogp", *options])
    assert shown.exit_code == 0, shown.output
    assert "random search" in shown.output
    assert BogpResult.load(tmp_path / "run").settings["pool_size"] == 6
    again = CliRunner().invoke(cli.app, ["bogp", *options])
    assert isinstance(again.exception, FileExistsError) and "To go on" not in again.output


def test_command_goes_on_after_ctrl_c(
    run: tuple[BogpResult, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("COLUMNS", "300")
    folder = tmp_path / "run"
    shutil.copytree(run[1], folder)
    for file in ("result.json", "report.md"):
        (folder / file).unlink()
    with monkeypatch.context() as patched:
        patched.setattr(module, "_trained", killed)
        stopped = CliRunner().invoke(cli.app, ["bogp", "--resume", str(folder), "--device", "cpu"])
    assert stopped.exit_code == 130 and f"gnnrl bogp --resume {folder}" in stopped.output
    done = CliRunner().invoke(cli.app, ["bogp", "--resume", str(folder), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert replace(BogpResult.load(folder), seconds=0) == replace(run[0], seconds=0)


@pytest.mark.parametrize("damage", [b"\xff\xfe\xfa", b"[]", b"{}", b"{"])
def test_damaged_record_is_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "result.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"result\.json"):
        BogpResult.load(tmp_path)


def test_command_names_the_missing_extra_and_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bayesian_module, "find_spec", lambda name: None)
    shown = CliRunner().invoke(cli.app, ["bogp", "--out", str(tmp_path / "run")])
    assert isinstance(shown.exception, MissingExtra) and "gnnrl_gym[bayesian]" in str(shown.exception)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option, said", [
    (("--density", "2"), "density"), (("--evaluations", "0"), "evaluations"), (("--model", "mlp"), "no model is named"),
    (("--model", "mlp-0-5"), "0 units"), (("--nodes", "1"), "nodes must"), (("--seed", "-1"), "seed must"),
    (("--evaluations", "65"), "64 graphs"), (("--controls", "65"), "64 graphs"), (("--resume", "no/run"), "no/run"),
    (("--learning-rate", "nan"), "learning_rate"), (("--weight-decay", "-1"), "weight_decay"),
])  # fmt: skip
def test_mistakes_are_said_and_leave_no_folder(tmp_path: Path, option: tuple[str, str], said: str) -> None:
    pytest.importorskip("botorch", reason='needs botorch: pip install -e ".[bayesian]"')
    shown = CliRunner().invoke(cli.app, ["bogp", *option, "--out", str(tmp_path / "run")])
    assert isinstance(shown.exception, (ValueError, OSError)) and said in str(shown.exception)
    assert not (tmp_path / "run").exists()


def test_table_of_the_benchmark(run: tuple[BogpResult, Path]) -> None:
    row = bogp_mnist._row(run[0])
    text = bogp_mnist.table({"model": "mlp-16-16", "density": 0.5, "rows": [row | {"weights_ratio": 0.496}, row]})
    assert "| random graphs, 3 of each pool |  | at most 50 % |" in text and "| bayesian | 10 | 50.00 % |" in text
    assert "| random search | 10 | at most 50 % |" in text  # other graphs: their masks were not counted


def test_no_way_on_is_named_where_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("agents.bogp_cli.run_bogp", killed)  # while the pool is drawn
    stopped = CliRunner().invoke(cli.app, ["bogp", "--out", str(tmp_path / "run")])
    assert stopped.exit_code == 130 and "--resume" not in stopped.output
