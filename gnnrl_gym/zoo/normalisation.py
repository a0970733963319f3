"""What is taken off each channel of an image (mean), and what it is divided by (std), on the scale [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Values = float | Sequence[float]  # one number for all channels, or one for each
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


def check_normalisation(mean: Any, std: Any) -> None:
    """Check `mean` and `std` as far as that is possible without images. Both may be None.

    Raises:
        ValueError: only one of the two is given, or they hold no finite numbers, numbers above 1, or a ``std`` that
            is not above 0.
    """
    if (mean is None) != (std is None):
        given, absent = ("mean", "std") if std is None else ("std", "mean")
        raise ValueError(f"{given} is given without {absent}: give both, or neither for the usual ones")
    if mean is not None:
        for name, values in (("mean", mean), ("std", std)):
            if max(_numbers(name, values)) > 1:
                raise ValueError(
                    f"mean and std are of pixels on the scale from 0 to 1, got {name}={values!r}: divide both by 255"
                )


def by_channel(mean: Any, std: Any, channels: int) -> Normalisation:
    """A number for each of so many channels; a single number is for all of them.

    Raises:
        ValueError: as ``check_normalisation``, or there are not as many numbers as channels.
    """
    return _spread("mean", mean, channels), _spread("std", std, channels)


def _numbers(name: str, values: Any) -> list[float]:
    """The values as a flat list, one number where it is a single one."""
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:  # text, ragged, a tensor on a GPU
        raise ValueError(f"{name} must be a number, or one for each channel, got {values!r}") from error
    if array.ndim > 1 or array.size == 0:
        raise ValueError(f"{name} must be a number, or one for each channel, got shape {array.shape}")
    numbers: list[float] = array.reshape(-1).tolist()
    if not all(map(math.isfinite, numbers)) or (name == "std" and min(numbers) <= 0):
        raise ValueError(f"{name} must hold finite numbers{' above 0' if name == 'std' else ''}, got {values!r}")
    return numbers


def _spread(name: str, values: Any, channels: int) -> tuple[float, ...]:
    numbers = _numbers(name, values)
    if np.ndim(values) == 0:
        return tuple(numbers * channels)
    if len(numbers) != channels:
        raise ValueError(f"{name} has {len(numbers)} numbers, but the images have {channels} channels")
    return tuple(numbers)
