"""How many threads a network deserves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from gnnrl_gym.pruning.network import PrunableNetwork

SMALL = 5_000_000  # MACs of one image, below which threads wait for each other longer than they compute


@contextlib.contextmanager
def fitting_threads(network: PrunableNetwork) -> Iterator[None]:
    """One thread while a small network runs; the previous number afterwards. On cores that are shared with others
    the difference is not a few percent but minutes."""
    before = torch.get_num_threads()
    if network.macs(network.widths) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
