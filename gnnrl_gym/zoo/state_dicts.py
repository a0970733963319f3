"""State dicts from files: read safely, checked against the network, with messages that say what to mend."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

# Heads that only training uses; torchvision's files hold them, our networks don't.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
_SHOWN = 3


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads a state dict without running any code that the file may hold.

    A dict with the state dict under the key ``state_dict`` is unwrapped, and the ``module.`` prefix that
    ``DataParallel`` leaves is taken off.

    Args:
        path: a file written by ``torch.save(model.state_dict(), path)``.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds anything but a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {str(path)!r}")
    content = _load_safely(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(map(_is_entry, content.items())):
        raise ValueError(_no_state_dict(path, f"it holds {_describe(content)}"))
    wrapped = all(key.startswith("module.") for key in content)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in content.items()}


def _load_safely(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes are, an unpickler may raise anything on them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(_no_state_dict(path, reason)) from error


def _no_state_dict(path: Path, reason: str) -> str:
    return (
        f"{str(path)!r} is not a state dict that can be read safely ({reason}); "
        "write one with torch.save(model.state_dict(), path)"
    )


def _is_entry(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _describe(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return f"a dict with the keys {_some([str(key) for key in content])}" if content else "an empty dict"


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copies a state dict into a network, after checking that every name and shape fits.

    Args:
        model: the network, changed in place.
        state: tensors by name. BatchNorm's batch counters may be absent: old files have none.
        source: where the tensors come from, for the messages.

    Raises:
        ValueError: if names are missing or unexpected, or shapes differ; ``model`` is then unchanged.
    """
    own = model.state_dict()
    given = {key: value for key, value in state.items() if key in own or not key.startswith(_AUXILIARY)}
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in own]
    misfits = [key for key in given if key in own and given[key].shape != own[key].shape]
    _check_classes(own, given, misfits, source)
    problems = [
        f"{len(keys)} {what}: {_some(keys)}"
        for what, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", [_shapes(key, given[key], own[key]) for key in misfits]),
        )
        if keys
    ]
    if problems:
        raise ValueError(f"the weights in {source} are of another network; tensors {'; '.join(problems)}")
    model.load_state_dict(given)


def _check_classes(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], misfits: list[str], source: str
) -> None:
    """The commonest misfit, so it gets a message of its own: only the last layer has another size."""
    last = [key for key in own if key.endswith(".weight")][-1]
    head = {last, last.removesuffix("weight") + "bias"}
    if last in misfits and head.issuperset(misfits) and given[last].shape[1:] == own[last].shape[1:]:
        classes = given[last].shape[0]
        raise ValueError(
            f"the weights in {source} are for {classes} classes, the network for {own[last].shape[0]}; "
            f"pass num_classes={classes}, or other weights"
        )


def _shapes(key: str, given: Tensor, own: Tensor) -> str:
    return f"{key} {list(given.shape)} instead of {list(own.shape)}"


def _some(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")
