"""Primitive operations -> layers -> blocks -> whole network, found from the graph alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from gnnrl_gym.graph.channels import Channels, operator_name
from gnnrl_gym.graph.trace import Trace, shape_of

Edge = tuple[int, int]

# bookkeeping that moves or computes nothing worth a node
_SILENT = {"getitem", "contiguous", "clone", "alias", "detach", "dropout", "feature_dropout", "to", "_to_copy"}
MAX_BLOCK = 16  # layers; a motif larger than this is a stage, not a block
MIN_COUNT = 3  # a subgraph that occurs twice may do so by chance: stages do, blocks occur more often


@dataclass(frozen=True)
class Hierarchy:
    """Which operation belongs to which layer, which layer to which block, and the dataflow edges of each level.

    Attributes:
        operations: graph nodes in order.
        layer_of: layer of every operation. A layer is a weighted operation, or one where dataflow meets or parts,
            with the chain of operations that follows it.
        block_of: block of every layer. A block is an instance of a motif: a subgraph of layers that recurs.
        motif_of: motif of every block, numbered by first appearance.
        edges: dataflow edges between operations, between layers, between blocks.
    """

    operations: list[fx.Node]
    layer_of: list[int]
    block_of: list[int]
    motif_of: list[int]
    edges: tuple[list[Edge], list[Edge], list[Edge]]


def find_hierarchy(trace: Trace, channels: Channels) -> Hierarchy:
    """The hierarchy of a traced network."""
    operations, op_edges = _operations(trace)
    weighted = {product.node for product in channels.products}
    layer_of = _layers(operations, op_edges, weighted)
    layer_edges = _lift(op_edges, layer_of)
    names: dict[int, list[str]] = defaultdict(list)
    for node, layer in zip(operations, layer_of, strict=True):
        names[layer].append(_label(node, trace))
    labels = ["|".join(names[layer]) for layer in range(len(names))]
    block_of, motif_of = find_motifs(labels, layer_edges)
    return Hierarchy(operations, layer_of, block_of, motif_of, (op_edges, layer_edges, _lift(layer_edges, block_of)))


def _operations(trace: Trace) -> tuple[list[fx.Node], list[Edge]]:
    operations: list[fx.Node] = []
    origin: dict[fx.Node, list[int]] = {}  # operations that a node's value comes from
    edges: dict[Edge, None] = {}
    for node in trace.operations():
        sources = sorted({o for n in node.all_input_nodes for o in origin.get(n, ())})
        if operator_name(node) in _SILENT:
            origin[node] = sources
            continue
        edges.update(dict.fromkeys((s, len(operations)) for s in sources))
        origin[node] = [len(operations)]
        operations.append(node)
    return operations, list(edges)


def _layers(operations: list[fx.Node], edges: list[Edge], weighted: set[fx.Node]) -> list[int]:
    sources, readers = _neighbours(edges)
    layer_of: list[int] = []
    count = 0
    for i, node in enumerate(operations):
        chained = node not in weighted and len(sources[i]) == 1 and len(readers[sources[i][0]]) == 1
        layer_of.append(layer_of[sources[i][0]] if chained else count)
        count += not chained
    return layer_of


def _neighbours(edges: Iterable[Edge]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    sources: dict[int, list[int]] = defaultdict(list)
    readers: dict[int, list[int]] = defaultdict(list)
    for a, b in edges:
        sources[b].append(a)
        readers[a].append(b)
    return sources, readers


def _lift(edges: Iterable[Edge], parent: list[int]) -> list[Edge]:
    """Edges between the parents, each once, in order."""
    return list(dict.fromkeys((parent[a], parent[b]) for a, b in edges if parent[a] != parent[b]))


def _label(node: fx.Node, trace: Trace) -> str:
    """What makes two operations alike: the operator and its kernel, not its name and not how many channels."""
    weights = [shape_of(n) for n in node.all_input_nodes if n.name in trace.tensors]
    return operator_name(node) + ("x".join(map(str, weights[0][2:])) if weights else "")


def find_motifs(labels: list[str], edges: list[Edge], largest: int = MAX_BLOCK) -> tuple[list[int], list[int]]:
    """Recurring subgraphs of a labelled DAG: the most frequent pair of neighbours is contracted, again and again
    (pair encoding, Larsson and Moffat 2000, on a graph), until no pair of different labels recurs (`MIN_COUNT`).

    Args:
        labels: label of every node.
        edges: directed edges (a, b), acyclic.
        largest: nodes a motif may hold.

    Returns:
        The motif instance of every node, and the motif of every instance. A node that joins no motif is its own.
    """
    cluster = list(range(len(labels)))
    label = dict(enumerate(labels))
    size = dict.fromkeys(cluster, 1)
    live = list(edges)
    while True:
        pairs = _contractible(live, label, size, largest)
        counts = Counter({pair: len(_disjoint(found)) for pair, found in pairs.items()})
        pair, count = max(counts.items(), key=lambda item: item[1], default=(None, 0))
        if pair is None or count < MIN_COUNT:
            return _number(cluster, label)
        merged = {b: a for a, b in _disjoint(pairs[pair])}
        for b, a in merged.items():
            label[a], size[a] = f"({pair[0]}>{pair[1]})", size[a] + size[b]
        cluster = [merged.get(c, c) for c in cluster]
        live = _lift(live, [merged.get(i, i) for i in range(len(labels))])


def _contractible(
    edges: list[Edge], label: dict[int, str], size: dict[int, int], largest: int
) -> dict[tuple[str, str], list[Edge]]:
    """Edges by their pair of labels, where contraction leaves the graph acyclic. Repetition of one label is not
    structure: it stays dataflow between blocks."""
    sources, readers = _neighbours(edges)
    pairs: dict[tuple[str, str], list[Edge]] = defaultdict(list)
    for a, b in edges:
        fits = label[a] != label[b] and size[a] + size[b] <= largest
        if fits and (len(readers[a]) == 1 or len(sources[b]) == 1):
            pairs[label[a], label[b]].append((a, b))
    return pairs


def _disjoint(edges: list[Edge]) -> list[Edge]:
    used: set[int] = set()
    chosen = []
    for a, b in edges:
        if a not in used and b not in used:
            used |= {a, b}
            chosen.append((a, b))
    return chosen


def _number(cluster: list[int], label: dict[int, str]) -> tuple[list[int], list[int]]:
    instance = {c: i for i, c in enumerate(dict.fromkeys(cluster))}
    motif = {text: i for i, text in enumerate(dict.fromkeys(label[c] for c in instance))}
    return [instance[c] for c in cluster], [motif[label[c]] for c in instance]
