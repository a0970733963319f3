"""`gnnrl report`: what its pages say, that they stand alone, and that nothing else is touched."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from torch import nn
from typer.testing import CliRunner

from agents import cli, finetune_run, search
from agents.early import early
from agents.report import write_report
from agents.report_figures import MOST_DOTS, draw_search
from agents.results import RESULT, SearchResult
from agents.searchers import SEARCHERS
from gnnrl_gym.evaluation.training import Recipe
from gnnrl_gym.zoo import load_model

Env = gym.Env[Any, Any]
NASTY = "<script>alert(1)</script>&\"'$x_$"
VOID = ("meta", "br", "hr", "img", "link", "input")


class Page(HTMLParser):
    """A page as it is read: its tables, its text, what it refers to. Elements must be closed in their order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source, self.open = path.read_text(), []
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.references += [values[name] for name in ("href", "xlink:href", "src") if name in values]
        self.references += re.findall(r"url\((.*?)\)", " ".join(value or "" for value in values.values()))
        if tag == "table":
            self.rows = self.tables.setdefault(values["class"], [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += "" if "style" in self.open else data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, table: str, head: str) -> list[str]:
        return next(row for row in self.tables[table] if row[0] == head)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a fine-tuned run, one that was not, one of `early`, and one that is not finished."""
    base = tmp_path_factory.mktemp("runs")
    small: dict[str, Any] = {"search_images": 50, "device": "cpu"}
    env = gym.make("GNNRL-Prune-v0", **small)
    search(env, "random", 6, out=base / "tuned")
    finetune_run(base / "tuned", 1, device="cpu")
    search(env, "uniform", 1, out=base / "plain")
    early(gym.make("GNNRL-Mask-v0", **small), "random", 2, out=base / "early", recipe=Recipe(epochs=1))
    shutil.copytree(base / "tuned", base / "cut")
    (base / "cut" / RESULT).unlink()
    with (base / "cut" / "evaluations.jsonl").open("a") as file:
        file.write('{"evaluation": 7, "search_accu')  # as of a search that is running, or was killed
    return base


def written(*runs: Path, out: Path) -> Page:
    return Page(write_report(list(runs), out))


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def test_a_page_says_what_the_record_says(runs: Path, tmp_path: Path) -> None:
    page, result = written(runs / "tuned", out=tmp_path / "page.html"), SearchResult.load(runs / "tuned")
    assert page.row("costs", "MACs")[1:3] == ["100.00 %", percent(result.macs_ratio)]
    assert page.row("costs", "search accuracy")[2] == percent(result.search_accuracy)
    dense, pruned = percent(result.dense_test_accuracy), percent(result.test_accuracy)
    assert page.row("costs", "test accuracy, not fine-tuned")[1:3] == [dense, pruned]
    tuned = page.row("costs", "test accuracy, fine-tuned")
    assert tuned[2] == percent(result.finetuned_accuracy or 0) and "1 epoch of" in tuned[3]
    asked = {row[0]: row[1] for row in page.tables["asked"]}
    assert (asked["model"], asked["data"], asked["method"], asked["evaluations"]) == (
        "digits-resnet", "digits", "random", "6"
    )  # fmt: skip
    assert "0.5 of macs" in asked["budget"] and "search_images 50" in asked["settings"]
    network = result.network()
    rows = zip(network.group_names, result.widths, network.widths.tolist(), strict=True)
    expected = [[str(n), name, str(k), str(f), percent(k / f)] for n, (name, k, f) in enumerate(rows)]
    assert page.tables["groups"][1:] == expected


def test_a_page_stands_alone(runs: Path, tmp_path: Path) -> None:
    folders = [runs / name for name in ("tuned", "early", "cut", "tuned")]
    page = written(*folders, out=tmp_path / "page.html")
    assert not page.tags & {"script", "link", "img", "iframe", "object"} and "@import" not in page.source
    assert page.references and all(reference.startswith("#") for reference in page.references)
    assert len(page.ids) == len(set(page.ids)) and {each[1:] for each in page.references} <= set(page.ids)
    assert page.source == written(*folders, out=tmp_path / "again.html").source


def test_no_weights_and_no_data_are_loaded(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded")

    for name in ("load_data", "load_model", "read_slim", "make_network"):
        monkeypatch.setattr(f"agents.results.{name}", work)
    written(*(runs / name for name in ("tuned", "plain", "early", "cut")), out=tmp_path / "page.html")


def test_several_runs_are_compared_as_given(runs: Path, tmp_path: Path) -> None:
    page = written(*(runs / name for name in ("plain", "early", "tuned", "cut")), out=tmp_path / "page.html")
    heads, *rows = page.tables["runs"]
    found = [dict(zip(heads, row, strict=True)) for row in rows]
    assert [row["run"] for row in found] == ["1", "2", "3", "4"]
    assert [row["method"] for row in found] == ["uniform", "random", "random", "random"]
    assert [row["budget"] for row in found] == ["0.5 of macs", "0.5 of units", "0.5 of macs", "0.5 of macs"]
    assert [bool(row["test, fine-tuned"]) for row in found] == [False, False, True, False]
    assert [bool(row["test, trained"]) for row in found] == [False, True, False, False]
    assert [row["state"] for row in found] == ["", "", "", "not finished"]
    assert all(f"run {number}" in re.findall(r"<text.*?>(.*?)</text>", page.source) for number in range(1, 5))


def test_an_unfinished_run_shows_what_is_there_and_is_left_as_it_is(runs: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (runs / "cut").rglob("*") if path.is_file()}
    page = written(runs / "cut", out=tmp_path / "page.html")
    assert {path: path.read_bytes() for path in (runs / "cut").rglob("*") if path.is_file()} == before
    lines = [json.loads(line) for line in (runs / "cut" / "evaluations.jsonl").read_text().splitlines()[:-1]]
    best = max(lines, key=lambda line: line["search_accuracy"])
    assert "Not finished: 6 evaluations so far" in page.text
    assert f"If it is not running still, go on with gnnrl search --resume {runs}" in page.text
    assert page.row("costs", "search accuracy")[2] == percent(best["search_accuracy"])
    assert [row[1] for row in page.tables["groups"][1:]] == list(map(str, best["widths"]))


def test_a_run_without_evaluations_says_so(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "cut", tmp_path / "run")
    (tmp_path / "run" / "evaluations.jsonl").unlink()
    page = Page(write_report(tmp_path / "run"))
    assert "No evaluation yet" in page.text and "No plan within the budget yet" in page.text


def test_an_unfinished_run_of_early_and_a_begun_fine_tuning_are_said(runs: Path, tmp_path: Path) -> None:
    for name in ("early", "tuned"):
        shutil.copytree(runs / name, tmp_path / name)
    (tmp_path / "early" / RESULT).unlink()
    (tmp_path / "tuned" / "finetuning-1.pt").touch()
    page = written(tmp_path / "early", tmp_path / "tuned", out=tmp_path / "page.html")
    assert f"go on with gnnrl early --resume {tmp_path / 'early'}" in page.text
    assert "A fine-tuning was begun that is not finished" in page.text
    heads, first, second = page.tables["runs"]
    assert first[heads.index("budget")] == "0.5 of units" and first[heads.index("state")] == "not finished"
    assert second[heads.index("state")] == ""


def test_an_interrupted_run_says_how_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(recorder: Any, *_: Any) -> None:
        recorder.play([[0.9] * len(recorder.unwrapped.widths)])
        raise KeyboardInterrupt

    monkeypatch.setitem(SEARCHERS, "random", cut)
    env = gym.make("GNNRL-Prune-v0", search_images=50, device="cpu")
    search(env, "random", 5, out=tmp_path / "a run")
    text = Page(write_report(tmp_path / "a run")).text
    assert "Interrupted after 1 of 5 evaluations" in text and "To make it again" not in text
    assert f"gnnrl search --resume '{tmp_path / 'a run'}'" in text


def test_everything_from_files_is_escaped(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / NASTY.replace("/", "")
    shutil.copytree(runs / "tuned", folder)
    record = json.loads((folder / RESULT).read_text())
    for key in ("model", "data", "weights", "method", "machine", "metric"):
        record[key] = NASTY
    record["versions"] = {NASTY: NASTY}
    record["settings"] = {NASTY: NASTY, "finetuning": [{NASTY: NASTY}]}
    record["group_names"] = [NASTY] * len(record["widths"])
    (folder / RESULT).write_text(json.dumps(record))
    asked = json.loads((folder / "search.json").read_text())
    (folder / "search.json").write_text(json.dumps(asked | {"environment": asked["environment"] | {NASTY: NASTY}}))
    for folders in ([folder], [folder, folder]):
        page = written(*folders, out=tmp_path / f"{len(folders)}.html")
        assert "script" not in page.tags and page.text.count(NASTY) > 10 * len(folders)
        assert NASTY not in page.source


def test_an_old_record_shows_the_groups_of_the_named_network_whatever_its_weights(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "tuned", tmp_path / "run")
    (tmp_path / "run" / "pruned.pt").unlink()
    record = json.loads((tmp_path / "run" / RESULT).read_text())
    (tmp_path / "run" / RESULT).write_text(json.dumps(record | {"dense_widths": None, "weights": "gone.pt"}))
    page = Page(write_report(tmp_path / "run"))
    assert page.tables["groups"] == written(runs / "tuned", out=tmp_path / "page.html").tables["groups"]
    (tmp_path / "run" / RESULT).write_text(json.dumps(record | {"dense_widths": None, "model": "Mine"}))
    page = Page(write_report(tmp_path / "run"))
    assert [row[1] for row in page.tables["groups"]] == ["kept", *map(str, record["widths"])]
    assert "not in this older record: Mine is a module of your own." in page.text


def test_a_module_of_ones_own_has_widths_but_no_command(tmp_path: Path) -> None:
    model: nn.Module = load_model("digits-resnet")
    env = gym.make("GNNRL-Prune-v0", model=model, search_images=50, device="cpu")
    search(env, "uniform", 1, out=tmp_path / "run")
    page = Page(write_report(tmp_path / "run"))
    assert page.row("groups", "0")[1] == "conv1" and page.row("groups", "0")[3] == "8"
    assert "No command line makes it again: its network, CifarResNet, is a module of your own." in page.text
    assert page.row("asked", "weights")[1] == "those of the module that was given"


COMMANDS = {
    "search": "search --method es --evaluations 3 --search-images 50 --finetune 1 --budget macs=0.5,params=0.6 "
    "--floor 0.2 --importance bn-scale --round-to 2 --seed 5 --device cpu",
    "early": "early --method random --evaluations 2 --search-images 50 --epochs 1 --sparsity 0.3 --no-control --seed 2",
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_commands_of_a_page_make_the_same_run_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("a run")
    command(f"{COMMANDS[kind]} --out 'a run'")
    if kind == "search":
        command("finetune 'a run' --epochs 1 --learning-rate 0.01 --distill 0.5 --images all --schedule one-cycle")
    page = Page(write_report(run))
    lines = re.findall(r"^gnnrl .*$", page.text, re.MULTILINE)
    assert len(lines) == (3 if kind == "search" else 1)
    places = [place for line in lines[1:] for place in re.findall("--device ([a-z]*)", line)]
    assert places == (["cpu", "auto"] if kind == "search" else [])
    run.rename("before")
    for line in lines:
        command(line.removeprefix("gnnrl "))
    first, again = (json.loads((folder / RESULT).read_text()) for folder in (Path("before"), run))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert (run / f"{kind}.json").read_bytes() == Path("before", f"{kind}.json").read_bytes()


def command(line: str) -> str:
    found = CliRunner().invoke(cli.app, shlex.split(line))
    assert found.exit_code == 0, found.output
    return found.output


# of what was asked, of its environment, and of the record's settings: what is another
NO_COMMAND: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "an argument without an option": ({}, {"landing": "free"}, {}, "landing='free'"),
    "a setting of the searcher": ({"n_steps": 4}, {}, {}, "n_steps=4"),
    "data of one's own": ({}, {"data": "arrays"}, {}, "its data, arrays, were given in Python"),
    "another split": ({}, {}, {"data_seed": 3}, "its data were split with the seed 3"),
    "a fine-tuning": ({}, {}, {"finetuning": [{"epochs": 2}]}, "how the network was fine-tuned"),
}


@pytest.mark.parametrize("what", NO_COMMAND)
def test_what_no_command_says_is_named(runs: Path, tmp_path: Path, what: str) -> None:
    *changes, said = NO_COMMAND[what]
    text = Page(write_report(changed(runs / "plain", tmp_path / "run", *changes))).text
    assert "To make it again" not in text and "No command line makes it again: " in text and said in text


def changed(run: Path, copy: Path, asked: Any, environment: Any, settings: Any) -> Path:
    shutil.copytree(run, copy)
    before, record = (json.loads((copy / name).read_text()) for name in ("search.json", RESULT))
    now = {**before, **asked, "environment": {**before["environment"], **environment}}
    (copy / "search.json").write_text(json.dumps(now))
    (copy / RESULT).write_text(json.dumps({**record, "settings": {**record["settings"], **settings}}))
    return copy


@pytest.mark.parametrize(
    ("policy", "said"), [({"policy": None}, "--policy none"), ({"policy": "my p.pt"}, "--policy 'my p.pt'"), ({}, "")]
)
def test_a_command_says_the_policy(runs: Path, tmp_path: Path, policy: dict[str, Any], said: str) -> None:
    run = changed(runs / "plain", tmp_path / "run", {"method": "ppo", **policy}, {}, {})
    line = next(line for line in Page(write_report(run)).text.splitlines() if line.startswith("gnnrl search"))
    assert said in line and ("--policy" in line) == bool(said)


def test_of_very_long_runs_fewer_dots_are_drawn() -> None:
    log = [{"search_accuracy": i / 30_000, "is_success": i % 2 == 0} for i in range(20_000)]
    assert 0 < draw_search([log], "x").count("<use") < 2 * MOST_DOTS


# ---- where it is written ---------------------------------------------------------------------------------------


def test_without_out_the_page_of_one_run_is_in_its_folder_and_of_several_here(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / "tuned", tmp_path / "runs" / "first")
    shutil.copytree(runs / "plain", tmp_path / "runs" / "second")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first" / RESULT).touch()
    for _ in range(2):  # a page is replaced by the next
        assert command("report").strip().endswith("report: runs/first/report.html")
        assert "report: report.html" in command("report runs/first runs/second")
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "report.html"}


def test_a_page_is_written_at_once_or_not_at_all(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write_report(runs / "plain", tmp_path / "page.html")
    before = page.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_report(runs / "tuned", page)
    assert page.read_bytes() == before and list(tmp_path.iterdir()) == [page]


def test_what_is_no_page_is_not_overwritten(runs: Path, tmp_path: Path) -> None:
    mine = tmp_path / "report.html"
    mine.write_text("<!DOCTYPE html><p>mine")
    for path, error, said in (
        (mine, FileExistsError, "no report: choose another --out"),
        (tmp_path, IsADirectoryError, "is a folder"),
        (mine / "page.html", NotADirectoryError, "is no folder"),
    ):
        with pytest.raises(error, match=said):
            write_report(runs / "plain", path)
    assert mine.read_text() == "<!DOCTYPE html><p>mine" and list(tmp_path.iterdir()) == [mine]


OTHERS = {
    "nothing": ({}, "No result.json in .*: give the folder that `gnnrl search` wrote"),
    "bogp": ({"bogp.json": "{}", RESULT: '{"graph": 3}'}, "written by `gnnrl bogp`, .* report.md beside it"),
    "bogp that is not finished": ({"bogp.json": "{}"}, "unfinished `gnnrl bogp` is none"),
    "a training": ({"train.json": "{}", RESULT: '{"policy": "p.pt"}'}, "written by `gnnrl train`, .* the policy is"),
    "nothing asked": ({"search.json": "{}"}, "search.json' is damaged: it has no 'environment'"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_run_is_named(kind: str, tmp_path: Path) -> None:
    files, said = OTHERS[kind]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((FileNotFoundError, ValueError), match=said):
        write_report(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(files)


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "an accuracy": ({"test_accuracy": "high"}, "'test_accuracy' is 'high', not a Real"),
    "a budget": ({"budget": {"macs": "half"}}, "'macs' is 'half', not a Real"),
    "more than all": ({"dense_widths": [1] * 9}, "no plan of its network"),
    "too few names": ({"group_names": ["conv1"]}, "no plan of its network"),
    "no widths": ({"widths": ["a"] * 9}, "no plan of its network"),
    "a latency": ({"latency": {"measured": 1.0}}, "has no 'dense_measured'"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_record_is_named(runs: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(runs / "plain", tmp_path / "run")
    changes, said = DAMAGED[damage]
    path = tmp_path / "run" / RESULT
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"result.json' is damaged: .*{said}"):
        write_report(tmp_path / "run")


def test_the_template_is_packaged() -> None:
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parents[1] / "setup.cfg")
    assert "report_template.html" in settings["options.package_data"]["agents"].split()
