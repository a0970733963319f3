"""Run folders: which may be written to, and which hold a run that can be gone on with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from agents.results import RESULT, write_atomic
from gnnrl_gym.files import read_json


def finished(folder: Path) -> bool:
    """Whether a run folder holds the result of a run that came to its end."""
    return (folder / RESULT).is_file() and not read_json(folder / RESULT).get("interrupted")


def free_folder(out: str | os.PathLike[str]) -> Path:
    """A folder for a new run; it is not made yet.

    Raises:
        FileExistsError: something is there already.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{str(folder)!r} is there already and not empty: choose another --out, or remove it "
            "(an interrupted run goes on with --resume)."
        )
    return folder


def begin(
    out: str | os.PathLike[str] | None, asked: dict[str, Any], resume: bool, name: str
) -> Path | None:
    """The run folder, with what was `asked` in its file `name`; None where none is wanted.

    Args:
        resume: it has to hold an unfinished run that was asked the same.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: it is no such folder.
    """
    if resume:
        _check_resumable(out, asked, name)
    if out is None:
        return None
    folder = Path(out) if resume else free_folder(out)
    write_atomic(folder / name, lambda file: file.write(json.dumps(asked, default=str).encode()))
    return folder


def read_asked(run: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """What was asked of the unfinished run in a folder, by its file `name`, which differs from command to command.

    Raises:
        FileNotFoundError: no run was begun there.
        FileExistsError: it is finished.
        ValueError: a file is damaged.
    """
    folder, path = Path(run), Path(run) / name
    if not path.is_file():
        raise FileNotFoundError(f"No run to resume: there is no {str(path)!r}.")
    if finished(folder):
        raise FileExistsError(f"The run in {str(folder)!r} is finished: for another, choose another --out.")
    return read_json(path)


def _check_resumable(out: str | os.PathLike[str] | None, asked: dict[str, Any], name: str) -> None:
    if out is None:
        raise ValueError("resume=True needs out=, the run folder to go on with.")
    before, now = read_asked(out, name), json.loads(json.dumps(asked, default=str))
    for key in before.keys() | now.keys():
        if before.get(key) != now.get(key):
            raise ValueError(f"{os.fspath(out)!r} was run with {key}={before.get(key)!r}, not {now.get(key)!r}.")
