"""What the tables of the benchmarks are made of: run folders, resumed and checked, and statistics."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from agents.provenance import DIGESTS
from agents.recorder import LOG, PlanRecorder
from agents.results import ASKED_OF, RESULT, SearchResult
from benchmarks import (
    bogp_mnist,
    coverage,
    early_pruning,
    finetuning,
    general_policy,
    off_policy,
    reward_report,
    search_comparison,
    search_speed,
    searches,
    torchvision_coverage,
    training_networks,
)
from benchmarks.cli import bench
from benchmarks.registry import RESULTS, Benchmark, Options, spread
from benchmarks.searches import searched
from benchmarks.tables import draw
from gnnrl_gym.graph.features import EDGE_FEATURES, NODE_FEATURES
from gnnrl_gym.zoo import DataSplits, load_data

FEW: dict[str, Any] = {"search_images": 50, "recalibration_images": 16, "device": "cpu"}


def random_search(folder: Path, evaluations: int = 12, **changes: Any) -> Any:
    return searched(folder, "random", evaluations, 0, {**FEW, **changes}, {})


def log_of(folder: Path) -> list[list[int]]:
    return [json.loads(line)["widths"] for line in (folder / LOG).read_text().splitlines()]


def test_an_interrupted_search_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_search(tmp_path / "whole")
    play = PlanRecorder.play

    def interrupted(self: PlanRecorder, *args: Any, **settings: Any) -> Any:
        if self.spent >= 5:
            raise KeyboardInterrupt
        return play(self, *args, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PlanRecorder, "play", interrupted)
        random_search(tmp_path / "cut")
    assert 0 < len(log_of(tmp_path / "cut")) < 12
    assert json.loads((tmp_path / "cut" / RESULT).read_text())["interrupted"]
    resumed = random_search(tmp_path / "cut")
    assert (resumed.evaluations, resumed.widths, resumed.interrupted) == (12, whole.widths, False)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")


@pytest.mark.parametrize("workers", [1, 2])
def test_after_ctrl_c_no_other_search_begins(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def interrupted(options: Options, method: str, seed: int, base: Path) -> None:
        begun.append(seed)
        if seed == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(search_comparison, "_search", interrupted)
    monkeypatch.setattr(searches, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    with pytest.raises(KeyboardInterrupt):
        search_comparison.run(Options(methods=("random",), seeds=20, workers=workers, runs=tmp_path))
    assert len(begun) <= 1 + workers


def test_a_finished_search_is_not_made_again_and_answers_nothing_else(tmp_path: Path) -> None:
    random_search(tmp_path / "run", evaluations=3)
    before = (tmp_path / "run" / RESULT).stat().st_mtime_ns
    random_search(tmp_path / "run", evaluations=3)
    assert (tmp_path / "run" / RESULT).stat().st_mtime_ns == before
    for changes, name in (({"evaluations": 4}, "evaluations"), ({"budget": 0.6}, "environment")):
        with pytest.raises(ValueError, match=f"{name}=.*--runs"):
            random_search(tmp_path / "run", **{"evaluations": 3, **changes})


@pytest.mark.parametrize("kept", ["random", "torch-pruning"])
def test_a_comparison_takes_no_row_of_other_weights(kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_comparison, "ENVIRONMENTS", {"random": FEW, "uniform": FEW, "torch-pruning": FEW})
    monkeypatch.setattr(search_comparison, "control", lambda env: {"method": "torch-pruning", "macs_ratio": 0.5})
    search_comparison._search(Options(evaluations=2), kept, 0, tmp_path / "digits-resnet-0.5-2")
    with pytest.raises(ValueError, match=rf"{kept}-0.*other\.pt.*--runs"):
        search_comparison.run(Options(evaluations=2, methods=("uniform",), weights="other.pt", runs=tmp_path))
    assert [path.name for path in (tmp_path / "digits-resnet-0.5-2").iterdir()] == [f"{kept}-0"]


@pytest.mark.parametrize(("benchmark", "kept"), [(search_comparison, "torch-pruning"), (off_policy, "uniform")])
def test_a_table_takes_no_row_of_weights_or_data_that_have_changed(
    benchmark: Any, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_comparison, "ENVIRONMENTS", {kept: FEW})
    monkeypatch.setattr(search_comparison, "control", lambda env: {"method": "torch-pruning", "macs_ratio": 0.5})
    begins = "off-policy-" if benchmark is off_policy else ""
    folder, options = tmp_path / f"{begins}digits-resnet-0.5-2" / f"{kept}-0", Options(evaluations=2, runs=tmp_path)
    search_comparison._search(options, kept, 0, folder.parent)
    asked = json.loads((folder / ASKED_OF["search"]).read_text())
    assert all(asked["environment"].pop(digest) for digest in DIGESTS)
    (folder / ASKED_OF["search"]).write_text(json.dumps(asked))
    search_comparison.check_kept(options, [folder])  # older folders have none
    asked["environment"] |= dict.fromkeys(DIGESTS, "another's")
    (folder / ASKED_OF["search"]).write_text(json.dumps(asked))
    with pytest.raises(ValueError, match=rf"{kept}-0.*other .* under the same name.*--runs"):
        benchmark.run(Options(evaluations=2, methods=("uniform",), runs=tmp_path))


def test_a_comparison_has_no_row_of_another_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_comparison, "ENVIRONMENTS", {"uniform": FEW, "ppo-params": FEW})
    for method in ("uniform", "ppo-params"):
        search_comparison._search(Options(evaluations=2), method, 0, tmp_path / "digits-resnet-0.5-2")
    record = search_comparison.run(Options(evaluations=2, methods=("uniform",), runs=tmp_path))
    assert [row["method"] for row in record["rows"]] == ["uniform"]
    result = SearchResult.load(tmp_path / "digits-resnet-0.5-2" / "ppo-params-0")
    assert result.macs_ratio <= 0.5 and result.params_ratio <= 0.5
    assert result.budget == {"macs": 0.5, "params": 0.5}


def test_finished_runs_of_other_data_are_no_rows(tmp_path: Path) -> None:
    job, early = early_pruning.DENSE, Options(data="a.npz", seeds=1, runs=tmp_path)
    environment = early_pruning._environment(early, early_pruning.MLP, job, 0)
    recipe = {"recipe": early_pruning.RECIPES[early_pruning.MLP].record(), "control": True}
    kept = {
        "early-mlp-300-100-400/0-dense-untrained-1-0": searches.asked_of("dense", 1, 0, environment, recipe),
        "bogp-mlp-128-128-0": asdict(bogp_mnist.question("mlp-128-128", "a.npz", 0)),
    }
    for (name, asked), command in zip(kept.items(), ("early", "bogp"), strict=True):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / RESULT).write_text("{}")
        (tmp_path / name / ASKED_OF[command]).write_text(json.dumps(asked))
    early_pruning._check_kept(early, early_pruning.MLP, job, 0, tmp_path / "early-mlp-300-100-400")
    for run in (early_pruning.run, bogp_mnist.run):
        with pytest.raises(ValueError, match=r"was run with .*a\.npz.*b\.npz.*--runs"):
            run(Options(data="b.npz", seeds=1, runs=tmp_path))


def test_a_plan_of_other_weights_is_not_taken(tmp_path: Path) -> None:
    env, path = gym.make("GNNRL-Prune-v0", **FEW).unwrapped, tmp_path / "plan-0.json"
    plan = env.network.widths  # type: ignore[attr-defined]
    known = {"settings": reward_report._settings(), "widths": plan.tolist()}
    path.write_text(json.dumps(known))
    assert reward_report._row(path, env, plan, 0) == known  # type: ignore[arg-type]
    path.write_text(json.dumps(known | {"weights_digest": "another's"}))
    with pytest.raises(ValueError, match=r"other settings.*--runs"):
        reward_report._row(path, env, plan, 0)  # type: ignore[arg-type]


def test_the_reward_report_measures_only_the_plans_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"PLANS": 3, "IMAGES": 100, "TRAINING_IMAGES": 128}
    for name, value in small.items():
        monkeypatch.setattr(reward_report, name, value)
    made: list[str] = []

    def one_after_the_other(work: Any, jobs: Any, workers: int, unit: str) -> None:
        for job in jobs:
            work(*job)
            made.append(job[0].name)

    monkeypatch.setattr(reward_report, "side_by_side", one_after_the_other)
    whole = reward_report.run(Options(runs=tmp_path))
    assert made == ["plan-0.json", "plan-1.json", "plan-2.json"]
    (tmp_path / "reward-report-digits-resnet-0.5-0" / "plan-1.json").unlink()
    again = reward_report.run(Options(runs=tmp_path))
    assert made[3:] == ["plan-1.json"]
    rows = [[{**row, "seconds": 0} for row in record["rows"]] for record in (whole, again)]
    assert rows[0] == rows[1] and len({tuple(row["widths"]) for row in rows[0]}) == 3


def test_networks_measured_with_another_seed_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "isolated", lambda measure, name, seed: f"seed {seed}")
    options = [Options(seed=seed, model="alexnet", runs=tmp_path) for seed in (0, 1, 0)]
    rows = [torchvision_coverage.run(each)["rows"][0]["error"] for each in options]
    assert rows == ["seed 0", "seed 1", "seed 0"]


def test_search_comparison_shows_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_comparison, "ENVIRONMENTS", {"random": FEW, "uniform": FEW})
    options = Options(evaluations=4, seeds=2, methods=("uniform", "random"), runs=tmp_path)
    for method, seed in (("uniform", 0), ("random", 0), ("random", 1)):
        search_comparison._search(options, method, seed, tmp_path)
    rows = [search_comparison._row(tmp_path / name) for name in ("uniform-0", "random-0", "random-1")]
    assert [len(row["best_so_far"]) for row in rows] == [1, 4, 4]
    for row in rows[1:]:
        assert row["best_so_far"] == sorted(row["best_so_far"]) and row["macs_ratio"] <= 0.5
        assert row["best_so_far"][-1] == round(row["search_accuracy"], 6)
    record = {"evaluations": 4, "rows": rows}
    assert "| random (2 seeds) | 4 |" in search_comparison.table(record)


def test_a_record_names_the_machine_and_versions_of_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_comparison, "ENVIRONMENTS", {"random": FEW})
    options = Options(evaluations=2, seeds=2, methods=("random",), runs=tmp_path / "runs")
    for seed, version in ((0, "2.0"), (1, "2.1")):
        folder = tmp_path / "runs" / "digits-resnet-0.5-2" / f"random-{seed}"
        search_comparison._search(options, "random", seed, folder.parent)
        record = json.loads((folder / RESULT).read_text())
        (folder / RESULT).write_text(json.dumps(record | {"versions": {"torch": version}, "machine": "another"}))
    monkeypatch.setattr(search_comparison, "side_by_side", lambda *arguments: None)
    written = json.loads(search_comparison.BENCHMARK.measure(options, tmp_path).read_text())
    assert (written["machine"], written["versions"]) == ("another", {"torch": "2.0 and 2.1"})


def test_tables_without_pages_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No README\.md or docs here: run --tables in the repository"):
        bench(tables=True, methods="", out=Path("out"), runs=Path("runs"))


def test_tables_are_made_of_the_records_in_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("<!-- table: bogp-retrieval -->\nold\n<!-- end of table -->\n")
    record = json.loads((RESULTS / "bogp-retrieval.json").read_text())
    Path("out").mkdir()
    Path("out/bogp-retrieval.json").write_text(json.dumps(record | {"by_name": 0.123}))
    bench(out=Path("out"), tables=True, methods="", runs=Path("runs"))
    assert "in any order | 12.3 %" in Path("README.md").read_text() and not Path("docs").exists()
    for damage in ("{", "[]", "{}"):
        Path("out/other.json").write_text(damage)
        with pytest.raises(ValueError, match=r"other\.json"):
            draw(tmp_path, Path("out"))


def test_what_was_not_installed_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["not installed", "ok", "never asked"])
    monkeypatch.setattr(coverage, "isolated", lambda measure, name, seed: next(answers))
    found = [coverage.kept(tmp_path / "a.json", torchvision_coverage._torch_pruning, "alexnet", 0) for _ in range(3)]
    assert found == ["not installed", "ok", "ok"]


def test_a_comparison_of_the_outside_control_alone_is_a_table() -> None:
    row = {"method": "torch-pruning", "evaluations": 1, "macs_ratio": 0.5, "test_accuracy": 0.6, "best_so_far": [0.7]}
    text = search_comparison.table({"evaluations": 50, "rows": [row]})
    assert "| dense |  | 100 % |  |  |" in text and "| torch-pruning | 1 | 50.00% | 70.0 | 60.0 |" in text


def test_plans_over_the_budget_are_no_best_plan(tmp_path: Path) -> None:
    result = random_search(tmp_path / "random-0", evaluations=3)
    lines = [json.loads(line) for line in (tmp_path / "random-0" / LOG).read_text().splitlines()]
    lines[0] |= {"search_accuracy": 1.0, "is_success": False, "widths": lines[1]["widths"]}
    (tmp_path / "random-0" / LOG).write_text("\n".join(map(json.dumps, lines)))
    row = search_comparison._row(tmp_path / "random-0")
    best = row["best_so_far"]
    assert best[0] == 0 and max(best) == max(line["search_accuracy"] for line in lines[1:])
    assert row["plans"] == len({tuple(line["widths"]) for line in lines[1:]})
    assert result.evaluations == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seeds": 0}, "seeds"),
        ({"workers": 0}, "workers"),
        ({"seed": -1}, "seed"),
        ({"images": "some"}, "images"),
        ({"distill": 2.0}, "distill"),
        ({"distill": -0.1}, "distill"),
    ],
)
def test_options_out_of_range_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Options(**change)


@pytest.mark.parametrize("benchmark", [search_comparison, finetuning, off_policy])
def test_a_searcher_that_a_table_leaves_out_is_refused(benchmark: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown method 'grasp': choose one of uniform"):
        benchmark.run(Options(methods=("uniform", "grasp"), runs=tmp_path))
    assert not list(tmp_path.iterdir())


def test_nothing_is_measured_that_could_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    never = Benchmark("never", "", lambda options: pytest.fail("it was measured"), lambda record: "")
    with pytest.raises(NotADirectoryError, match="--out"):
        never.measure(Options(), tmp_path / "file")


def test_no_plan_is_fine_tuned_before_all_searches_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetuning, "_finetune", lambda *job: pytest.fail("it was fine-tuned"))
    for name, record in (("uniform-0", {}), ("ppo-0", {"interrupted": True})):
        (tmp_path / "digits-resnet-0.5-400" / name).mkdir(parents=True)
        (tmp_path / "digits-resnet-0.5-400" / name / RESULT).write_text(json.dumps(record))
    with pytest.raises(FileNotFoundError, match=r"No finished search in .*ppo-0"):
        finetuning.run(Options(methods=("uniform", "ppo"), seeds=1, runs=tmp_path))


def test_ctrl_c_before_the_first_run_leaves_no_record_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(early_pruning, "_run", interrupted)
    monkeypatch.setattr(early_pruning.torch, "set_num_threads", lambda count: None)  # it is for the whole process
    with pytest.raises(KeyboardInterrupt):
        early_pruning.BENCHMARK.measure(Options(runs=tmp_path / "runs"), tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_pruning_before_training_runs_what_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[str] = []
    monkeypatch.setattr(early_pruning, "_run", lambda options, model, job, seed, base: run.append(job.name))
    monkeypatch.setattr(early_pruning.torch, "set_num_threads", lambda count: None)  # it is for the whole process
    record = early_pruning.run(Options(methods=("snip",), seeds=1, runs=tmp_path))
    assert run == ["0-dense-untrained-1", "0.9-snip-untrained-1"]
    assert len(record["missing"]) == len(early_pruning.JOBS[early_pruning.MLP])
    with pytest.raises(ValueError, match=r"method.*'es'"):
        early_pruning.run(Options(methods=("es",), seeds=1, runs=tmp_path))


@pytest.mark.parametrize("benchmark", [search_comparison, finetuning, off_policy, early_pruning])
def test_a_record_of_longer_searches_replaces_none(benchmark: Any) -> None:
    assert len({benchmark.BENCHMARK.variant(Options(evaluations=count)) for count in (200, 400, 1000)}) == 3


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.2, 0.5, 0.9], [3.0, 1.0, 2.0, 2.0, 2.0]])
def test_rank_correlation_is_scipys(values: list[float]) -> None:
    after = np.array([0.3, 0.1, 0.4, 0.4, 0.8])
    scores = np.stack([values, values[::-1], [1.0] * 5], axis=1)
    expected = [spearmanr(scores[:, column], after).statistic for column in (0, 1)]
    np.testing.assert_allclose(reward_report._spearman(scores, after), [*expected, 0.0], atol=1e-12)


def test_spread_is_of_the_sample() -> None:
    assert spread([0.5, 0.7], 1, percent=True) == "60.0 ± 14.1"
    assert spread([0.5], 2) == "0.50" and spread([None], 2) == ""


def test_a_mean_says_how_many_it_is_of() -> None:
    assert spread([0.5, None], 2) == "0.50 (1 of 2)"
    run = {"method": "random", "evaluations": 50, "macs_ratio": 0.5, "test_accuracy": 0.6, "dense_test_accuracy": 0.9}
    rows = [run | {"best_so_far": [best]} for best in (0.5, 0.7, 0.0)]  # one had no plan within the budget
    assert "| 60.0 ± 14.1 (2 of 3) |" in search_comparison.table({"evaluations": 50, "rows": rows})


@pytest.mark.parametrize("benchmark", [search_comparison, off_policy, reward_report])
def test_a_record_on_other_data_replaces_none(benchmark: Any) -> None:
    named = [benchmark.BENCHMARK.variant(Options(data=data)) for data in (None, "x/cifar10.npz", "x/mine.npz")]
    assert named == ["digits-resnet-0.5", "digits-resnet-0.5", "digits-resnet-0.5-mine"]


def test_a_record_of_the_speed_of_another_network_or_data_replaces_none() -> None:
    asked = [("resnet20", "x/cifar10.npz"), ("resnet56", "x/cifar10.npz"), (None, "mine.npz"), ("resnet56", "mine.npz")]
    named = [search_speed.BENCHMARK.variant(Options(model=model, data=data)) for model, data in asked]
    assert named == ["", "resnet56", "mine", "resnet56-mine"]


def test_finetuning_of_several_lengths_stands_side_by_side(tmp_path: Path) -> None:
    names = ["net-0.5-400-finetuned-1-0.5-all", "net-0.5-400-finetuned-30-0.5-all"]
    for name in [*names, "net-0.5-400-finetuned-30-0.5", "net-0.5-400-finetuned-30-0-all", "net-0.5-400"]:
        (tmp_path / name / "ppo-0").mkdir(parents=True)
        (tmp_path / name / "ppo-0" / RESULT).touch()
    found = finetuning._folders(tmp_path / "net-0.5-400", Options(distill=0.5, images="all"))
    assert [folder.parent.name for folder in found] == names


def test_a_table_of_finetuning_has_a_column_for_every_length() -> None:
    def row(method: str, seed: int, epochs: int, before: float, after: float) -> dict[str, Any]:
        widths = [seed if method == "ppo" else 7]  # equal shares have one plan, whatever the seed
        shares = dict.fromkeys(finetuning.SHARES, 0.5)
        known = {"method": method, "seed": seed, "epochs": epochs, "dense_test_accuracy": 0.9, "widths": widths}
        return known | shares | {"test_accuracy": before, "finetuned_accuracy": after, "train_accuracy": after + 0.1}

    rows = [row("uniform", 0, 1, 0.4, 0.6), row("uniform", 1, 1, 0.4, 0.62), row("uniform", 0, 30, 0.4, 0.8)]
    rows += [row("ppo", seed, epochs, 0.5 + seed / 10, 0.7) for seed in (0, 1) for epochs in (1, 30)]
    text = finetuning.table({"rows": rows}).splitlines()
    assert text[0].endswith("| after 1 epoch | after 30 epochs | training images after 30 epochs |")
    assert text[3] == "| uniform | 1 to 2 | 50.0% | 50.0% | 50.0% | 40.00 | 61.00 ± 1.41 | 80.00 | 90.00 |"
    assert text[4] == "| ppo | 2 | 50.0% | 50.0% | 50.0% | 55.00 ± 7.07 | 70.00 ± 0.00 | 70.00 ± 0.00 | 80.00 ± 0.00 |"


def test_a_copy_that_was_cut_off_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = tmp_path / "searches", tmp_path / "tuned"
    random_search(base / "random-0", evaluations=2)
    (tuned / ".random-0").mkdir(parents=True)
    (tuned / ".random-0" / RESULT).write_text("{")
    asked: list[Any] = []
    monkeypatch.setattr(finetuning, "finetune_run", lambda folder, *_, **settings: asked.append((folder, settings)))
    finetuning._finetune(base / "random-0", tuned / "random-0", Options(images="all", distill=0.5), "random", 0)
    assert asked == [(tuned / "random-0", {"distill": 0.5, "images": "all"})]
    assert sorted(p.name for p in tuned.iterdir()) == ["random-0"]
    copied, original = ({path.name for path in (place / "random-0").iterdir()} for place in (tuned, base))
    assert copied == original - {"tensorboard"} | {finetuning.WHERE}


@pytest.mark.parametrize("change", [{"weights": "other.pt"}, {"data": "other.npz"}])
@pytest.mark.parametrize("tuned", [False, True])
def test_no_plan_of_other_weights_or_data_is_fine_tuned(
    tuned: bool, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_comparison, "ENVIRONMENTS", {"uniform": FEW})
    monkeypatch.setattr(finetuning, "side_by_side", lambda *work: pytest.fail("it was fine-tuned"))
    base = tmp_path / "digits-resnet-0.5-2"
    search_comparison._search(Options(evaluations=2), "uniform", 0, base)
    if tuned:  # before the search was made again with others
        (tmp_path / "digits-resnet-0.5-2-finetuned-1-0").mkdir()
        base.joinpath("uniform-0").rename(tmp_path / "digits-resnet-0.5-2-finetuned-1-0" / "uniform-0")
        (base / "uniform-0").mkdir()
        (base / "uniform-0" / RESULT).write_text("{}")
    with pytest.raises(ValueError, match=r"uniform-0.*other\..*--runs"):
        finetuning.run(Options(evaluations=2, seeds=1, methods=("uniform",), runs=tmp_path, **change))


def test_a_record_of_finetuning_names_the_machines_of_its_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tuned(folder: Path, *_: Any, **settings: Any) -> None:
        result = SearchResult.load(folder)
        result.finetuned_accuracy = 0.5
        result.save(folder)

    def record_on(machine: str, seeds: int) -> dict[str, Any]:
        monkeypatch.setattr(finetuning, "machine", lambda: machine)
        return finetuning.run(Options(evaluations=2, seeds=seeds, methods=("uniform",), runs=tmp_path))

    monkeypatch.setattr(search_comparison, "ENVIRONMENTS", {"uniform": FEW})
    monkeypatch.setattr(finetuning, "side_by_side", lambda work, jobs, *_: [work(*job) for job in jobs])
    monkeypatch.setattr(finetuning, "finetune_run", tuned)
    monkeypatch.setattr(finetuning, "_row", lambda folder: {"seed": folder.name})
    search_comparison._search(Options(evaluations=2), "uniform", 0, tmp_path / "digits-resnet-0.5-2")
    assert record_on("one", seeds=1)["machine"] == "one"
    record = record_on("another", seeds=2)
    assert record["machine"] == "another and one" and len(record["rows"]) == 2
    old = next(tmp_path.glob(f"*/uniform-0/{finetuning.WHERE}"))
    old.unlink()
    assert finetuning._where(old.parent).machine == finetuning._where(old.parent).versions["torch"] == "unknown"


def test_a_training_network_of_something_else_is_trained_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits, trainings = load_data("digits"), list[Any]()

    def finetune(model: Any, *_: Any, **settings: Any) -> None:
        trainings.append(settings)
        torch.nn.init.constant_(model.linear.bias, len(trainings))

    def bias(data: DataSplits = digits, epochs: int = 1, images: int = 10, seed: int = 0) -> float:
        model: Any = training_networks.trained("resnet8", data, tmp_path, epochs, images, seed)
        return model.linear.bias[0].item()

    other = DataSplits(**{**vars(digits), "search": digits.test})
    monkeypatch.setattr(training_networks, "finetune", finetune)
    for _ in range(2):
        assert [bias(), bias(other), bias(epochs=2), bias(images=9), bias(seed=1)] == [1, 2, 3, 4, 5]


def test_a_policy_of_something_else_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, about: dict[str, Any]) -> None:
        facts = {"features": [*NODE_FEATURES, *EDGE_FEATURES], **about}
        torch.save({"state": {}, "about": json.dumps(facts)}, path)

    def train(env: Any, path: Path, evaluations: int, seed: int, about: dict[str, Any]) -> None:
        write(path, about)

    path, options = tmp_path / "general-policy" / "general-0.pt", Options(data="digits", weights=".", runs=tmp_path)
    for name, value in {"_training": lambda *_: None, "_row": lambda *_: {}, "train_to_file": train}.items():
        monkeypatch.setattr(general_policy, name, value)
    first = general_policy.run(options)
    assert general_policy.run(options) == first
    for changed, value in (("IMAGES", 5), ("EPOCHS", 5), ("NETWORKS", {}), ("digest_of_data", lambda data: "other's")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"general-0\.pt.*--runs"):
            patch.setattr(general_policy, changed, value)
            general_policy.run(options)
    write(path, {"evaluations": options.evaluations})  # older files say no more
    assert general_policy.run(options) == first
