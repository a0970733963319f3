"""Trains the digits network that ships with the package: ``python -m gnnrl_gym.zoo.train_digits``.

Seeded, on the train split of the digits data alone; the last epoch counts, so that neither the search nor
the test split chooses anything.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import sklearn
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from gnnrl_gym.files import write_atomic
from gnnrl_gym.zoo.data import DataSplits, load_data
from gnnrl_gym.zoo.models import DIGITS, DIGITS_DEPTH, DIGITS_WEIGHTS, DIGITS_WIDTHS, load_model
from gnnrl_gym.zoo.split import Split, augment

BATCH_SIZE = 50
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
SHIFT = 1  # pixels; a digit fills most of its 8x8 image


def train(data: DataSplits, epochs: int, seed: int) -> nn.Module:
    """Trains a digits network from random weights, by SGD with a cosine schedule.

    Returns:
        The network after the last epoch, in eval mode.
    """
    model = load_model(DIGITS, weights="random", seed=seed).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for x, y in data.train.batches(BATCH_SIZE, generator):
            optimizer.zero_grad()
            F.cross_entropy(model(augment(x, generator, padding=SHIFT, flip=data.flip)), y).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, split: Split) -> float:
    """Top-1 accuracy as a share in [0, 1]; for splits that fit one batch."""
    x, y = split.tensors()
    return (model(x).argmax(1) == y).double().mean().item()


def describe(model: nn.Module, data: DataSplits, epochs: int, seed: int) -> dict[str, Any]:
    """What the JSON beside the weights says: how they were made, and how good they are."""
    return {
        "model": DIGITS,
        "data": data.name,
        "depth_per_stage": DIGITS_DEPTH,
        "widths": list(DIGITS_WIDTHS),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": epochs,
        "seed": seed,
        "train_accuracy": accuracy(model, data.train),
        "search_accuracy": accuracy(model, data.search),
        "test_accuracy": accuracy(model, data.test),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }


def main() -> None:
    """Trains, prints the accuracies, writes the weights and the JSON beside them."""
    parser = argparse.ArgumentParser(description="Train the digits network that ships with the package.")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DIGITS_WEIGHTS, help="weights file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    data = load_data("digits")
    model = train(data, arguments.epochs, arguments.seed)
    text = json.dumps(describe(model, data, arguments.epochs, arguments.seed), indent=2)
    print(text)
    write_atomic(arguments.out, lambda file: torch.save(model.state_dict(), file))
    write_atomic(arguments.out.with_suffix(".json"), lambda file: file.write(text.encode() + b"\n"))


if __name__ == "__main__":
    main()
