"""Channels last or not: the layout that convolutions are fastest in, where the networks take it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gnnrl_gym.backends import gpus_of
from gnnrl_gym.copies import copy_of
from gnnrl_gym.pruning.recalibration import eager
from gnnrl_gym.zoo import DataSplits


def fitting_layout(images: Tensor, *networks: nn.Module | None) -> torch.memory_format:
    """channels_last where all `networks` take images [N, C, H, W] in it, in training as in eval mode; else contiguous.

    `x.view(len(x), -1)` on what a convolution gives does not, nor do convolutions in three dimensions. That shows only
    when it is tried: on copies, with a few `images` on the networks' device.
    """
    takes = images.dim() == 4 and all(network is None or _takes(network, images[:2]) for network in networks)
    return torch.channels_last if takes else torch.contiguous_format


def _takes(network: nn.Module, images: Tensor) -> bool:
    try:
        trial = copy_of(eager(network)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad(), torch.random.fork_rng(gpus_of([images])):  # dropout draws
            for training in (False, True):
                trial.train(training)(images.clone(memory_format=torch.channels_last))
    except Exception:  # whatever a forward raises; one that takes no layout at all says so when it is used
        return False
    return True


def put_on(device: torch.device, data: DataSplits, *networks: nn.Module | None) -> torch.memory_format:
    """Move `networks`, in place, to the device and into the layout in which they take the images of `data`, and into
    eval mode.

    Returns:
        The layout, which the images should have.
    """
    given = [network for network in networks if network is not None]
    for network in given:
        network.to(device)
    images, _ = data.train.batch(torch.arange(min(2, len(data.train))))
    layout = fitting_layout(images.to(device), *given)
    for network in given:
        network.eval().to(memory_format=layout)  # type: ignore[call-overload]
    return layout
