"""The same numbers from the same seed, on a GPU too; and the caller's own are left alone."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic


@contextlib.contextmanager
def randomness_kept(device: torch.device) -> Iterator[None]:
    """Python's, NumPy's and torch's global random numbers go on afterwards as if nothing had been drawn: agent
    libraries seed all of them."""
    own, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU: algorithms without atomic additions, wherever PyTorch has one. A CPU has no others.

    A search is resumed by going through it again, which ends somewhere else if sums are rounded otherwise. What has no
    such algorithm (the backward of max pooling, say) runs as it does, with PyTorch's warning.
    """
    if device.type != "cuda":
        yield
        return
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # nothing here reads memory it has not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
        settings.fill_uninitialized_memory = fill
