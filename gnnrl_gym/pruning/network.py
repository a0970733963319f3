"""`PrunableNetwork`: a network, its channel groups, the cost of any plan, and the smaller network a plan makes."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.spaces import GraphInstance
from torch import Tensor, nn

from gnnrl_gym.errors import UnsupportedOperation
from gnnrl_gym.graph.arguments import cloned
from gnnrl_gym.graph.channels import Channels, propagate
from gnnrl_gym.graph.features import GraphBuilder
from gnnrl_gym.graph.groups import ChannelGroups, Floats, Ints, Kept, find_groups
from gnnrl_gym.graph.hierarchy import find_hierarchy
from gnnrl_gym.graph.trace import trace
from gnnrl_gym.pruning.adapting import Adapting
from gnnrl_gym.pruning.attributes import Attributes
from gnnrl_gym.pruning.cost import macs_cost, params_cost
from gnnrl_gym.pruning.importance import Batch, importance_scores
from gnnrl_gym.pruning.memory import PeakMemory, peak_memory
from gnnrl_gym.pruning.slimming import Slimmer

Plans = npt.ArrayLike


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
        self.channels = self._propagated(strict)
        self._follow_training_heads(strict)
        self._warn_of_unsupported()
        adapting = Adapting(model, self.trace, self.channels, find_groups(self.channels))
        self._set_groups(*adapting.settled(self.example_input))
        if not len(self.widths):
            raise UnsupportedOperation(
                f"{type(model).__name__} has no channel group that can be pruned. Every hidden channel reaches the "
                "output or an operation without a rule (warnings name those), or is one with all others of its layer, "
                "as a view of them makes it."
            )
        self._order_by(importance_scores(model, self.groups, importance, batch))

    def _propagated(self, strict: bool) -> Channels:
        """Where channels of each convolution group can't go, whole groups may, if each is a head's (EfficientViT)."""
        channels = propagate(self.trace, strict)
        if stuck := _stuck(channels, channels.across):
            others = propagate(self.trace, strict, by_group=stuck)
            channels = propagate(self.trace, strict, by_group=stuck - _stuck(others, stuck))
        return channels

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
            training = trace(self.model, args, training=True)
            propagate(training, strict, into=self.channels)
        except (UnsupportedOperation, RuntimeError, ValueError) as error:
            warnings.warn(
                f"Parameters or buffers that eval mode does not use ({sorted(unused)[0]} and {len(unused) - 1} more) "
                f"are left as they are, since training mode can't be traced: {str(error)[:300]}",
                stacklevel=3,
            )
        else:
            self._warn_of_unreached(unused - training.used())

    def _warn_of_unreached(self, unused: set[str]) -> None:
        """An example leads through one branch of a forward. Layers of another one would be met after the whole search;
        a number that nothing reads, a temperature say, does no harm."""
        layers = [name for name, p in self.model.named_parameters() if name in unused and p.dim() > 1]
        if layers:
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            warnings.warn(
                f"The forward of {type(self.model).__name__} does not reach '{layers[0]}'{more} on the example input: "
                "it stays as it is, and may not fit the pruned network. Where it is needed, give an example that leads "
                "there.",
                stacklevel=4,
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

    def _set_groups(self, groups: ChannelGroups, attributes: Attributes) -> None:
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
        return self.groups.names()

    def graph(self, widths: Plans, budget: float = 1.0) -> GraphInstance:
        """The hierarchical graph at a plan [A]: nodes [N, F], edges [M, E], edge_links [M, 2].

        The columns are `gnnrl_gym.graph.features.NODE_FEATURES` and `EDGE_FEATURES`; the first A nodes are the
        channel groups. `budget` is shown in the last node feature.
        """
        return self.graph_builder.build(self.checked_one(widths), budget)

    # ---- the pruned network -----------------------------------------------------------------------------------

    def kept(self, widths: Plans) -> Kept:
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


def _rebuild(
    model: nn.Module, example_input: tuple[Any, ...], importance: Floats, static: npt.NDArray[np.float32]
) -> PrunableNetwork:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when it was made first
        network = PrunableNetwork(model, example_input)
    network._order_by(importance)
    network.graph_builder.static = static  # holds the measured sensitivity
    return network


def _stuck(channels: Channels, weights: Collection[str]) -> frozenset[str]:
    """Those of `weights` of whose channels all stay, along one of their dimensions."""
    owner = find_groups(channels).owner if weights else {}
    along = {name: [owner[name, dim] for dim in (0, 1) if (name, dim) in owner] for name in weights}
    return frozenset(name for name in weights if any((units < 0).all() for units in along[name]))


def _ranks(groups: ChannelGroups, scores: Floats) -> Ints:
    """Place of every unit in its group by falling importance, 0 the most important; ties in the network's order."""
    order = np.lexsort((-scores, groups.group_of))
    starts = np.concatenate([[0], np.cumsum(groups.widths)[:-1]])
    rank = np.empty(len(scores), np.int64)
    rank[order] = np.arange(len(scores)) - starts[groups.group_of[order]]
    return rank


def _plain(total: Ints) -> Any:
    return int(total) if total.ndim == 0 else total
