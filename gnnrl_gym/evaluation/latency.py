"""Measured latency of several networks, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gnnrl_gym.pruning.timing import wait_for


@torch.inference_mode()
def measure_latency(models: Sequence[nn.Module], images: Tensor, repeats: int = 50) -> list[float]:
    """Median seconds of one forward of `images` [N, C, H, W], for each model in eval mode.

    The models take turns, so that whatever else the machine does hits all of them alike.
    """
    times: list[list[float]] = [[] for _ in models]
    for turn in range(repeats + 3):
        for model, seconds in zip(models, times, strict=True):
            own = images.clone()  # a forward may change its input in place
            wait_for(images.device)
            start = time.perf_counter()
            model(own)
            wait_for(images.device)
            if turn >= 3:  # the first turns warm up
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]
