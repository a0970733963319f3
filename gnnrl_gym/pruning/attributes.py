"""Numbers of channels that modules hold as integers (``self.num_heads``), or several as a tuple or list
(``self.split_sizes``), found by value: `slim` brings them in line.

Which attribute a literal of the graph came from can't be seen in a trace. One that equals the number is a guess, which
`PrunableNetwork` checks by probing before it relies on it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from itertools import combinations, product
from typing import Any

import numpy as np
from torch import fx, nn

from gnnrl_gym.graph.channels import Channels, operator_name
from gnnrl_gym.graph.groups import ChannelGroups, Ints
from gnnrl_gym.graph.trace import module_path

Attributes = dict[str, tuple[str, ...]]  # path of a module -> names

Numbers = int | tuple[int, ...]

_SIZED = ("view", "reshape", "_unsafe_view", "unflatten", "expand", "slice", "split", "split_with_sizes")
_MOST = 4  # attributes of one module that are tried in every combination


def matching_attributes(model: nn.Module, channels: Channels, groups: ChannelGroups) -> Attributes:
    """The attributes of every module that equal a number of channels in one of its own literals, or the numbers of all
    parts of a split."""
    everything = np.ones(len(groups.group_of), bool)
    found = {}
    for path, numbers in _numbers(channels, groups, everything).items():
        own = vars(model.get_submodule(path))
        names = tuple(name for name, value in own.items() if _plain(value) in numbers)
        if names:
            found[path] = names
    return found


def attempts(
    model: nn.Module, found: Attributes, touched: Callable[[Collection[str]], set[int]]
) -> Iterator[list[Attributes]]:
    """What may be tried, one list after the other: for a class of modules; for those of it that hold the same numbers,
    since it may stand in several places; for two classes, where the one needs the other's, as the channels that a layer
    makes and the size of the parts that they are split into.

    Args:
        touched: the groups that meet literals of the modules of some paths.
    """
    classes = choices(model, found)
    for options in classes:
        yield options
        alike: dict[tuple[Numbers | None, ...], list[str]] = defaultdict(list)
        for path in options[0]:
            alike[tuple(_plain(getattr(model.get_submodule(path), name)) for name in found[path])].append(path)
        for paths in alike.values() if len(alike) > 1 else ():
            yield [{path: option[path] for path in paths} for option in options]
    for one, other in combinations(classes, 2):
        if touched(one[0]) & touched(other[0]):
            yield [a | b for a, b in sorted(product(one, other), key=lambda both: sum(map(_names, both)))]


def _names(option: Attributes) -> int:
    return len(next(iter(option.values())))


def choices(model: nn.Module, found: Attributes) -> list[list[Attributes]]:
    """For each class of modules, what may be tried: each attribute that was found, then ever more of
    them: one that equals the number by chance stays as it is."""
    by_class: dict[tuple[type, tuple[str, ...]], list[str]] = defaultdict(list)
    for path, names in found.items():
        by_class[type(model.get_submodule(path)), names].append(path)
    return [
        [
            dict.fromkeys(paths, chosen)
            for count in range(1, len(names) + 1)
            if len(names) <= _MOST or count == len(names)
            for chosen in combinations(names, count)
        ]
        for (_, names), paths in by_class.items()
    ]


def set_attributes(
    model: nn.Module, attributes: Attributes, channels: Channels, groups: ChannelGroups, kept: np.ndarray
) -> None:
    """Give the `attributes` of `model` (already slim) the numbers that the `kept` units (bool [U]) make true."""
    numbers = _numbers(channels, groups, kept) if attributes else {}
    for path, names in attributes.items():
        module = model.get_submodule(path)
        for name in names:
            value = getattr(module, name)
            now = list(numbers.get(path, {}).get(_plain(value) or 0, ()))
            if len(now) == 1:  # else two groups share the number, and the attribute can't follow both
                (new,) = now
                setattr(module, name, list(new) if isinstance(value, list) and isinstance(new, tuple) else new)


def _plain(value: Any) -> Numbers | None:
    """A number, or several, as `_numbers` has them; None for anything else."""
    if type(value) in (tuple, list) and value and all(type(x) is int for x in value):
        return tuple(value)
    return value if type(value) is int else None


def _numbers(channels: Channels, groups: ChannelGroups, kept: np.ndarray) -> dict[str, dict[Numbers, set[Numbers]]]:
    """Path of a module -> number of channels in its literals, in each part of a split and in all -> how many are
    `kept`."""
    found: dict[str, dict[Numbers, set[Numbers]]] = defaultdict(lambda: defaultdict(set))
    for node in channels.literals:
        numbers, parts = found[module_path(node)], _counted(node, groups)
        left = [int(np.append(kept, True)[owner].sum()) for owner in parts]
        movable = [bool((owner >= 0).any()) for owner in parts]
        for owner, now, moves in zip(parts, left, movable, strict=True):
            if moves:
                numbers[len(owner)].add(now)
        if len(parts) > 1 and any(movable):
            numbers[tuple(map(len, parts))].add(tuple(left))
            numbers[sum(map(len, parts))].add(sum(left))
    return found


def _counted(node: fx.Node, groups: ChannelGroups) -> list[Ints]:
    """The owners of the channels that a size in the arguments of `node` may count."""
    if operator_name(node) not in _SIZED:
        return []
    source = node.all_input_nodes[0] if operator_name(node).startswith("split") else node
    if source not in groups.values:
        return []
    dim, owner = groups.values[source]
    if source is node:
        return [owner]
    return list(np.split(owner, np.cumsum([part.shape[dim] for part in node.meta["val"]])[:-1]))
