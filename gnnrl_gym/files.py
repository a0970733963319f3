"""Files that are never half-written, and where the package keeps what it measured."""

from __future__ import annotations

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


def cache_folder() -> Path:
    """`gnnrl_gym` in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gnnrl_gym"
