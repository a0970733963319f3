"""One HTML page about run folders: what was asked, what came of it, and pictures, from the records alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from agents.refine import CHECKPOINT
from agents.replay import NotACommand, replay
from agents.report_figures import draw_search, draw_widths
from agents.report_runs import Run, groups_of, read_run
from agents.report_tables import asked_rows, comparison, group_table, kept_shares, outcome_rows, spent_of, title_of
from agents.results import how_to_go_on
from agents.run_folder import check_writable
from gnnrl_gym.files import write_atomic

Place = str | os.PathLike[str]

PAGE, TEMPLATE = "report.html", "report_template.html"
# how a page begins: what else is at the place of one is not overwritten
MARK = "<!DOCTYPE html>\n<!-- by gnnrl report -->"


def write_report(runs: Place | Sequence[Place], out: Place | None = None) -> Path:
    """Write a page about run folders of `gnnrl search` and `gnnrl early`, finished or not. It needs no other file, no
    script and no network; equal folders give equal pages.

    Args:
        runs: one, or several in the order of the page.
        out: the file. Default: `report.html` in the run folder, of several runs in the current directory.

    Returns:
        The file. An older page there is replaced.

    Raises:
        FileNotFoundError: no run in one of the folders. ValueError: one of another kind, a damaged file, or no run.
        FileExistsError, IsADirectoryError: `out` is there, and no page. PermissionError, NotADirectoryError: it can't
            be written.
    """
    folders = [Path(run) for run in ([runs] if isinstance(runs, str | os.PathLike) else runs)]
    if not folders:
        raise ValueError("A report is about one run folder at least.")
    path = Path(out) if out is not None else (folders[0] if len(folders) == 1 else Path()) / PAGE
    found = [read_run(folder) for folder in folders]
    check_writable(path)
    _check_replaceable(path)
    text = page(found)
    write_atomic(path, lambda file: file.write(text.encode(errors="replace")))  # paths may hold what is no text
    return path


def _check_replaceable(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: give the name of a file.")
    if path.exists() and not path.read_bytes().startswith(MARK.encode()):
        raise FileExistsError(f"{str(path)!r} is there already, and no report: choose another --out.")


def page(runs: list[Run]) -> str:
    """The page of `runs`. The template escapes everything but the pictures, which hold no text from files."""
    environment = Environment(
        loader=PackageLoader("agents", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    several = len(runs) > 1
    return environment.get_template(TEMPLATE).render(
        mark=Markup(MARK),
        title=f"{len(runs)} runs" if several else title_of(runs[0]),
        comparison=comparison(runs) if several else None,
        picture=_picture(runs, "search"),
        runs=[_section(number, run) for number, run in enumerate(runs, 1)],
    )


def _picture(runs: list[Run], name: str) -> Markup | None:
    return Markup(draw_search([run.log for run in runs], name)) if any(run.log for run in runs) else None


def _section(number: int, run: Run) -> dict[str, Any]:
    """What the template says of a run."""
    groups = groups_of(run)
    shares = kept_shares(groups) if groups else []
    return {
        "number": number,
        "title": title_of(run),
        "folder": str(run.folder),
        "notes": _notes(run),
        "asked": asked_rows(run),
        "outcome": outcome_rows(run),
        "groups": groups,
        "widths": group_table(groups) if groups else None,
        "picture": Markup(draw_widths(shares, f"widths{number}")) if shares else None,
        **_again(run),
    }


def _notes(run: Run) -> list[str]:
    """What is not finished."""
    if run.result is None:
        goes_on = how_to_go_on(run.folder)
        return [f"Not finished: {spent_of(run)} evaluations so far. If it is not running still, {goes_on}"]
    notes = []
    if run.result.interrupted:
        notes.append(f"Interrupted after {spent_of(run)} evaluations: this is the best plan until then.")
        if run.command and run.result.finetuned_accuracy is None:  # which going on would overwrite
            notes.append(f"To have the rest, {how_to_go_on(run.folder)}")
    if (run.folder / f"{CHECKPOINT}{run.result.finetune_epochs or 0}.pt").is_file():
        notes.append("A fine-tuning was begun that is not finished: it is running, or was interrupted.")
    return notes


def _again(run: Run) -> dict[str, Any]:
    """The commands that make a run again, or why there are none."""
    commands, why = [], ""
    if run.result is not None and run.command is not None and not run.state:
        try:
            commands = replay(run.folder, run.command, run.asked, run.result)
        except NotACommand as error:
            why = str(error)
    return {"commands": commands, "no_command": why}
