"""Run folders: which may be written to, and which hold a run that can be gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from agents.provenance import DIGESTS
from agents.recorder import LATENCIES, LOG
from agents.results import ASKED_OF, RESULT, WEIGHTS, SearchResult, written_by
from gnnrl_gym.envs.budget import Meter
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.files import alone_in, check_entries, plain, read_json, write_atomic

COPY = "Copy the run to a folder that can be written, and go on there."


def finished(folder: Path) -> bool:
    """Whether a run folder holds the result of a run that came to its end."""
    return (folder / RESULT).is_file() and not read_json(folder / RESULT).get("interrupted")


def seconds_before(folder: Path | None) -> float:
    """How long the search in a run folder took until it was interrupted, in seconds; 0 if it was killed and so left no
    result."""
    if folder is None or not (folder / RESULT).is_file():
        return 0.0
    return float(read_json(folder / RESULT).get("seconds", 0.0))


def is_of_run(run: str | os.PathLike[str], key: str, digest: str) -> bool:
    """Whether weights or data with this `digest` are those that a run was given, by its record (`DIGESTS`); also
    True if the record holds no digest, because it was written by a version without digests."""
    command = written_by(run)
    environment = read_json(Path(run) / ASKED_OF[command]).get("environment") if command else None
    return not isinstance(environment, dict) or environment.get(key) in (None, digest)


def free_folder(out: str | os.PathLike[str]) -> Path:
    """A folder for a new run; it is not made yet.

    Raises:
        FileExistsError: something is there already.
        NotADirectoryError, PermissionError: it can't be made there.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{str(folder)!r} is there already and not empty: choose another --out, or remove it "
            "(an interrupted run goes on with --resume)."
        )
    check_writable(folder)
    return folder


def check_writable(path: Path, mend: str = "Choose another --out.") -> None:
    """Check that a file or folder can be made at `path`.

    Args:
        mend: what to do about it.

    Raises:
        NotADirectoryError, PermissionError: nothing can be written at `path`.
    """
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if there != path and not there.is_dir():
        raise NotADirectoryError(f"{str(path)!r} can't be written: {str(there)!r} is no folder. {mend}")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{str(path)!r} can't be written: {str(there)!r} is read-only. {mend}")


@contextlib.contextmanager
def begun(out: str | os.PathLike[str] | None, asked: dict[str, Any], resume: bool, name: str) -> Iterator[Path | None]:
    """As `begin`. Nobody else may work in the folder until the end; a new run that fails before its first evaluation
    leaves nothing behind.

    Raises:
        BlockingIOError: another process works in it.
    """
    there = out is not None and Path(out).exists()
    folder = begin(out, asked, resume, name)
    with alone_in(folder):
        try:
            yield folder
        except BaseException:
            if folder and not resume and not any(folder.rglob(LOG)):  # bogp's are in folders of their own
                _clear(folder, there)
            raise


def _clear(folder: Path, keep: bool) -> None:
    """Remove what a run wrote in its folder, which was empty before it (`free_folder`), and with `keep` was there."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not keep:
        folder.rmdir()


def begin(out: str | os.PathLike[str] | None, asked: dict[str, Any], resume: bool, name: str) -> Path | None:
    """The run folder, with what was `asked` written to its file `name`; None if `out` is None.

    Args:
        resume: the folder has to hold an unfinished run that was asked the same; otherwise it has to be new or empty.

    Raises:
        FileNotFoundError, FileExistsError, NotADirectoryError, ValueError, PermissionError: it is not such a folder, or
            nothing can be written there.
    """
    if resume:
        _check_resumable(out, asked, name)
    if out is None:
        return None
    folder = Path(out) if resume else free_folder(out)
    check_writable(folder, COPY)
    write_atomic(folder / name, lambda file: file.write(json.dumps(asked, default=plain).encode()))
    return folder


def keep_latencies(folder: Path | None, envs: Sequence[PruneEnv]) -> None:
    """Let plans land by the latencies that a run was begun with: measured again, or on another machine, they would
    differ, and every plan with them. Runs of older versions, which kept none, use those of the cache."""
    if folder is None or all(env.meter.table is None for env in envs):
        return
    path = folder / LATENCIES
    if not path.is_file() and not (folder / LOG).is_file():
        tables = [env.meter.table for env in envs if env.meter.table]
        figures = {name: found for table in tables for name, found in table.figures().items()}
        write_atomic(path, lambda file: file.write(json.dumps(figures).encode()))
    if path.is_file():
        for env in envs:
            env.meter = Meter(env.network, env.budgets, path)


def read_asked(run: str | os.PathLike[str], name: str, **kinds: type) -> dict[str, Any]:
    """What was asked of the unfinished run in a folder, by its file `name`, which differs from command to command.

    Args:
        kinds: of what it must hold.

    Raises:
        FileNotFoundError: no run was begun there.
        FileExistsError: it is finished, or fine-tuned as it is.
        ValueError: a file is damaged.
    """
    folder, path = Path(run), Path(run) / name
    if not path.is_file():
        raise FileNotFoundError(f"No run to resume: there is no {str(path)!r}.")
    if finished(folder):
        later = _fine_tuning_left(folder, read_json(path)) or "for another, choose another --out."
        raise FileExistsError(f"The run in {str(folder)!r} is finished: {later}")
    if (folder / RESULT).is_file() and read_json(folder / RESULT).get("finetuned_accuracy") is not None:
        raise FileExistsError(
            f"The interrupted run in {str(folder)!r} is fine-tuned by now, and going on would overwrite that: move "
            f"{RESULT} and {WEIGHTS} elsewhere first."
        )
    asked = read_json(path)
    check_entries(path, asked, kinds)
    if "environment" in kinds:
        check_entries(path, asked["environment"], {"model": str})
    return asked


def _fine_tuning_left(folder: Path, asked: dict[str, Any]) -> str:
    """How to go on with the fine-tuning of a finished run that was killed after an epoch; "" if there is nothing to go
    on with."""
    from agents.refine import CHECKPOINT  # which checks run folders

    left = folder / f"{CHECKPOINT}{read_json(folder / RESULT).get('finetune_epochs') or 0}.pt"
    if not left.is_file():
        return ""
    try:
        options = _finetuned_with(folder, left, asked)
    except Exception:  # whatever a damaged checkpoint, record or data set raises: the command itself says more
        options = []
    command = shlex.join(["gnnrl", "finetune", str(folder), *options])
    return f"its fine-tuning was interrupted, and goes on after its last whole epoch with {command}"


def _finetuned_with(folder: Path, checkpoint: Path, asked: dict[str, Any]) -> list[str]:
    """The options of the fine-tuning that left a checkpoint: with others it would begin anew."""
    settings = torch.load(checkpoint, map_location="cpu", weights_only=True)["settings"]
    given = {name: settings[name] for name in ("epochs", "learning_rate", "schedule", "distill", "seed")}
    given["images"] = "train" if settings["images"] == len(SearchResult.load(folder).splits().train) else "all"
    given["device"] = asked["environment"].get("device", "auto")
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def _check_resumable(out: str | os.PathLike[str] | None, asked: dict[str, Any], name: str) -> None:
    if out is None:
        raise ValueError("resume=True needs out=, the run folder to go on with.")
    asked_before, asked_now = read_asked(out, name), json.loads(json.dumps(asked, default=plain))
    for part, given in asked_now.items():
        if isinstance(given, dict) and isinstance(asked_before.get(part), dict):
            _check_digests(os.fspath(out), asked_before[part], given)
    before, now = _flat(asked_before), _flat(asked_now)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{os.fspath(out)!r} was run with {key}={before.get(key)!r}, not {now.get(key)!r}: go on with it as it "
                "was begun, or begin another run with another --out."
            )


def _flat(asked: dict[str, Any]) -> dict[str, Any]:
    """What was asked, without the levels: `budget` of `environment` as "environment: budget"."""
    found: dict[str, Any] = {}
    for part, given in asked.items():
        found |= {f"{part}: {key}": value for key, value in given.items()} if isinstance(given, dict) else {part: given}
    return found


def _check_digests(out: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Of two records of an environment; those written by a version without digests have none."""
    digests = {key: (before.pop(key, None), now.pop(key, None)) for key in DIGESTS}
    if before != now:  # which says more
        return
    for key, (found, given) in digests.items():
        if found not in (None, given):
            raise ValueError(
                f"{out!r} was run with other {DIGESTS[key]} ({now['model']} on {now['data']}; digest {found}, now "
                f"{given}): resume it with the same, or begin another run with another --out."
            )
