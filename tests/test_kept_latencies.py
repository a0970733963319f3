"""Measured latencies that stay as they are: for processes that measure at once, in run folders, on another machine."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Network, images, random_plans
from test_budgets import flops_of
from test_memory import Residual
from test_resuming import kill_after, lines
from test_transfer import interrupt_at

from agents import SearchResult, search
from agents.recorder import LATENCIES
from agents.search_cli import _go_on
from agents.transfer import train_policy
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.files import locked
from gnnrl_gym.pruning.latency import LatencyTable
from gnnrl_gym.zoo.resnet import CifarResNet

CLOCK = "gnnrl_gym.pruning.latency.take_turns"
SMALL: dict[str, Any] = {"search_images": 50, "recalibration_images": 40, "device": "cpu"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the package, in a folder of the test's own; and a clock that is unsteady."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(CLOCK, unsteady(0))
    return tmp_path / "gnnrl_gym"


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(Residual(), images(1, 3, 16, 16))


def unsteady(seed: int) -> Callable[..., list[float]]:
    """A clock that says something else every time, as a real one does."""
    rng = np.random.default_rng(seed)

    def counted(calls: Any, repeats: int, device: torch.device, inputs: Any = ()) -> list[float]:
        return [(1e-6 + 1e-10 * flops_of(call, inputs)) * rng.uniform(0.8, 1.2) for call in calls]

    return counted


def test_processes_that_measure_at_once_predict_alike(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = multiprocessing.get_context("fork")
    together, plans = fork.Barrier(2), random_plans(network, 5)

    def measure(number: int) -> None:
        clock = unsteady(number)

        def both(*given: Any) -> list[float]:
            together.wait(60)
            return clock(*given)

        monkeypatch.setattr(CLOCK, both)
        np.save(tmp_path / f"{number}.npy", LatencyTable(network, 2, tmp_path).predict(plans))

    processes = [fork.Process(target=measure, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    first, second = (np.load(tmp_path / f"{number}.npy") for number in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, LatencyTable(network, 2, tmp_path).predict(plans))


def test_a_process_that_was_faster_counts_unless_all_is_measured_anew(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, plans = unsteady(0), random_plans(network, 5)
    faster: list[LatencyTable] = []

    def slow(*given: Any) -> list[float]:
        monkeypatch.setattr(CLOCK, clock)
        faster.append(LatencyTable(network, 2, tmp_path))
        return clock(*given)

    monkeypatch.setattr(CLOCK, slow)
    np.testing.assert_array_equal(LatencyTable(network, 2, tmp_path).predict(plans), faster[0].predict(plans))
    anew = LatencyTable(network, 2, tmp_path, refresh=True).predict(plans)
    assert (anew != faster[0].predict(plans)).all()
    np.testing.assert_array_equal(LatencyTable(network, 2, tmp_path).predict(plans), anew)


def test_only_one_at_a_time_is_in_a_lock(tmp_path: Path) -> None:
    inside: list[int] = []

    def work(number: int) -> list[int]:
        with locked(tmp_path / "folder" / "file"):
            inside.append(number)
            time.sleep(0.02)
            found = list(inside)
            inside.remove(number)
        return found

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [[0], [1], [2], [3]]


def test_figures_of_another_machine_predict_exactly_as_there(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kept.json"
    there, plans = LatencyTable(network, 2, tmp_path), random_plans(network, 20)
    file.write_text(json.dumps(there.figures()))
    for vectors in ("AVX512", "NEON"):  # the channels that kernels work on at a time are those of there, too
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda vectors=vectors: vectors)
        kept = LatencyTable(network, 2, tmp_path / "empty", kept=file)
        np.testing.assert_array_equal(kept.predict(plans), there.predict(plans))
        assert kept.figures() == there.figures()
    assert not (tmp_path / "empty").exists()


DAMAGED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "of another network": (lambda entry: {}, "has no latencies of this network"),
    "no object": (lambda entry: dict.fromkeys(entry, 3), "is 3, not a dict"),
    "no seconds": (lambda entry: {name: {**each, "seconds": None} for name, each in entry.items()}, "None, not a dict"),
    "no operation": (
        lambda entry: {name: {**each, "seconds": {}} for name, each in entry.items()},
        "it has no 'network",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_figures_that_are_damaged_or_of_another_network_are_refused(
    network: Network, tmp_path: Path, damage: str
) -> None:
    file = tmp_path / "kept.json"
    change, said = DAMAGED[damage]
    file.write_text(json.dumps(change(LatencyTable(network, 1, tmp_path).figures())))
    with pytest.raises(ValueError, match=f"kept.json.*{said}"):
        LatencyTable(network, 1, tmp_path, kept=file)
    with pytest.raises(FileNotFoundError):
        LatencyTable(network, 1, tmp_path, kept=tmp_path / "none.json")


# ---- runs ------------------------------------------------------------------------------------------------------


def timed() -> Any:
    return gym.make("GNNRL-Prune-v0", metric="latency", budget=0.7, max_steps=1, **SMALL)


@pytest.fixture
def killed(cache: Path, tmp_path: Path) -> Path:
    """A run under a budget of latency that was killed; its cache is gone. Beside it `whole` is the same, not killed."""
    env = timed()
    search(env, "random", 20, seed=3, out=tmp_path / "whole")
    kill_after(12, env, "random", tmp_path / "killed", 0)
    cache.rename(tmp_path / "lost")
    return tmp_path / "killed"


def test_a_latency_run_is_resumed_without_the_cache(killed: Path) -> None:
    result = search(timed(), "random", 20, seed=3, out=killed, resume=True)
    assert lines(killed) == lines(killed.with_name("whole"))
    assert result.widths == SearchResult.load(killed.with_name("whole")).widths


def test_a_resumed_latency_run_measures_nothing(killed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a budget that this machine's figures would not allow is no hindrance, either."""
    for name in ("_measure", "_calibrated"):
        monkeypatch.setattr(LatencyTable, name, lambda *_: pytest.fail("measured again"))
    _go_on(killed, 0)
    assert lines(killed) == lines(killed.with_name("whole"))
    assert not cache.exists()


def test_a_latency_run_of_before_figures_were_kept_needs_the_cache(killed: Path, cache: Path) -> None:
    (killed / LATENCIES).unlink()
    with pytest.raises(ValueError, match=r"another plan than now.*device, or once its measured latencies are lost"):
        search(timed(), "random", 20, seed=3, out=killed, resume=True)
    assert not (killed / LATENCIES).exists()  # these are not the run's
    shutil.rmtree(cache)
    killed.with_name("lost").rename(cache)
    search(timed(), "random", 20, seed=3, out=killed, resume=True)
    assert lines(killed) == lines(killed.with_name("whole"))


def test_a_training_is_resumed_without_the_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its networks has no budget of latency."""

    def many() -> Any:
        shutil.rmtree(cache, ignore_errors=True)
        return gym.make("GNNRL-PruneMany-v0", networks=[timed(), untimed], budgets=(0.7, 0.75))

    out = tmp_path / "run"
    untimed = PruneEnv(CifarResNet(1, in_channels=1, widths=(8, 8, 8)), max_steps=1, **SMALL)
    interrupt_at(12, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_policy(many(), 14, out=out, slots=2, batch_size=2)
    train_policy(many(), 14, out=out, slots=2, batch_size=2, resume=True)
    assert len(lines(out)) == 14
    assert {line["network"] for line in lines(out)[:12]} == {0, 1}
