"""Re-estimating BatchNorm statistics of a pruned network."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """BatchNorm layers that keep running statistics."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [m for m in norms if m.track_running_stats]


@torch.no_grad()
def recalibrate(model: nn.Module, images: Tensor) -> nn.Module:
    """Replace the running statistics by those of `images` [N, C, H, W], one forward, in place; leaves eval mode.

    Pruning shifts what every later layer sees; a few hundred training images put the statistics right again (Li et
    al. 2020, EagleEye, section 3.3). Only the BatchNorms are in training mode meanwhile, so dropout draws nothing.
    """
    model.eval()
    norms = batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # exactly this batch's statistics
    try:
        if norms:
            model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
    return model
