"""Readers of data: a .npz file, a folder of class folders, torchvision's sets, scikit-learn's digits.

Each checks what it finds and returns the data set's parts as labelled images.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torchvision.datasets.folder import IMG_EXTENSIONS

from gnnrl_gym.files import cache_folder
from gnnrl_gym.zoo.arrays import KEYS, SEARCH_KEYS, Labelled, Parts, labelled
from gnnrl_gym.zoo.images import FileImages, MemoryImages
from gnnrl_gym.zoo.normalisation import check_normalisation

_NORMALISATION = ("mean", "std")

TORCHVISION: dict[str, Any] = {
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
    "mnist": torchvision.datasets.MNIST,
    "fashion-mnist": torchvision.datasets.FashionMNIST,
    "svhn": torchvision.datasets.SVHN,
}


def default_root() -> Path:
    """The folder of torchvision's data sets, unless another is given."""
    return cache_folder() / "data"


def read_digits() -> Labelled:
    """scikit-learn's 1797 digits of 8x8 pixels, as one whole; they come with the package."""
    bunch: Any = load_digits()
    levels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    return Labelled(
        MemoryImages(torch.from_numpy(levels).unsqueeze(1)), torch.from_numpy(bunch.target.astype(np.int64))
    )


def read_npz(path: Path) -> tuple[Parts, tuple[Any, Any], bool | None]:
    """Reads ``x_train, y_train, x_test, y_test`` from a .npz file, ``x_search, y_search`` where it has them, and
    ``mean, std`` and ``flip``, each None where it has none.

    Raises:
        ValueError: if the file is broken, lacks one of the first four, or one is not of the form that it must have.
    """
    try:
        arrays = _arrays(path)
    except Exception as error:  # zip, zlib, lzma and numpy each have errors of their own for broken files
        raise ValueError(f"{str(path)!r} is not a .npz file that can be read ({_reason(path, error)})") from error
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise ValueError(f"{str(path)!r} has no {', '.join(missing)}; it must have {', '.join(KEYS)}")
    try:
        mean, std = (arrays.get(key) for key in _NORMALISATION)
        check_normalisation(mean, std)
        return labelled(arrays), (mean, std), _flip(arrays.get("flip"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    file = np.load(path, allow_pickle=False)  # a pickle may hold code
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError("it holds a single array")
    with file:
        _warn_of_unread(path, [key for key in file if key.startswith(("x_", "y_")) and key not in KEYS + SEARCH_KEYS])
        return {key: file[key] for key in (*KEYS, *SEARCH_KEYS, *_NORMALISATION, "flip") if key in file}


def _flip(given: Any) -> bool | None:
    if given is not None and (given.size != 1 or given.dtype != np.bool_):
        raise ValueError(f"flip is True or False, got {given!r}")
    return None if given is None else bool(given)


def _warn_of_unread(path: Path, names: list[str]) -> None:
    """Images for a validation under another name would be missed without a word, and training images searched on."""
    if names:
        search = "val/" if path.is_dir() else " and ".join(SEARCH_KEYS)
        warnings.warn(
            f"{str(path)!r}: {', '.join(names)} {'are' if len(names) > 1 else 'is'} not read. Images to search on are "
            f"called {search}.",
            stacklevel=2,
        )


def _reason(path: Path, error: Exception) -> str:
    """Why numpy could not read it, without numpy's advice to load objects."""
    if "pickle" not in str(error):
        return str(error)
    with path.open("rb") as file:
        start = file.read(2)
    # numpy takes whatever is no archive and no array for a pickle; a pickle starts with byte 0x80
    if start.startswith((b"PK", b"\x80", b"\x93N")):
        return "it holds Python objects, which were not loaded"
    return "it is no archive: write one with np.savez"


def read_torchvision(name: str, root: Path, download: bool) -> Parts:
    """Reads one of torchvision's data sets, which lies in ``root`` or may be downloaded there.

    Raises:
        FileNotFoundError: if it is not there.
    """
    parts = [{"split": part} if name == "svhn" else {"train": part == "train"} for part in ("train", "test")]
    try:
        sets = [TORCHVISION[name](root, download=download, **part) for part in parts]
    except (RuntimeError, OSError) as error:
        mend = "is the network up?" if download else _how_to_get(name, root)
        raise FileNotFoundError(f"data set {name!r} is not in {str(root)!r} ({error}); {mend}") from error
    arrays = {}
    for part, data in zip(("train", "test"), sets, strict=True):
        x = np.asarray(data.data)
        arrays[f"x_{part}"] = x.transpose(0, 2, 3, 1) if name == "svhn" else x
        arrays[f"y_{part}"] = np.asarray(data.labels if name == "svhn" else data.targets)
    return labelled(arrays)


def _how_to_get(name: str, root: Path) -> str:
    """A command, since neither the environments nor `gnnrl` download anything."""
    place = "" if root == default_root() else f", root={str(root)!r}"
    command = f"from gnnrl_gym.zoo import load_data; load_data({name!r}{place}, download=True)"
    return f'download it once with: python -c "{command}"; if it lies elsewhere, data=load_data({name!r}, root=...)'


def read_folder(path: Path, image_size: int) -> Parts:
    """Lists the images of ``train/``, and of ``test/`` and ``val/``: test and search; one of them alone is the test.

    Raises:
        FileNotFoundError: if ``train/`` or both others are absent.
        ValueError: if they have different classes, or a class without images.
    """
    if not (path / "train").is_dir():
        raise FileNotFoundError(f"{str(path)!r} has no folder train/ with a folder of images for each class")
    held_out = [part for part in ("test", "val") if (path / part).is_dir()]
    _warn_of_unread(path, sorted(f"{part.name}/" for part in path.glob("valid*") if part.is_dir()))
    if not held_out:
        raise FileNotFoundError(f"{str(path)!r} has neither a folder test/ nor val/")
    found = {part: _class_folders(path / part, image_size) for part in ("train", *held_out)}
    classes = found["train"][1]
    for part in held_out:
        if odd := sorted(set(classes) ^ set(found[part][1])):
            raise ValueError(f"{str(path)!r}: train/ and {part}/ differ in classes: {', '.join(odd[:5])}")
    return Parts(*(images for images, _ in found.values()))


class _Visible(torchvision.datasets.ImageFolder):
    """Without the hidden folders that systems and notebooks leave."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return classes, {name: index for index, name in enumerate(classes)}


def _is_image(path: str) -> bool:
    return not Path(path).name.startswith(".") and path.lower().endswith(IMG_EXTENSIONS)


def _class_folders(path: Path, image_size: int) -> tuple[Labelled, list[str]]:
    try:
        folder = _Visible(str(path), is_valid_file=_is_image)
    except FileNotFoundError as error:
        raise ValueError(f"{str(path)!r} must have a folder of images for each class: {error}") from error
    paths, labels = zip(*folder.samples, strict=True)
    return Labelled(FileImages(tuple(map(Path, paths)), image_size), torch.tensor(labels)), folder.classes
