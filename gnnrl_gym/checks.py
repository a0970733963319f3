"""What environments are given is checked before any work starts; every message names the argument and the mend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """
    Raises:
        ValueError: `value` is none of `allowed`.
    """
    if value not in allowed:
        raise ValueError(f"Unknown {name} {value!r}: choose one of {', '.join(map(str, allowed))}.")


def check_whole(least: int, **numbers: Any) -> None:
    """
    Raises:
        ValueError: one of `numbers` is no whole number of at least `least`.
    """
    for name, value in numbers.items():
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} must be a whole number and at least {least}, got {value!r}.")


def check_seed(**seeds: Any) -> None:
    """
    Raises:
        ValueError: one of `seeds` is no whole number that every generator takes.
    """
    for name, value in seeds.items():
        if not isinstance(value, Integral) or not 0 <= int(value) < 2**32:
            raise ValueError(f"{name} must be a whole number from 0 to {2**32 - 1}, got {value!r}.")


def check_number(condition: str, **numbers: Any) -> None:
    """
    Args:
        condition: "above 0" or "at least 0".

    Raises:
        ValueError: one of `numbers` is no finite number that meets it.
    """
    for name, value in numbers.items():
        finite = isinstance(value, Real) and math.isfinite(value)
        if not finite or value < 0 or (value == 0 and condition == "above 0"):
            raise ValueError(f"{name} must be a number {condition}, got {value!r}.")


def check_share(name: str, value: Any, of: str) -> None:
    """
    Raises:
        ValueError: `value` is no share in [0, 1).
    """
    if not isinstance(value, Real) or not 0 <= float(value) < 1:
        raise ValueError(f"{name} is a share of {of} in [0, 1), got {value!r}.")
