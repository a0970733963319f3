"""`SparseNetwork`: weights set to zero one by one, in blocks, or N of every M, by the same plans as channel groups."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from gnnrl_gym.errors import UnsupportedOperation
from gnnrl_gym.graph.arguments import cloned
from gnnrl_gym.graph.channels import Channels, Weight, operator_name, propagate
from gnnrl_gym.graph.features import GraphBuilder, importance_quantiles
from gnnrl_gym.graph.groups import ChannelGroups, Floats, Ints, Kept, find_groups
from gnnrl_gym.graph.hierarchy import find_hierarchy
from gnnrl_gym.graph.trace import Trace, module_path, trace
from gnnrl_gym.pruning.cost import Cost, macs_cost
from gnnrl_gym.pruning.granularity import CHANNELS, Granularity, WeightMasker
from gnnrl_gym.pruning.importance import Batch
from gnnrl_gym.pruning.network import Plans, PrunableNetwork

WEIGHTED = ("conv1d", "conv2d", "conv3d", "linear")


class SparseNetwork(PrunableNetwork):
    """A network whose layers lose weights rather than channels: the same plans, costs, graph and masks as
    `PrunableNetwork`, with one decision node per convolution or linear layer, the output layer among them.

    A unit is what `Granularity` says; a width is how many units of a layer stay as they are. The smallest go first:
    by magnitude, a tile by the l2 norm of the entries that go with it (Han et al. 2015; per layer, as in Yu et al.
    2022, where the ratio of a layer is the action too).

    Costs are honest: `params` counts the entries that are not removed, biases and norms included. `macs` is that of
    the dense network whatever the plan: dense kernels multiply by zero, and nothing here runs others. A budget has to
    count `params`.

    A layer used twice is one node. Layers without a whole tile (2:4 in a depthwise convolution), transposed
    convolutions and embeddings stay dense.

    Args:
        model, example_input: as for `PrunableNetwork`; `model` is kept as it is, never changed.
        granularity: ``unstructured``, ``block4x1``, ``2:4`` and the like.

    Attributes:
        widths: units of every layer, int64 [A].
        least: the smallest width of any layer: 1, or 0 for N:M, where a layer without a dense tile is not empty but
            what hardware takes.

    Raises:
        ValueError: unknown granularity.
        UnsupportedOperation: the network can't be traced, or no layer holds a whole tile.
    """

    group = "layer"

    def __init__(self, model: nn.Module, example_input: Tensor | tuple[Any, ...], granularity: str) -> None:
        self.granularity, form = granularity, Granularity.parse(granularity)
        self.model = model
        self.example_input = example_input if isinstance(example_input, tuple) else (example_input,)
        self.trace = trace(model, cloned(example_input))
        self.channels = propagate(self.trace)
        parameters = dict(model.named_parameters())
        layers = _layers(self.trace, self.channels, parameters)
        _warn_of_computed(self.trace, granularity)
        self._nodes = {name: nodes for name, nodes in layers.items() if form.units(tuple(parameters[name].shape))}
        if not self._nodes:
            raise UnsupportedOperation(
                f"{type(model).__name__} has no convolution or linear layer with a whole unit of {granularity!r}."
            )
        units = {name: form.units(tuple(parameters[name].shape)) for name in self._nodes}
        self.widths = np.array(list(units.values()), np.int64)
        self.least = 0 if form.stay else 1
        self.slimmer = WeightMasker(model, form, units)  # type: ignore[assignment]
        self._set_costs(form, parameters)
        self._order(form, parameters)

    def _set_costs(self, form: Granularity, parameters: dict[str, nn.Parameter]) -> None:
        self.groups = _unpruned(find_groups(self.channels), self.widths)
        self.macs_terms = macs_cost(self.channels, self.groups)
        rows, each = np.zeros((len(self.widths) + 1, len(parameters))), form.rows * form.columns - form.stay
        for term, (name, parameter) in enumerate(parameters.items()):
            rows[-1, term] = parameter.numel()
            if name in self._nodes:
                layer = list(self._nodes).index(name)
                rows[layer, term], rows[-1, term] = each, parameter.numel() - each * self.widths[layer]
        ones = np.zeros_like(rows)
        ones[-1] = 1
        self.params_terms = Cost(np.ones(len(parameters), np.int64), rows, ones)

    def _order(self, form: Granularity, parameters: dict[str, nn.Parameter]) -> None:
        ranks, quantiles = [], []
        for name in self._nodes:
            scores = form.scores(parameters[name])
            ranks.append(_rank(scores))
            quantiles.append(importance_quantiles(scores.double().numpy()))
        self._ranks = ranks
        self.graph_builder = _LayerGraphBuilder(self, list(parameters), np.array(quantiles))

    @property
    def group_names(self) -> list[str]:
        """The layers, without ".weight"."""
        return [name.removesuffix(".weight") for name in self._nodes]

    def kept(self, widths: Plans) -> Kept:
        """Which units a plan [A] leaves as they are: the largest of every layer, bool [U]."""
        return np.concatenate([r < width for r, width in zip(self._ranks, self.checked_one(widths), strict=True)])

    def zeros_held(self, module: nn.Module, kept: Kept) -> contextlib.AbstractContextManager[None]:
        """``with network.zeros_held(module, network.kept(plan)): finetune(module, ...)``; see `WeightMasker`."""
        return self.slimmer.zeros_held(module, kept)  # type: ignore[attr-defined,no-any-return]

    def __reduce__(self) -> Any:
        # as PrunableNetwork: a traced graph does not pickle
        return _rebuild, (self.model, self.example_input, self.granularity, self.graph_builder.static)


def make_network(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...],
    granularity: str = CHANNELS,
    importance: str = "l2",
    batch: Batch | None = None,
) -> PrunableNetwork:
    """A `PrunableNetwork` for granularity ``channels``, else a `SparseNetwork`.

    Raises:
        ValueError: unknown granularity or importance; a `SparseNetwork` knows the importance l2 (magnitude) alone.
    """
    if granularity == CHANNELS:
        return PrunableNetwork(model, example_input, importance, batch)
    if importance != "l2":
        raise ValueError(f"granularity={granularity!r} orders weights by magnitude: importance must be 'l2'.")
    return SparseNetwork(model, example_input, granularity)


class _LayerGraphBuilder(GraphBuilder):
    """The graph whose decision nodes are layers: each is tied to the operations that use its weight."""

    def __init__(self, network: SparseNetwork, parameters: list[str], quantiles: Floats) -> None:
        self._nodes, self._quantiles = network._nodes, quantiles  # before the rest: it asks for them
        super().__init__(
            find_hierarchy(network.trace, network.channels), network.channels, network.groups,
            network.macs_terms, network.params_terms, parameters, np.zeros(0),
        )  # fmt: skip

    def _touches(self) -> list[tuple[int, int, float, float]]:
        found = []
        for decision, nodes in enumerate(self._nodes.values()):
            for node in nodes:  # a weight ties what is read to what is written
                found.append((self.hierarchy.layer_of[self._index[node]], decision, 1.0, 1.0))
        return found

    def _importance_quantiles(self, importance: Floats) -> Floats:
        return self._quantiles


def _layers(trace: Trace, channels: Channels, parameters: dict[str, nn.Parameter]) -> dict[str, list[fx.Node]]:
    """Weight of every convolution and linear layer -> the operations that use it."""
    found: dict[str, list[fx.Node]] = {}
    for node in trace.operations():
        source: Any = node.args[1] if operator_name(node) in WEIGHTED else None
        weight = channels.values.get(source)
        if isinstance(weight, Weight) and source.name in trace.tensors and weight.name in parameters:
            found.setdefault(weight.name, []).append(node)
    return found


def _warn_of_computed(trace: Trace, granularity: str) -> None:
    """Warn of weights that are computed from parameters, as a parametrization does: they are not pruned."""
    fixed: set[fx.Node] = set()  # what depends on parameters and buffers alone
    left: list[str] = []
    for node in trace.graph.nodes:
        sources = node.all_input_nodes
        if node.name in trace.tensors or (sources and all(source in fixed for source in sources)):
            fixed.add(node)
        elif node.op == "call_function" and operator_name(node) in WEIGHTED:
            weight = node.args[1]
            if weight in fixed and weight.name not in trace.tensors:
                left.append(module_path(node) or "the network's own forward")
    if left:
        warnings.warn(
            f"{granularity} pruning leaves {', '.join(dict.fromkeys(left))} dense: the weights there are computed from "
            "parameters. Where a parametrization does that, torch.nn.utils.parametrize.remove_parametrizations makes "
            "them plain.",
            stacklevel=4,
        )


def _unpruned(groups: ChannelGroups, widths: Ints) -> ChannelGroups:
    """All channels stay; plans have the shape of `widths`."""
    owner = {key: np.full_like(units, -1) for key, units in groups.owner.items()}
    values = {node: (dim, np.full_like(units, -1)) for node, (dim, units) in groups.values.items()}
    return ChannelGroups(widths, np.zeros(0, np.int64), owner, values)


def _rank(scores: Tensor) -> npt.NDArray[np.int32]:
    """Place of every unit by falling score, 0 the largest; ties in the order of the weight."""
    rank = torch.empty(len(scores), dtype=torch.int32)
    rank[scores.argsort(descending=True, stable=True)] = torch.arange(len(scores), dtype=torch.int32)
    return rank.numpy()


def _rebuild(model: nn.Module, example_input: tuple[Any, ...], granularity: str, static: Any) -> SparseNetwork:
    network = SparseNetwork(model, example_input, granularity)
    network.graph_builder.static = static  # holds the measured sensitivity
    return network
