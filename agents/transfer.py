"""Policies that move between networks: train one on many, keep it in a file, start a search from it."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from torch import Tensor

from agents.provenance import environment_record, versions
from agents.recorder import PlanRecorder, check_wrappers, remembered
from agents.results import ASKED_OF, RESULT
from agents.run_folder import begun, check_writable, finished, keep_latencies
from agents.sb3 import PruneVecEnv
from gnnrl_gym.checks import check_seed, check_whole
from gnnrl_gym.envs.prune_many import PruneManyEnv
from gnnrl_gym.evaluation.determinism import deterministic, randomness_kept
from gnnrl_gym.files import write_atomic
from gnnrl_gym.graph.features import EDGE_FEATURES, NODE_FEATURES
from gnnrl_gym.zoo.state_dicts import why_unreadable

GENERAL = "general"
ASKED = ASKED_OF["train"]
_SHIPPED = Path(__file__).parent / "policies"

# Every batch is of another network: smaller steps than in a search, which sees one network only.
TRAINING: dict[str, Any] = {"learning_rate": 1e-3, "n_epochs": 4, "policy_kwargs": {"node_bias": False}}


def train_policy(
    env: gym.Env[Any, Any],
    evaluations: int,
    seed: int = 0,
    progress: bool = False,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **settings: Any,
) -> PPO:
    """Train one policy on a `GNNRL-PruneMany-v0` environment.

    The plans of a batch are all for the network and budget that were drawn, so they are compared with each other.
    An interrupted training is resumed as a search is: what was measured is remembered, and it is gone through again.

    Args:
        env: its networks must have `max_steps=1`, so that the plans of a batch stay together.
        evaluations: how many may be spent, over all networks.
        out: run folder for `evaluations.jsonl` and TensorBoard curves; it must not hold a run already.
        resume: `out` holds an interrupted run of the same training.
        settings: override `TRAINING` and those of `agents.ppo`.

    Raises:
        ValueError: an environment of another kind, or with longer episodes; a number out of range; or a run to
            resume that was asked something else.
        FileExistsError: `out` holds a run.
        KeyboardInterrupt: interrupted.
    """
    from agents.ppo import check_no_schedules, learn, make_ppo  # which starts searches from our policies

    inner = env.unwrapped
    if not isinstance(inner, PruneManyEnv) or any(each.max_steps != 1 for each in inner.envs):
        raise ValueError("train_policy needs a GNNRL-PruneMany-v0 environment whose networks have max_steps=1.")
    check_wrappers("train_policy", env)
    check_whole(1, evaluations=evaluations)
    check_seed(seed=seed)
    check_no_schedules(settings)
    evaluations, seed = int(evaluations), int(seed)  # NumPy's are no seeds to some generators
    networks = {f"network {number}": environment_record(each) for number, each in enumerate(inner.envs, 1)}
    asked = {"evaluations": evaluations, "seed": seed, "budgets": inner.budgets, **networks, **settings}
    policy = {**TRAINING["policy_kwargs"], **settings.get("policy_kwargs", {})}
    settings = {**TRAINING, **settings, "policy_kwargs": policy}
    slots = settings.pop("slots", 10)
    with begun(out, asked, resume, ASKED) as folder, randomness_kept(), deterministic(inner.device):
        keep_latencies(folder, inner.envs)
        for line in remembered(folder, "network", "widths", "search_accuracy") if folder else ():
            env_of = inner.envs[line["network"]]
            plan = np.array(line["widths"])[: len(env_of.network.widths)]  # without the padding of `info`
            env_of.evaluator.remember(plan, line["search_accuracy"])
        recorder = PlanRecorder(env, evaluations, folder, progress)
        agent = make_ppo(PruneVecEnv(recorder, slots), seed, str(inner.device), **settings)
        try:
            learn(agent, recorder)
        finally:
            recorder.close()
    return agent


def train_to_file(
    env: gym.Env[Any, Any], path: Path, evaluations: int, seed: int = 0, about: dict[str, Any] | None = None
) -> Path:
    """Train a policy, with a bar, and save it in `path`; what was measured is kept in a folder beside it.

    The same call goes on with an interrupted one. `about`: see `save_policy`.

    Returns:
        The folder.

    Raises:
        FileExistsError: `path` is there, or the folder of another training. ValueError: as `train_policy`.
    """
    log = training_folder(path)
    agent = train_policy(env, evaluations, seed, progress=True, out=log, resume=(log / ASKED).is_file())
    save_policy(agent, path, about)
    record = {"policy": path.name, "evaluations": int(evaluations), "seed": int(seed), "versions": versions()}
    write_atomic(log / RESULT, lambda file: file.write(json.dumps(record, indent=2).encode() + b"\n"))
    return log


def training_folder(path: Path) -> Path:
    """Where the evaluations behind a policy file are kept.

    Raises:
        FileExistsError: the file is there, or the folder of a finished training, or of something else.
    """
    log = path.with_name(f"{path.name}.training")
    if path.exists() or finished(log) or (log.exists() and not (log / ASKED).is_file()):
        there = [repr(str(each)) for each in (path, log) if each.exists()]
        are, them = ("are", "them") if len(there) > 1 else ("is", "it")
        raise FileExistsError(f"{' and '.join(there)} {are} there already: choose another --out, or remove {them}.")
    check_writable(path)
    return log


def save_policy(agent: PPO, path: str | os.PathLike[str], about: dict[str, Any] | None = None) -> None:
    """Write the parts of a policy that fit any network: plain tensors, and JSON beside them in the same file."""
    state = {name: value for name, value in agent.policy.state_dict().items() if name != "node_bias"}
    facts = {"features": [*NODE_FEATURES, *EDGE_FEATURES], "versions": versions(), **(about or {})}
    content = {"state": {name: value.cpu() for name, value in state.items()}, "about": json.dumps(facts)}
    write_atomic(Path(path), lambda file: torch.save(content, file))


def read_policy(source: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a policy file and what is said about it.

    Args:
        source: a file that `save_policy` wrote, or "general" for the one that ships with the package.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else, or a policy for other graph features.
    """
    path = _SHIPPED / "general.pt" if os.fspath(source) == GENERAL else Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"No policy {str(source)!r}: give a file that `gnnrl train` wrote, or {GENERAL!r}.")
    try:
        content = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        state, about = dict(content["state"]), dict(json.loads(content["about"]))
    except Exception as error:
        raise ValueError(f"{str(path)!r} is no policy file of `gnnrl train`: {why_unreadable(error)}") from error
    if not all(torch.isfinite(value).all() for value in state.values() if isinstance(value, Tensor)):
        raise ValueError(f"{str(path)!r} holds NaN or infinity: its training diverged, train it anew.")
    if about.get("features") != [*NODE_FEATURES, *EDGE_FEATURES]:
        raise ValueError(f"{str(path)!r} was trained on other graph features than this version has: train it anew.")
    return state, about


def start_from(agent: PPO, source: str | os.PathLike[str]) -> None:
    """Give `agent` the policy of a file; a free offset per node, where it has one, stays 0.

    Raises:
        FileNotFoundError, ValueError: as `read_policy`; or the policy has other layers.
    """
    state, _ = read_policy(source)
    try:
        unknown = agent.policy.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"The policy {str(source)!r} has other layers than this agent: {error}") from error
    if unknown.unexpected_keys or set(unknown.missing_keys) - {"node_bias"}:
        raise ValueError(f"The policy {str(source)!r} has other layers than this agent: {unknown}")
