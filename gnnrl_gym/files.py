"""Files that are never half-written, and where the package keeps what it measured."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """`write` into a temporary file beside `path`, then put it in its place: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # not tempfile's: that would be readable by its owner alone, wherever it ends up
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:  # also of bytes that are no text
        raise ValueError(f"{str(path)!r} is damaged: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} is damaged: it holds no JSON object.")
    return found


def cache_folder() -> Path:
    """`gnnrl_gym` in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gnnrl_gym"
