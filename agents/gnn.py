"""The multi-stage graph neural network, a feature extractor for any Stable-Baselines3 algorithm.

After Yu, Mazaheri, Jannesari, "Topology-Aware Network Pruning using Multi-stage Graph Embedding and
Reinforcement Learning" (ICML 2022): the graph is read level by level, message passing inside a level and
pooling into the next. Beyond the paper, edge features take part and every decision node keeps an embedding.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

with warnings.catch_warnings():
    # importing it uses torch.jit.script, whose end torch announces: nothing that our users can do about
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
    from torch_geometric.nn import GINEConv
    from torch_geometric.utils import scatter


class GraphBatch(NamedTuple):
    """A padded batch of `B` graphs as one disjoint graph of `n` nodes and `m` edges, without padding.

    Nodes are sorted by rank, the order in which a level is read: levels 1, 2, ..., L-1, and 0 at the end.
    """

    nodes: Tensor  # [n, F]
    edges: Tensor  # [m, E]
    links: Tensor  # [2, m], source and target
    graph: Tensor  # [n], the graph a node belongs to
    rank: Tensor  # [n], ascending
    position: Tensor  # [B * max_nodes], the row of a padded node in `nodes`


def disjoint_graph(observations: dict[str, Tensor], levels: int) -> GraphBatch:
    """Join the graphs of a `PadGraph` batch, whose entries all have a leading batch dimension `B`.

    Raises:
        ValueError: with several levels, the first features of a node are not the one-hot code of a single level.
    """
    node_mask = observations["node_mask"].bool()
    size = node_mask.shape[1]
    slot = node_mask.flatten().nonzero().squeeze(1)
    nodes = observations["nodes"].flatten(0, 1)[slot]
    level = _level(nodes[:, :levels]) if levels > 1 else torch.zeros_like(slot)
    rank, order = ((level - 1) % levels).sort(stable=True)
    position = slot.new_zeros(node_mask.numel())
    position[slot[order]] = torch.arange(len(slot), device=slot.device)

    graph, edge = observations["edge_mask"].bool().nonzero(as_tuple=True)
    links = observations["edge_links"][graph, edge].long() + graph[:, None] * size
    edges = observations["edges"][graph, edge]
    return GraphBatch(nodes[order], edges, position[links].T, slot[order] // size, rank, position)


def _level(one_hot: Tensor) -> Tensor:
    """The level [n] of every node, from the columns [n, levels] that say it."""
    if ((one_hot != 0) & (one_hot != 1)).any() or (one_hot.sum(1) != 1).any():
        raise ValueError(
            f"the first {one_hot.shape[1]} columns of the node features must be the one-hot level of the node. Graphs "
            "must reach the policy as PadGraph gives them: use VecNormalize with norm_obs=False."
        )
    return one_hot.argmax(dim=1)


def linear(layer: Any, x: Tensor) -> Tensor:
    """`layer(x)` [n, out] of any linear layer, for an `x` [n, in] of many rows, in up to four blocks of rows.

    Of one product of many rows and few columns MKL keeps half of four threads busy, and with very few columns it
    takes up to ten times as long for the weights' gradient as for the same sums with the weights transposed.
    """
    blocks = math.gcd(len(x), 4)
    weight = layer.weight.t().contiguous().expand(blocks, -1, -1)
    return torch.baddbmm(layer.bias, x.reshape(blocks, -1, x.shape[1]), weight).flatten(0, 1)


class EdgeConv(GINEConv):
    """GINEConv (Hu et al. 2020, "Strategies for pre-training graph neural networks"), means instead of sums."""

    def __init__(self, hidden: int, edge_features: int) -> None:
        super().__init__(nn.Linear(hidden, hidden), edge_dim=edge_features, aggr="sum")

    def forward(self, x: tuple[Tensor, Tensor], links: Tensor, edges: Tensor) -> Tensor:
        """Embeddings [n, hidden] from those of the sources and the targets, `links` [2, m] and edge features [m, E]."""
        targets = x[1]
        share = 1 / links[1].bincount(minlength=len(targets)).clamp(min=1).to(targets.dtype)
        # the mean of the messages, in one pass with what it is added to: most of the time goes into moving memory
        x_in = torch.addcmul(targets, self.propagate(links, x=x, edge_attr=edges), share[:, None])
        return linear(self.nn, x_in)

    def aggregate(self, inputs: Tensor, index: Tensor, ptr: Any = None, dim_size: int | None = None) -> Tensor:
        """Sums [n, hidden] of the messages [m, hidden] by target, `index` [m].

        On a GPU that has to be deterministic this sorts the messages, and GINEConv's own way all of their entries.
        """
        return inputs.new_zeros(dim_size or 0, inputs.shape[1]).index_add_(0, index, inputs)

    def message(self, x_j: Tensor, edge_attr: Tensor) -> Tensor:
        """Messages [m, hidden] of the edges, from their sources [m, hidden], a copy, and features [m, E]."""
        return x_j.add_(linear(self.lin, edge_attr)).relu_()


class Stage(nn.Module):
    """Reads one level: encode its nodes, pool their members, pass messages along its dataflow edges.

    Dataflow is directed, so each direction has weights of its own. Means and LayerNorm, never batch
    statistics: a graph's embedding must not depend on the graphs it is batched with.
    """

    def __init__(self, features: int, edge_features: int, hidden: int, rounds: int, members: bool, whole: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, hidden))
        self.pool = EdgeConv(hidden, edge_features) if members else None
        self.whole = nn.Linear(hidden, hidden) if whole else None
        self.forwards = nn.ModuleList(EdgeConv(hidden, edge_features) for _ in range(rounds))
        self.backwards = nn.ModuleList(EdgeConv(hidden, edge_features) for _ in range(rounds))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(rounds))

    def forward(
        self,
        nodes: Tensor,
        below: Tensor,
        members: tuple[Tensor, Tensor],
        flow: tuple[Tensor, Tensor],
        whole: Tensor | None,
    ) -> Tensor:
        """Embeddings [n, hidden] of the level's `nodes` [n, F].

        `below` [k, hidden] are the nodes read before; `members` and `flow` are (links [2, m], edge
        features [m, E]), the first from `below` into this level, the second inside it; `whole`
        [n, hidden] is the embedding of the graph that each node belongs to.
        """
        first, activation, last = self.encoder
        x = linear(last, activation(linear(first, nodes)))
        if self.pool is not None:
            x = x + self.pool((below, x), *members)
        if self.whole is not None:
            x = x + self.whole(whole)
        for along, against, norm in zip(self.forwards, self.backwards, self.norms, strict=True):
            x = norm(x + (along((x, x), *flow) + against((x, x), flow[0].flip(0), flow[1])).relu_())
        return x


class MultiStageGNN(BaseFeaturesExtractor):
    """Embeds every decision node and the whole graph, for graphs of any size and topology.

    Levels are read bottom to top, level 0 (the decision nodes) last: a decision node receives what its
    members give and the embedding of the whole graph, the mean over the nodes of the top level. With
    `levels=1` every node is of level 0 and the whole is the mean over all of them. An edge that points
    from a later level to an earlier one has no part.

    Args:
        observation_space: the `Dict` of `gnnrl_gym.wrappers.PadGraph`.
        hidden: width `H` of every embedding.
        levels: levels of the hierarchy; above 1 the first columns of the node features are the one-hot
            level. Default: what the space of `PadGraph` says, 1 where it says nothing.
        rounds: rounds of message passing on each level.

    Raises:
        TypeError: the space is not that of `PadGraph`.
        ValueError: `levels` is below 1, or more than there are node features. From `forward`: masks, links or levels
            that something between `PadGraph` and the policy has changed, or a decision without a node.
    """

    def __init__(
        self, observation_space: spaces.Dict, hidden: int = 64, levels: int | None = None, rounds: int = 2
    ) -> None:
        _check_padded(observation_space)
        levels = int(getattr(observation_space, "levels", 1)) if levels is None else levels
        decisions, features, edge_features = (
            (observation_space[key].shape or (0,))[-1] for key in ("decision_mask", "nodes", "edges")
        )
        if not 1 <= levels <= max(features, 1):
            raise ValueError(f"levels={levels}, but its one-hot has to fit the node features' {features} columns.")
        super().__init__(observation_space, features_dim=(decisions + 1) * hidden)
        self.hidden, self.levels = hidden, levels
        self.stages = nn.ModuleList(
            Stage(features, edge_features, hidden, rounds, members=rank > 0, whole=0 < rank == levels - 1)
            for rank in range(levels)
        )

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Features [B, (max_decisions + 1) * H]: the decision nodes (padding 0), then the whole graph."""
        size = len(observations["nodes"])
        # Plans that are compared with each other mostly come from one state: it is read once.
        if size > 1 and all(torch.equal(part, part[:1].expand_as(part)) for part in observations.values()):
            return self._features({key: part[:1] for key, part in observations.items()}).expand(size, -1)
        return self._features(observations)

    def _features(self, observations: dict[str, Tensor]) -> Tensor:
        _check_masks(observations)
        batch = disjoint_graph(observations, self.levels)
        read, pooled = self._embed(batch, graphs=len(observations["nodes"]))
        mask = observations["decision_mask"].bool()
        graph, decision = mask.nonzero(as_tuple=True)
        decisions = pooled.new_zeros(*mask.shape, self.hidden)
        x, rows = _rows(read, batch.position[graph * observations["nodes"].shape[1] + decision])
        decisions[graph, decision] = x[rows]
        return torch.cat([decisions.flatten(1), pooled], dim=1)

    def split_features(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Split features into decision embeddings [B, max_decisions, H] and the pooled one [B, H]."""
        return split_features(features, self.hidden)

    def _embed(self, batch: GraphBatch, graphs: int) -> tuple[list[Tensor], Tensor]:
        """Embeddings of the nodes [n, H], level by level in the order of the batch, and of the graphs [graphs, H]."""
        read = [batch.nodes.new_zeros(0, self.hidden)]
        pooled = batch.nodes.new_zeros(graphs, self.hidden)
        source, target = batch.rank[batch.links]
        counts, start = torch.bincount(batch.rank, minlength=self.levels).tolist(), 0
        for rank, (count, stage) in enumerate(zip(counts, self.stages, strict=True)):
            here = slice(start, start + count)
            links, edges = _select(batch, (target == rank) & (source < rank))
            below, first = _rows(read, links[0])
            members = torch.stack([first, links[1] - start]), edges
            links, edges = _select(batch, (target == rank) & (source == rank))
            whole = pooled[batch.graph[here]] if stage.whole is not None else None
            level = stage(batch.nodes[here], below, members, (links - start, edges), whole)
            if rank == max(self.levels - 2, 0):  # the top level
                pooled = scatter(level, batch.graph[here], dim_size=graphs, reduce="mean")
            read.append(level)
            start += count
        return read, pooled


def _check_padded(space: spaces.Space[Any]) -> None:
    shapes = {key: part.shape or () for key, part in space.spaces.items()} if isinstance(space, spaces.Dict) else {}
    nodes, edges, decisions = (shapes.get(f"{what}_mask", ())[:1] for what in ("node", "edge", "decision"))
    features, edge_features = (shapes.get(what, ())[1:2] for what in ("nodes", "edges"))
    expected = {
        "nodes": nodes + features, "edges": edges + edge_features, "edge_links": (*edges, 2),
        "node_mask": nodes, "edge_mask": edges, "decision_mask": decisions,
    }  # fmt: skip
    if shapes != expected:  # stacked frames would be read as other graphs, and an entry more, the time say, not at all
        raise TypeError(
            "The graph policies read padded graphs as PadGraph gives them: wrap the environment with "
            f"agents.make_sb3_env, and put what else they should see into the features. Got {space}."
        )


def _check_masks(observations: dict[str, Tensor]) -> None:
    for key in ("node_mask", "edge_mask", "decision_mask"):
        mask = observations[key]
        if ((mask != 0) & (mask != 1)).any():  # normalised masks and links would be read as some other graph
            raise ValueError(
                f"{key} holds something else than 0 and 1. Graphs must reach the policy as PadGraph gives them: "
                "use VecNormalize with norm_obs=False."
            )
    nodes, decisions = (observations[key].sum(1) for key in ("node_mask", "decision_mask"))
    if (decisions > nodes).any():  # it would read padding, or a node of another graph
        raise ValueError(
            f"a graph has {int(nodes[decisions > nodes][0])} nodes, but its action {int(decisions.max())} components: "
            "component i acts on node i, so there must be a node for each, and those come first"
        )
    links, real = observations["edge_links"], observations["edge_mask"].bool()
    wrong = (links != links.long()) | (links < 0) | (links >= nodes[:, None, None])
    if (wrong.any(2) & real).any():
        raise ValueError(
            "edge_links hold something else than nodes of their graph. Graphs must reach the policy as PadGraph gives "
            "them: use VecNormalize with norm_obs=False."
        )


def split_features(features: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """Split features [B, (D + 1) * hidden] into decisions [B, D, hidden] and pooled [B, hidden]."""
    embeddings = features.unflatten(1, (-1, hidden))
    return embeddings[:, :-1], embeddings[:, -1]


def _select(batch: GraphBatch, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Links and features of some of the edges."""
    chosen = mask.nonzero().squeeze(1)
    return batch.links[:, chosen], batch.edges[chosen]


def _rows(read: list[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """The levels that hold some rows of all that is read, as one tensor, and the rows in it.

    Mostly that is one level, and no copy: the lowest is larger than all the others, and only the next one reads it.
    """
    if not len(rows):
        return read[0][:0], rows
    ends = list(accumulate(map(len, read)))
    first, last = (bisect_right(ends, int(row)) for row in (rows.min(), rows.max()))
    held = read[first : last + 1]
    return held[0] if first == last else torch.cat(held), rows - (ends[first] - len(read[first]))
