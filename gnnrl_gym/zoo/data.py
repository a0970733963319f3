"""Data by name or path, as a train, a search and a test split."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from gnnrl_gym.checks import check_seed, check_whole
from gnnrl_gym.zoo.datasplits import DataSplits, assemble, normalisation_of
from gnnrl_gym.zoo.normalisation import Values, check_normalisation
from gnnrl_gym.zoo.readers import TORCHVISION, default_root, read_digits, read_folder, read_npz, read_torchvision
from gnnrl_gym.zoo.split import Split, augment

__all__ = ["DataSplits", "Split", "augment", "data_names", "load_data"]

IMAGE_SIZE = 224  # of the images of a folder, what torchvision's networks take
_DIGITS_TRAIN, _DIGITS_SEARCH = 1000, 397
_UNFLIPPED = ("mnist", "svhn")  # a mirrored digit is no digit


def data_names() -> list[str]:
    """All names that ``load_data`` takes, besides paths."""
    return ["digits", *TORCHVISION]


def load_data(
    name_or_path: str | os.PathLike[str],
    seed: int = 0,
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    image_size: int = IMAGE_SIZE,
    mean: Values | None = None,
    std: Values | None = None,
    flip: bool | None = None,
) -> DataSplits:
    """Loads a data set by name, or from a file or folder of one's own.

    Images are handed out as ``(pixels / 255 - mean) / std``. Give the ``mean`` and ``std`` that the network was
    trained with: with others its accuracy is worth nothing. ``mean=0, std=1`` leaves ``pixels / 255``.

    Args:
        name_or_path: ``digits`` (scikit-learn's 1797 8x8 images, always there), ``cifar10``, ``cifar100``,
            ``mnist``, ``fashion-mnist``, ``svhn``; a ``.npz`` with uint8 ``x_train``, ``x_test``
            (``[N, H, W]`` or ``[N, H, W, C]``) and integer ``y_train``, ``y_test`` (from 0), and perhaps
            ``x_search``, ``y_search``, ``mean``, ``std`` and ``flip``; or a folder with a folder per class in
            ``train/`` and in ``test/``, and perhaps in ``val/``, which is the search split then (where there is no
            ``test/``, ``val/`` is the test split).
        seed: of the draw that sets a tenth of the training images apart for the search split, where the data has no
            images for it. The three splits of ``digits`` are the same for all seeds, as its network ships trained on
            one of them.
        root: where torchvision's data sets lie; None: in the package's cache folder.
        download: whether torchvision may fetch what is not there.
        image_size: height and width that a folder's images are brought to.
        mean, std: of each channel, or one number for all, on the scale [0, 1]; they go before those of a ``.npz``.
            None: in colour ImageNet's, (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225); else the train split's own.
        flip: whether training may mirror images left and right; goes before that of a ``.npz``. None: where that is
            plausible, which in colour it is taken to be but for ``svhn``, and in grey not.

    Raises:
        ValueError: for an unknown name, or data, ``seed``, ``mean`` or ``std`` of another form than above.
        FileNotFoundError: if the file, the folder or the downloaded data is not there.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise ValueError(_no_data(name_or_path))
    check_seed(seed=seed)
    check_whole(1, image_size=image_size)
    check_normalisation(mean, std)
    name, given = os.fspath(name_or_path), (mean, std)
    if name == "digits":
        return _load_digits(given, bool(flip))
    if name in TORCHVISION:
        place, usual = default_root() if root is None else Path(root), name not in _UNFLIPPED
        return assemble(name, read_torchvision(name, place, download), seed, usual if flip is None else flip, given)
    path = Path(name)
    if path.is_dir():
        return assemble(name, read_folder(path, image_size), seed, flip, given)
    if path.is_file() and path.suffix == ".npz":
        return _load_npz(name, seed, given, flip)
    raise _nothing_there(name, path)


def _no_data(given: object) -> str:
    return (
        f"data is a name ({', '.join(data_names())}), the path of a .npz file or of an image folder, or DataSplits; "
        f"got a {type(given).__name__}. Arrays or tensors of your own: "
        "data=gnnrl_gym.zoo.DataSplits.of(x_train, y_train, x_test, y_test)"
    )


def _load_npz(name: str, seed: int, given: tuple[Any, Any], flip: bool | None) -> DataSplits:
    parts, own, own_flip = read_npz(Path(name))
    try:
        return assemble(name, parts, seed, own_flip if flip is None else flip, given if given[0] is not None else own)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error


def _nothing_there(name: str, path: Path) -> Exception:
    if path.is_file():
        return ValueError(f"{name!r} is neither a .npz file nor a folder of images")
    if path.suffix or os.sep in name:
        return FileNotFoundError(f"no data file or folder at {name!r}")
    near = difflib.get_close_matches(name.lower(), data_names(), n=3) or data_names()
    return ValueError(f"no data set is named {name!r}, nor is there such a path; near it: {', '.join(near)}")


def _load_digits(given: tuple[Any, Any], flip: bool) -> DataSplits:
    whole = read_digits()
    train, search, test = _stratified(whole.labels, _DIGITS_TRAIN, _DIGITS_SEARCH)
    split = Split(*whole, *normalisation_of(whole.images, train, given))
    return DataSplits(
        "digits",
        split.select(train),
        split.select(search),
        split.select(test),
        num_classes=10,
        input_shape=whole.images.shape,
        flip=flip,
    )


def _stratified(labels: Tensor, first: int, second: int) -> list[Tensor]:
    """Indices of three parts with the classes in equal shares; the last part gets what is left."""
    rest = np.arange(len(labels))
    parts = []
    for size in (first, second):
        part, rest = train_test_split(rest, train_size=size, stratify=labels[rest], random_state=0)
        parts.append(torch.from_numpy(part))
    return [*parts, torch.from_numpy(rest)]
