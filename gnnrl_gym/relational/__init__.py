"""Sparse masks from a graph that all layers share: graphs, descriptors, masks, pools, training.

You, Leskovec, He and Xie, "Graph Structure of Neural Networks" (ICML 2020).
"""

from gnnrl_gym.relational.descriptors import DESCRIPTORS, describe
from gnnrl_gym.relational.graphs import ws_flex
from gnnrl_gym.relational.masks import Masking, block_mask, plain_state, weight_counts
from gnnrl_gym.relational.pool import GraphPool, make_pool

__all__ = ["DESCRIPTORS", "GraphPool", "Masking", "block_mask", "describe", "make_pool", "plain_state",
           "weight_counts", "ws_flex"]  # fmt: skip
