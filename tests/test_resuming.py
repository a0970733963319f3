"""Interrupted searches: what they leave, and that they go on as if they had never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import SearchResult, search
from agents.recorder import PlanRecorder
from agents.refine import finetune_run
from agents.searchers import SEARCHERS
from gnnrl_gym.evaluation.accuracy import accuracy
from gnnrl_gym.files import alone_in, digest_of
from gnnrl_gym.zoo import load_data, load_model

Env = gym.Env[Any, Any]
LOCKS = pytest.mark.skipif(sys.platform == "win32", reason="Windows locks no folders")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "evaluations.jsonl").read_text().splitlines()]


def interrupted_after(evaluations: int) -> Callable[..., None]:
    def searcher(recorder: Any, seed: int = 0, out: Path | None = None) -> None:
        recorder.action_space.seed(seed)
        for _ in range(evaluations):
            recorder.play([recorder.action_space.sample()])
        raise KeyboardInterrupt

    return searcher


def test_interrupted_search_leaves_a_usable_result(
    digits_env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SEARCHERS, "interrupted", interrupted_after(3))
    result = search(digits_env, "interrupted", 100, out=tmp_path / "run")
    again = SearchResult.load(tmp_path / "run")
    assert result.interrupted and again.interrupted
    assert again.evaluations == len(lines(tmp_path / "run")) == 3
    assert accuracy(again.pruned(), load_data("digits").test) == result.test_accuracy


def test_interrupted_twice_it_leaves_the_same(digits_env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def close(recorder: PlanRecorder) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(SEARCHERS, "interrupted", interrupted_after(3))
    monkeypatch.setattr(PlanRecorder, "close", close)
    result = search(digits_env, "interrupted", 100, out=tmp_path / "run")
    assert result.interrupted and SearchResult.load(tmp_path / "run") == result


def test_a_lost_wakeup_of_the_curves_holds_up_nothing(digits_env: Env, tmp_path: Path) -> None:
    recorder = PlanRecorder(digits_env, 3, tmp_path)
    assert recorder._curves is not None
    queue = recorder._curves._get_file_writer().event_writer._async_writer._byte_queue
    queue.not_empty.notify = lambda *_: None  # as a Ctrl-C in it leaves the writing thread: asleep
    recorder.play([recorder.action_space.sample()])
    start = time.perf_counter()
    recorder.close()
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("method", ["ppo", "td3", "es", "random"])
def test_global_randomness_is_left_alone(digits_env: Env, method: str) -> None:
    """Agent libraries seed all of it."""
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    search(digits_env, method, 8, seed=1)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected


def test_interrupted_before_the_first_evaluation(digits_env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SEARCHERS, "interrupted", interrupted_after(0))
    with pytest.raises(KeyboardInterrupt):
        search(digits_env, "interrupted", 100)


@pytest.mark.parametrize("method", ["random", "ppo", "sensitivity", "es", "cma-es"])
@pytest.mark.parametrize("cut", [0, 20])
def test_resumed_equals_uninterrupted(digits_env: Env, tmp_path: Path, method: str, cut: int) -> None:
    whole = search(digits_env, method, 20, seed=3, out=tmp_path / "whole")
    kill_after(12, digits_env, method, tmp_path / "killed", cut)
    resumed = search(digits_env, method, 20, seed=3, out=tmp_path / "killed", resume=True)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    changing = {"out": None, "seconds": 0.0}
    assert replace(resumed, **changing) == replace(whole, **changing)


def kill_after(count: int, env: Env, method: str, out: Path, cut: int) -> None:
    """A search that dies after `count` evaluations, `cut` bytes before the end of its last line."""
    die_after(env, count)
    with pytest.raises(RuntimeError, match="killed"):
        search(env, method, 20, seed=3, out=out)
    log = out / "evaluations.jsonl"
    log.write_bytes(log.read_bytes()[: -cut or None])
    assert not (out / "result.json").exists()
    env.unwrapped.evaluator._scores.clear()  # type: ignore[attr-defined]  # another process remembers nothing


def die_after(env: Any, count: int) -> None:
    """No wrapper, which a search refuses."""
    inner = env.unwrapped
    score, start = inner.evaluator.score, inner.evaluations

    def dying(widths: Any) -> float:
        if inner.evaluations - start >= count:
            del inner.evaluator.score
            raise RuntimeError("killed")
        return float(score(widths))

    inner.evaluator.score = dying


def test_resuming_does_not_measure_again(digits_env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_after(12, digits_env, "es", tmp_path / "run", 0)
    evaluator, measured = digits_env.unwrapped.evaluator, []  # type: ignore[attr-defined]
    measure = evaluator._measure
    monkeypatch.setattr(evaluator, "_measure", lambda plan: measured.append(plan) or measure(plan))
    search(digits_env, "es", 20, seed=3, out=tmp_path / "run", resume=True)
    assert len(measured) <= 8


def test_functions_among_the_settings_are_the_same_in_another_process(
    digits_env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def searcher(recorder: Any, seed: int = 0, out: Path | None = None, rate: Any = None) -> None:
        interrupted_after(1)(recorder, seed, out)

    def schedule() -> Callable[[float], float]:
        return lambda left: 0.001 * left

    monkeypatch.setitem(SEARCHERS, "random", searcher)
    first, second = schedule(), schedule()  # at two places of the memory, as in two processes
    search(digits_env, "random", 4, out=tmp_path, rate=first)
    assert search(digits_env, "random", 4, out=tmp_path, resume=True, rate=second).interrupted


def test_resuming_refuses_another_search(digits_env: Env, tmp_path: Path) -> None:
    kill_after(12, digits_env, "es", tmp_path / "run", 0)
    with pytest.raises(ValueError, match="seed=3, not 4"):
        search(digits_env, "es", 20, seed=4, out=tmp_path / "run", resume=True)
    with pytest.raises(FileNotFoundError, match="No run to resume"):
        search(digits_env, "es", 20, out=tmp_path / "other", resume=True)
    search(digits_env, "es", 20, seed=3, out=tmp_path / "run", resume=True)
    with pytest.raises(FileExistsError, match="finished"):
        search(digits_env, "es", 20, seed=3, out=tmp_path / "run", resume=True)


def test_seconds_of_a_resumed_search_are_those_of_all_its_parts(
    digits_env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(recorder: Any, seed: int = 0, out: Path | None = None) -> None:
        time.sleep(0.3)
        interrupted_after(3)(recorder, seed, out)

    random = SEARCHERS["random"]
    monkeypatch.setitem(SEARCHERS, "random", slow)
    first = search(digits_env, "random", 4, out=tmp_path / "run").seconds
    monkeypatch.setitem(SEARCHERS, "random", random)
    resumed = search(digits_env, "random", 4, out=tmp_path / "run", resume=True)
    assert resumed.seconds > first > 0.3


@pytest.mark.parametrize("there", [True, False])
def test_search_that_evaluated_nothing_leaves_nothing(digits_env: Env, tmp_path: Path, there: bool) -> None:
    out = tmp_path / "run"
    if there:
        out.mkdir()
    with pytest.raises(ValueError, match="sensitivity needs"):
        search(digits_env, "sensitivity", 2, out=out)
    with pytest.raises(TypeError, match="no_such_setting"):
        search(digits_env, "ppo", 2, out=out, no_such_setting=3)
    assert list(tmp_path.rglob("*")) == [out] * there
    assert search(digits_env, "uniform", 1, out=out).evaluations == 1


def test_failed_resuming_keeps_the_run(digits_env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_after(2, digits_env, "random", tmp_path / "run", 0)
    (tmp_path / "run" / "evaluations.jsonl").unlink()
    monkeypatch.setitem(SEARCHERS, "random", interrupted_after(0))
    with pytest.raises(KeyboardInterrupt):
        search(digits_env, "random", 20, seed=3, out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "search.json").is_file()


def test_a_run_that_can_not_be_written_is_refused_before_any_work(
    digits_env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_after(2, digits_env, "random", tmp_path / "killed", 0)
    search(digits_env, "uniform", 1, out=tmp_path / "whole")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(PermissionError, match=r"killed' can't be written: .* is read-only\. Copy the run"):
        search(digits_env, "random", 20, seed=3, out=tmp_path / "killed", resume=True)
    with pytest.raises(PermissionError, match=r"whole' can't be written: .* is read-only\. Copy the run"):
        finetune_run(tmp_path / "whole", 1)


def test_of_two_searches_in_one_folder_one_ends(
    digits_env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def joined(recorder: Any, seed: int = 0, out: Path | None = None) -> None:
        assert out is not None
        recorder.play([recorder.action_space.sample()])
        with (out / "evaluations.jsonl").open("a") as file:
            file.write("{}\n")
        recorder.play([recorder.action_space.sample()])

    monkeypatch.setitem(SEARCHERS, "joined", joined)
    with pytest.raises(ValueError, match="another one writes there too"):
        search(digits_env, "joined", 20, out=tmp_path / "run")
    assert len(lines(tmp_path / "run")) == 2


@LOCKS
def test_where_another_process_works_nothing_begins(digits_env: Env, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill_after(2, digits_env, "random", run, 0)
    before = lines(run)
    with alone_in(run), pytest.raises(BlockingIOError, match=r"Another process works in '.*run': wait until it ends"):
        search(digits_env, "random", 20, seed=3, out=run, resume=True)
    assert lines(run) == before
    search(digits_env, "random", 20, seed=3, out=run, resume=True)
    record = (run / "result.json").read_bytes()
    with alone_in(run), pytest.raises(BlockingIOError, match="Another process works"):
        finetune_run(run, 1)
    assert (run / "result.json").read_bytes() == record
    assert finetune_run(run, 1).finetune_epochs == 1


@LOCKS
def test_a_search_is_alone_in_its_folder(digits_env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(recorder: Any, seed: int = 0, out: Path | None = None) -> None:
        recorder.play([recorder.action_space.sample()])
        with alone_in(out):
            pass

    monkeypatch.setitem(SEARCHERS, "twice", twice)
    with pytest.raises(BlockingIOError, match="Another process works"):
        search(digits_env, "twice", 20, out=tmp_path / "run")


@LOCKS
def test_a_process_that_is_killed_is_alone_no_more(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys, time\nfrom gnnrl_gym.files import alone_in\n"
        "with alone_in(pathlib.Path(sys.argv[1])):\n    print('in', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(BlockingIOError), alone_in(tmp_path):
            pass
        process.kill()
        process.wait()
    with alone_in(tmp_path):
        pass


@LOCKS
def test_a_forked_process_does_not_keep_others_out(tmp_path: Path) -> None:
    with alone_in(tmp_path):
        child = os.fork()
        if not child:
            signal.pause()
    with alone_in(tmp_path):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


SMALL: dict[str, Any] = {"search_images": 30, "recalibration_images": 16, "device": "cpu"}


def relabelled() -> Any:
    """Digits with another label on one image of the search split."""
    data = load_data("digits")
    labels = data.search.labels.clone()
    labels[-1] = (labels[-1] + 1) % 10
    return replace(data, search=replace(data.search, labels=labels))


def test_resuming_refuses_other_weights_and_labels_of_the_same_name(tmp_path: Path) -> None:
    def env(seed: int, data: Any = "digits") -> Env:
        return gym.make("GNNRL-Prune-v0", model=load_model("digits-resnet", "random", seed=seed), data=data, **SMALL)

    out = tmp_path / "run"
    kill_after(2, env(0), "random", out, 0)
    with pytest.raises(ValueError, match=r"other weights of the network .CifarResNet"):
        search(env(1), "random", 20, seed=3, out=out, resume=True)
    with pytest.raises(ValueError, match=r"other labels, size or normalisation .* on digits"):
        search(env(0, relabelled()), "random", 20, seed=3, out=out, resume=True)
    search(env(0), "random", 20, seed=3, out=out, resume=True)


def test_runs_without_digests_are_resumed(digits_env: Env, tmp_path: Path) -> None:
    kill_after(12, digits_env, "random", tmp_path / "run", 0)
    asked = tmp_path / "run" / "search.json"
    record = json.loads(asked.read_text())
    assert len(record["environment"].pop("weights_digest")) == len(record["environment"].pop("data_digest")) == 16
    asked.write_text(json.dumps(record))
    assert search(digits_env, "random", 20, seed=3, out=tmp_path / "run", resume=True).evaluations == 20


def test_digests_are_of_values_alone() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    assert digest_of(tensors) == "fb4955e36839f99b"  # in every process
    turned = tensors | {"a": torch.arange(6.0).reshape(2, 3).t().contiguous().t()}
    assert digest_of(turned) == digest_of(tensors)  # whatever the layout
    for name, other in (("a", tensors["a"].t()), ("b", torch.tensor(4)), ("c", torch.ones(2, dtype=torch.float16))):
        assert digest_of(tensors | {name: other}) != digest_of(tensors)


def test_going_on_with_a_search_does_not_undo_its_fine_tuning(
    digits_env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, random = tmp_path / "run", SEARCHERS["random"]
    monkeypatch.setitem(SEARCHERS, "random", interrupted_after(3))
    search(digits_env, "random", 20, seed=3, out=out)
    monkeypatch.setitem(SEARCHERS, "random", random)
    tuned = finetune_run(out, 1, device="cpu")
    with pytest.raises(FileExistsError, match=r"fine-tuned by now.*result\.json and pruned\.pt"):
        search(digits_env, "random", 20, seed=3, out=out, resume=True)
    assert SearchResult.load(out).finetuned_accuracy == tuned.finetuned_accuracy
    (out / "result.json").rename(out / "kept.json")
    assert search(digits_env, "random", 20, seed=3, out=out, resume=True).evaluations == 20
