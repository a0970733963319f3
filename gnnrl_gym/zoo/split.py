"""A split: images and labels that are handed out as normalised batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gnnrl_gym.checks import check_whole
from gnnrl_gym.zoo.images import FileImages, ImageSource, kind_of
from gnnrl_gym.zoo.normalisation import by_channel


def training_batches(order: Tensor, batch_size: int) -> list[Tensor]:
    """Parts of `order` [N], the batches of a training. An image that would be left alone joins those before: BatchNorm
    can't train on one."""
    parts = list(order.split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images.

    Attributes:
        images: where the images come from.
        labels: int64 ``[N]``.
        mean: of each channel, or one number for all, on the scale [0, 1]; taken off each image.
        std: of each channel, on the same scale; each image is divided by it.

    Raises:
        ValueError: if the numbers of images and labels differ or are 0, or one of the four attributes has a wrong type.
    """

    images: ImageSource
    labels: Tensor
    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        if isinstance(self.images, (Tensor, np.ndarray)) or not hasattr(self.images, "read"):
            raise ValueError(
                f"images must be MemoryImages or FileImages, got {kind_of(self.images)}; "
                "DataSplits.of makes the splits of plain arrays"
            )
        if not isinstance(self.labels, Tensor) or self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise ValueError(f"labels must be an int64 tensor [N], got {kind_of(self.labels)}")
        for name, values in zip(("mean", "std"), by_channel(self.mean, self.std, self.images.shape[0]), strict=True):
            object.__setattr__(self, name, values)
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")
        if len(self.labels) == 0:
            raise ValueError("a split must hold at least one image")

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float32 ``[n, C, H, W]`` and labels int64 ``[n]``, at ``indices`` (int64 ``[n]``)."""
        pixels = self.images.read(indices).float().div_(255)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return pixels.sub_(mean).div_(std), self.labels[indices]

    def check_readable(self) -> None:
        """Check that the images can be read: a search of a night would end at the first test image that can't.

        Raises:
            ValueError: one can't; which, and why.
        """
        if isinstance(self.images, FileImages):
            self.images.check()

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The whole split as one batch; float32 takes four times the memory of the images."""
        return self.batch(torch.arange(len(self)))

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Goes through the split once, the last batch perhaps smaller.

        Args:
            batch_size: images in a batch, at least 1.
            generator: a CPU generator that shuffles, for training; without one the order is the stored one. An image
                that would be left alone joins the batch before: BatchNorm can't train on one.

        Raises:
            ValueError: if ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        shuffled = generator is not None
        order = torch.randperm(len(self), generator=generator) if shuffled else torch.arange(len(self))
        parts = training_batches(order, batch_size) if shuffled else order.split(batch_size)
        return (self.batch(indices) for indices in parts)

    def shuffled_batches(self, batch_size: int) -> int:
        """How many batches of at least 1 image ``batches`` hands out when it shuffles."""
        return len(training_batches(torch.arange(len(self)), batch_size))

    def select(self, indices: Tensor) -> Split:
        """The split of only the images at ``indices`` (int64 ``[n]``), in that order."""
        return Split(self.images.select(indices), self.labels[indices], self.mean, self.std)

    def joined(self, other: Split) -> Split:
        """These images, then those of ``other``, another part of the same data set."""
        return Split(self.images.joined(other.images), torch.cat([self.labels, other.labels]), self.mean, self.std)

    def take(self, n: int, seed: int = 0) -> Split:
        """The first ``n`` images of a seeded shuffle; the split itself where it holds no more than ``n``.

        Raises:
            ValueError: if ``n`` is no whole number, or below 1.
        """
        check_whole(1, n=n)
        if n >= len(self):
            return self
        return self.select(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n])


def augment(x: Tensor, generator: torch.Generator, padding: int | tuple[int, int] = 4, *, flip: bool = True) -> Tensor:
    """Shifts each image at random, and mirrors every other one: the augmentation of He et al. 2016.

    Args:
        x: normalised images ``[n, C, H, W]``.
        generator: source of the randomness, on any device.
        padding: largest shift in pixels, each way, or that in height and that in width; what comes in from outside is
            zero, the mean colour.
        flip: whether to mirror left and right; not for digits.

    Returns:
        A new tensor of the same shape.
    """
    n, channels, height, width = x.shape
    high, wide = padding if isinstance(padding, tuple) else (padding, padding)

    def draw(count: int) -> Tensor:
        return torch.randint(count, (n, 1), generator=generator, device=generator.device).to(x.device)

    rows = torch.arange(height, device=x.device) + draw(2 * high + 1)
    columns = torch.arange(width, device=x.device) + draw(2 * wide + 1)
    if flip:
        columns = torch.where(draw(2).bool(), columns.flip(1), columns)
    image = torch.arange(n, device=x.device).view(n, 1, 1, 1)
    channel = torch.arange(channels, device=x.device).view(1, channels, 1, 1)
    padded = F.pad(x, (wide, wide, high, high))
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
