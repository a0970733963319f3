"""The same numbers from the same seed, on a GPU too; and the caller's own are left alone."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def randomness_kept() -> Iterator[None]:
    """Python's, NumPy's and torch's global random numbers go on afterwards as if nothing had been drawn: agent
    libraries seed all of them, on every GPU."""
    own, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)


@contextlib.contextmanager
def deterministic(device: torch.device, attention: bool = False) -> Iterator[None]:
    """On a GPU: algorithms without atomic additions, wherever PyTorch has one. A CPU has no others.

    A search is resumed by going through it again, which ends somewhere else if sums are rounded otherwise. What has no
    such algorithm (the backward of max pooling, say) runs as it does, with PyTorch's warning.

    Args:
        attention: also gradients of attention: by plain products, since the fused kernels' gradients stay as they are
            where a warning is enough. Their answers alone are the same each time, and faster.
    """
    if device.type != "cuda":
        yield
        return
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # nothing here reads memory it has not written
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # its usual size; older versions warn without
    cudnn: Any = torch.backends.cudnn
    chosen = cudnn.deterministic, cudnn.benchmark  # Stable-Baselines3 sets both, for good
    cudnn.benchmark = False  # it chooses by timing
    try:
        with sdpa_kernel(SDPBackend.MATH) if attention else contextlib.nullcontext():
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = chosen
        torch.use_deterministic_algorithms(mode, warn_only=warn)
        settings.fill_uninitialized_memory = fill
