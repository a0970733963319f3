"""Files that are never half-written, digests of what they hold, and where the package keeps what it measured."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

if sys.platform != "win32":
    import fcntl


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """`write` into a temporary file beside `path`, then put it in its place: a reader never sees half a file.

    Raises:
        IsADirectoryError: `path` is a folder. OSError: it can't be written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: give the name of a file.")
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


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """While no other process is in here with the same `path`, where the system can lock files; the lock ends with the
    process that holds it.

    Raises:
        OSError: there can be no file beside `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("ab") as file:
        if sys.platform != "win32":
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def alone_in(folder: Path | None) -> Iterator[None]:
    """While nobody else is in here with the same folder, where the system can lock folders; whoever is killed is out.

    Raises:
        BlockingIOError: somebody else is.
    """
    if folder is None or sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"Another process works in {str(folder)!r}: wait until it ends.") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough where a forked process holds it open
        os.close(handle)


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


def check_entries(path: Path, found: dict[str, Any], kinds: Mapping[str, type]) -> None:
    """Check that a JSON file has the entries that it must have.

    Args:
        path: the file, for the message.
        found: what it holds.
        kinds: the entries that it must have, and the class of each.

    Raises:
        ValueError: one is missing, or of another class.
    """
    for name, kind in kinds.items():
        if name not in found:
            raise ValueError(f"{str(path)!r} is damaged: it has no {name!r}.")
        if not isinstance(found[name], kind):
            raise ValueError(f"{str(path)!r} is damaged: its {name!r} is {found[name]!r:.50}, not a {kind.__name__}.")


def plain(value: Any) -> Any:
    """`json.dumps`'s default: NumPy's numbers and arrays as Python's, anything else as its text."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))  # where a function lies differs from process to process


def digest_of(tensors: Mapping[str, Any]) -> str:
    """A digest of names, types, shapes and values; the same on every device and in every process."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):  # a module may keep other things in its state
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def cache_folder() -> Path:
    """`gnnrl_gym` in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gnnrl_gym"
