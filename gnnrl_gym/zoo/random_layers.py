"""What random networks are wired with: every module here is one way to tie, move, repeat or count channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sum(nn.Module):
    """The sum of several branches on one input: a residual block, where one of them is a shortcut.

    Args:
        branches: modules whose outputs have equal shapes.
        in_place: add with ``+=``, as much published code does.
    """

    def __init__(self, branches: Sequence[nn.Module], in_place: bool = False) -> None:
        super().__init__()
        self.branches, self.in_place = nn.ModuleList(branches), in_place

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            if self.in_place:
                total += branch(x)
            else:
                total = total + branch(x)
        return total

    def extra_repr(self) -> str:
        return "in_place=True" if self.in_place else ""


class Concat(nn.Module):
    """Several branches on one input, their channels behind each other."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Gate(nn.Module):
    """``body(x) * gate(x)``. The gate has all channels or one, all positions or one."""

    def __init__(self, body: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.body, self.gate = body, gate

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.gate(x)


class Halves(nn.Module):
    """Two equal halves of the channels: one goes through `branch`, the other past it (ShuffleNet V2)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        through, past = x.chunk(2, 1)
        return torch.cat([past, self.branch(through)], 1)


class GatedHalves(nn.Module):
    """One half of the channels gates the other (Dauphin et al. 2017, gated linear unit)."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, 1)
        return value * torch.sigmoid(gate)


class Parts(nn.Module):
    """Channels split into parts of given sizes, one branch for each; the sizes are attributes that `slim` updates."""

    def __init__(self, sizes: Sequence[int], branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.set_split_sizes(sizes)

    def set_split_sizes(self, sizes: Sequence[int]) -> None:
        """Sets how many channels each branch gets."""
        self.sizes = list(sizes)

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.branches, x.split(self.sizes, 1), strict=True)
        return torch.cat([branch(part) for branch, part in parts], 1)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}"


class Shuffle(nn.Module):
    """Channel shuffle (Zhang et al. 2018): group g's k-th channel goes to the k-th group's g-th place."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, *size = x.shape
        return x.view(n, self.groups, c // self.groups, *size).transpose(1, 2).reshape(n, c, *size)

    def extra_repr(self) -> str:
        return f"groups={self.groups}"


class Scale(nn.Module):
    """A learned scale of every channel (LayerScale) and a learned offset of every position."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))
        self.offset = nn.Parameter(torch.randn(1, channels, size, size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset

    def extra_repr(self) -> str:
        return str(tuple(self.offset.shape))


class ChannelsLast(nn.Module):
    """`body` on ``[N, H, W, C]``, as linear layers and LayerNorm want it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Sequences(nn.Module):
    """`body` on ``[N, C, H * W]``, as one-dimensional convolutions want it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(2)).unflatten(2, x.shape[2:])


class Wiring(nn.Module):
    """A directed acyclic graph: its shortcuts cross each other, which nested blocks' never do.

    Args:
        nodes: node i reads the sum of the values that ``sources[i]`` names: 0 is the input, j + 1 node j's output.
        sources: one non-empty list per node, and a last one whose values are concatenated into the output.
    """

    def __init__(self, nodes: Sequence[nn.Module], sources: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.nodes, self.sources = nn.ModuleList(nodes), [list(s) for s in sources]

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for node, sources in zip(self.nodes, self.sources[:-1], strict=True):
            total = values[sources[0]]
            for source in sources[1:]:
                total = total + values[source]
            values.append(node(total))
        return torch.cat([values[source] for source in self.sources[-1]], 1)

    def extra_repr(self) -> str:
        return f"sources={self.sources}"


class Foreign(nn.Module):
    """A module without parameters around a function with numbers of channels in it, as other people's code has them:
    nobody but its traced graph knows those."""

    def __init__(self, function: Callable[..., Tensor], *numbers: Any) -> None:
        super().__init__()
        self.function, self.numbers = function, numbers

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.numbers)

    def extra_repr(self) -> str:
        return ", ".join([self.function.__name__, *map(str, self.numbers)])


def pad_channels(x: Tensor, stride: int, front: int, back: int) -> Tensor:
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, front, back))


def shuffle_channels(x: Tensor, groups: int, per_group: int) -> Tensor:
    size = x.shape[2:]
    return x.view(-1, groups, per_group, *size).transpose(1, 2).reshape(-1, groups * per_group, *size)


def slice_channels(x: Tensor, start: int, stop: int) -> Tensor:
    return x[:, start:stop]


def swap_parts(x: Tensor, first: int, second: int) -> Tensor:
    a, b = x.split([first, second], 1)
    return torch.cat([b, a], 1)
