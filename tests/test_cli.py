"""The command line, through its entry point: what it writes, what it says, and its exit codes."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch

from agents import search
from agents.cli import main
from agents.cli_common import new_folder
from agents.recorder import EvaluationsExhausted
from agents.searchers import SEARCHERS
from gnnrl_gym.evaluation.accuracy import accuracy
from gnnrl_gym.evaluation.finetuning import finetune
from gnnrl_gym.zoo import load_data, load_model

COMMANDS = ("search", "finetune", "evaluate")
BELOW_A_FILE = "/dev/null/run"


class Shell:
    """Runs `gnnrl` in this process."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.patch, self.capture = patch, capture

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Exit code, standard output, standard error; boxes and line breaks taken out."""
        self.patch.setattr(sys, "argv", ["gnnrl", *map(str, arguments)])
        self.patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = self.capture.readouterr()
        code = exit_.value.code
        return int(code or 0), _plain(out), _plain(err)


def _plain(text: str) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─┃━┏┓┗┛├┤┡┩└┘┌┐╇┴┬┼]", " ", text))


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


def small(out: Path, *more: object) -> tuple[object, ...]:
    options = ("--method", "random", "--evaluations", 3, "--search-images", 50, "--device", "cpu", "--out")
    return ("search", *options, out, *more)


@pytest.fixture
def run(shell: Shell, tmp_path: Path) -> Path:
    assert shell(*small(tmp_path / "run", "--finetune", 0))[0] == 0
    return tmp_path / "run"


def test_search_finetunes_and_reports(shell: Shell, tmp_path: Path) -> None:
    more = ("--budget", 0.4, "--metric", "params", "--finetune", 1, "--seed", 3, "--floor", 0.05)
    code, out, _ = shell(*small(tmp_path / "run", *more))
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert code == 0
    assert (record["method"], record["evaluations"], record["seed"], record["budget"]) == ("random", 3, 3, 0.4)
    assert record["params_ratio"] <= 0.4
    assert record["finetune_epochs"] == 1
    assert record["settings"]["floor"] == 0.05
    for said in (f"{record['test_accuracy']:.2%}", f"{record['finetuned_accuracy']:.2%}", str(tmp_path / "run")):
        assert said in out


def test_search_needs_no_argument_for_its_folder(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = shell(
        "search", "--method", "uniform", "--finetune", 0, "--evaluations", 1, "--search-images", 20, "--device", "cpu"
    )
    folders = list((tmp_path / "runs").iterdir())
    assert code == 0
    assert len(folders) == 1 and folders[0].name.startswith("digits-resnet-uniform-")
    assert folders[0].name in out


def test_runs_that_are_started_together_have_folders_of_their_own() -> None:
    assert len({new_folder("resnet20-random") for _ in range(3)}) == 3


def test_finetune(shell: Shell, run: Path) -> None:
    code, out, _ = shell("finetune", run, "--epochs", 1, "--device", "cpu")
    record = json.loads((run / "result.json").read_text())
    assert code == 0
    assert record["finetune_epochs"] == 1
    assert f"{record['finetuned_accuracy']:.2%}" in out


def test_evaluate(shell: Shell, run: Path) -> None:
    code, out, _ = shell("evaluate", run, "--batch", 2, "--device", "cpu")
    record = json.loads((run / "result.json").read_text())
    assert code == 0
    assert "latency, batch 2" in out
    assert f"accuracy {record['test_accuracy']!r}, in the record {record['test_accuracy']!r}" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help(shell: Shell, command: str) -> None:
    code, out, err = shell(command, "--help")
    assert (code, err) == (0, "")
    assert f"gnnrl {command}" in out
    assert "--device" in out


def test_help_lists_the_commands(shell: Shell) -> None:
    _, out, _ = shell("--help")
    assert all(command in out for command in COMMANDS)


def test_search_has_the_promised_options(shell: Shell) -> None:
    _, out, _ = shell("search", "--help")
    promised = "--model --weights --data --budget --metric --method --evaluations --seed --device --out"
    assert all(option in out for option in promised.split())


MISTAKES = {
    "unknown model lists near ones": (("search", "--model", "resnet21", "--data", "digits"), "resnet20"),
    "no data for another model": (("search", "--model", "resnet20"), "--data"),
    "data that isn't there": (("search", "--model", "resnet20", "--data", "/no/such.npz"), "/no/such.npz"),
    "data that doesn't fit": (("search", "--model", "resnet20", "--data", "digits"), "images of 'digits'"),
    "weights that aren't there": (("search", "--weights", "none.pt"), "none.pt"),
    "metric": (("search", "--metric", "flops"), "macs, params"),
    "budget": (("search", "--budget", "2"), "budget"),
    "a metric twice": (("search", "--budget", "macs=0.5", "--metric", "macs"), "name the metrics in --budget alone"),
    "weights that save no MACs": (("search", "--granularity", "2:4"), "not macs: .*--metric params"),
    "a pattern that saves no time": (
        ("search", "--granularity", "block4x1", "--budget", "params=0.5,latency=0.5"),
        "not latency: .*--metric params",
    ),
    "floor": (("search", "--floor", "1"), "floor"),
    "a budget that's no number": (("search", "--budget", "half"), "--budget"),
    "device": (("search", "--device", "tpu9"), "tpu9"),
    "unknown option": (("search", "--speed", "3"), "--speed"),
    "unknown command": (("prune",), "prune"),
    "no run to finetune": (("finetune", "no/such/run"), "no/such/run"),
    "no run to report": (("report", "no/such/run"), "No result.json in 'no/such/run'"),
    "no run to evaluate": (("evaluate", "no/such/run"), "no/such/run"),
    "no run to evaluate, in brackets": (("evaluate", "runs[/such]"), "runs[/such]"),
    "no run to evaluate, in other brackets": (("evaluate", "runs[best]"), "runs[best]"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_said_in_a_sentence(
    shell: Shell, mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, said = MISTAKES[mistake]
    code, _, err = shell(*arguments)
    assert code == 2
    assert said in err or re.search(said, err)
    assert "Traceback" not in err


BEFORE_THE_ENVIRONMENT = {
    "method": (("search", "--method", "guess"), "uniform, random"),
    "a searcher of pools": (("search", "--method", "bayesian"), "choose one of ppo"),
    "evaluations": (("search", "--evaluations", "0"), "evaluations"),
    "seed": (("search", "--seed", "-1"), "seed"),
    "epochs": (("search", "--finetune", "-1"), "finetune must"),
    "no policy": (("search", "--policy", "nothere.pt"), "No policy 'nothere.pt'"),
    "a policy that is none": (("search", "--policy", "file"), "'file' is no policy"),
    "a policy for random": (("search", "--method", "random", "--policy", "general"), "for the method 'ppo' alone"),
    "an occupied folder": (("search", "--out", "."), "not empty"),
    "a folder below a file": (("search", "--out", BELOW_A_FILE), "'/dev/null' is no folder"),
    "resume with a method": (("search", "--resume", "run", "--method", "ppo"), "--method can't stand beside"),
    "resume with a default": (("search", "--resume", "run", "--seed", "0"), "--seed can't"),
    "early with a seed": (("early", "--resume", "run", "--seed", "0"), "--seed can't"),
    "bogp with a density": (("bogp", "--resume", "run", "--density", "0.5"), "--density can't"),
    "networks that aren't there": (("train", "none.json"), "none.json"),
    "cut networks": (("train", "cut.json"), "'cut.json' is no JSON"),
    "networks that are none": (("train", "file"), "'file' is no JSON"),
    "one network": (("train", "dict.json"), "'dict.json' must hold a list"),
    "no networks": (("train", "empty.json"), "'empty.json' must hold a list"),
    "a misspelt argument": (("train", "typo.json"), "'typo.json': network 2 has an unknown 'modle'; near it: model"),
    "a policy that is there": (("train", "networks.json", "--out", "file"), "'file' is there already"),
    "a policy below a file": (("train", "networks.json", "--out", BELOW_A_FILE), "is no folder"),
    "no training": (("train", "networks.json", "--evaluations", "0"), "evaluations"),
}  # fmt: skip
FILES = {"file": "", "cut.json": '[{"model": "dig', "dict.json": "{}", "empty.json": "[]", "networks.json": "[{}]",
         "typo.json": '[{}, {"modle": "digits-resnet"}]'}  # fmt: skip


@pytest.mark.parametrize("mistake", BEFORE_THE_ENVIRONMENT)
def test_mistakes_are_said_before_any_work_and_leave_nothing(
    shell: Shell, mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("an environment was made")

    monkeypatch.setattr(gym, "make", work)
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    arguments, said = BEFORE_THE_ENVIRONMENT[mistake]
    code, _, err = shell(*arguments)
    assert code == 2 and said in err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == FILES


DEFAULTS = {
    "search": ("(0.5)", "(digits, for digits-resnet)", "(runs/MODEL-METHOD-TIME)", "[default: 0.1]"),
    "early": ("(0.5; dense: 0)", "(the model's)", "(runs/MODEL-early-METHOD-TIME)"),
    "bogp": ("(runs/bogp-MODEL-TIME)",),
    "finetune": ("(the newest in runs)",),
    "evaluate": ("(the newest in runs)",),
    "report": ("(the newest in runs)", "(report.html in the run folder; of several runs, here)"),
}


@pytest.mark.parametrize("command", DEFAULTS)
def test_help_shows_the_defaults(shell: Shell, command: str) -> None:
    _, out, _ = shell(command, "--help")
    for default in DEFAULTS[command]:
        assert (default if default.startswith("[") else f"[default: {default}]") in out


def test_help_lists_no_searcher_that_can_not_work(shell: Shell) -> None:
    assert "bayesian" not in shell("search", "--help")[1]


def test_mistaken_search_leaves_no_folder(shell: Shell, tmp_path: Path) -> None:
    shell("search", "--budget", 2, "--out", tmp_path / "run")
    shell("search", "--method", "guess", "--device", "cpu", "--out", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_occupied_folder_is_refused(shell: Shell, run: Path) -> None:
    before = (run / "result.json").read_text()
    code, _, err = shell(*small(run))
    assert code == 2 and "run" in err
    assert (run / "result.json").read_text() == before


@pytest.mark.parametrize("damage", [b"{", b"[]", b"{}", b"\xff\xfe\xfa"])
def test_damaged_run_is_refused(shell: Shell, run: Path, damage: bytes) -> None:
    (run / "result.json").write_bytes(damage)
    code, _, err = shell("evaluate", run)
    assert code == 2 and "result.json" in err


def test_damaged_log_is_named(shell: Shell, run: Path) -> None:
    (run / "result.json").unlink()
    log = run / "evaluations.jsonl"
    log.write_bytes(b"\xff\n" + log.read_bytes())
    code, _, err = shell("search", "--resume", run)
    assert code == 2 and "Line 1 of" in err and "evaluations.jsonl" in err


DAMAGED = {
    "nothing was asked": ("search.json", "{}", "'.*search.json' is damaged: it has no 'environment'"),
    "an environment of no kind": ("search.json", '{"environment": 3}', "its 'environment' is 3, not a dict"),
    "no model": ("search.json", '{"environment": {}, "method": "es", "evaluations": 3, "seed": 0}', "has no 'model'"),
    "a number for a line": ("evaluations.jsonl", "5\n", "Line 1 of '.*evaluations.jsonl' is damaged"),
    "a line without a plan": ("evaluations.jsonl", '{"search_accuracy": 0.5}\n', "Line 1 of .* is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_that_is_json_is_named(shell: Shell, run: Path, damage: str) -> None:
    name, text, said = DAMAGED[damage]
    (run / "result.json").unlink()
    (run / name).write_text(text)
    code, _, err = shell("search", "--resume", run)
    assert code == 2 and re.search(said, err)


@pytest.mark.parametrize("recipe", [None, {}, {"speed": 3}])
def test_a_damaged_recipe_is_named(shell: Shell, tmp_path: Path, recipe: Any) -> None:
    (tmp_path / "early.json").write_text(json.dumps({"environment": {"model": "digits-resnet"}, "recipe": recipe}))
    code, _, err = shell("early", "--resume", tmp_path)
    assert code == 2 and re.search("early.json' is damaged.* its 'recipe' is", err)


def test_a_record_without_settings_is_named(shell: Shell, run: Path) -> None:
    record = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(record | {"settings": None}))
    code, _, err = shell("evaluate", run)
    assert code == 2 and re.search("result.json' is damaged: its 'settings' is None, not a dict", err)


@pytest.mark.parametrize("command", ["evaluate", "finetune"])
def test_a_run_that_is_not_finished_says_how_it_goes_on(shell: Shell, tmp_path: Path, command: str) -> None:
    for name in ("search", "early"):
        out = tmp_path / f"a {name}"
        out.mkdir()
        (out / f"{name}.json").write_text("{}")
        code, _, err = shell(command, out)
        assert code == 2 and f"'{out}' is not finished: go on with gnnrl {name} --resume '{out}'" in err


@pytest.mark.parametrize("missing", ["data", "weights"])
@pytest.mark.parametrize("command", ["search", "early"])
def test_what_a_resumed_run_needs_is_said_to_be_elsewhere(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, missing: str
) -> None:
    asked = {"method": "random", "evaluations": 3, "seed": 0, "recipe": {"epochs": 1}}
    file = {"data": "mine.npz", "weights": "mine.pt"}[missing]
    environment = {"model": "digits-resnet", missing: file}
    if command == "early":
        environment |= {"objective": "pretrained"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"{command}.json").write_text(json.dumps(asked | {"environment": environment}))
    monkeypatch.chdir(tmp_path)
    code, _, err = shell(command, "--resume", "run")
    assert code == 2 and f"'{file}'" in err and "relative paths count from the folder in which it was begun" in err


def test_what_a_message_repeats_is_no_markup(shell: Shell, tmp_path: Path) -> None:
    code, out, _ = shell("search", "--model", "[red]x", "--data", "digits", "--out", tmp_path / "run")
    assert code == 2 and "No --weights: [red]x is pruned" in out


def test_run_without_its_network_is_refused(shell: Shell, run: Path) -> None:
    (run / "pruned.pt").unlink()
    code, _, err = shell("evaluate", run, "--device", "cpu")
    assert code == 2 and "pruned.pt" in err


def test_the_weights_of_a_run_are_said_to_be_elsewhere_or_others(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    torch.save(load_model("digits-resnet").state_dict(), "mine.pt")
    assert shell(*small(Path("run"), "--finetune", 0, "--weights", "mine.pt"))[0] == 0
    monkeypatch.chdir(tmp_path)
    code, _, err = shell("evaluate", "there/run", "--device", "cpu")
    assert code == 2 and "'mine.pt'. A run's relative paths count from the folder in which it was begun" in err
    torch.save({"other": torch.zeros(3)}, "mine.pt")
    code, _, err = shell("evaluate", "there/run", "--device", "cpu")
    assert code == 2 and "'mine.pt'" in err and "module of your own" not in err


def test_interrupted_fine_tuning_keeps_the_search(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.search_cli.finetune_run", interrupted)
    code, out, _ = shell(*small(tmp_path / "run", "--finetune", 1))
    assert code == 130 and "Fine-tuning stopped" in out  # so that a shell does not go on
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["search_accuracy"] > 0 and record["finetuned_accuracy"] is None


def test_interrupted_finetune_says_how_it_goes_on(shell: Shell, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.cli.finetune_run", interrupted)
    code, out, _ = shell("finetune", run)
    assert code == 130 and "same command goes on" in out


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("given", ["", "--images all --distill 0.5 --schedule one-cycle --learning-rate 0.01 --seed 3"])
def test_a_finished_search_says_how_its_killed_fine_tuning_goes_on(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    run = tmp_path / "a run"
    shell(*small(run, "--finetune", 0))
    with monkeypatch.context() as patched:
        patched.setattr(
            "agents.refine.finetune", lambda *own, **more: finetune(*own, **more | {"on_epoch": interrupted})
        )
        assert shell("finetune", run, "--epochs", 2, "--device", "cpu", *given.split())[0] == 130
    code, _, err = shell("search", "--resume", run)
    hint = re.search(r"is finished: .* whole epoch with gnnrl (finetune .+)", err)
    assert code == 2 and hint is not None
    code, _, err = shell(*shlex.split(hint[1]))
    assert code == 0 and re.findall(r"(\d)/2 epochs", err) == ["2"]
    (run / "finetuning-0.pt").touch()  # left of a fine-tuning that is over
    assert "choose another --out" in shell("search", "--resume", run)[2]
    (run / "finetuning-2.pt").touch()
    assert shell("search", "--resume", run)[2].endswith(f"whole epoch with gnnrl finetune '{run}' ")


def after_one(searcher: Callable[..., Any]) -> Callable[..., Any]:
    """The searcher, interrupted after its first evaluation."""

    def cut(recorder: Any, *more: Any) -> None:
        recorder.limit = 1
        with contextlib.suppress(EvaluationsExhausted):
            searcher(recorder, *more)
        raise KeyboardInterrupt

    return cut


def test_interrupted_search_goes_on_with_the_epochs_that_were_asked(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(SEARCHERS, "random", after_one(SEARCHERS["random"]))
        code, out, _ = shell(*small(tmp_path / "a run", "--finetune", 0))
    hint = re.search(r"gnnrl (search --resume .+ --finetune \d+)", out)
    assert code == 130 and hint is not None
    code, out, _ = shell(*shlex.split(hint[1]))  # as a shell does
    record = json.loads((tmp_path / "a run" / "result.json").read_text())
    assert code == 0 and record["evaluations"] == 3
    assert record["finetune_epochs"] is None and not record["interrupted"]


def test_a_search_that_is_interrupted_before_a_plan_within_the_budget_says_how_it_goes_on(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(recorder: Any, *_: Any) -> None:
        recorder.evaluate(recorder.unwrapped.network.widths)  # the dense network: above any budget
        raise KeyboardInterrupt

    monkeypatch.setitem(SEARCHERS, "random", cut)
    code, out, _ = shell(*small(tmp_path / "a run", "--finetune", 2))
    assert code == 130 and f"To go on: gnnrl search --resume '{tmp_path / 'a run'}' --finetune 2" in out
    monkeypatch.setitem(SEARCHERS, "random", interrupted)
    code, out, _ = shell(*small(tmp_path / "other"))
    assert code == 130 and "To go on" not in out and not (tmp_path / "other").exists()


def test_a_search_that_fails_says_where_it_is_and_how_it_goes_on(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["agents.search"], "save_slim", lambda *_: Path("/no/such/disk").touch())
        code, out, err = shell(*small(tmp_path / "run", "--finetune", 0))
    assert code == 2 and "/no/such/disk" in err and f"run folder: {tmp_path / 'run'}" in out
    hint = re.search(r"To go on: gnnrl (search --resume .+ --finetune 0)", out)
    assert hint is not None and "Interrupted" not in out
    assert shell(*shlex.split(hint[1]))[0] == 0


def test_a_run_that_is_not_finished_is_found(tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["agents.search"], "save_slim", interrupted)
    shell(*small(Path("runs") / "cut", "--finetune", 0))
    for command in ("evaluate", "finetune", "report"):
        code, _, err = shell(command)
        assert code == 2 and "No finished run in 'runs': go on with gnnrl search --resume runs/cut" in err


def test_search_first_says_how_good_the_dense_network_is(shell: Shell, tmp_path: Path) -> None:
    dense = accuracy(load_model("digits-resnet"), load_data("digits").search.take(50))
    _, out, _ = shell(*small(tmp_path / "run[best]", "--finetune", 0))
    assert 0 < out.find(f"dense network: search accuracy {dense:.2%}") < out.find("test accuracy")
    assert f"run folder: {tmp_path / 'run[best]'}" in out
    lines = (tmp_path / "run[best]" / "evaluations.jsonl").read_text().splitlines()
    assert len(lines) == json.loads((tmp_path / "run[best]" / "result.json").read_text())["evaluations"] == 3


def test_without_a_terminal_a_line_is_said_now_and_then(shell: Shell, tmp_path: Path) -> None:
    _, _, err = shell(*small(tmp_path / "run", "--evaluations", 25, "--finetune", 2))
    assert re.findall(r"(\d+)/25 evaluations, best search accuracy [\d.]+ %", err) == [
        "3", "5", "8", "10", "13", "15", "18", "20", "23", "25"
    ]  # fmt: skip
    assert re.findall(r"fine-tuning: (\d)/2 epochs, training loss", err) == ["1", "2"]


# ---- runs of other kinds ---------------------------------------------------------------------------------------


def test_runs_of_bogp_are_no_runs_to_evaluate(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, _ = shell(*small(tmp_path / "runs" / "found", "--finetune", 0))
    other = tmp_path / "runs" / "other"
    other.mkdir()
    (other / "bogp.json").write_text("{}")
    (other / "result.json").write_text('{"graph": 3}')
    code, out, _ = shell("evaluate", "--device", "cpu")
    assert code == 0 and "runs/found" in out
    code, _, err = shell("evaluate", other)
    assert code == 2 and "written by `gnnrl bogp`" in err


@pytest.mark.parametrize("own", ["model", "data"])
def test_runs_of_own_objects_say_how_they_are_evaluated(shell: Shell, tmp_path: Path, own: str) -> None:
    data = load_data("digits")
    object.__setattr__(data, "name", "mine")
    given: dict[str, Any] = {"model": load_model("digits-resnet")} if own == "model" else {"data": data}
    env = gym.make("GNNRL-Prune-v0", **given, search_images=20, device="cpu")
    search(env, "uniform", 1, out=tmp_path / "run")
    code, _, err = shell("evaluate", tmp_path / "run", "--device", "cpu")
    assert code == 2
    assert f"pass {own}=, agents.refine.evaluate_run(run, model=..., data=...)" in err
    (tmp_path / "run" / "result.json").unlink()
    code, _, err = shell("search", "--resume", tmp_path / "run")
    assert code == 2 and ("agents.search(env" in err if own == "model" else "'mine'" in err)
