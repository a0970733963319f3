"""The hierarchical graph as a `GraphInstance`: topology once, features at any plan."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.spaces import GraphInstance
from torch import fx

from gnnrl_gym.graph.channels import Channels, operator_name
from gnnrl_gym.graph.groups import ChannelGroups, Floats, Ints
from gnnrl_gym.graph.hierarchy import Edge, Hierarchy
from gnnrl_gym.graph.trace import shape_of

if TYPE_CHECKING:
    from gnnrl_gym.pruning.cost import Cost

LEVELS = ("decision", "operation", "layer", "block", "network")

OPERATORS = {
    "conv": ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    "grouped conv": (),  # told apart by its groups
    "linear": ("linear", "addmm", "matmul", "mm", "bmm", "scaled_dot_product_attention"),
    "norm": ("batch_norm", "layer_norm", "group_norm", "instance_norm"),
    "activation": ("relu", "relu6", "hardtanh", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "softmax"),
    "pool": ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean"),
    "add": ("add", "sub"),
    "gate": ("mul", "div"),
    "concat": ("cat", "stack"),
    "shape": ("view", "reshape", "flatten", "transpose", "permute", "slice", "pad", "chunk", "split", "select"),
    "other": (),
}  # fmt: skip
_OPERATOR_OF = {name: i for i, names in enumerate(OPERATORS.values()) for name in names}

STATIC = (
    *(f"level: {level}" for level in LEVELS),
    *(f"operator: {operator}" for operator in OPERATORS),
    "kernel", "stride", "convolution groups", "resolution", "depth", "members", "multiplicity",
    "importance 10 %", "importance 25 %", "importance 50 %", "importance 75 %", "sensitivity", "sensitivity rank",
)  # fmt: skip
DYNAMIC = (
    "log channels in", "log channels out", "share kept in", "share kept out", "share of MACs", "share of parameters",
    "MACs of the network", "parameters of the network", "budget",
)  # fmt: skip
NODE_FEATURES = STATIC + DYNAMIC
EDGE_FEATURES = ("dataflow", "membership", "writes", "reads", "log channels")

_MAX_LOG_CHANNELS = 12  # 4,096 channels


class GraphBuilder:
    """Graph observations of one network.

    Nodes: decision nodes (channel groups) first, then operations, layers, blocks, the network. Edges: dataflow inside
    each of the three lower levels, membership from a node to its parent one level up and from a layer to the channel
    groups that it writes or reads. Only features change with the widths.

    Args:
        hierarchy, channels, groups: what the graph side found.
        macs, params: costs whose terms are `channels.products` and `parameters`.
        parameters: names of the parameters.
        importance: score of every unit, [U].
    """

    def __init__(
        self,
        hierarchy: Hierarchy,
        channels: Channels,
        groups: ChannelGroups,
        macs: Cost,
        params: Cost,
        parameters: list[str],
        importance: Floats,
    ) -> None:
        self.hierarchy, self.channels, self.groups = hierarchy, channels, groups
        self.macs, self.params = macs, params
        self.counts = [
            len(groups.widths),
            len(hierarchy.operations),
            len(hierarchy.block_of),
            len(hierarchy.motif_of),
            1,
        ]
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.nodes = int(self.starts[-1])
        self._index = {node: i for i, node in enumerate(hierarchy.operations)}
        self._belongs = self._membership_matrix()
        self.static = self._static(importance)
        self._macs_of, self._params_of = self._cost_matrices(parameters)
        self._rows_in, self._rows_out = self._channel_rows()
        self._dense = self._measure(groups.widths)
        self.edges, self.edge_links = self._edges()

    # ---- observation ----------------------------------------------------------------------------------------

    def build(self, widths: Ints, budget: float = 1.0) -> GraphInstance:
        """Nodes float32 [N, F], edges float32 [M, E], edge_links int64 [M, 2] at `widths` [A]."""
        nodes = np.empty((self.nodes, len(NODE_FEATURES)), np.float32)
        nodes[:, : len(STATIC)] = self.static
        now, dense = self._measure(widths), self._dense
        total_macs, total_params = dense[2].sum(), dense[3].sum()
        with np.errstate(divide="ignore"):
            nodes[:, len(STATIC) + 0] = np.log2(np.maximum(now[0], 1)) / _MAX_LOG_CHANNELS
            nodes[:, len(STATIC) + 1] = np.log2(np.maximum(now[1], 1)) / _MAX_LOG_CHANNELS
        nodes[:, len(STATIC) + 2] = now[0] / np.maximum(dense[0], 1)
        nodes[:, len(STATIC) + 3] = now[1] / np.maximum(dense[1], 1)
        # square roots: the shares of single operations are small, and still have to be told apart
        nodes[:, len(STATIC) + 4] = np.sqrt(self._macs_of @ now[2] / max(total_macs, 1))
        nodes[:, len(STATIC) + 5] = np.sqrt(self._params_of @ now[3] / max(total_params, 1))
        nodes[:, len(STATIC) + 6] = now[2].sum() / max(total_macs, 1)
        nodes[:, len(STATIC) + 7] = now[3].sum() / max(total_params, 1)
        nodes[:, len(STATIC) + 8] = budget
        # copies: an agent may keep what it was given
        return GraphInstance(nodes, self.edges.copy(), self.edge_links.copy())

    def _measure(self, widths: Ints) -> tuple[Floats, Floats, Ints, Ints]:
        """Channels in and out of every node, MACs and parameters of every term."""
        w = np.append(widths, 1).astype(np.float64)
        return self._rows_in @ w, self._rows_out @ w, self.macs.terms(widths), self.params.terms(widths)

    def set_sensitivity(self, loss_rise: Floats) -> None:
        """Fill in the groups' sensitivity [A]: the loss rise when only this group is halved."""
        rise = np.maximum(loss_rise, 0)
        rank = np.argsort(np.argsort(loss_rise)) / max(len(rise) - 1, 1)
        decisions = slice(0, self.counts[0])
        self.static[decisions, STATIC.index("sensitivity")] = rise / (1 + rise)
        self.static[decisions, STATIC.index("sensitivity rank")] = 2 * rank - 1

    # ---- topology -------------------------------------------------------------------------------------------

    def _node(self, level: str, index: int) -> int:
        return int(self.starts[LEVELS.index(level)]) + index

    def _membership(self) -> dict[Edge, tuple[float, float]]:
        """Edges to the parents, with (writes, reads)."""
        h, edges = self.hierarchy, {}
        for op, layer in enumerate(h.layer_of):
            edges[self._node("operation", op), self._node("layer", layer)] = (0.0, 0.0)
        for layer, block in enumerate(h.block_of):
            edges[self._node("layer", layer), self._node("block", block)] = (0.0, 0.0)
        for block in range(len(h.motif_of)):
            edges[self._node("block", block), self._node("network", 0)] = (0.0, 0.0)
        for layer, group, writes, reads in self._touches():
            edge = (self._node("layer", layer), group)
            known = edges.get(edge, (0.0, 0.0))
            edges[edge] = (max(known[0], writes), max(known[1], reads))
        return edges

    def _touches(self) -> list[tuple[int, int, float, float]]:
        """(layer, group, writes, reads) of every weighted operation."""
        found = []
        for product in self.channels.products:
            if product.node not in self._index:
                continue
            layer = self.hierarchy.layer_of[self._index[product.node]]
            for place, key in enumerate(product.factors):
                owner = self.groups.owner[key]
                for group in np.unique(self.groups.group_of[owner[owner >= 0]]):
                    found.append((layer, int(group), float(place == 0), float(place == 1)))
        return found

    def _edges(self) -> tuple[Any, Any]:
        links, features = [], []
        channels = np.log2(np.maximum(self._dense[1], 1)) / _MAX_LOG_CHANNELS
        for level, edges in zip(LEVELS[1:4], self.hierarchy.edges, strict=True):
            for a, b in edges:
                links.append((self._node(level, a), self._node(level, b)))
                features.append((1.0, 0.0, 0.0, 0.0, channels[links[-1][0]]))
        for link, (writes, reads) in self._membership().items():
            links.append(link)
            features.append((0.0, 1.0, writes, reads, channels[link[0]]))
        return np.array(features, np.float32), np.array(links, np.int64)

    # ---- features -------------------------------------------------------------------------------------------

    def _membership_matrix(self) -> Floats:
        """``M[node, op]`` = 1 where the operation lies in the node (itself, its layer, block, network, or a layer
        that the channel group touches)."""
        h, ops = self.hierarchy, np.arange(self.counts[1])
        layers = np.array(h.layer_of)
        blocks = np.array(h.block_of)[layers]
        belongs = np.zeros((self.nodes, self.counts[1]))
        belongs[self._node("operation", 0) + ops, ops] = 1
        belongs[self._node("layer", 0) + layers, ops] = 1
        belongs[self._node("block", 0) + blocks, ops] = 1
        belongs[-1] = 1
        for layer, group, _, _ in self._touches():
            belongs[group, layers == layer] = 1
        return belongs

    def _cost_matrices(self, parameters: list[str]) -> tuple[Floats, Floats]:
        """Matrices [N, T]: terms to the nodes that hold their operation."""
        of_term = {name: [] for name in parameters}  # type: dict[str, list[int]]
        for node, op in self._index.items():
            for source in node.all_input_nodes:
                weight = self.channels.values.get(source)
                if (name := getattr(weight, "name", None)) in of_term:
                    of_term[name].append(op)
        params = np.zeros((self.counts[1], len(parameters)))
        for term, ops in enumerate(of_term.values()):
            params[ops[:1], term] = 1
        macs = np.zeros((self.counts[1], len(self.channels.products)))
        for term, product in enumerate(self.channels.products):
            macs[self._index[product.node], term] = 1
        return self._belongs @ macs, self._belongs @ params

    def _channel_rows(self) -> tuple[Floats, Floats]:
        """Affine channel counts [N, A + 1] into and out of every node; a group's are its width."""
        size = self.counts[0] + 1
        ins, outs = np.zeros((self.counts[1], size)), np.zeros((self.counts[1], size))
        for node, op in self._index.items():
            source = next((n for n in node.all_input_nodes if n in self.groups.values), None)
            ins[op] = self._row(source, size) if source is not None else self._constant(node, size)
            outs[op] = self._row(node, size)
        head, tail = self._ends()
        decisions = np.eye(self.counts[0], size)
        return np.concatenate([decisions, ins[head]]), np.concatenate([decisions, outs[tail]])

    def _row(self, node: fx.Node, size: int) -> Floats:
        if node in self.groups.values:
            return self.groups.kept_row(self.groups.values[node][1]).astype(float)
        shape = shape_of(node)
        return _constant_row(shape[1] if len(shape) > 1 else 1, size)

    def _constant(self, node: fx.Node, size: int) -> Floats:
        shape = shape_of(node.all_input_nodes[0]) if node.all_input_nodes else ()
        return _constant_row(shape[1] if len(shape) > 1 else 1, size)

    def _ends(self) -> tuple[Ints, Ints]:
        """First and last operation of every node above the decisions."""
        above = self._belongs[self.counts[0] :] > 0
        return above.argmax(1), above.shape[1] - 1 - above[:, ::-1].argmax(1)

    def _static(self, importance: Floats) -> Any:
        static = np.zeros((self.nodes, len(STATIC)), np.float32)
        for level in range(len(LEVELS)):
            static[self.starts[level] : self.starts[level + 1], level] = 1
        first = len(LEVELS) + len(OPERATORS)
        share = self._belongs / np.maximum(self._belongs.sum(1, keepdims=True), 1)
        described = np.array([_describe(node) for node in self.hierarchy.operations])
        static[:, len(LEVELS) : first + 4] = share @ described
        depth = np.linspace(-1, 1, self.counts[1])
        static[:, first + 4] = share @ depth
        static[:, first + 5] = np.log2(1 + self._belongs.sum(1)) / 10
        static[:, first + 6] = np.log2(self._multiplicity()) / 10
        static[: self.counts[0], first + 7 : first + 11] = self._importance_quantiles(importance)
        return static

    def _multiplicity(self) -> Floats:
        """How many alike: units of a group, instances of a block's motif."""
        result = np.ones(self.nodes)
        result[: self.counts[0]] = self.groups.widths
        motifs = np.array(self.hierarchy.motif_of)
        blocks = slice(int(self.starts[3]), int(self.starts[4]))
        result[blocks] = np.bincount(motifs)[motifs]
        return result

    def _importance_quantiles(self, importance: Floats) -> Floats:
        """[A, 4], see `importance_quantiles`."""
        rows = [importance_quantiles(importance[self.groups.group_of == group]) for group in range(self.counts[0])]
        return np.array(rows)


def importance_quantiles(scores: Floats) -> Floats:
    """Quantiles [4] of a group's scores [units] relative to their mean, less 1, in [-1, 1]: is there a weak tail?"""
    relative = np.quantile(scores, [0.1, 0.25, 0.5, 0.75]) / max(abs(scores.mean()), 1e-12) - 1
    return np.asarray(np.clip(relative, -1, 1))


def _constant_row(count: int, size: int) -> Floats:
    row = np.zeros(size)
    row[-1] = count
    return row


def _describe(node: fx.Node) -> list[float]:
    """Operator one-hot, then log kernel, log stride, log convolution groups, log resolution."""
    name, operator = operator_name(node), [0.0] * len(OPERATORS)
    args = dict(enumerate(node.args))
    convolution = name.startswith("conv")
    groups = int(args.get(6, 1)) if convolution else 1  # type: ignore[arg-type]
    kind = list(OPERATORS).index("other")
    kind = _OPERATOR_OF.get(name, kind) if groups == 1 else list(OPERATORS).index("grouped conv")
    operator[kind] = 1.0
    weight: Any = args.get(1)
    kernel = shape_of(weight)[-1] if convolution else 1
    stride: Any = args.get(3, [1]) if convolution else [1]
    stride = stride[0] if isinstance(stride, (list, tuple)) else stride
    shape = shape_of(node)
    resolution = shape[-1] if len(shape) > 2 else 1
    return [*operator, math.log2(kernel) / 4, math.log2(stride) / 4, math.log2(groups) / 10, math.log2(resolution) / 8]
