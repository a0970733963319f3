"""Channel classes -> channel groups: which units exist, and which channels of which weight each owns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx

from gnnrl_gym.graph.channels import FROZEN, Channels, Key, along, compress, constant, first, varying

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Kept = npt.NDArray[np.bool_]  # [U]: which units stay, numbered group by group


@dataclass(frozen=True)
class ChannelGroups:
    """The removable units of a network, numbered group by group.

    Attributes:
        widths: units of every group, int64 [A].
        group_of: group of every unit, int64 [U].
        owner: for each dimension of a weight, the unit that owns each index, -1 where none does (it stays), [size].
        values: for each node, the dimension that its channels lie along and their units, likewise. Nodes whose
            channels lie along no single dimension are absent.
    """

    widths: Ints
    group_of: Ints
    owner: dict[Key, Ints]
    values: dict[fx.Node, tuple[int, Ints]]

    def kept_row(self, owner: Ints) -> Ints:
        """Row r [A + 1] such that ``r[:-1] @ widths + r[-1]`` channels of `owner` are kept at `widths`.

        All units of a group own the same number of channels anywhere, by construction.
        """
        units = owner[owner >= 0]
        row = np.zeros(len(self.widths) + 1, np.int64)
        row[:-1] = np.bincount(self.group_of[units], minlength=len(self.widths)) // self.widths
        row[-1] = len(owner) - len(units)
        return row

    def without(self, groups: Ints) -> ChannelGroups:
        """The same network with `groups` (indices) frozen."""
        stays = ~np.isin(np.arange(len(self.widths)), groups)
        new_unit = np.where(stays[self.group_of], np.cumsum(stays[self.group_of]) - 1, -1)

        def renumber(owner: Ints) -> Ints:
            return np.append(new_unit, -1)[owner]

        group_of = (np.cumsum(stays) - 1)[self.group_of[stays[self.group_of]]]
        return ChannelGroups(
            self.widths[stays],
            group_of,
            {key: renumber(owner) for key, owner in self.owner.items()},
            {node: (dim, renumber(owner)) for node, (dim, owner) in self.values.items()},
        )

    def names(self) -> list[str]:
        """For each group the first weight that it owns channels of, without ".weight"."""
        names: dict[int, str] = {}
        for (weight, _), owner in self.owner.items():
            for group in np.unique(self.group_of[owner[owner >= 0]]).tolist():
                names.setdefault(group, weight.removesuffix(".weight"))
        return [names[group] for group in range(len(self.widths))]


def find_groups(channels: Channels) -> ChannelGroups:
    """Units are the classes of merged ids. Units that own equally many channels of the same weights are exchangeable:
    they form one group, in the order of the network."""
    label = _classes(channels)
    keys = list(channels.bound)
    owners = [label[ids.numpy()] for ids in channels.bound.values()]
    groups = _exchangeable(owners, len(label))
    unit, group_of = _number(groups, len(label))
    owner = {key: unit[owned] for key, owned in zip(keys, owners, strict=True)}
    values = dict(_channel_vectors(channels, unit[label]))
    return ChannelGroups(np.bincount(group_of, minlength=len(groups)).astype(np.int64), group_of, owner, values)


def _classes(channels: Channels) -> Ints:
    """Class of every id; class 0 is frozen."""
    whole = [ids for (name, _), ids in channels.bound.items() if name in channels.whole]
    pairs = [(a.numpy(), b.numpy()) for a, b in channels.merges]
    pairs += [(ids.numpy(), np.full(ids.numel(), FROZEN)) for ids in [*channels.frozen, *whole]]
    label = connected(pairs, channels.count)
    return np.where(label == label[FROZEN], 0, label + (label < label[FROZEN]))


def connected(pairs: list[tuple[Ints, Ints]], count: int) -> Ints:
    """Class of each of `count` ids where those of `pairs` are one, [count]."""
    first = np.concatenate([np.zeros(0, np.int64), *(a for a, _ in pairs)])
    second = np.concatenate([np.zeros(0, np.int64), *(b for _, b in pairs)])
    graph = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _exchangeable(owners: list[Ints], count: int) -> list[Ints]:
    """Classes with the same number of channels in every weight dimension, at least two of them, in network order."""
    # a class's counts are compared by a random 64-bit hash of them: exact but for odds of 2^-64 a pair
    secret = np.random.default_rng(0).integers(1, 2**63 - 1, size=len(owners), dtype=np.uint64)
    signature = np.zeros(count + 1, np.uint64)
    first_seen: dict[int, None] = {}
    for number, owned in zip(secret, owners, strict=True):
        np.add.at(signature, owned, number)
        first_seen.update(dict.fromkeys(owned[owned > 0].tolist()))
    groups: dict[int, list[int]] = {}
    for label in first_seen:
        groups.setdefault(int(signature[label]), []).append(label)
    return [np.array(members) for members in groups.values() if len(members) > 1]


def _number(groups: list[Ints], count: int) -> tuple[Ints, Ints]:
    """Unit of every class (-1: none), group of every unit."""
    order = np.concatenate([*groups, np.zeros(0, np.int64)])
    unit = np.full(count + 1, -1, np.int64)
    unit[order] = np.arange(len(order))
    return unit, np.repeat(np.arange(len(groups)), [len(g) for g in groups]).astype(np.int64)


def _channel_vectors(channels: Channels, unit_of: Ints) -> Iterator[tuple[fx.Node, tuple[int, Ints]]]:
    units = torch.from_numpy(unit_of)
    for node, ids in channels.values.items():
        if node.op != "call_function" or not isinstance(ids, Tensor) or not ids.dim():
            continue
        small = first(ids, constant(ids))
        owners = compress(units[small].expand(ids.shape) if small.dim() else units[small])
        # a single-channel tensor varies nowhere: its channels lie along dimension 1
        dim = next(iter(varying(owners)), min(1, ids.dim() - 1))
        vector = along(owners, dim)
        if vector is not None:
            yield node, (dim, vector.numpy())
