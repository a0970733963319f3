"""Readers of data: a .npz file, a folder of class folders, torchvision's sets, scikit-learn's digits.

Each checks what it finds and returns ``(train, test)``, both as labelled images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor

from gnnrl_gym.zoo.split import FileImages, ImageSource, MemoryImages

_KEYS = ("x_train", "y_train", "x_test", "y_test")
_MOST_CLASSES = 1_000_000  # the last layer has a row for each: a label that is no label would fill all memory

TORCHVISION: dict[str, Any] = {
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
    "mnist": torchvision.datasets.MNIST,
    "fashion-mnist": torchvision.datasets.FashionMNIST,
    "svhn": torchvision.datasets.SVHN,
}


class Labelled(NamedTuple):
    """Images and their labels (int64 ``[N]``)."""

    images: ImageSource
    labels: Tensor


def read_digits() -> Labelled:
    """scikit-learn's 1797 digits of 8x8 pixels, as one whole; they come with the package."""
    bunch: Any = load_digits()
    levels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    return Labelled(
        MemoryImages(torch.from_numpy(levels).unsqueeze(1)), torch.from_numpy(bunch.target.astype(np.int64))
    )


def read_npz(path: Path) -> tuple[Labelled, Labelled]:
    """Reads ``x_train, y_train, x_test, y_test`` from a .npz file.

    Raises:
        ValueError: if the file is broken, lacks one of them, or one is not of the form that it must have.
    """
    try:
        arrays = _arrays(path)
    except Exception as error:  # zip, zlib, lzma and numpy each have errors of their own for broken files
        # numpy's own words would advise to load the objects
        reason = "it holds Python objects, which were not loaded" if "pickle" in str(error) else error
        raise ValueError(f"{str(path)!r} is not a .npz file that can be read ({reason})") from error
    missing = [key for key in _KEYS if key not in arrays]
    if missing:
        raise ValueError(f"{str(path)!r} has no {', '.join(missing)}; it must have {', '.join(_KEYS)}")
    try:
        return _checked(arrays)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    file = np.load(path, allow_pickle=False)  # a pickle may hold code
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError("it holds a single array")
    with file:
        return {key: file[key] for key in _KEYS if key in file}


def read_torchvision(name: str, root: Path, download: bool) -> tuple[Labelled, Labelled]:
    """Reads one of torchvision's data sets, which lies in ``root`` or may be downloaded there.

    Raises:
        FileNotFoundError: if it is not there.
    """
    parts = [{"split": part} if name == "svhn" else {"train": part == "train"} for part in ("train", "test")]
    try:
        sets = [TORCHVISION[name](root, download=download, **part) for part in parts]
    except (RuntimeError, OSError) as error:
        mend = "is the network up?" if download else "pass download=True, or root= if it lies elsewhere"
        raise FileNotFoundError(f"data set {name!r} is not in {str(root)!r} ({error}); {mend}") from error
    arrays = {}
    for part, data in zip(("train", "test"), sets, strict=True):
        x = np.asarray(data.data)
        arrays[f"x_{part}"] = x.transpose(0, 2, 3, 1) if name == "svhn" else x
        arrays[f"y_{part}"] = np.asarray(data.labels if name == "svhn" else data.targets)
    return _checked(arrays)


def read_folder(path: Path, image_size: int) -> tuple[Labelled, Labelled]:
    """Lists the images of ``train/`` and ``test/`` (or ``val/``, where there is no ``test/``).

    Raises:
        FileNotFoundError: if either folder is absent.
        ValueError: if they have different classes, or a class without images.
    """
    if not (path / "train").is_dir():
        raise FileNotFoundError(f"{str(path)!r} has no folder train/ with a folder of images for each class")
    held_out = next((path / part for part in ("test", "val") if (path / part).is_dir()), None)
    if held_out is None:
        raise FileNotFoundError(f"{str(path)!r} has neither a folder test/ nor val/")
    train, classes = _class_folders(path / "train", image_size)
    test, test_classes = _class_folders(held_out, image_size)
    if classes != test_classes:
        odd = ", ".join(sorted(set(classes) ^ set(test_classes))[:5])
        raise ValueError(f"{str(path)!r}: train/ and {held_out.name}/ differ in classes: {odd}")
    return train, test


def _class_folders(path: Path, image_size: int) -> tuple[Labelled, list[str]]:
    try:
        folder = torchvision.datasets.ImageFolder(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{str(path)!r} must have a folder of images for each class: {error}") from error
    paths, labels = zip(*folder.samples, strict=True)
    return Labelled(FileImages(tuple(map(Path, paths)), image_size), torch.tensor(labels)), folder.classes


def _checked(arrays: dict[str, NDArray[Any]]) -> tuple[Labelled, Labelled]:
    train, test = (Labelled(MemoryImages(_images(arrays, part)), _labels(arrays, part)) for part in ("train", "test"))
    if train.images.shape != test.images.shape:
        raise ValueError(
            f"the images of x_train and x_test differ in shape (C, H, W): {train.images.shape} and {test.images.shape}"
        )
    if test.labels.max() > train.labels.max():
        raise ValueError(f"y_test has the label {int(test.labels.max())}, y_train none above {int(train.labels.max())}")
    return train, test


def _images(arrays: dict[str, NDArray[Any]], part: str) -> Tensor:
    """uint8 ``[N, H, W]`` or ``[N, H, W, C]`` as ``[N, C, H, W]``."""
    array, key = arrays[f"x_{part}"], f"x_{part}"
    if array.dtype != np.uint8:
        raise ValueError(f"{key} must be uint8, got {array.dtype}")
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[-1] > 4):
        raise ValueError(f"{key} must be [N, H, W] or [N, H, W, C], C at most 4; got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{key} is empty: its shape is {array.shape}")
    last = array[..., None] if array.ndim == 3 else array
    return torch.from_numpy(np.ascontiguousarray(last.transpose(0, 3, 1, 2)))


def _labels(arrays: dict[str, NDArray[Any]], part: str) -> Tensor:
    images, labels, key = arrays[f"x_{part}"], arrays[f"y_{part}"], f"y_{part}"
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise ValueError(f"{key} must be integers of shape [N], got {labels.dtype} {labels.shape}")
    if len(images) != len(labels):
        raise ValueError(f"x_{part} has {len(images)} images, but {key} has {len(labels)} labels")
    if labels.min() < 0:
        raise ValueError(f"{key} has a negative label: {labels.min()}")
    if labels.max() >= _MOST_CLASSES:
        raise ValueError(f"{key} has the label {labels.max()}: number the classes from 0, below {_MOST_CLASSES:,}")
    return torch.from_numpy(labels.astype(np.int64))
