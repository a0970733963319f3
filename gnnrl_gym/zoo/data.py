"""Data by name or path, as a train, a search and a test split."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from gnnrl_gym.zoo.readers import TORCHVISION, Labelled, read_digits, read_folder, read_npz, read_torchvision
from gnnrl_gym.zoo.split import ImageSource, Split, augment

__all__ = ["DataSplits", "Split", "augment", "data_names", "load_data"]

# Of ImageNet's training images; the published CIFAR networks were trained with them too.
RGB_MEAN, RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEFAULT_ROOT = Path.home() / ".cache" / "gnnrl_gym" / "data"
SEARCH_SHARE = 0.1
_DIGITS_TRAIN, _DIGITS_SEARCH = 1000, 397
_UNFLIPPED = ("mnist", "svhn")  # a mirrored digit is no digit

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A data set in three disjoint parts.

    Attributes:
        name: the name or path it was loaded by.
        train: for fine-tuning and recalibration.
        search: for the reward.
        test: reported once at the end, never used to choose anything.
        num_classes: labels are below it.
        input_shape: (C, H, W) of one image.
        flip: whether mirrored images are plausible, so that augmentation may make them.
    """

    name: str
    train: Split
    search: Split
    test: Split
    num_classes: int
    input_shape: tuple[int, int, int]
    flip: bool


def data_names() -> list[str]:
    """All names that ``load_data`` takes, besides paths."""
    return ["digits", *TORCHVISION]


def load_data(
    name_or_path: str | os.PathLike[str],
    seed: int = 0,
    *,
    root: str | os.PathLike[str] = DEFAULT_ROOT,
    download: bool = False,
    image_size: int = 224,
) -> DataSplits:
    """Loads a data set by name, or from a file or folder of one's own.

    Args:
        name_or_path: ``digits`` (scikit-learn's 1797 8x8 images, always there), ``cifar10``, ``cifar100``,
            ``mnist``, ``fashion-mnist``, ``svhn``; a ``.npz`` with uint8 ``x_train``, ``x_test``
            (``[N, H, W]`` or ``[N, H, W, C]``) and integer ``y_train``, ``y_test``; or a folder with a folder
            per class in ``train/`` and in ``test/`` (or ``val/``, where there is no ``test/``).
        seed: of the draw that sets a tenth of the training images apart for the search split. The three
            splits of ``digits`` are the same for all seeds, as its network ships trained on one of them.
        root: where torchvision's data sets lie.
        download: whether torchvision may fetch what is not there.
        image_size: height and width that a folder's images are brought to.

    Raises:
        ValueError: for an unknown name, or data of another form than above.
        FileNotFoundError: if the file, the folder or the downloaded data is not there.
    """
    name = os.fspath(name_or_path)
    if name == "digits":
        return _load_digits()
    if name in TORCHVISION:
        return _assemble(name, *read_torchvision(name, Path(root), download), seed, name not in _UNFLIPPED)
    path = Path(name)
    if path.is_dir():
        return _assemble(name, *read_folder(path, image_size), seed, flip=True)
    if path.is_file() and path.suffix == ".npz":
        train, test = read_npz(path)
        # In colour it may be anything, and most things have mirror images; in grey it is digits or letters.
        return _assemble(name, train, test, seed, flip=train.images.shape[0] == 3)
    raise _nothing_there(name, path)


def _nothing_there(name: str, path: Path) -> Exception:
    if path.is_file():
        return ValueError(f"{name!r} is neither a .npz file nor a folder of images")
    if path.suffix or os.sep in name:
        return FileNotFoundError(f"no data file or folder at {name!r}")
    near = difflib.get_close_matches(name.lower(), data_names(), n=3) or data_names()
    return ValueError(f"no data set is named {name!r}, nor is there such a path; near it: {', '.join(near)}")


def _load_digits() -> DataSplits:
    whole = read_digits()
    train, search, test = _stratified(whole.labels, _DIGITS_TRAIN, _DIGITS_SEARCH)
    split = Split(*whole, *_normalisation(whole.images, train))
    return DataSplits(
        "digits",
        split.select(train),
        split.select(search),
        split.select(test),
        num_classes=10,
        input_shape=whole.images.shape,
        flip=False,
    )


def _stratified(labels: Tensor, first: int, second: int) -> list[Tensor]:
    """Indices of three parts with the classes in equal shares; the last part gets what is left."""
    rest = np.arange(len(labels))
    parts = []
    for size in (first, second):
        part, rest = train_test_split(rest, train_size=size, stratify=labels[rest], random_state=0)
        parts.append(torch.from_numpy(part))
    return [*parts, torch.from_numpy(rest)]


def _assemble(name: str, training: Labelled, test: Labelled, seed: int, flip: bool) -> DataSplits:
    train, search = _search_split(len(training.labels), seed)
    normalisation = _normalisation(training.images, train)
    whole = Split(*training, *normalisation)
    return DataSplits(
        name,
        whole.select(train),
        whole.select(search),
        Split(*test, *normalisation),
        num_classes=int(training.labels.max()) + 1,
        input_shape=training.images.shape,
        flip=flip,
    )


def _search_split(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices that stay for training, and those set apart for the search."""
    if n < 2:
        raise ValueError("at least 2 training images are needed: one to train on, one to search with")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    size = max(1, round(SEARCH_SHARE * n))
    return order[size:], order[:size]


def _normalisation(images: ImageSource, train: Tensor) -> Normalisation:
    """Mean and standard deviation by channel: the usual constants in colour, else the train split's own."""
    if images.shape[0] == 3:
        return RGB_MEAN, RGB_STD
    # By counting grey levels: exact, and no float copy of all images.
    channels = images.read(train).unbind(1)
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in channels]).double()
    shares, levels = counts / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ levels
    std = (shares @ levels.square() - mean.square()).clamp(min=0).sqrt()
    std[std == 0] = 1.0  # a constant channel says nothing; leave its scale
    return tuple(mean.tolist()), tuple(std.tolist())
