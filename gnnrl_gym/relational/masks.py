"""From a graph to masks: nodes own blocks of channels, an edge lets two blocks exchange messages."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gnnrl_gym.checks import check_choice

SCOPES = ("hidden", "network")
Ints = NDArray[np.int64]


def owners(channels: int, nodes: int) -> Ints:
    """The node that owns each channel, int64 [channels]: contiguous blocks whose sizes differ by one at most.

    Raises:
        ValueError: fewer channels than nodes, so that a node would own none.
    """
    if channels < nodes:
        raise ValueError(
            f"{channels} channels are too few for {nodes} nodes: use fewer nodes or wider layers; an image's own "
            "channels stay out of it with scope='hidden' (--scope hidden)."
        )
    return np.arange(channels) * nodes // channels


def linked(graph: nx.Graph) -> NDArray[np.bool_]:
    """Adjacency [n, n] with a self-loop on every node."""
    edges = nx.to_numpy_array(graph, nodelist=range(len(graph)), dtype=bool, weight=None)  # whatever attributes it has
    return edges | np.eye(len(graph), dtype=bool)


def block_mask(graph: nx.Graph, outputs: int, inputs: int) -> Tensor:
    """bool [outputs, inputs]: whether a channel may read another, from 0-based nodes' blocks (You et al. 2020,
    section 2.2).

    Raises:
        ValueError: as `owners`.
    """
    rows, columns = owners(outputs, len(graph)), owners(inputs, len(graph))
    return torch.from_numpy(linked(graph)[np.ix_(rows, columns)])


class Mask(nn.Module):
    """Parametrization of a weight [outputs, inputs, ...]: zero where `mask` [outputs, inputs, 1, ...] is."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight. Its gradient is masked too, so what starts at zero stays zero."""
        return weight * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is stored when a weight is assigned."""
        return weight * self.mask


@dataclass(frozen=True)
class Masking:
    """Which layers of a network a graph masks, and how many weights that leaves. Make it with `Masking.of`.

    Attributes:
        names: masked linear and convolution layers, as `named_modules` calls them; of layers that share a weight, the
            first.
        shapes: (outputs, inputs, weights per pair of channels) of each.
        dense: weights (no biases) that stay whole and count for the density all the same.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int, int], ...]
    dense: int

    @classmethod
    def of(cls, model: nn.Module, scope: str = "hidden") -> Masking:
        """The layers of `model` that masks are for.

        The last weighted layer is the classifier and stays dense; grouped convolutions do, too.

        Args:
            model: its linear and convolution layers are taken in the order in which they are registered.
            scope: `hidden`: the first layer (input stem) stays dense as well, and the density counts the masked
                layers alone. `network`: the first layer is masked, its inputs being blocks of the nodes like all
                channels, and the density counts all weights of the network, the dense ones included.

        Raises:
            ValueError: unknown scope, a layer's weight is computed from others, or no layer is left to mask.
        """
        check_choice("scope", scope, SCOPES)
        layers = _weighted(model)
        _check_plain(layers)
        ends = {layer.weight for _, layer in layers[-1:] + (layers[:1] if scope == "hidden" else [])}
        once = _distinct(layers)
        masked = [each for each in once if each[1].weight not in ends and getattr(each[1], "groups", 1) == 1]
        if not masked:
            raise ValueError(
                f"Scope {scope!r} leaves no layer to mask among {[name for name, _ in layers]}: take a deeper network"
                + (", or scope='network'." if scope == "hidden" else ".")
            )
        names = tuple(name for name, _ in masked)
        shapes = tuple((*layer.weight.shape[:2], _area(layer.weight)) for _, layer in masked)
        dense: int = sum(layer.weight.numel() for name, layer in once if name not in names)
        return cls(names, shapes, dense if scope == "network" else 0)

    @property
    def total(self) -> int:
        """Weights that the density counts, before masking."""
        return self.dense + sum(outputs * inputs * area for outputs, inputs, area in self.shapes)

    def kept(self, graph: nx.Graph) -> int:
        """Weights of `total` that a graph's masks keep, counted exactly."""
        links, nodes = linked(graph).astype(np.int64), len(graph)
        return self.dense + sum(
            area * int(_sizes(outputs, nodes) @ links @ _sizes(inputs, nodes)) for outputs, inputs, area in self.shapes
        )

    def edges(self, nodes: int, density: float) -> int:
        """The most edges with which a graph of `nodes` keeps, on average over graphs, no more than the share `density`.

        Where channels divide evenly among the nodes, that is every graph; else see `make_pool(accept=)`.

        Raises:
            ValueError: density out of (0, 1], or too few weights for a connected ring.
        """
        if not 0 < density <= 1:
            raise ValueError(f"density is a share of weights in (0, 1], got {density}.")
        loops = self.kept(nx.empty_graph(nodes))
        most = nodes * (nodes - 1) // 2
        slope = (self.total - loops) / most
        # a hair more: a density that is met exactly must not fail by rounding
        edges = min(int((density * self.total - loops) / slope + 1e-9), most)
        if edges < nodes:
            raise ValueError(
                f"density={density} leaves {max(edges, 0)} edges to {nodes} nodes, but a connected pool needs "
                f"{nodes}: take more nodes (their self-loops weigh less then) or a higher density."
            )
        return edges

    def apply(self, model: nn.Module, graph: nx.Graph) -> nn.Module:
        """A copy of `model` with masked layers.

        What stays of a unit's initial weights is scaled to the fan-in that is left (Evci et al. 2022, section 3.1);
        with a complete graph the copy computes what `model` computes.
        """
        masked = copy.deepcopy(model)
        for name in self.names:
            weight: Tensor = masked.get_submodule(name).weight  # type: ignore[assignment]
            mask = block_mask(graph, weight.shape[0], weight.shape[1]).to(weight)
            scale = (weight.shape[1] / mask.sum(1)).sqrt()
            shape = (-1,) + (1,) * (weight.ndim - 1)
            weight.data.mul_(scale.view(shape))
            for layer in [module for module in masked.modules() if _own(module) is weight]:
                parametrize.register_parametrization(layer, "weight", Mask(mask.view(*mask.shape, *shape[2:])))
        return masked


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict of a masked network for its unmasked twin: the masked weights are plain zeros."""
    # not remove_parametrizations: copies of a module share the class that it takes the weight from
    state = model.state_dict()
    for name, _ in _masked(model):
        original = state.pop(f"{name}.parametrizations.weight.original")
        state[f"{name}.weight"] = original * state.pop(f"{name}.parametrizations.weight.0.mask")
    return state


def weight_counts(model: nn.Module) -> tuple[int, int]:
    """(kept, total): parameters of a network, biases included, that masks leave, and all."""
    total = sum(parameter.numel() for parameter in model.parameters())
    masks = {weight.original: weight[0].mask for _, weight in _masked(model)}  # what layers share counts once
    removed = sum(int((mask == 0).sum()) * _area(weight) for weight, mask in masks.items())
    return total - removed, total


def _masked(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every masked layer's weight, a `ParametrizationList`, by each name that the layer has."""
    for name, module in model.named_modules(remove_duplicate=False):
        if parametrize.is_parametrized(module, "weight"):
            weight: Any = module.parametrizations.weight  # type: ignore[union-attr]
            if isinstance(weight[0], Mask):
                yield name, weight


def _area(weight: Any) -> int:
    """Weights per pair of channels."""
    return int(weight[0, 0].numel())


def _weighted(model: nn.Module) -> list[tuple[str, Any]]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def _own(module: nn.Module) -> Tensor | None:
    """The parameter `weight` of a module itself, if it has one."""
    return module._parameters.get("weight")


def _check_plain(layers: list[tuple[str, Any]]) -> None:
    computed = [name for name, layer in layers if _own(layer) is None]
    if computed:
        raise ValueError(
            f"The weights of {computed} are computed from other parameters, and masks are of plain weights: call "
            "torch.nn.utils.parametrize.remove_parametrizations (or remove_weight_norm, ...) on these layers first."
        )


def _distinct(layers: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Of layers that share a weight the first."""
    first: dict[Tensor, tuple[str, Any]] = {}
    for name, layer in layers:
        first.setdefault(layer.weight, (name, layer))
    return list(first.values())


def _sizes(channels: int, nodes: int) -> Ints:
    return np.bincount(owners(channels, nodes), minlength=nodes)
