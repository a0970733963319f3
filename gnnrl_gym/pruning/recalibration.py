"""Re-estimating BatchNorm statistics of a pruned network."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 64  # enough for statistics, and small networks' activations stay in the cache: half the time of 512 at once


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """BatchNorm layers that keep running statistics."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [m for m in norms if m.track_running_stats]


@torch.no_grad()
def recalibrate(model: nn.Module, images: Tensor, batch: int = BATCH) -> nn.Module:
    """Replace the running statistics by the averages over `images` [N, C, H, W], in place; leaves eval mode.

    Pruning shifts what every later layer sees; a few hundred training images put the statistics right again (Li et
    al. 2020, EagleEye, section 3.3). Only the BatchNorms are in training mode meanwhile, so dropout draws nothing.
    """
    model.eval()
    norms = batch_norms(model)
    momenta, average = [norm.momentum for norm in norms], _PlainAverage()
    hooks = [norm.register_forward_pre_hook(average) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    try:
        for part in _parts(images, batch) if norms else ():
            eager(model)(part.clone())  # a forward may change its input in place
    finally:
        for norm, momentum, hook in zip(norms, momenta, hooks, strict=True):
            hook.remove()
            norm.eval()
            norm.momentum = momentum
    return model


def eager(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, or `model` itself: a compiled one would be compiled again for every
    plan."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


class _PlainAverage:
    """Before a BatchNorm's n-th call: a momentum of 1/n, and so the plain average over all batches.

    PyTorch's momentum of None is the same, but reads n off a tensor: at every layer it would wait for the GPU.
    """

    def __init__(self) -> None:
        self.calls: Counter[nn.Module] = Counter()

    def __call__(self, norm: Any, _: Any) -> None:
        self.calls[norm] += 1
        norm.momentum = 1 / self.calls[norm]


def _parts(images: Tensor, batch: int) -> tuple[Tensor, ...]:
    """Batches of at least `batch` images where there are that many: a last small one would weigh too much."""
    return images.tensor_split(max(len(images) // batch, 1))
