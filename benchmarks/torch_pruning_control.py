"""The outside control: Torch-Pruning's global pruning by group magnitude, in the place of a search."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

from torch import nn

from gnnrl_gym import PrunableNetwork
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.evaluation.accuracy import accuracy
from gnnrl_gym.pruning.recalibration import recalibrate

NAME = "torch-pruning"
HALVINGS = 12  # of the interval in which the ratio lies that meets the budget


def control(env: PruneEnv) -> dict[str, Any]:
    """The row of a search comparison: the largest network on Torch-Pruning's way that is within the budget of MACs.

    Its order of channels, one threshold for all of them, and the floor of the environment (Fang et al. 2023, "DepGraph:
    Towards Any Structural Pruning", the library's `MagnitudePruner(global_pruning=True)`). MACs are counted by our
    counter on the network that it built; recalibration and splits are those of the other methods. It follows no zeros
    that a shortcut pads with, and builds broken networks there: layers that write to a residual sum are left whole,
    which is how the literature prunes these networks too.

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: the budget is not of MACs, or even its largest ratio does not meet it.
    """
    import torch_pruning  # noqa: F401  (said before any work starts)

    if tuple(env.budgets) != ("macs",):
        raise ValueError(f"{NAME} prunes to a budget of MACs, not of {env.metric}.")
    x = env.data.train.take(1).tensors()[0]
    dense, whole = copy.deepcopy(env.network.model).cpu().eval(), shared_writers(env.network)
    costs, low, high, found = _costs(dense, x), 0.0, 1.0, None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        pruned = _pruned(dense, x, middle, float(env.arguments["floor"]), whole)
        within = _costs(pruned, x)[0] <= env.budget * costs[0]
        low, high, found = (low, middle, pruned) if within else (middle, high, found)
    if found is None:
        raise ValueError(f"{NAME} does not reach {env.budget:.0%} of the MACs.")
    return _measured(env, found, [now / before for now, before in zip(_costs(found, x), costs, strict=True)])


def shared_writers(network: PrunableNetwork) -> list[str]:
    """Names of the convolutions and linear layers of which some output is added to another layer's, or stays."""
    owners = {
        name: network.groups.owner[f"{name}.weight", 0]
        for name, module in network.model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    writers = Counter(unit for owner in owners.values() for unit in set(owner.tolist()))
    return [name for name, owner in owners.items() if any(unit < 0 or writers[unit] > 1 for unit in owner.tolist())]


def _pruned(dense: nn.Module, x: Any, ratio: float, floor: float, whole: list[str]) -> nn.Module:
    import torch_pruning

    model = copy.deepcopy(dense)
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        x,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=1 - floor,
        ignored_layers=[model.get_submodule(name) for name in whole],
    )
    pruner.step()
    return model.eval()


def _costs(model: nn.Module, x: Any) -> tuple[int, int]:
    """MACs and parameters."""
    network = PrunableNetwork(model, x)
    return network.macs(network.widths), network.params(network.widths)


def _measured(env: PruneEnv, model: nn.Module, shares: list[float]) -> dict[str, Any]:
    given = env.arguments
    recalibrate(model, env.data.train.take(given["recalibration_images"], seed=1).tensors()[0])
    search = accuracy(model, env.data.search.take(given["search_images"]))
    row = {"method": NAME, "seed": 0, "evaluations": 1, "macs_ratio": shares[0], "params_ratio": shares[1]}
    row |= {"search_accuracy": search, "test_accuracy": accuracy(model, env.data.test)}
    return row | {"best_so_far": [search], "widths": None}
