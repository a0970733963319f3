"""`PrunableNetwork`: a network, its channel groups, the cost of any plan, and the smaller network a plan makes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.spaces import GraphInstance
from torch import Tensor, nn

from gnnrl_gym.errors import UnsupportedOperation
from gnnrl_gym.graph.arguments import cloned
from gnnrl_gym.graph.channels import operator_name, propagate
from gnnrl_gym.graph.features import GraphBuilder
from gnnrl_gym.graph.groups import ChannelGroups, Floats, Ints, find_groups
from gnnrl_gym.graph.hierarchy import find_hierarchy
from gnnrl_gym.graph.trace import module_path, named_module, shape_of, source_line, trace
from gnnrl_gym.pruning.attributes import Attributes, attempts, matching_attributes
from gnnrl_gym.pruning.cost import macs_cost, params_cost
from gnnrl_gym.pruning.importance import Batch, importance_scores
from gnnrl_gym.pruning.memory import PeakMemory, peak_memory
from gnnrl_gym.pruning.probe import Probe
from gnnrl_gym.pruning.slimming import SPLITS, Slimmer, literal_home

Plans = npt.ArrayLike
Draw = Callable[[ChannelGroups], Iterator[npt.NDArray[np.bool_]]]  # plans to probe, as units that are kept
PROBES = 16  # plans that a network with literals is checked on; groups of two units agree by chance in every other


class PrunableNetwork:
    """A network whose channel groups can be narrowed.

    Args:
        model: any `nn.Module` that `torch.export` can trace. It is kept as it is, never changed.
        example_input: a tensor, or a tuple of positional arguments. Costs are those of one forward of it, so give a
            batch of one to have them per sample.
        importance: what orders the units of a group: l1, l2, bn-scale, taylor or random.
        batch: (inputs, labels) for ``taylor``.
        strict: raise on an operation without a rule instead of freezing the groups that touch it.

    Attributes:
        widths: units of every channel group, int64 [A]. A plan is a vector of widths between 1 and these.
        importance: score of every unit, float64 [U], groups one after the other.

    Raises:
        UnsupportedOperation: the network can't be traced or copied, or nothing in it can be pruned.
        TypeError, ValueError: no network, weights that are not finite, no example input, an unknown importance.

    Shapes: a plan is [A], or [B, A] for B candidates.
    """

    least = 1  # the smallest width of a group: no layer may be empty
    group = "group"  # what a width belongs to, in messages

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor | tuple[Any, ...],
        importance: str = "l2",
        batch: Batch | None = None,
        strict: bool = False,
    ) -> None:
        self.model = model
        self.example_input = example_input if isinstance(example_input, tuple) else (example_input,)
        self.trace = trace(model, cloned(example_input))
        self.channels = propagate(self.trace, strict)
        self._follow_training_heads(strict)
        self._warn_of_unsupported()
        self._set_groups(find_groups(self.channels))
        self._freeze_what_does_not_adapt()
        if not len(self.widths):
            raise UnsupportedOperation(
                f"{type(model).__name__} has no channel group that can be pruned. Every hidden channel reaches the "
                "output or an operation without a rule (warnings name those), or is one with all others of its layer, "
                "as a view of them makes it."
            )
        self._order_by(importance_scores(model, self.groups, importance, batch))

    def _warn_of_unsupported(self) -> None:
        """Once for an operation: a transformer has dozens of places with the same."""
        kinds: dict[str, list[str]] = {}
        for place in dict.fromkeys(self.channels.unsupported):  # a part that runs twice is named once
            kinds.setdefault(place.partition(" in ")[0], []).append(place)
        for first, *more in kinds.values():
            others = f" and {len(more)} more (channels.unsupported lists them)" if more else ""
            warnings.warn(f"No channel rule for {first}{others}: the groups that touch it are frozen.", stacklevel=3)

    def _follow_training_heads(self, strict: bool) -> None:
        """Heads that only training uses (GoogLeNet's) read channels too: a second trace shows which."""
        buffers = [name for name, b in self.model.named_buffers() if b.is_floating_point() and b.dim()]
        unused = {*dict(self.model.named_parameters()), *buffers} - self.trace.used()
        if not unused:
            return
        # two samples: BatchNorm can't train on one
        args = tuple(torch.cat([a, a]) if isinstance(a, Tensor) and a.dim() else a for a in self.example_input)
        try:
            propagate(trace(self.model, args, training=True), strict, into=self.channels)
        except (UnsupportedOperation, RuntimeError, ValueError) as error:
            warnings.warn(
                f"Parameters or buffers that eval mode does not use ({sorted(unused)[0]} and {len(unused) - 1} more) "
                f"are left as they are, since training mode can't be traced: {str(error)[:300]}",
                stacklevel=3,
            )

    def _order_by(self, importance: Floats) -> None:
        self.importance = importance
        self._rank = _ranks(self.groups, importance)
        self.graph_builder = GraphBuilder(
            find_hierarchy(self.trace, self.channels),
            self.channels,
            self.groups,
            self.macs_terms,
            self.params_terms,
            [name for name, _ in self.model.named_parameters()],
            importance,
        )

    def _set_groups(self, groups: ChannelGroups, attributes: Attributes | None = None) -> None:
        self.groups = groups
        self.widths = groups.widths
        self.slimmer = Slimmer(self.model, self.trace, self.channels, groups, attributes)
        self.macs_terms = macs_cost(self.channels, groups)
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        self.params_terms = params_cost(shapes, groups)

    # ---- cost -----------------------------------------------------------------------------------------------

    def macs(self, widths: Plans) -> Any:
        """Multiply-accumulates of convolutions and matrix products as built: int, or int64 [B] for [B, A]."""
        return _plain(self.macs_terms.total(self._plan(widths)))

    def params(self, widths: Plans) -> Any:
        """Number of parameters: int, or int64 [B] for [B, A]."""
        return _plain(self.params_terms.total(self._plan(widths)))

    def memory(self, widths: Plans) -> Any:
        """Peak bytes of activations during one forward of the example input: int, or int64 [B] for [B, A].

        `gnnrl_gym.pruning.memory` says what exactly is counted.
        """
        return _plain(self._peak_memory.peak(self._plan(widths)))

    @cached_property
    def _peak_memory(self) -> PeakMemory:
        return peak_memory(self.trace, self.groups)

    @property
    def group_names(self) -> list[str]:
        """For each group the first weight that it owns channels of, without ".weight"."""
        names: dict[int, str] = {}
        for (weight, _), owner in self.groups.owner.items():
            for group in np.unique(self.groups.group_of[owner[owner >= 0]]).tolist():
                names.setdefault(group, weight.removesuffix(".weight"))
        return [names[group] for group in range(len(self.widths))]

    def graph(self, widths: Plans, budget: float = 1.0) -> GraphInstance:
        """The hierarchical graph at a plan [A]: nodes [N, F], edges [M, E], edge_links [M, 2].

        The columns are `gnnrl_gym.graph.features.NODE_FEATURES` and `EDGE_FEATURES`; the first A nodes are the
        channel groups. `budget` is shown in the last node feature.
        """
        return self.graph_builder.build(self.checked_one(widths), budget)

    # ---- the pruned network -----------------------------------------------------------------------------------

    def kept(self, widths: Plans) -> npt.NDArray[np.bool_]:
        """Which units a plan [A] keeps: the most important ones of every group, bool [U]."""
        return np.asarray(self._rank < self.checked_one(widths)[self.groups.group_of])

    def slim(self, widths: Plans) -> nn.Module:
        """The physically smaller network, same class as the original."""
        return self.slimmer.slim(self.kept(widths))

    def mask(self, widths: Plans) -> nn.Module:
        """The full-size network in which the removed units contribute nothing."""
        return self.slimmer.mask(self.kept(widths))

    def checked(self, widths: Plans) -> Ints:
        """`widths` as an array int64 [A] or [B, A].

        Raises:
            ValueError: another shape, not integers, or not between 1 and the full widths.
        """
        return self._plan(widths)

    def checked_one(self, widths: Plans) -> Ints:
        """`widths` as one plan, an array int64 [A]; errors as in `checked`."""
        plan = self._plan(widths)
        if plan.ndim != 1:
            raise ValueError(f"One plan [A={len(self.widths)}] at a time, got shape {plan.shape}.")
        return plan

    def _plan(self, widths: Plans) -> Ints:
        try:
            plan = np.asarray(widths)
        except ValueError:  # rows of different lengths
            plan = np.empty(0)
        if plan.ndim not in (1, 2) or plan.shape[-1] != len(self.widths):
            raise ValueError(f"A plan has shape [A={len(self.widths)}] or [B, {len(self.widths)}], got {plan.shape}.")
        if plan.dtype.kind not in "iu":
            raise ValueError(f"Widths are integers, got {plan.dtype}. Round them first.")
        if ((plan < self.least) | (plan > self.widths)).any():
            at = np.argwhere((plan < self.least) | (plan > self.widths))[0, -1]
            why = ": no layer may be empty" if self.least else ""
            raise ValueError(f"Width of {self.group} {at} must be between {self.least} and {self.widths[at]}{why}.")
        return plan.astype(np.int64, copy=False)

    def __reduce__(self) -> Any:
        # a traced graph does not pickle: made again, from the same weights and so the same in all respects
        return _rebuild, (self.model, self.example_input, self.importance, self.graph_builder.static)

    # ---- literals that nobody updates -------------------------------------------------------------------------

    def _freeze_what_does_not_adapt(self) -> None:
        """Prune at random and compare with the mask; what a number in the code breaks is frozen and named."""
        sites = [n for n in self.channels.literals if not self._keeps_itself(n)]
        if not len(self.widths):
            return
        self._noisy = Probe(self.model, self.example_input).in_float64()
        if not self._adapts(sites) and not (self._ties_parts() and self._adapts(sites)):
            self._freeze_broken(sites)
        self._warn_of_training()
        del self._noisy  # as large as the model

    def _adapts(self, sites: list[Any]) -> bool:
        everything = list(range(len(self.widths)))
        return self._probe(everything, _all if sites else _few) or (bool(sites) and self._adapts_by_attributes(sites))

    def _ties_parts(self) -> bool:
        """Equal parts of splits stay equal from now on; whether there are any."""
        for one, other in self.channels.parts:
            self.channels.merge(one, other)
        if self.channels.parts:
            self._set_groups(find_groups(self.channels))
        return bool(self.channels.parts)

    def _warn_of_training(self) -> None:
        """A number of channels that only training uses (noise of a fixed shape) would be met after the whole search."""
        slimmer = Slimmer(self._noisy.dense, self.trace, self.channels, self.groups, self.slimmer.attributes)
        if error := self._noisy.training_error(slimmer, next(_halves_and_ends(self.groups))):
            warnings.warn(
                f"The forward of {type(self.model).__name__} fails in training mode once channels are removed, so the "
                f"pruned network can't be fine-tuned: {error[:300]}. Take numbers of channels from a shape there.",
                stacklevel=4,
            )

    def _freeze_broken(self, sites: list[Any]) -> None:
        everything = range(len(self.widths))
        if not sites and self._noisy.is_random():
            return  # there is nothing to compare
        suspects = self._touching(sites)
        ordered = [*(g for g in everything if g not in suspects), *suspects]
        exact, free = False, ordered
        for plans in (_few, _all):  # few find out most of it, and all have the last word
            if not exact:
                free = self._adapting(ordered, [], plans)
                exact = self._probe(free, _all)
        broken = [g for g in everything if g not in free]
        self._name_broken(broken, sites)
        self._set_groups(self.groups.without(np.array(broken)), self.slimmer.attributes)
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

    def _adapts_by_attributes(self, sites: list[Any]) -> bool:
        """Whether the network adapts once integers that its modules hold follow the channels that they equal. Where
        not all of them do (the size of a head may equal their number by chance), some may."""
        found = matching_attributes(self.model, self.channels, self.groups)
        chosen: Attributes = {}
        for options in attempts(self.model, found, lambda paths: set(self._touching(_inside(sites, paths)))):
            if not options[0].keys() <= chosen.keys():
                chosen |= self._right(options, chosen, sites)
        self.slimmer.attributes = chosen
        return bool(chosen) and self._probe(list(range(len(self.widths))), _all)

    def _right(self, options: list[Attributes], chosen: Attributes, sites: list[Any]) -> Attributes:
        """The first of `options` with which, beside what is `chosen`, all that their modules touch adapts; or none."""
        touched = self._touching(_inside(sites, options[0]))
        for option in options:
            self.slimmer.attributes = chosen | option
            if self._probe(touched, _few):
                return option
        return {}

    def _keeps_itself(self, site: Any) -> bool:
        """Whether the literal is surely updated: by its own module, which was called once where it depends on that.
        That of a split is not: who reads a part may not stand that nothing is left of it."""
        if operator_name(site) in SPLITS:
            return False
        home = literal_home(self.model, module_path(site))
        calls = [module_path(n) for n in self.channels.literals].count(module_path(site))
        return home == "heads" or (home in ("attribute", "resized") and calls == 1)

    def _touching(self, sites: list[Any]) -> list[int]:
        units = [self.groups.values[m][1] for n in sites for m in (n, *n.all_input_nodes) if m in self.groups.values]
        units = [u[u >= 0] for u in units]
        return sorted(set(self.groups.group_of[np.concatenate(units)].tolist())) if units else []

    def _name_broken(self, broken: list[int], sites: list[Any]) -> None:
        guilty = [node for node in sites if set(self._touching([node])) & set(broken)]
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
        if others := [f"'{self.group_names[g]}'" for g in broken if g not in self._touching(guilty)]:
            warnings.warn(
                f"The forward of {type(self.model).__name__} computes with the number of channels of "
                f"{', '.join(others)} (in a factor, a branch or the shape of another tensor): these groups are "
                "frozen. To free them, settle such numbers and branches in __init__.",
                stacklevel=5,
            )

    def _probe(self, chosen: list[int], plans: Draw) -> bool:
        """Whether slim equals mask on `plans` that leave all but the `chosen` groups whole."""
        groups = self.groups.without(np.setdiff1d(np.arange(len(self.widths)), chosen))
        slimmer = Slimmer(self._noisy.dense, self.trace, self.channels, groups, self.slimmer.attributes)
        return all(self._noisy.agrees(slimmer, kept) for kept in plans(groups))


def _all(groups: ChannelGroups) -> Iterator[npt.NDArray[np.bool_]]:
    return chain(_narrow(groups), _halves_and_ends(groups))


def _few(groups: ChannelGroups) -> Iterator[npt.NDArray[np.bool_]]:
    """Enough that numbers of several groups are seldom mistaken for each other."""
    return chain(islice(_halves_and_ends(groups), 3), islice(_narrow(groups), 2))


def _inside(sites: list[Any], paths: Collection[str]) -> list[Any]:
    return [node for node in sites if module_path(node) in paths]


def _narrow(groups: ChannelGroups) -> Iterator[npt.NDArray[np.bool_]]:
    """All groups of one width, so that a number that a forward compares with another one is equal to it; one unit of
    every other group, beside whole ones that keep the activations from being all zero, and then of the others."""
    place = np.arange(len(groups.group_of)) - (np.cumsum(groups.widths) - groups.widths)[groups.group_of]
    for width in (max(groups.widths.min(initial=PROBES) - 1, 1), 1):
        yield np.asarray(place < width)
    for turn in (0, 1):
        yield np.asarray((place < 1) | (groups.group_of % 2 == turn))


def _halves_and_ends(groups: ChannelGroups) -> Iterator[npt.NDArray[np.bool_]]:
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


def _rebuild(
    model: nn.Module, example_input: tuple[Any, ...], importance: Floats, static: npt.NDArray[np.float32]
) -> PrunableNetwork:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when it was made first
        network = PrunableNetwork(model, example_input)
    network._order_by(importance)
    network.graph_builder.static = static  # holds the measured sensitivity
    return network


def _mend(site: Any) -> str:
    """What to write instead of a literal in a forward."""
    name = operator_name(site)
    if name in ("view", "reshape") and len(shape_of(site)) == 2:
        return "To free them, write x.flatten(1)."
    if name in ("view", "reshape", "unflatten", "expand"):
        return "To free them, write -1 in its place, or take it from the shape of this very tensor."
    if name in SPLITS or name == "slice":
        return "To free them, cut equal parts by x.chunk(n, 1), or take the sizes from what the parts go to."
    return "To free them, take the number from a shape, such as x.shape[1], instead of writing it down."


def _ranks(groups: ChannelGroups, scores: Floats) -> Ints:
    """Place of every unit in its group by falling importance, 0 the most important; ties in the network's order."""
    order = np.lexsort((-scores, groups.group_of))
    starts = np.concatenate([[0], np.cumsum(groups.widths)[:-1]])
    rank = np.empty(len(scores), np.int64)
    rank[order] = np.arange(len(scores)) - starts[groups.group_of[order]]
    return rank


def _plain(total: Ints) -> Any:
    return int(total) if total.ndim == 0 else total
