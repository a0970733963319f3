"""What environments are given is checked before any work starts; every message names the argument and the mend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Check that the argument `name` is one of the values that are `allowed`.

    Raises:
        ValueError: `value` is not in `allowed`.
    """
    if value not in allowed:
        raise ValueError(f"Unknown {name} {value!r}: choose one of {', '.join(map(str, allowed))}.")


def check_whole(least: int, **numbers: Any) -> None:
    """Check that every number is a whole number of at least `least`.

    Raises:
        ValueError: one of `numbers` is not.
    """
    for name, value in numbers.items():
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} must be a whole number and at least {least}, got {value!r}.")


def check_seed(**seeds: Any) -> None:
    """Check that every seed is a whole number in [0, 2**32), which all random generators take.

    Raises:
        ValueError: one of `seeds` is not.
    """
    for name, value in seeds.items():
        if not isinstance(value, Integral) or not 0 <= int(value) < 2**32:
            raise ValueError(f"{name} must be a whole number from 0 to {2**32 - 1}, got {value!r}.")


def check_number(condition: str, **numbers: Any) -> None:
    """Check that every number is finite and meets the condition.

    Args:
        condition: "above 0" or "at least 0".

    Raises:
        ValueError: one of `numbers` is not finite, or does not meet it.
    """
    for name, value in numbers.items():
        finite = isinstance(value, Real) and math.isfinite(value)
        if not finite or value < 0 or (value == 0 and condition == "above 0"):
            raise ValueError(f"{name} must be a number {condition}, got {value!r}.")


def check_share(name: str, value: Any, of: str) -> None:
    """Check that the argument `name` is a share in [0, 1).

    Args:
        of: what it is a share of, for the message.

    Raises:
        ValueError: `value` is not.
    """
    if not isinstance(value, Real) or not 0 <= float(value) < 1:
        raise ValueError(f"{name} is a share of {of} in [0, 1), got {value!r}.")
