"""Literals that nobody updates: numbers of channels in the code of a forward, found by pruning at random and comparing
with the mask. Those that modules hold are brought in line; what the others break is frozen and named."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from itertools import chain, islice

import numpy as np
from torch import fx, nn

from gnnrl_gym.errors import UnsupportedOperation
from gnnrl_gym.graph.channels import Channels, operator_name
from gnnrl_gym.graph.groups import ChannelGroups, Kept, find_groups
from gnnrl_gym.graph.trace import Trace, module_path, named_module, shape_of, source_line
from gnnrl_gym.pruning.attributes import Attributes, attempts, matching_attributes
from gnnrl_gym.pruning.probe import Inputs, Probe
from gnnrl_gym.pruning.slimming import SPLITS, Slimmer, literal_home

Draw = Callable[[ChannelGroups], Iterator[Kept]]  # plans to probe, as units that are kept
PROBES = 16  # plans that a network with literals is checked on; groups of two units agree by chance in every other


class Adapting:
    """Finds the groups and attributes with which a slim network computes what the masked one does.

    Attributes:
        groups: those that adapt, as far as is known.
        attributes: of modules, which have to follow them.
        sites: literals that may be numbers of channels and that no module surely updates.
    """

    def __init__(self, model: nn.Module, trace: Trace, channels: Channels, groups: ChannelGroups) -> None:
        self.model, self.trace, self.channels, self.groups = model, trace, channels, groups
        self.attributes: Attributes = {}
        self.sites = [node for node in channels.literals if not self._keeps_itself(node)]

    def settled(self, example_input: Inputs) -> tuple[ChannelGroups, Attributes]:
        """Prune at random and compare with the mask; what a number in the code breaks is frozen and named.

        Raises:
            UnsupportedOperation: something else differs.
        """
        if len(self.groups.widths):
            self.probe = Probe(self.model, example_input).in_float64()  # as large as the model, and gone with this
            if not self._adapts() and not (self._ties_parts() and self._adapts()):
                self._freeze_broken()
            self._warn_of_training()
        return self.groups, self.attributes

    def _adapts(self) -> bool:
        everything = list(range(len(self.groups.widths)))
        if self._probe(everything, _all if self.sites else _few):
            return True
        return bool(self.sites) and self._adapts_by_attributes()

    def _ties_parts(self) -> bool:
        """Equal parts of splits stay equal from now on; whether there are any."""
        for one, other in self.channels.parts:
            self.channels.merge(one, other)
        if self.channels.parts:
            self.groups = find_groups(self.channels)
        return bool(self.channels.parts)

    def _warn_of_training(self) -> None:
        """A number of channels that only training uses (noise of a fixed shape) would be met after the whole search."""
        slimmer = Slimmer(self.probe.dense, self.trace, self.channels, self.groups, self.attributes)
        if error := self.probe.training_error(slimmer, next(_halves_and_ends(self.groups))):
            warnings.warn(
                f"The forward of {type(self.model).__name__} fails in training mode once channels are removed, so the "
                f"pruned network can't be fine-tuned: {error[:300]}. Take numbers of channels from a shape there.",
                stacklevel=4,
            )

    def _freeze_broken(self) -> None:
        everything = range(len(self.groups.widths))
        if not self.sites and self.probe.is_random():
            warnings.warn(
                f"{type(self.model).__name__} gives something else each time, so its pruned networks could not be "
                "compared with it. Draw random numbers by torch.",
                stacklevel=4,
            )
            return
        suspects = self._touching(self.sites)
        ordered = [*(g for g in everything if g not in suspects), *suspects]
        exact, free = False, ordered
        for plans in (_few, _all):  # few find out most of it, and all have the last word
            if not exact:
                free = self._adapting(ordered, [], plans)
                exact = self._probe(free, _all)
        broken = [g for g in everything if g not in free]
        self._name_broken(broken)
        self.groups = self.groups.without(np.array(broken))
        if not exact:
            raise UnsupportedOperation(
                f"{type(self.model).__name__} computes something else once channels are removed, and no channel "
                "group explains it. Check for channel numbers written into its forward."
            )

    def _adapting(self, groups: list[int], free: list[int], plans: Draw) -> list[int]:
        """`free` and those of `groups`, one after the other, that adapt together with what is free already."""
        if not groups or self._probe([*free, *groups], plans):
            return [*free, *groups]
        half = len(groups) // 2
        return self._adapting(groups[half:], self._adapting(groups[:half], free, plans), plans) if half else free

    def _adapts_by_attributes(self) -> bool:
        """Whether the network adapts once integers that its modules hold follow the channels that they equal. Where
        not all of them do (the size of a head may equal their number by chance), some may."""
        found = matching_attributes(self.model, self.channels, self.groups)
        chosen: Attributes = {}
        for options in attempts(self.model, found, lambda paths: set(self._touching(_inside(self.sites, paths)))):
            if not options[0].keys() <= chosen.keys():
                chosen |= self._right(options, chosen)
        self.attributes = chosen
        return bool(chosen) and self._probe(list(range(len(self.groups.widths))), _all)

    def _right(self, options: list[Attributes], chosen: Attributes) -> Attributes:
        """The first of `options` that, together with what is `chosen`, makes all groups adapt that their modules touch;
        empty if there is no such option."""
        touched = self._touching(_inside(self.sites, options[0]))
        for option in options:
            self.attributes = chosen | option
            if self._probe(touched, _few):
                return option
        return {}

    def _keeps_itself(self, site: fx.Node) -> bool:
        """Whether the literal is surely updated: by its own module, which was called once where it depends on that.
        That of a split is not: who reads a part may not stand that nothing is left of it."""
        if operator_name(site) in SPLITS:
            return False
        home = literal_home(self.model, module_path(site))
        calls = [module_path(n) for n in self.channels.literals].count(module_path(site))
        return home == "heads" or (home in ("attribute", "resized") and calls == 1)

    def _touching(self, sites: Collection[fx.Node]) -> list[int]:
        units = [self.groups.values[m][1] for n in sites for m in (n, *n.all_input_nodes) if m in self.groups.values]
        units = [u[u >= 0] for u in units]
        return sorted(set(self.groups.group_of[np.concatenate(units)].tolist())) if units else []

    def _name_broken(self, broken: list[int]) -> None:
        guilty = [node for node in self.sites if set(self._touching([node])) & set(broken)]
        lines: dict[tuple[str, str], dict[str, None]] = {}  # to the modules whose forward it is, each once
        for node in guilty:
            lines.setdefault((source_line(node), _mend(node)), {})[named_module(self.model, node)] = None
        for (line, mend), (where, *more) in lines.items():
            and_more = f" and {len(more)} more" if more else ""
            warnings.warn(
                f"The forward of {where}{and_more} ({line}) holds a number of channels that can't be updated: "
                f"the groups that touch it are frozen. {mend}",
                stacklevel=5,
            )
        names, explained = self.groups.names(), self._touching(guilty)
        if others := [f"'{names[g]}'" for g in broken if g not in explained]:
            warnings.warn(
                f"The forward of {type(self.model).__name__} computes with the number of channels of "
                f"{', '.join(others)} (in a factor, a branch or the shape of another tensor): these groups are "
                "frozen. To free them, settle such numbers and branches in __init__.",
                stacklevel=5,
            )

    def _probe(self, chosen: list[int], plans: Draw) -> bool:
        """Whether slim equals mask on `plans` that leave all but the `chosen` groups whole."""
        groups = self.groups.without(np.setdiff1d(np.arange(len(self.groups.widths)), chosen))
        slimmer = Slimmer(self.probe.dense, self.trace, self.channels, groups, self.attributes)
        return all(self.probe.agrees(slimmer, kept) for kept in plans(groups))


def _all(groups: ChannelGroups) -> Iterator[Kept]:
    return chain(_narrow(groups), _halves_and_ends(groups))


def _few(groups: ChannelGroups) -> Iterator[Kept]:
    """Enough that numbers of several groups are seldom mistaken for each other."""
    return chain(islice(_halves_and_ends(groups), 3), islice(_narrow(groups), 2))


def _inside(sites: Collection[fx.Node], paths: Collection[str]) -> list[fx.Node]:
    return [node for node in sites if module_path(node) in paths]


def _narrow(groups: ChannelGroups) -> Iterator[Kept]:
    """All groups of one width, so that a number that a forward compares with another one is equal to it; one unit of
    every other group, beside whole ones that keep the activations from being all zero, and then of the others."""
    place = np.arange(len(groups.group_of)) - (np.cumsum(groups.widths) - groups.widths)[groups.group_of]
    for width in (max(groups.widths.min(initial=PROBES) - 1, 1), 1):
        yield np.asarray(place < width)
    for turn in (0, 1):
        yield np.asarray((place < 1) | (groups.group_of % 2 == turn))


def _halves_and_ends(groups: ChannelGroups) -> Iterator[Kept]:
    """About half of the units, by chance, and then the other half; all but the first and all but the last of each
    group. So every unit goes, and all that can."""
    rng, group_of = np.random.default_rng(0), groups.group_of
    first, last = np.cumsum(groups.widths) - groups.widths, np.cumsum(groups.widths) - 1
    halves = [rng.random(len(group_of)) < 0.5 for _ in range(PROBES // 2 - 1)]
    ends = [np.isin(np.arange(len(group_of)), end) for end in (first, last)]
    for kept in [*halves, *(~half for half in halves), *ends]:
        empty = np.bincount(group_of, kept, len(groups.widths)) == 0
        kept[(first + rng.integers(groups.widths))[empty]] = True  # never an empty layer
        yield kept


def _mend(site: fx.Node) -> str:
    """What to write instead of a literal in a forward."""
    name = operator_name(site)
    if name in ("view", "reshape") and len(shape_of(site)) == 2:
        return "To free them, write x.flatten(1)."
    if name in ("view", "reshape", "unflatten", "expand"):
        return "To free them, write -1 in its place, or take it from the shape of this very tensor."
    if name in SPLITS or name == "slice":
        return "To free them, cut equal parts by x.chunk(n, 1), or take the sizes from what the parts go to."
    return "To free them, take the number from a shape, such as x.shape[1], instead of writing it down."
