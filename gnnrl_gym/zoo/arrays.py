"""Arrays of images and labels, checked: those of a .npz file, of torchvision's sets, or of the caller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gnnrl_gym.zoo.images import ImageSource, MemoryImages

KEYS = ("x_train", "y_train", "x_test", "y_test")
SEARCH_KEYS = ("x_search", "y_search")
_MOST_CLASSES = 1_000_000  # the last layer has a row for each: a label that is no label would fill all memory


class Labelled(NamedTuple):
    """Images and their labels (int64 ``[N]``)."""

    images: ImageSource
    labels: Tensor


class Parts(NamedTuple):
    """A data set as it comes. Where it has no search part, one is set apart from the train part."""

    train: Labelled
    test: Labelled
    search: Labelled | None = None


def labelled(arrays: Mapping[str, Any]) -> Parts:
    """The parts of ``x_train, y_train, x_test, y_test`` and perhaps ``x_search, y_search``, which are copied.

    Args:
        arrays: images uint8 ``[N, H, W]`` or ``[N, H, W, C]``, labels integer ``[N]`` from 0; arrays or tensors.

    Raises:
        ValueError: one of them is not of that form, or they don't go together.
    """
    given = [key for key in SEARCH_KEYS if arrays.get(key) is not None]
    if len(given) == 1:
        raise ValueError(f"there is {given[0]} alone: give both, {' and '.join(SEARCH_KEYS)}, or neither")
    found = {key: _as_array(key, arrays[key]) for key in (*KEYS, *given)}
    parts = Parts(
        *(
            Labelled(MemoryImages(_images(found, part)), _labels(found, part))
            for part in Parts._fields
            if f"x_{part}" in found
        )
    )
    _check_alike(parts.train, "test", parts.test)
    if parts.search:
        _check_alike(parts.train, "search", parts.search)
    return parts


def _check_alike(train: Labelled, name: str, part: Labelled) -> None:
    if train.images.shape != part.images.shape:
        shapes = f"{train.images.shape} and {part.images.shape}"
        raise ValueError(f"the images of x_train and x_{name} differ in shape (C, H, W): {shapes}")
    if part.labels.max() > train.labels.max():
        highest = int(train.labels.max())
        raise ValueError(f"y_{name} has the label {int(part.labels.max())}, y_train none above {highest}")


def _as_array(key: str, values: Any) -> NDArray[Any]:
    if isinstance(values, Tensor):
        try:
            return values.detach().cpu().numpy()
        except (TypeError, RuntimeError) as error:  # kinds that numpy has not, such as bfloat16 or sparse
            raise ValueError(f"{key} is a tensor of {values.dtype}, {values.layout}: {error}") from error
    if isinstance(values, np.ndarray) or (key.startswith("y") and isinstance(values, (list, tuple))):
        try:
            return np.asarray(values)
        except ValueError as error:  # lists in a list, of different lengths
            raise ValueError(f"{key} must be integers of shape [N]: {error}") from error
    raise ValueError(f"{key} must be an array or a tensor, got a {type(values).__name__}")


def _images(arrays: Mapping[str, NDArray[Any]], part: str) -> Tensor:
    """uint8 ``[N, H, W]`` or ``[N, H, W, C]`` as ``[N, C, H, W]``, a copy."""
    array, key = arrays[f"x_{part}"], f"x_{part}"
    if array.dtype != np.uint8:
        raise ValueError(f"{key} must be uint8, got {array.dtype}: pixels from 0 to 255, which are normalised here")
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[-1] > 4):
        last = "; move the channels to the end" if array.ndim == 4 and array.shape[1] <= 4 else ""
        raise ValueError(f"{key} must be [N, H, W] or [N, H, W, C], C at most 4; got {array.shape}{last}")
    if array.size == 0:
        raise ValueError(f"{key} is empty: its shape is {array.shape}")
    last_channels = array[..., None] if array.ndim == 3 else array
    return torch.from_numpy(np.array(last_channels.transpose(0, 3, 1, 2), order="C"))


def _labels(arrays: Mapping[str, NDArray[Any]], part: str) -> Tensor:
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
