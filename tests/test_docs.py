"""The pages: every Python block of README.md, docs/custom-graphs.md, docs/job-shop.md runs, with fewer steps."""

from __future__ import annotations

import re
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium.utils.env_checker import check_env
from typer.testing import CliRunner

import gnnrl_gym
from agents.cli import app
from benchmarks.registry import RESULTS, benchmarks
from benchmarks.tables import rebuild
from gnnrl_gym.zoo.data import data_names

ROOT = Path(__file__).parents[1]
# what takes the time, and what a test can do with
SHORTER = {r"evaluations=\d+": "evaluations=12", r"epochs=\d+": "epochs=1", r"\.learn\([\d_]+\)": ".learn(128)"}


def run_page(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the names of a page stand for once its Python blocks have run, one after the other, in an empty folder."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    code = "\n".join(blocks)
    for long, short in SHORTER.items():
        code = re.sub(long, short, code)
    script = folder / "page.py"
    script.write_text(code)
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    return runpy.run_path(str(script))


def test_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_page("README.md", tmp_path, monkeypatch)
    result = names["result"]
    assert result.evaluations == 12 and 0 < result.macs_ratio <= 0.5
    assert result.finetuned_accuracy > 0.5
    assert names["net"].params(names["half"]) < names["net"].params(names["net"].widths)
    assert (tmp_path / "small.pt2").is_file()


def test_custom_graphs_run_and_keep_gymnasiums_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_page("docs/custom-graphs.md", tmp_path, monkeypatch)
    assert names["agent"].num_timesteps == 128
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(no_spec|spec|render).*")
        check_env(names["MatchNeighbours"](), skip_render_check=True)


def test_job_shops_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_page("docs/job-shop.md", tmp_path, monkeypatch)
    assert names["info"]["makespan"] >= 55 and str(names["info"]["makespan"]) in capsys.readouterr().out


def test_the_readme_names_what_data_there_are() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in data_names() if f"`{name}`" not in text] == []


def test_the_benchmarks_and_tables_of_the_pages_exist() -> None:
    text = "\n".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    run = {name for names in re.findall(r"gnnrl bench((?: [a-z][a-z-]+)+)", blocks) for name in names.split()}
    tables = set(re.findall(r"<!-- table: (\S+) -->", text))
    assert "reward-report" in run and "search-speed" in tables
    assert run <= benchmarks().keys()
    assert tables <= {path.stem for path in RESULTS.glob("*.json")}


def test_the_tables_of_the_pages_are_those_of_the_records(tmp_path: Path) -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        copy = tmp_path / page.name
        copy.write_text(page.read_text())
        rebuild(copy)
        assert copy.read_text() == page.read_text(), f"{page.name}: run `gnnrl bench --tables`"


def test_the_architecture_names_every_module_in_its_folder() -> None:
    rooms = (ROOT / "docs/architecture.md").read_text().split("\n## Rooms\n")[1].split("\n## ")[0]
    named, folder = [], ""
    for line in re.findall(r"^    (.*)", rooms, re.MULTILINE):
        first = line.split()[0]
        if first.endswith("/"):
            folder = first
        else:
            named.append(folder + first)
    packages = ("gnnrl_gym", "agents", "benchmarks")
    files = [path.relative_to(ROOT).as_posix() for name in packages for path in (ROOT / name).rglob("*.py")]
    assert sorted(named) == sorted(path for path in files if not path.endswith("__init__.py"))


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {gnnrl_gym.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_command_line_says_the_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"gnnrl_gym {gnnrl_gym.__version__}\n"
