"""Fine-tuning: train the pruned network; the last epoch counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnrl_gym.zoo import DataSplits
from gnnrl_gym.zoo.data import augment

BATCH = 128


def finetune(
    model: nn.Module,
    data: DataSplits,
    epochs: int,
    learning_rate: float = 0.02,
    seed: int = 0,
    device: torch.device | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Train `model` in place on the train split: SGD with Nesterov momentum 0.9, weight decay 5e-4, a cosine from
    `learning_rate` to 0, crops (and flips where they make sense); mixed precision on a GPU.

    Args:
        epochs: passes over the train split; 0 leaves the model as it is.
        on_epoch: called with (epoch from 1, mean training loss) after each.

    Returns:
        `model`, in eval mode, after the last epoch. No split chooses an epoch.
    """
    device = device or next(model.parameters()).device
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    steps = epochs * -(-len(data.train) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for images, labels in data.train.batches(BATCH, generator):
            images = augment(images, generator, _padding(data), flip=data.flip).to(device)
            total += _step(model, optimizer, images, labels.to(device)) * len(labels)
            schedule.step()
        if on_epoch:
            on_epoch(epoch, total / len(data.train))
    return model.eval()


def _padding(data: DataSplits) -> int:
    """An eighth of the image, as 4 pixels of CIFAR's 32."""
    return data.input_shape[-1] // 8


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())
