"""The command line, through its entry point: what it writes, what it says, and its exit codes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from agents.cli import main

COMMANDS = ("search", "finetune", "evaluate")


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
    code, out, _ = shell(*small(tmp_path / "run", "--budget", 0.4, "--metric", "params", "--finetune", 1, "--seed", 3))
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert code == 0
    assert (record["method"], record["evaluations"], record["seed"], record["budget"]) == ("random", 3, 3, 0.4)
    assert record["params_ratio"] <= 0.4
    assert record["finetune_epochs"] == 1
    for said in (f"{record['test_accuracy']:.2%}", f"{record['finetuned_accuracy']:.2%}", str(tmp_path / "run")):
        assert said in out


def test_search_needs_no_argument_for_its_folder(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = shell(
        "search", "--method", "uniform", "--finetune", 0, "--evaluations", 1, "--search-images", 20, "--device", "cpu"
    )
    folders = list((tmp_path / "runs").iterdir())
    assert code == 0
    assert len(folders) == 1 and folders[0].name.startswith("digits-resnet-uniform-")
    assert folders[0].name in out


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
    "method": (("search", "--method", "guess"), "uniform, random"),
    "metric": (("search", "--metric", "flops"), "macs, params"),
    "budget": (("search", "--budget", "2"), "budget"),
    "a budget that's no number": (("search", "--budget", "half"), "--budget"),
    "evaluations": (("search", "--evaluations", "0"), "evaluations"),
    "device": (("search", "--device", "tpu9"), "tpu9"),
    "seed": (("search", "--seed", "-1", "--device", "cpu"), "seed"),
    "a folder below a file": (("search", "--method", "uniform", "--device", "cpu", "--out", "/dev/null/run"), "null"),
    "unknown option": (("search", "--speed", "3"), "--speed"),
    "unknown command": (("prune",), "prune"),
    "no run to finetune": (("finetune", "no/such/run"), "no/such/run"),
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
    assert said in err
    assert "Traceback" not in err


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


def test_run_without_its_network_is_refused(shell: Shell, run: Path) -> None:
    (run / "pruned.pt").unlink()
    code, _, err = shell("evaluate", run, "--device", "cpu")
    assert code == 2 and "pruned.pt" in err


def test_interrupted_fine_tuning_keeps_the_search(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("agents.cli.finetune_run", interrupted)
    code, out, _ = shell(*small(tmp_path / "run", "--finetune", 1))
    assert code == 0 and "Fine-tuning stopped" in out
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["search_accuracy"] > 0 and record["finetuned_accuracy"] is None
