"""Who measures plans, threads or a Ray cluster, has no part in what comes out."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import random_plans
from test_cli import Shell, shell, small

from agents import search
from agents.recorder import EvaluationsExhausted
from agents.searchers import SEARCHERS
from gnnrl_gym.errors import MissingExtra
from gnnrl_gym.evaluation.accuracy import PlanEvaluator
from gnnrl_gym.evaluation.workers import RayCluster, scored_by

__all__ = ["shell"]  # a fixture

THERE = """
import pickle, sys
evaluator, plans = pickle.load(sys.stdin.buffer)
print([evaluator._measure(plan) for plan in plans])
"""


def make(**arguments: Any) -> Any:
    """An environment that has scored nothing."""
    return gym.make("GNNRL-Prune-v0", search_images=100, device="cpu", **arguments)


@pytest.fixture
def evaluator() -> PlanEvaluator:
    return make().unwrapped.evaluator


def plans_of(evaluator: PlanEvaluator, count: int = 6) -> list[np.ndarray]:
    return list(random_plans(evaluator.network, count))


@pytest.mark.parametrize("workers", [1, 3])
def test_so_many_threads_measure_the_plans(
    evaluator: PlanEvaluator, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, seen = plans_of(evaluator), set()
    alone = [evaluator._measure(plan) for plan in plans]
    measure = evaluator._measure

    def watched(plan: np.ndarray) -> float:
        seen.add(threading.get_ident())
        assert torch.get_num_threads() == 1
        time.sleep(0.05)
        return measure(plan)

    monkeypatch.setattr(evaluator, "_measure", watched)
    threads = torch.get_num_threads()
    with scored_by(evaluator, workers):
        evaluator.prefetch(plans)
        assert len(seen) == workers and threading.get_ident() not in seen
        evaluator.score(evaluator.network.widths)  # one that comes alone, too
        assert threading.get_ident() not in seen
    assert torch.get_num_threads() == threads and evaluator.workers is None
    assert [evaluator.score(plan) for plan in plans] == alone


def test_workers_end_with_an_error(evaluator: PlanEvaluator) -> None:
    with pytest.raises(KeyboardInterrupt), scored_by(evaluator, 2):
        raise KeyboardInterrupt
    assert evaluator.workers is None


def test_a_search_with_workers_is_the_same_and_resumes_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = search(make(), "random", 12, out=tmp_path / "whole")
    random = SEARCHERS["random"]

    def stopped(recorder: Any, *arguments: Any, **settings: Any) -> None:
        recorder.limit = 5
        try:
            random(recorder, *arguments, **settings)
        except EvaluationsExhausted:
            raise KeyboardInterrupt from None

    monkeypatch.setitem(SEARCHERS, "random", stopped)
    assert search(make(), "random", 12, out=tmp_path / "run", workers=3).interrupted
    monkeypatch.setitem(SEARCHERS, "random", random)
    found = search(make(), "random", 12, out=tmp_path / "run", workers=2, resume=True)
    assert (found.widths, found.search_accuracy) == (expected.widths, expected.search_accuracy)
    log = "evaluations.jsonl"
    assert (tmp_path / "run" / log).read_text() == (tmp_path / "whole" / log).read_text()


def test_the_command_takes_workers_also_to_go_on(tmp_path: Path, shell: Shell) -> None:
    code, _, err = shell(*small(tmp_path / "run"), "--workers", 2, "--finetune", 0)
    assert code == 0, err
    (tmp_path / "run" / "result.json").unlink()
    code, _, err = shell("search", "--resume", tmp_path / "run", "--workers", 3, "--finetune", 0)
    assert code == 0, err
    code, _, err = shell(*small(tmp_path / "other"), "--workers", 0)
    assert code == 2 and "at least 1, got 0" in err and not (tmp_path / "other").exists()


def test_the_command_says_how_ray_is_installed(tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = shell(*small(tmp_path / "run"), "--ray", "auto")
    assert code == 2 and "pip install gnnrl_gym[ray]" in err and not (tmp_path / "run").exists()


class Apart:
    """Workers of their own processes, as far as an evaluator can tell."""

    apart = True

    def __init__(self) -> None:
        self.plans = 0

    def __call__(self, measure: Any, plans: Any) -> list[float]:
        self.plans += len(plans)
        return [measure(plan) for plan in plans]


def test_threads_train_no_candidates_side_by_side_but_processes_do() -> None:
    evaluator = make(objective="proxy", proxy_steps=1).unwrapped.evaluator
    plans, workers = plans_of(evaluator, 2), Apart()
    with scored_by(evaluator, 2):
        evaluator.prefetch(plans)
        assert not evaluator._scores
    evaluator.workers = workers
    evaluator.prefetch(plans)
    assert workers.plans == len(evaluator._scores) == 2


@pytest.mark.parametrize("objective", [None, "proxy"])
def test_an_evaluator_measures_the_same_in_a_process_that_knows_nothing_of_it(
    objective: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "torch", torch, raising=False)  # as in a script that imports it
    evaluator = make(objective=objective, proxy_steps=2).unwrapped.evaluator
    plans = plans_of(evaluator, 3)
    sent = cloudpickle.dumps((evaluator, plans))
    assert (b"DataSplits" in sent) == (objective == "proxy")  # all images are sent where they are trained on
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    there = subprocess.run([sys.executable, "-c", THERE], input=sent, capture_output=True, env=environment, check=False)
    assert there.returncode == 0, there.stderr.decode()
    with scored_by(evaluator, 1):
        assert there.stdout.decode().strip() == str([evaluator.score(plan) for plan in plans])


def test_what_can_not_be_is_said_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env, out = make(), tmp_path / "run"
    with pytest.raises(ValueError, match=r"at least 1, got 0"):
        search(env, "random", 3, out=out, workers=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install gnnrl_gym\[ray\]"):
        search(env, "random", 3, out=out, ray="auto")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="workers=2 are threads of this machine, which ray='auto' replaces"):
        search(env, "random", 3, out=out, workers=2, ray="auto")
    monkeypatch.setattr(env.unwrapped.evaluator, "device", torch.device("cuda:0"))
    with pytest.raises(ValueError, match="on CPUs, not on cuda:0: use device='cpu'"):
        search(env, "random", 3, out=out, workers=2)
    assert not out.exists()


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster of two machines, as far as Ray can tell, with one processor each."""
    utilities = pytest.importorskip("ray.cluster_utils", reason='needs Ray: pip install -e ".[ray]"')
    cluster = utilities.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    cluster.shutdown()


def test_a_ray_cluster_measures_the_same_and_may_lose_a_machine(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lost, proxy = cluster.add_node(num_cpus=1), {"objective": "proxy", "proxy_steps": 20}
    expected = search(make(**proxy), "random", 12)
    measure, ended = RayCluster.__call__, []

    def losing(workers: RayCluster, *batch: Any) -> list[float]:
        if ended:
            return measure(workers, *batch)
        with ThreadPoolExecutor(1) as beside:
            result = beside.submit(measure, workers, *batch)
            time.sleep(1)  # it takes longer to begin a process
            cluster.remove_node(lost, allow_graceful=False)
            ended.append(result.done())
            return result.result()

    monkeypatch.setattr(RayCluster, "__call__", losing)
    found = search(make(**proxy), "random", 12, ray=cluster.address)
    assert ended == [False]  # it was lost on the way
    assert (found.widths, found.search_accuracy) == (expected.widths, expected.search_accuracy)


def test_where_there_is_no_cluster(evaluator: PlanEvaluator) -> None:
    pytest.importorskip("ray", reason='needs Ray: pip install -e ".[ray]"')
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=rf"no Ray cluster at '{address}': begin one"), scored_by(
            evaluator, ray=address
        ):  # fmt: skip
            pass
    assert evaluator.workers is None
