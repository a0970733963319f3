"""GNNRL-Relational-v0: the best sparse mask among those that a graph shared by all layers gives."""

from __future__ import annotations

import os
from typing import Any

import networkx as nx
import numpy as np
from gymnasium.utils import EzPickle
from torch import nn

from gnnrl_gym.checks import check_number, check_seed, check_whole
from gnnrl_gym.copies import copy_of
from gnnrl_gym.envs.network import check_outputs, own_arguments, splits_for
from gnnrl_gym.envs.pool import PoolEnv
from gnnrl_gym.evaluation.accuracy import resolve_device
from gnnrl_gym.relational.masks import Masking, weight_counts
from gnnrl_gym.relational.pool import make_pool
from gnnrl_gym.relational.training import Recipe, Trainer, make_network
from gnnrl_gym.zoo import DataSplits


class RelationalEnv(PoolEnv, EzPickle):
    """Find the relational graph whose masks train best.

    ## Description
    A relational graph (You et al., ICML 2020) has n nodes that own blocks of channels in every layer; two blocks may
    exchange messages where there is an edge, and every node has a self-loop. So one graph is a sparse mask for all
    layers at once. A pool of WS-flex graphs of equal cost is drawn when the environment is made. An action picks one;
    a network with its masks is trained from scratch on the train split, and its accuracy on the search split is the
    reward. All graphs are trained with the same seeds (initial weights, order of images), and the noise of training
    that remains is the searcher's affair. This is the problem of BoGP (Bayes optimal pruning with relational graph
    properties), with descriptors by name.

    ## Observation Space
    `Graph(Box(D + 2,), Box(1,))`. The pool is the graph: node i is the relational graph i, with its D descriptors
    (`gnnrl_gym.relational.DESCRIPTORS`, in that order, from -1 for the pool's smallest value to 1 for its largest),
    whether it was seen (0 or 1), and the search accuracy it had (0 where unseen). Edges lead from each to the five
    that are nearest in descriptor space; their feature is the distance, in [0, 1].

    ## Action Space
    `action="descriptors"`: `Box(0, 1, (D,))`, a point in descriptor space, between the pool's smallest (0) and largest
    value (1) of each descriptor; it is answered by the nearest unseen graph, in standard deviations of the pool.
    `action="index"`: `Discrete(P)`, a graph of the pool, seen or not.
    No component acts on a node, so the graph policies of `agents` don't fit here: the searchers of `gnnrl bogp` do.

    ## Reward
    Minus the Top-1 error on the search split, in [-1, 0].

    ## Episode End
    Every episode is one step, after which it is terminated. What was seen lasts from episode to episode, until
    `reset(seed=...)` begins a new search; once all graphs are seen, all count as unseen for the lookup.

    ## Arguments
    * `model`: `mlp-H1-H2-...`, a name for `load_model`, or an `nn.Module` (trained from its present weights). Linear
      and convolution layers are masked, in the order in which they are registered; the last stays dense.
    * `data`: a name or path for `load_data`, or `DataSplits`. Default `digits`. Colour images are normalised with
      ImageNet's mean and std; `load_data(..., mean=..., std=...)` takes others, and `DataSplits.of` takes arrays. The
      images of a folder are brought to the size that a named network is usually fed, else to 224 by 224.
    * `density`: share of weights that stay. `scope`: of which: `hidden`: of all layers but the first (input stem) and
      the last (classifier), which are dense; `network`: of all weights, the first layer being masked, too.
    * `nodes`, `pool_size`: n and P. The number of edges follows from the density.
    * `epochs`, `learning_rate`, `weight_decay`: of the training behind an evaluation. `shift`: pixels by which its
      images are shifted at random. `train_seeds`: with how many seeds a graph is trained; the accuracy is the mean.
    * `pool_seed`: of the pool. `action`: `descriptors` or `index`. `device`: `auto`, `cpu`, `cuda`.
    * `render_mode`: `ansi`: last and best graph.

    ## Info
    `graph` (index, -1 before there is one), `descriptors` (by name), `weights_ratio` (share kept of the weights that
    the density counts), `search_accuracy` (-1 until there is one), `is_success` (whether a graph was scored),
    `evaluations` (in this episode; the attribute `evaluations` counts them since the environment was made).

    ## Version History
    * v0: first version.
    """

    def __init__(
        self,
        model: str | nn.Module = "mlp-64-64",
        data: str | os.PathLike[str] | DataSplits = "digits",
        density: float = 0.25,
        scope: str = "hidden",
        nodes: int = 16,
        pool_size: int = 64,
        epochs: int = 5,
        learning_rate: float = 0.1,
        weight_decay: float = 5e-4,
        shift: int = 0,
        train_seeds: int = 1,
        pool_seed: int = 0,
        action: str = "descriptors",
        device: str = "auto",
        render_mode: str | None = None,
    ) -> None:
        self.arguments = own_arguments(locals())
        EzPickle.__init__(self, **self.arguments)
        check_whole(1, epochs=epochs, train_seeds=train_seeds)
        check_whole(2, pool_size=pool_size)
        check_whole(3, nodes=nodes)
        check_whole(0, shift=shift)
        check_seed(pool_seed=pool_seed)
        check_number("above 0", density=density, learning_rate=learning_rate)
        check_number("at least 0", weight_decay=weight_decay)
        found = resolve_device(device)
        self.data = splits_for(data, model)
        if shift >= min(self.data.input_shape[1:]):
            raise ValueError(f"shift={shift} moves images of shape {self.data.input_shape} out of sight: give less.")
        # a module of the caller's is copied: it may move to another device here
        network = copy_of(model) if isinstance(model, nn.Module) else model
        example = network if isinstance(network, nn.Module) else make_network(network, self.data, 0)
        check_outputs(example.to(found), self.data, found)
        self.masking = Masking.of(example, scope)
        self.density, self.epochs, self.train_seeds = density, epochs, train_seeds
        self.recipe = Recipe(learning_rate, weight_decay, shift)
        self.edges = self.masking.edges(nodes, density)
        pool = make_pool(nodes, self.edges, pool_size, pool_seed, self.within_density)
        super().__init__(pool, action, render_mode)
        self.trainer = Trainer(self.data, network, self.masking, found)

    def within_density(self, graph: nx.Graph) -> bool:
        """Whether the masks of a graph keep no more weights than allowed, counted exactly."""
        return self.masking.kept(graph) <= self.density * self.masking.total + 1e-6

    def measure(self, index: int) -> float:
        """The search accuracy in [0, 1] of a graph: the mean over the training seeds."""
        return float(np.mean([self.trainer.search_accuracy(self._trained(index, seed)) for seed in self._seeds()]))

    def facts(self, index: int) -> dict[str, Any]:
        """The share of weights that a graph's masks keep."""
        return {"weights_ratio": self.masking.kept(self.pool.graphs[index]) / self.masking.total}

    def params_ratio(self, index: int) -> float:
        """The share of all parameters, biases included, that a graph's masks keep."""
        kept, total = weight_counts(self.trainer.fresh(self.pool.graphs[index], 0))
        return kept / total

    def _seeds(self) -> range:
        return range(self.train_seeds)

    def _trained(self, index: int, seed: int) -> nn.Module:
        return self.trainer.train(self.pool.graphs[index], self.epochs, seed, self.recipe)
