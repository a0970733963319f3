"""The FLOPs that the published code counts, beside which real MACs are printed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def published_ratio(dense: nn.Module, slim: nn.Module, image: Tensor) -> float:
    """Share of the dense FLOPs as GNN-RL's code counts them (`preserve_flops`, its case of the CIFAR ResNets).

    A convolution counts ``H * W * (C_in * (2 * k**2 - 1) + 1) * C_out`` FLOPs when dense, and this times the kept share
    of its own outputs and that of the convolution before it when pruned. Nothing else counts. In the published
    environment the shares are ratios that no rounding to whole channels has met; here they are those of the network
    that was built.

    Args:
        dense, slim: networks with the same convolutions, in the same order.
        image: [1, C, H, W].
    """
    before, after = _convolutions(dense, image), _convolutions(slim, image)
    kept = [small.out_channels / full.out_channels for (full, _), (small, _) in zip(before, after, strict=True)]
    flops = [_flops(layer, positions) for layer, positions in before]
    shares = [own * previous for own, previous in zip(kept, [1.0, *kept[:-1]], strict=True)]
    return sum(count * share for count, share in zip(flops, shares, strict=True)) / sum(flops)


def _flops(layer: nn.Conv2d, positions: int) -> float:
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    return positions * (layer.in_channels * (2 * taps - 1) + 1) * layer.out_channels / layer.groups


@torch.no_grad()
def _convolutions(model: nn.Module, image: Tensor) -> list[tuple[nn.Conv2d, int]]:
    """Convolutions in the order in which they run, with the positions of their outputs."""
    found: list[tuple[nn.Conv2d, int]] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    hooks = [layer.register_forward_hook(lambda m, _, y: found.append((m, y[0, 0].numel()))) for layer in layers]
    try:
        model.eval()(image)
    finally:
        for hook in hooks:
            hook.remove()
    return found
