"""State dicts from files: read safely, checked against the network, with messages that say what to mend."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

# What DataParallel and torch.compile put in front of every name.
_PREFIXES = ("module.", "_orig_mod.")
# Heads that only training uses; torchvision's files hold them, our networks don't.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
_SHOWN = 3


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads a state dict without running any code that the file may hold.

    A dict with the state dict under the key ``state_dict`` is unwrapped, and the prefixes that ``DataParallel``
    (``module.``) and ``torch.compile`` (``_orig_mod.``) leave are taken off, in whatever order they were put on.

    Args:
        path: a file written by ``torch.save(model.state_dict(), path)``.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds anything but a state dict.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"{str(path)!r} is a folder; pass the weights file in it")
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {str(path)!r}")
    content = _load_safely(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(map(_is_entry, content.items())):
        raise ValueError(_no_state_dict(path, f"it holds {_describe(content)}"))
    while prefix := next((each for each in _PREFIXES if all(key.startswith(each) for key in content)), None):
        content = {key.removeprefix(prefix): value for key, value in content.items()}
    return dict(content)


def _load_safely(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes are, an unpickler may raise anything on them
        raise ValueError(_no_state_dict(path, why_unreadable(error))) from error


def why_unreadable(error: Exception) -> str:
    """One line on why ``torch.load(weights_only=True)`` failed, without its advice to load unsafely."""
    if code := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it holds {code[1]}, which is no tensor and was not run"
    lines = str(error).strip().splitlines()
    if isinstance(error, pickle.UnpicklingError) or not lines:
        return f"it is no file of tensors, or damaged: {type(error).__name__}"
    return f"{type(error).__name__}: {lines[0]}"


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
        ValueError: if names are missing or unexpected, shapes or kinds of numbers differ, or a parameter is not
            finite; ``model`` is then unchanged.
    """
    whole = model.state_dict()
    own = {key: value for key, value in whole.items() if isinstance(value, Tensor)}
    others = {key: value for key, value in whole.items() if key not in own}  # `get_extra_state`: stays the model's own
    given = {k: v for k, v in state.items() if k not in others and (k in own or not k.startswith(_AUXILIARY))}
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
    _check_values(model, own, given, source)
    model.load_state_dict(given | others)


def _check_values(model: nn.Module, own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Tensors that would be copied with an error from deep inside, or silently into a broken network."""
    other = [f"{key} ({_kind(value)})" for key, value in given.items() if not _copies(value, own[key])]
    if other:
        raise ValueError(f"the weights in {source} hold other kinds of tensors than the network: {_some(other)}")
    # a buffer may well hold infinities: an attention mask does
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    bad = [k for k, v in given.items() if not bool(torch.isfinite(v).all() if k in parameters else (v == v).all())]
    if bad:
        raise ValueError(f"the weights in {source} hold NaN or infinity: {_some(bad)}")


def _copies(value: Tensor, own: Tensor) -> bool:
    plain = value.layout == own.layout and not value.is_meta and value.is_quantized == own.is_quantized
    return plain and value.is_complex() == own.is_complex() and value.is_floating_point() == own.is_floating_point()


def _kind(value: Tensor) -> str:
    return "no data, on the meta device" if value.is_meta else f"{value.dtype}, {value.layout}"


def _check_classes(own: dict[str, Tensor], given: Mapping[str, Tensor], misfits: list[str], source: str) -> None:
    """The commonest misfit, so it gets a message of its own: only the last layer has another size."""
    last = next((key for key in reversed(own) if key.endswith(".weight")), "")
    head = {last, last.removesuffix("weight") + "bias"}
    if last in misfits and head.issuperset(misfits) and given[last].shape[1:] == own[last].shape[1:]:
        classes = given[last].shape[0]
        raise ValueError(
            f"the weights in {source} are for {classes} classes, the network for {own[last].shape[0]}; "
            f"{mend_of_classes(classes)}"
        )


def mend_of_classes(classes: int) -> str:
    """What to do about weights for so many classes, where the network has another number of them."""
    return (
        f"pass num_classes={classes} to load_model; an environment has no such argument, since it builds a named "
        "network for the classes of its data: give it data with as many, weights='random', or a module with a last "
        "layer of your own"
    )


def _shapes(key: str, given: Tensor, own: Tensor) -> str:
    return f"{key} {list(given.shape)} instead of {list(own.shape)}"


def _some(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")
