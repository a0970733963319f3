"""Hypothesis strategies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from gnnrl_gym.zoo.random_networks import RandomNetwork, random_network

# Deterministic, so that a run in CI says the same twice; a network takes as long as it takes.
slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
deterministic = settings(derandomize=True, deadline=None, database=None, suppress_health_check=slow)


class Sample:
    """A random network and an input for it; what hypothesis prints of it is the network's description."""

    def __init__(self, network: RandomNetwork, x: Tensor) -> None:
        self.network, self.x = network, x

    def __repr__(self) -> str:
        return f"{self.network!r} on an input of shape {tuple(self.x.shape)}"


@st.composite
def networks(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Sample:
    """Random networks; they shrink to few and plain parts."""
    return Sample(*random_network(lambda n: draw(st.integers(0, n - 1))))
