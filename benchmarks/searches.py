"""Runs of a benchmark: each is a folder, made once, gone on with after an interruption, and made side by side."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from tqdm import tqdm

from agents.provenance import DIGESTS, environment_record
from agents.results import SearchResult
from agents.run_folder import finished, is_of_run
from agents.search import ASKED, search
from gnnrl_gym.files import read_json


def side_by_side(work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int, unit: str) -> None:
    """``work(*job)`` of all jobs in as many processes as there are workers, each with one thread.

    After Ctrl-C, and where a job fails, no other begins: what a pool was handed before would be done all the same.
    """
    context, waiting = multiprocessing.get_context("spawn"), iter(jobs)
    bar = tqdm(total=len(jobs), unit=unit, disable=None)
    with bar, ProcessPoolExecutor(workers, mp_context=context, initializer=begin_worker) as pool:
        running = {pool.submit(work, *job) for job in islice(waiting, workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for job in done:
                job.result()
            bar.update(len(done))
            running |= {pool.submit(work, *job) for job in islice(waiting, len(done))}


def begin_worker() -> None:
    """Of a process in a pool: one thread, and an end with the process that began it. Where that is killed, a worker
    would finish its job for nobody."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def searched(
    folder: Path, method: str, evaluations: int, seed: int, environment: dict[str, Any], settings: dict[str, Any]
) -> SearchResult:
    """The search of a run folder: as it lies there, else gone on with, else begun.

    Args:
        environment: arguments of `GNNRL-Prune-v0`. settings: of the searcher.

    Raises:
        ValueError: the folder holds a search with other arguments.
        KeyboardInterrupt: the search was interrupted, now; the next call goes on with it.
    """
    begun = (folder / ASKED).is_file()
    if begun:
        check_same(folder, asked_of(method, evaluations, seed, environment, settings))
    if not finished(folder):
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)  # left by a version that could not go on
        env = gym.make("GNNRL-Prune-v0", **environment)
        if search(env, method, evaluations, seed, folder, resume=begun, **settings).interrupted:
            raise KeyboardInterrupt
    return SearchResult.load(folder)


def measured_on(results: Sequence[Any]) -> dict[str, Any]:
    """Machine and versions of finished runs, for their record: some may be of another machine, or of before an update.
    Several stand side by side."""
    packages = dict.fromkeys(name for result in results for name in result.versions)
    versions = {name: _each(result.versions.get(name, "unknown") for result in results) for name in packages}
    return {"machine": _each(result.machine for result in results), "versions": versions} if results else {}


def _each(values: Iterable[str]) -> str:
    return " and ".join(sorted(set(values)))


def asked_of(
    method: str, evaluations: int, seed: int, environment: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """What a run folder keeps of a search, JSON-able; arguments as of `searched`."""
    asked = {"method": method, "evaluations": evaluations, "seed": seed, "environment": environment, **settings}
    kept: dict[str, Any] = json.loads(json.dumps(asked, default=str))
    return kept


def check_same(folder: Path, asked: dict[str, Any], name: str = ASKED) -> None:
    """Whether a run folder is of what is `asked`, by its file `name`. Arguments of the environment that are not asked
    for don't count: later versions have more of them.

    Raises:
        ValueError: it was run with something else.
    """
    found = read_json(folder / name)
    if "environment" in asked:
        found |= {"environment": {key: found["environment"].get(key) for key in asked["environment"]}}
    for key in asked.keys() | found.keys():
        if asked.get(key) != found.get(key):
            raise ValueError(
                f"{str(folder)!r} was run with {key}={found.get(key)!r}, not {asked.get(key)!r}: choose another --runs."
            )


def check_digests(folders: Sequence[Path], environment: dict[str, Any]) -> None:
    """Whether run folders are of the weights and data that are there now under the names of `environment`: a file may
    have become another. What a folder of an older version does not say passes.

    Raises:
        ValueError: one is of others.
    """
    for key, digest in digests_of(gym.make("GNNRL-Prune-v0", **environment)).items():
        for folder in folders:
            if not is_of_run(folder, key, digest):
                raise ValueError(
                    f"{str(folder)!r} was run with other {DIGESTS[key]} than are there now under the same name: put "
                    "them back, or choose another --runs."
                )


def digests_of(env: gym.Env[Any, Any]) -> dict[str, str]:
    """Of weights and data, which their names don't say (`DIGESTS`)."""
    record = environment_record(env.unwrapped)  # type: ignore[arg-type]
    return {key: record[key] for key in DIGESTS}
