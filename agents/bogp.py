"""BoGP, the whole of it: pool, search, training, report."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.bayesian import bayesian, random_graphs, require_botorch
from agents.bogp_record import BogpResult, Question, report
from agents.provenance import digest_of_data
from agents.recorder import LOG, EvaluationsExhausted, PlanRecorder, remembered
from agents.results import ASKED_OF, RESULT, WEIGHTS
from agents.run_folder import begun, free_folder
from gnnrl_gym.envs.relational import RelationalEnv
from gnnrl_gym.files import read_json, write_atomic
from gnnrl_gym.relational.masks import plain_state

ASKED, TRAINED, REPORT = ASKED_OF["bogp"], "trained", "report.md"
SEARCHERS: dict[str, Callable[[PlanRecorder, int], None]] = {"bayesian": bayesian, "random": random_graphs}


def bogp(
    question: Question,
    out: str | os.PathLike[str],
    device: str = "auto",
    progress: bool = False,
    resume: bool = False,
) -> BogpResult:
    """Draw a pool, search it, train what was found beside its controls, and write `result.json` and `report.md`.

    Both searches choose by the search split. The test split is used after them, once per trained network, and
    chooses nothing; every training's last epoch counts. `pruned.pt` holds the pick's weights (of the first seed), the
    masked ones zero.

    Args:
        out: run folder; it must not hold a run already.
        resume: an unfinished run of the same question may be there; then what it has measured is taken from it.

    Raises:
        MissingExtra: BoTorch is not installed.
        FileExistsError: `out` holds a run.
        ValueError: `out` holds a run of another question or other data, or the environment refuses the question.
    """
    require_botorch()
    resume = resume and (Path(out) / ASKED).is_file()
    folder = Path(out) if resume else free_folder(out)
    start, env = time.perf_counter(), question.environment(device)  # before anything is written: it may refuse
    with begun(out, _asked(question, env, folder), resume, ASKED), _one_thread_if_small(env):
        found = {name: _search(name, env, question, folder / name, progress) for name in SEARCHERS}
        trained = _trained(env, question, folder, {name: pick for name, (pick, _) in found.items()})
    result = _result(env, question, found, trained, time.perf_counter() - start)
    write_atomic(folder / REPORT, lambda file: file.write(report(result).encode()))
    write_atomic(folder / RESULT, lambda file: file.write(json.dumps(asdict(result), indent=2).encode() + b"\n"))
    return result


def _asked(question: Question, env: RelationalEnv, folder: Path) -> dict[str, Any]:
    """What the run folder keeps of a question, with a digest of what names don't say."""
    asked = asdict(question)
    if (folder / ASKED).is_file() and "environment" not in read_json(folder / ASKED):  # of before there was one
        return asked
    about = {"model": question.model, "data": question.data, "data_digest": digest_of_data(env.data)}
    return asked | {"environment": about}


@contextlib.contextmanager
def _one_thread_if_small(env: RelationalEnv) -> Any:
    """Small networks are faster on one thread; and the number of threads is part of what makes runs equal."""
    before = torch.get_num_threads()
    if env.masking.total < 5_000_000:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _search(name: str, env: RelationalEnv, question: Question, folder: Path, progress: bool) -> tuple[int, float]:
    """The pick of a searcher and its search accuracy."""
    folder.mkdir(exist_ok=True)
    for line in remembered(folder, "graph", "search_accuracy"):
        env.remember(line["graph"], line["search_accuracy"])
    env.reset(seed=question.seed)
    recorder = PlanRecorder(env, question.evaluations, folder, progress)
    try:
        with contextlib.suppress(EvaluationsExhausted):
            SEARCHERS[name](recorder, question.seed)
    finally:
        recorder.close()
    assert recorder.best is not None
    return int(recorder.best), recorder.best_accuracy


def _trained(env: RelationalEnv, question: Question, folder: Path, picks: dict[str, int]) -> dict[str, Any]:
    """Test accuracies of the final trainings; each is logged in the folder `trained` when it is done."""
    log = folder / TRAINED / LOG
    log.parent.mkdir(exist_ok=True)
    before = remembered(log.parent, "graph", "seed", "test_accuracy")
    known = {(line["graph"], line["seed"]): line["test_accuracy"] for line in before}
    seeds = range(question.train_seeds, question.train_seeds + question.final_seeds)

    def accuracies(graph: int | None, weights: Path | None = None) -> list[float]:
        for seed in seeds:
            if (graph, seed) not in known:
                known[graph, seed] = _train(env, question, graph, seed, weights if seed == seeds[0] else None)
                with log.open("a") as file:
                    file.write(json.dumps({"graph": graph, "seed": seed, "test_accuracy": known[graph, seed]}) + "\n")
        return [known[graph, seed] for seed in seeds]

    controls = np.random.default_rng([question.seed, 1]).permutation(len(env.pool))[: question.controls]
    return {
        "bayesian": accuracies(picks["bayesian"], folder / WEIGHTS),
        "random search": accuracies(picks["random"]),
        "dense": accuracies(None),
        "random graphs": [accuracies(int(index)) for index in controls],
    }


def _train(env: RelationalEnv, question: Question, graph: int | None, seed: int, weights: Path | None) -> float:
    chosen = None if graph is None else env.pool.graphs[graph]
    model = env.trainer.train(chosen, question.final_epochs, seed, env.recipe)
    if weights is not None:
        state = {name: tensor.cpu() for name, tensor in plain_state(model).items()}
        write_atomic(weights, lambda file: torch.save(state, file))
    return env.trainer.test_accuracy(model)


def _result(
    env: RelationalEnv,
    question: Question,
    found: dict[str, tuple[int, float]],
    trained: dict[str, Any],
    seconds: float,
) -> BogpResult:
    pick, score = found["bayesian"]
    controls = np.array(trained["random graphs"])
    asked = asdict(question)
    return BogpResult(
        model=asked.pop("model"),
        data=asked.pop("data"),
        budget=asked.pop("density"),
        method="bayesian",
        seed=asked.pop("seed"),
        evaluations=asked.pop("evaluations"),
        graph=pick,
        edges=env.edges,
        descriptors=env.pool.descriptors[pick],
        weights_ratio=env.facts(pick)["weights_ratio"],
        params_ratio=env.params_ratio(pick),
        search_accuracy=score,
        random_search_accuracy=found["random"][1],
        test_accuracy=float(np.mean(trained["bayesian"])),
        dense_test_accuracy=float(np.mean(trained["dense"])),
        random_search_test_accuracy=float(np.mean(trained["random search"])),
        random_test_accuracy=float(controls.mean()),
        trained=trained,
        noise={"graphs": _deviation(controls.mean(1)), "seeds": _deviation(controls.T)},
        correlations=_correlations(env),
        seconds=seconds,
        settings=asked,
    )


def _deviation(values: np.ndarray) -> float | None:
    """Standard deviation along the first axis, its mean over the others; None of one value."""
    return float(np.std(values, axis=0, ddof=1).mean()) if len(values) > 1 else None


def _correlations(env: RelationalEnv) -> dict[str, float]:
    from scipy.stats import spearmanr  # slow to import

    scored = env.scored()
    columns = [name for name, varies in zip(env.pool.names, env.pool.varies, strict=True) if varies]
    values = {name: [env.pool.descriptors[index][name] for index in scored] for name in columns}
    usable = {name: column for name, column in values.items() if len(set(column)) > 1 and len(set(scored.values())) > 1}
    return {name: float(spearmanr(column, list(scored.values())).statistic) for name, column in usable.items()}
