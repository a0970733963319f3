"""Where the images of a split come from: memory, or files that are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

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
            raise ValueError(f"images must be a uint8 tensor [N, C, H, W], got {kind_of(self.images)}")

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


def kind_of(value: Any) -> str:
    """What something is, in few words: never all of an array."""
    shaped = isinstance(value, (Tensor, np.ndarray))
    return f"{value.dtype} {list(value.shape)}" if shaped else f"a {type(value).__name__}"
