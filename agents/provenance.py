"""Where a record comes from: the environment with digests of its network and data, the versions, the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from gnnrl_gym.envs.network import NetworkEnv
from gnnrl_gym.evaluation.accuracy import accuracy
from gnnrl_gym.files import digest_of
from gnnrl_gym.graph.groups import Ints
from gnnrl_gym.pruning.timing import processor
from gnnrl_gym.zoo import DataSplits

# keys of `environment_record`, and what they are digests of
DIGESTS = {"weights_digest": "weights of the network", "data_digest": "labels, size or normalisation of the images"}


def name_of(model: str | nn.Module) -> str:
    """How a record calls a network: its name, or the class of a module."""
    return model if isinstance(model, str) else type(model).__name__


def environment_record(env: NetworkEnv) -> dict[str, Any]:
    """The environment's arguments, modules and data sets by name, and digests (`DIGESTS`) of what names don't say."""
    names = {"model": name_of(env.arguments["model"]), "data": env.data.name}
    digests = (digest_of(env.given.state_dict()), digest_of_data(env.data))
    record = env.arguments | names | dict(zip(DIGESTS, digests, strict=True))
    record.pop("latencies", None)  # a run folder holds them itself
    return record


def digest_of_data(data: DataSplits) -> str:
    """A digest of the labels, and of the size and normalisation of the images (`DIGESTS`)."""
    labels = {"train": data.train.labels, "search": data.search.labels, "test": data.test.labels}
    known: dict[str, Any] = labels | {"mean": data.mean, "std": data.std, "shape": data.input_shape}
    return digest_of({key: torch.as_tensor(value) for key, value in known.items()})


def environment_arguments(record: dict[str, Any]) -> dict[str, Any]:
    """An `environment_record` without its digests: what `gym.make` takes."""
    return {name: value for name, value in record.items() if name not in DIGESTS}


def common_keys(env: NetworkEnv, plan: Ints) -> dict[str, Any]:
    """What every record of a plan [A] says of it and of the network that it prunes."""
    network, weights = env.network, env.arguments["weights"]
    costs = {"macs_ratio": network.macs, "params_ratio": network.params, "memory_ratio": network.memory}
    return {
        "model": name_of(env.arguments["model"]),
        "weights": None if weights is None else os.fspath(weights),
        "data": env.data.name,
        "widths": plan.tolist(),
        "dense_widths": network.widths.tolist(),
        "group_names": network.group_names,
        **{name: cost(plan) / cost(network.widths) for name, cost in costs.items()},
        "dense_test_accuracy": accuracy(network.model, env.data.test),
    }


def settings_record(env: NetworkEnv, *names: str) -> dict[str, Any]:
    """The arguments `names` of an environment, of what shape its data are, and how they are split and normalised."""
    data = env.data
    shape = {"input_shape": list(data.input_shape), "num_classes": data.num_classes}
    how = {"data_seed": int(data.seed), "mean": list(data.mean), "std": list(data.std), "flip": data.flip}
    return {name: env.arguments[name] for name in names} | shape | how


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    packages = ("torch", "torchvision", "gymnasium", "stable-baselines3", "torch-geometric", "numpy", "gnnrl_gym")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:  # a checkout that is not installed
            found[package] = "unknown"
    return found


def machine() -> str:
    """The processor and the GPU, in words."""
    # a fork of a process that has used a GPU can't, and has not
    usable = torch.cuda.is_available() and not torch.cuda._is_in_bad_fork()
    gpu = f", {torch.cuda.get_device_name()}" if usable else ""
    return f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}"
