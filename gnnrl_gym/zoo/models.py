"""Models by name: the digits network that ships with the package, CIFAR ResNets, all of torchvision's."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from gnnrl_gym.checks import check_seed
from gnnrl_gym.zoo.early import EARLY
from gnnrl_gym.zoo.resnet import CifarResNet
from gnnrl_gym.zoo.state_dicts import load_into, mend_of_classes, read_state_dict

DIGITS = "digits-resnet"
DIGITS_WEIGHTS = Path(__file__).parent / "weights" / "digits_resnet.pt"
# Small enough to ship and to search in seconds, deep enough for blocks to repeat, narrow enough for
# pruning to hurt.
DIGITS_DEPTH, DIGITS_WIDTHS = 2, (8, 16, 32)
RANDOM = "random"

# Depth per stage: 6 * depth + 2 layers, as in He et al. 2016.
_CIFAR_DEPTHS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}


def model_names() -> list[str]:
    """All names that ``load_model`` takes."""
    return [DIGITS, *_CIFAR_DEPTHS, *EARLY, *torchvision.models.list_models(module=torchvision.models)]


def load_model(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    *,
    seed: int = 0,
) -> nn.Module:
    """Builds a network by name, in eval mode, on the CPU.

    Args:
        name: ``digits-resnet``, ``resnet20/32/44/56/110`` (for 32x32 images), ``cnn-4`` (likewise), ``mlp-300-100``
            (for 28x28), or a torchvision model.
        weights: a file with a state dict; the name of a torchvision weights entry, such as ``"DEFAULT"``
            (torchvision downloads it; its own files are best asked for so, since it adapts some networks to them:
            GoogLeNet and Inception rescale their images only then); ``"random"``; or None, which means the shipped
            weights for ``digits-resnet`` and random ones for all others.
        num_classes: outputs of the last layer; None means 10, or 1000 for torchvision's.
        seed: of random weights. The global random state is left alone, so that a name says it all.

    Returns:
        The network. Heads that only training uses (GoogLeNet, Inception) are left out, since no path to
        the output shows what pruning would do to them.

    Raises:
        ValueError: for an unknown name or weights entry, a seed that is not a whole number in [0, 2**32), or
            weights that don't fit the network.
        FileNotFoundError: if the weights file is absent, or a download fails.
    """
    _check_name(name)
    check_seed(seed=seed)
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
        raise ValueError(f"num_classes must be at least 1 and whole, got {num_classes!r}")
    if not isinstance(weights, (str, os.PathLike, type(None))):
        raise ValueError(f"weights is a file, the name of an entry, or 'random', got a {type(weights).__name__}")
    if weights is None:
        weights = DIGITS_WEIGHTS if name == DIGITS else RANDOM
    if weights == RANDOM:
        return _build(name, num_classes, seed).eval()
    entry = _torchvision_entry(name, weights)
    if entry is not None:
        return _download(name, entry, num_classes).eval()
    state = read_state_dict(weights)
    model = _build(name, num_classes, seed)
    load_into(model, state, repr(os.fspath(weights)))
    return model.eval()


def input_shape_for(name: str) -> tuple[int, int, int]:
    """The shape (C, H, W) of one image that the named model is usually fed.

    Raises:
        ValueError: for an unknown name.
    """
    _check_name(name)
    if name == DIGITS:
        return (1, 8, 8)
    if name in EARLY:
        return EARLY[name].input_shape
    if name in _CIFAR_DEPTHS:
        return (3, 32, 32)
    return (3, 299, 299) if name == "inception_v3" else (3, 224, 224)


def _check_name(name: str) -> None:
    names = model_names()
    if name not in names:
        near = difflib.get_close_matches(str(name).lower(), names, n=5, cutoff=0.5) or names[:8]
        own = '; a network of your own goes in Python: gym.make("GNNRL-Prune-v0", model=module, data=...)'
        looks_own = ":" in str(name) or os.sep in str(name) or Path(str(name)).suffix in (".py", ".pt", ".pth")
        raise ValueError(f"no model is named {name!r}; near it: {', '.join(near)}{own if looks_own else ''}")


def _build(name: str, num_classes: int | None, seed: int) -> nn.Module:
    """The named network with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # a GPU's stays as it is
        if name == DIGITS:
            return CifarResNet(DIGITS_DEPTH, num_classes or 10, DIGITS_WIDTHS, in_channels=1)
        if name in EARLY:
            return EARLY[name].build(num_classes or 10)
        if name in _CIFAR_DEPTHS:
            return CifarResNet(_CIFAR_DEPTHS[name], num_classes or 10)
        options: dict[str, Any] = {"num_classes": num_classes or 1000}
        if name in ("googlenet", "inception_v3"):
            options |= {"aux_logits": False, "init_weights": True}
        return torchvision.models.get_model(name, weights=None, **options)


def _torchvision_entry(name: str, weights: str | os.PathLike[str]) -> Any | None:
    """The torchvision weights entry that is meant, or None where ``weights`` is a file."""
    text = os.fspath(weights)
    if Path(text).exists() or Path(text).suffix or os.sep in text:
        return None  # a path; should it be absent, reading it says so
    if name == DIGITS or name in (*_CIFAR_DEPTHS, *EARLY):
        raise ValueError(f"{name} has no weights entry {text!r}; pass a file with a state dict, or 'random'")
    entries = torchvision.models.get_model_weights(name)
    # Not `in entries`: aliases such as DEFAULT are members only by name.
    if text not in entries.__members__:
        raise ValueError(
            f"{name} has no weights entry {text!r}, and there is no such file; "
            f"the entries are {', '.join(entries.__members__)}"
        )
    return entries[text]


def _download(name: str, entry: Any, num_classes: int | None) -> nn.Module:
    classes = len(entry.meta["categories"])
    if num_classes not in (None, classes):
        raise ValueError(
            f"weights {entry.name} of {name} are for {classes} classes, not {num_classes}; {mend_of_classes(classes)}"
        )
    try:
        model = torchvision.models.get_model(name, weights=entry)
    except OSError as error:  # urllib's errors are OSErrors
        # Not as a path: with its entry torchvision renames DenseNet's keys, and has GoogLeNet and Inception rescale
        # their images.
        raise FileNotFoundError(
            f"could not download {entry.url} ({error}); fetch it elsewhere and put it into "
            f"{os.path.join(torch.hub.get_dir(), 'checkpoints')!r}"
        ) from error
    _drop_auxiliary_heads(model)
    return model


def _drop_auxiliary_heads(model: nn.Module) -> None:
    for head in ("aux1", "aux2", "AuxLogits"):
        if isinstance(getattr(model, head, None), nn.Module):
            setattr(model, head, None)
            model.aux_logits = False  # type: ignore[assignment]
