"""Which ingredients a network has: read off its modules, so that no generator can claim what it didn't make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from gnnrl_gym.zoo import random_layers as layers
from gnnrl_gym.zoo.random_networks import RandomNetwork
from gnnrl_gym.zoo.resnet import ZeroPadShortcut


def _inside(module: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(inner, kind) for inner in module.modules() if inner is not module)


def _calls(module: Any, function: Callable[..., Any]) -> bool:
    return isinstance(module, layers.Foreign) and module.function is function


def _shortcut(module: Any) -> Any:
    return module.branches[-1] if isinstance(module, layers.Sum) else None


def _branches(module: Any) -> list[nn.Module]:
    return list(module.branches) if isinstance(module, (layers.Sum, layers.Concat)) else []


def _squeezes(module: Any) -> bool:
    return isinstance(module, layers.Gate) and _inside(module.gate, nn.AdaptiveAvgPool2d)


def _gate_channels(module: Any) -> int:
    if not isinstance(module, layers.Gate) or _squeezes(module):
        return 0
    return next(m.out_channels for m in module.gate.modules() if isinstance(m, nn.Conv2d))


def _layers_of(module: nn.Module) -> int:
    return sum(isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)) for m in module.modules())


def _grouped(module: Any) -> bool:
    return isinstance(module, nn.Conv2d) and 1 < module.groups < module.in_channels


# name: whether a module is one
INGREDIENTS: dict[str, Callable[[Any], bool]] = {
    "residual add": lambda m: isinstance(_shortcut(m), nn.Identity),
    "add in place": lambda m: isinstance(m, layers.Sum) and m.in_place,
    "projected shortcut": lambda m: isinstance(_shortcut(m), nn.Sequential) and _layers_of(_shortcut(m)) == 1,
    "zero-padded shortcut": lambda m: isinstance(_shortcut(m), ZeroPadShortcut),
    "foreign zero-padded shortcut": lambda m: _calls(_shortcut(m), layers.pad_channels),
    "shortcut over several layers": lambda m: any(_layers_of(branch) > 2 for branch in _branches(m)),
    "nested branches": lambda m: bool(_branches(m)) and (_inside(m, layers.Sum) or _inside(m, layers.Concat)),
    "crossing shortcuts": lambda m: isinstance(m, layers.Wiring) and any(len(s) > 1 for s in m.sources[:-1]),
    "concatenation": lambda m: isinstance(m, layers.Concat),
    "dense concatenation": lambda m: isinstance(m, layers.Concat) and isinstance(m.branches[-1], nn.Identity),
    "depthwise convolution": lambda m: isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels,
    "depth multiplier": lambda m: isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels < m.out_channels,
    "grouped convolution": _grouped,
    "transposed convolution": lambda m: isinstance(m, nn.ConvTranspose2d),
    "grouped transposed convolution": lambda m: isinstance(m, nn.ConvTranspose2d) and m.groups > 1,
    "convolution in one dimension": lambda m: isinstance(m, nn.Conv1d),
    "1x1 convolution": lambda m: isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1),
    "3x3 convolution": lambda m: isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3),
    "strided convolution": lambda m: isinstance(m, nn.Conv2d) and m.stride == (2, 2),
    "circular padding": lambda m: isinstance(m, nn.Conv2d) and m.padding_mode == "circular",
    "linear layer on channels": lambda m: isinstance(m, layers.ChannelsLast) and _inside(m, nn.Linear),
    "channel shuffle": lambda m: isinstance(m, layers.Shuffle) and m.groups > 1,
    "foreign channel shuffle": lambda m: _calls(m, layers.shuffle_channels),
    "foreign channel slice": lambda m: _calls(m, layers.slice_channels),
    "foreign channel split": lambda m: _calls(m, layers.swap_parts),
    "channel padding": lambda m: isinstance(m, ZeroPadShortcut) or _calls(m, layers.pad_channels),
    "channel chunks": lambda m: isinstance(m, layers.Halves),
    "channel split": lambda m: isinstance(m, layers.Parts) and len(m.sizes) > 1,
    "squeeze and excitation": _squeezes,
    "multiplied branches": lambda m: _gate_channels(m) > 1,
    "gate of one channel": lambda m: _gate_channels(m) == 1,
    "gated linear unit": lambda m: isinstance(m, layers.GatedHalves),
    "learned scale and offset": lambda m: isinstance(m, layers.Scale),
    "hidden layer in the head": lambda m: isinstance(m, RandomNetwork) and any(_layers_of(h) > 1 for h in m.heads),
    "flattened with positions": lambda m: isinstance(m, RandomNetwork) and any(map(_keeps_positions, m.heads)),
    "map as output": lambda m: isinstance(m, RandomNetwork) and any(isinstance(h, nn.Conv2d) for h in m.heads),
    "two outputs": lambda m: isinstance(m, RandomNetwork) and len(m.heads) > 1,
    "shared layer": lambda m: isinstance(m, RandomNetwork) and any(_repeated(m)),
    "shared weight": lambda m: isinstance(m, RandomNetwork) and any(_tied(m)),
    "max pooling": lambda m: isinstance(m, nn.MaxPool2d),
    "mean pooling": lambda m: isinstance(m, nn.AvgPool2d),
    "adaptive max pooling": lambda m: isinstance(m, nn.AdaptiveMaxPool2d),
    "interpolation": lambda m: isinstance(m, nn.Upsample),
    "BatchNorm": lambda m: isinstance(m, nn.BatchNorm2d),
    "BatchNorm in one dimension": lambda m: isinstance(m, nn.BatchNorm1d),
    "InstanceNorm": lambda m: isinstance(m, nn.InstanceNorm2d),
    "LayerNorm": lambda m: isinstance(m, nn.LayerNorm),
    "GroupNorm": lambda m: isinstance(m, nn.GroupNorm),
    "dropout": lambda m: isinstance(m, nn.Dropout),
    "dropout of channels": lambda m: isinstance(m, nn.Dropout2d),
    "PReLU for each channel": lambda m: isinstance(m, nn.PReLU) and m.num_parameters > 1,
    "activation in place": lambda m: isinstance(m, nn.ReLU) and m.inplace,
    "activation that is not 0 at 0": lambda m: isinstance(m, nn.Softplus),
}  # fmt: skip


def ingredients(model: nn.Module) -> Counter[str]:
    """How often each ingredient occurs; those that don't are absent."""
    return Counter(name for module in model.modules() for name, found in INGREDIENTS.items() if found(module))


def _keeps_positions(head: nn.Module) -> bool:
    """Whether a head flattens more than one position of each channel."""
    if not isinstance(head, nn.Sequential):
        return False
    return getattr(head[0], "output_size", 0) != 1


def _repeated(model: nn.Module) -> Iterator[bool]:
    """For every module that has several names whether it has parameters of its own."""
    seen: set[int] = set()
    for _, module in model.named_modules(remove_duplicate=False):
        if id(module) in seen:
            yield next(module.parameters(recurse=False), None) is not None
        seen.add(id(module))


def _tied(model: nn.Module) -> Iterator[bool]:
    """For every parameter whether another module has it too."""
    owners: Counter[int] = Counter()
    for module in model.modules():
        owners.update(id(parameter) for parameter in module.parameters(recurse=False))
    return (count > 1 for count in owners.values())
