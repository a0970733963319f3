"""Where the channels of a candidate have to be gated, so that the dense weights compute its slim network.

What a removed channel holds does not matter as long as nobody reads it, and often it is zero anyway.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import fx

from gnnrl_gym.graph.channels import Weight, operator_name
from gnnrl_gym.graph.groups import Ints
from gnnrl_gym.graph.trace import module_path, shape_of
from gnnrl_gym.pruning.network import PrunableNetwork

_READERS = ("linear", *(f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3)))
_ZEROS_OF_ZEROS = {
    "relu", "relu6", "leaky_relu", "elu", "selu", "silu", "gelu", "mish", "hardswish", "tanh", "dropout", "cat", "mean",
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "flatten",
    "view", "transpose", "permute", "slice", "chunk", "split", "split_with_sizes", "getitem", "clone", "contiguous",
}  # fmt: skip


def norms(network: PrunableNetwork) -> Iterator[tuple[str, Ints]]:
    """Path of every BatchNorm that runs, and the unit of each of its channels, -1 for no unit."""
    for node in network.trace.operations():
        if operator_name(node) == "batch_norm":
            mean: Weight = network.channels.values[node.args[3]]  # type: ignore[index]
            units = network.groups.owner.get((mean.name, 0), np.full(mean.shape, -1))
            yield mean.name.removesuffix(".running_mean"), units


def gated(network: PrunableNetwork) -> Iterator[tuple[str, Ints, int]]:
    """Path of every layer that would read removed channels, the unit of each of its inputs, and where in
    [K, N, ...] they lie."""
    zeroed = _zeroed(network)
    for node in network.trace.operations():
        units = read_units(network, node)
        if units is not None and node.args[0] not in zeroed:
            yield module_path(node), units, -1 if operator_name(node) == "linear" else 2


def read_units(network: PrunableNetwork, node: fx.Node) -> Ints | None:
    """Units of the channels that a layer mixes, where any can be removed. (Where a convolution loses whole groups, they
    reach nothing that stays.)"""
    weight = network.channels.values.get(node.args[1]) if operator_name(node) in _READERS else None  # type: ignore[arg-type]
    if not isinstance(weight, Weight):
        return None
    units = network.groups.owner.get(weight.key(int("transpose" not in operator_name(node))))
    if units is None or not (units >= 0).any():
        return None
    inputs = shape_of(node.all_input_nodes[0])[-1 if operator_name(node) == "linear" else 1]
    return np.tile(units, inputs // len(units))  # the same of every convolution group


def _zeroed(network: PrunableNetwork) -> set[fx.Node]:
    """Values that are zero wherever a channel is removed: BatchNorm's, and what makes zeros of zeros."""
    values = network.groups.values
    # those of frozen channels are no zeros, and a single one may be broadcast over removed ones
    norms = {node for node in values if operator_name(node) == "batch_norm" and (values[node][1] >= 0).any()}
    found: set[fx.Node] = set()
    for node in network.trace.operations():
        name, sources = operator_name(node), [source in found for source in node.all_input_nodes]
        keeps = name in _ZEROS_OF_ZEROS or (name == "add" and len(sources) == 2)
        keeps |= (name == "hardtanh" and node.args[1:] == (0.0, 6.0)) or (name == "pad" and len(node.args) == 2)
        if node in norms or (keeps and all(sources)) or (name == "mul" and any(sources)):
            found.add(node)
    return found
