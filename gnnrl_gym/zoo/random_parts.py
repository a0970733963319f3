"""Parts of random networks that hold no others: layers with norm and activation, and ways to move channels about."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import nn

from gnnrl_gym.zoo import random_layers as layers
from gnnrl_gym.zoo.resnet import ZeroPadShortcut

Draw = Callable[[int], int]  # n -> an integer from 0 to n - 1; 0 is the simplest choice
Option = TypeVar("Option")


class Shape(NamedTuple):
    """Of a map of features: its channels, and its height and width in pixels."""

    channels: int
    size: int


Part = tuple[nn.Module, Shape]


class PartMaker:
    """Makes parts from the choices of `draw`. A method takes the shape that its part gets, and says with the part which
    one it gives. All but `down` keep the size."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def pick(self, *options: Option) -> Option:
        return options[self.draw(len(options))]

    def chance(self, percent: int) -> bool:
        return self.draw(100) >= 100 - percent

    def width(self) -> int:
        return self.pick(4, 6, 8, 5, 3, 12)

    # ---- simple parts -------------------------------------------------------------------------------------------

    def activation(self, channels: int, in_place: bool = False) -> nn.Module:
        """`in_place` where no gradient needs what it overwrites."""
        made: list[Callable[[], nn.Module]] = [
            nn.ReLU, partial(nn.ReLU, in_place), partial(nn.PReLU, channels), nn.PReLU, nn.GELU, nn.SiLU, nn.Hardswish,
            nn.LeakyReLU, nn.ELU, nn.Mish, nn.Tanh, nn.Softplus, nn.ReLU6, nn.Identity,
        ]  # fmt: skip
        return self.pick(*made)()

    def norm(self, channels: int, size: int) -> nn.Module:
        if self.chance(10) and size > 1:
            return nn.InstanceNorm2d(channels, affine=self.chance(50))
        if self.chance(4):  # these two normalise over channels: what they touch is frozen
            return nn.GroupNorm(self.divisor(channels), channels)
        if self.chance(3):
            return layers.ChannelsLast(nn.LayerNorm(channels))
        return self.pick(nn.BatchNorm2d, nn.BatchNorm2d, nn.Identity)(channels)

    def finish(self, conv: nn.Module, channels: int, size: int, active: bool = True) -> nn.Module:
        """Normalisation and activation behind a convolution."""
        parts = [conv, self.norm(channels, size)]
        return nn.Sequential(*parts, self.activation(channels, in_place=True)) if active else nn.Sequential(*parts)

    def convolution(self, inputs: int, outputs: int, **settings: Any) -> nn.Conv2d:
        kernel = self.pick(1, 3)
        settings["padding_mode"] = self.pick("zeros", "zeros", "circular")
        settings["bias"] = self.chance(50)
        return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **settings)

    def divisor(self, *numbers: int) -> int:
        common = [d for d in range(1, min(numbers) + 1) if not any(n % d for n in numbers)]
        return self.pick(*common)

    def plain(self, shape: Shape, channels: int | None = None, active: bool = True) -> Part:
        channels = channels or self.width()
        conv = self.convolution(shape.channels, channels)
        return self.finish(conv, channels, shape.size, active), Shape(channels, shape.size)

    def down(self, shape: Shape) -> Part:
        half = (shape.size + 1) // 2
        if self.chance(50):
            pool: Any = self.pick(nn.MaxPool2d, nn.AvgPool2d)
            return pool(2, ceil_mode=True), Shape(shape.channels, half)
        channels = self.width()
        return self.finish(self.convolution(shape.channels, channels, stride=2), channels, half), Shape(channels, half)

    def depthwise(self, shape: Shape) -> Part:
        channels, multiplier = shape.channels, self.pick(1, 1, 2)
        conv = self.convolution(channels, channels * multiplier, groups=channels)
        return self.finish(conv, channels * multiplier, shape.size), Shape(channels * multiplier, shape.size)

    def grouped(self, shape: Shape) -> Part:
        groups = self.divisor(shape.channels)
        channels = groups * self.pick(1, 2, 3)
        conv = self.convolution(shape.channels, channels, groups=groups)
        return self.finish(conv, channels, shape.size), Shape(channels, shape.size)

    def around(self, shape: Shape) -> Part:
        """What keeps channels apart."""
        made: list[Callable[[], nn.Module]] = [
            partial(nn.MaxPool2d, 3, 1, 1), partial(nn.AvgPool2d, 3, 1, 1), nn.Dropout, nn.Dropout2d,
            partial(layers.Scale, *shape), partial(self.activation, shape.channels),
        ]  # fmt: skip
        return self.pick(*made)(), shape

    def shuffled(self, shape: Shape) -> Part:
        groups = self.divisor(shape.channels)
        numbers = (groups, shape.channels // groups)
        return self.pick(layers.Shuffle(groups), layers.Foreign(layers.shuffle_channels, *numbers)), shape

    def pad(self, stride: int, extra: int) -> nn.Module:
        front = self.draw(extra + 1)
        numbers = (stride, front, extra - front)
        return self.pick(ZeroPadShortcut(*numbers), layers.Foreign(layers.pad_channels, *numbers))

    def padded(self, shape: Shape) -> Part:
        extra = 1 + self.draw(4)
        return self.pad(1, extra), Shape(shape.channels + extra, shape.size)

    def cut(self, shape: Shape) -> Part:
        """Channels from one to another place, or two parts swapped; the numbers stand in foreign code."""
        if shape.channels < 2:
            return self.plain(shape)
        at = 1 + self.draw(shape.channels - 1)
        if self.chance(50):
            return layers.Foreign(layers.swap_parts, at, shape.channels - at), shape
        start = self.draw(at)
        return layers.Foreign(layers.slice_channels, start, at), Shape(at - start, shape.size)

    def halved(self, shape: Shape) -> Part:
        """A gated linear unit."""
        channels = self.width()
        conv, _ = self.plain(shape, 2 * channels)
        return nn.Sequential(conv, layers.GatedHalves()), Shape(channels, shape.size)

    def sequence(self, shape: Shape) -> Part:
        channels = self.width()
        body = nn.Sequential(
            nn.Conv1d(shape.channels, channels, 3, padding=1), nn.BatchNorm1d(channels), self.activation(channels)
        )
        return layers.Sequences(body), Shape(channels, shape.size)

    def mixed(self, shape: Shape) -> Part:
        """A hidden layer over the channels of every position."""
        channels, hidden = self.width(), self.width()
        body = nn.Sequential(nn.Linear(shape.channels, hidden), nn.GELU(), nn.Linear(hidden, channels))
        return layers.ChannelsLast(body), Shape(channels, shape.size)
