"""A split: images and labels that are handed out as normalised batches, from memory or from files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gnnrl_gym.checks import check_whole
from gnnrl_gym.zoo.normalisation import by_channel

Result = TypeVar("Result")


class ImageSource(Protocol):
    """Images by index, as uint8 ``[n, C, H, W]``."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""

    def __len__(self) -> int: ...

    def read(self, indices: Tensor) -> Tensor:
        """The images at ``indices`` (int64 ``[n]``)."""

    def select(self, indices: Tensor) -> ImageSource:
        """A source of only the images at ``indices``."""

    def joined(self, other: Any) -> ImageSource:
        """A source of these images, then those of ``other``, which is of the same kind."""


@dataclass(frozen=True, eq=False)
class MemoryImages:
    """Images in one uint8 tensor ``[N, C, H, W]``.

    Raises:
        ValueError: for anything else.
    """

    images: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.images, Tensor) or self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be a uint8 tensor [N, C, H, W], got {_kind(self.images)}")

    def __repr__(self) -> str:
        return f"MemoryImages({len(self)} of shape {self.shape})"

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.images.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def select(self, indices: Tensor) -> MemoryImages:
        return MemoryImages(self.images[indices])

    def joined(self, other: MemoryImages) -> MemoryImages:
        return MemoryImages(torch.cat([self.images, other.images]))


@dataclass(frozen=True, eq=False)
class FileImages:
    """Image files, each read when asked for: short side scaled to 8/7 of ``size`` (the usual 256 to 224), centre square
    cut out. An image whose short side is no longer than ``size`` was made for it: its short side becomes ``size``.

    Raises:
        ValueError: from ``read``, for a file that is no image, is too large, or has pixels that 8 bits would clip.
    """

    paths: tuple[Path, ...]
    size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.size, self.size

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"FileImages({len(self)} of shape {self.shape})"

    def read(self, indices: Tensor) -> Tensor:
        if len(indices) == 0:
            return torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return torch.stack(_side_by_side(self._read_one, [self.paths[i] for i in indices.tolist()]))

    def check(self) -> None:
        """Open every file, small where its format allows that.

        Raises:
            ValueError: as ``read``.
        """
        _side_by_side(_check_opens, self.paths)

    def select(self, indices: Tensor) -> FileImages:
        return FileImages(tuple(self.paths[i] for i in indices.tolist()), self.size)

    def joined(self, other: FileImages) -> FileImages:
        return FileImages(self.paths + other.paths, self.size)

    def _read_one(self, path: Path) -> Tensor:
        image = _opened(path)
        short = self.size * (8 / 7 if min(image.size) > self.size else 1)
        scale = short / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        square = resized.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _side_by_side(work: Callable[[Path], Result], paths: Sequence[Path]) -> list[Result]:
    threads = torch.get_num_threads()
    if threads == 1:
        return [work(path) for path in paths]
    with ThreadPoolExecutor(threads) as pool:  # decoding and scaling let other threads run
        return list(pool.map(work, paths))


def _opened(path: Path, small: bool = False) -> Image.Image:
    try:
        with Image.open(path) as file:
            mode = file.mode
            if small:
                file.draft("RGB", (1, 1))
            image = file.convert("RGB")
    except Exception as error:  # a decoder may raise anything on broken bytes, and on too many pixels
        raise ValueError(
            f"{str(path)!r} is not an image that can be read ({error}): put a readable one in its place (without "
            "it the data would be others)."
        ) from error
    _check_depth(path, mode)
    return image


def _check_opens(path: Path) -> None:
    _opened(path, small=True)  # and let go of: all of them would fill the memory


def _check_depth(path: Path, mode: str) -> None:
    if mode.startswith(("I", "F")):  # converted, all above 255 would be white, and all of [0, 1] black
        raise ValueError(f"{str(path)!r} has pixels of more than 8 bits (mode {mode}): save it with 8 bits a channel")


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
                f"images must be MemoryImages or FileImages, got {_kind(self.images)}; "
                "DataSplits.of makes the splits of plain arrays"
            )
        if not isinstance(self.labels, Tensor) or self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise ValueError(f"labels must be an int64 tensor [N], got {_kind(self.labels)}")
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


def _kind(value: Any) -> str:
    """What something is, in few words: never all of an array."""
    shaped = isinstance(value, (Tensor, np.ndarray))
    return f"{value.dtype} {list(value.shape)}" if shaped else f"a {type(value).__name__}"


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
