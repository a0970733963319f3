"""Random networks: tiny, and wired in every way that ties, moves or repeats channels. For tests and benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gnnrl_gym.zoo import random_layers as layers
from gnnrl_gym.zoo.random_parts import Draw, Part, PartMaker, Shape

MOST_CHANNELS = 24  # concatenation doubles them again and again: what gets more is a convolution
NESTING = 2


class RandomNetwork(nn.Module):
    """Parts one after the other, and heads that read after some of them.

    Args:
        parts: applied in turn.
        heads: what reads, with one output each.
        taps: number of the part after which each head reads.

    Shapes:
        ``[N, 3, S, S]`` -> the head's output, or a tuple of the heads' outputs where there are several.
    """

    def __init__(self, parts: list[nn.Module], heads: list[nn.Module], taps: list[int]) -> None:
        super().__init__()
        self.parts, self.heads, self.taps = nn.ModuleList(parts), nn.ModuleList(heads), taps

    def forward(self, x: Tensor) -> Any:
        outputs = []
        for number, part in enumerate(self.parts):
            x = part(x)
            outputs += [head(x) for head, tap in zip(self.heads, self.taps, strict=True) if tap == number]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def extra_repr(self) -> str:
        return f"taps={self.taps}"


def random_network(draw: Draw) -> tuple[RandomNetwork, Tensor]:
    """A network in eval mode, and an input for it.

    Args:
        draw: makes every choice. Equal answers give equal networks, weights included.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(draw(1 << 16))
        make = NetworkMaker(draw)
        batch, size = 1 + draw(2), make.pick(6, 5, 8, 9)
        network = randomise(make.network(size)).eval()
        return network, torch.randn(batch, 3, size, size)


def seeded_network(seed: int) -> tuple[RandomNetwork, Tensor]:
    """`random_network` with NumPy's random numbers."""
    rng = np.random.default_rng(seed)
    return random_network(lambda n: int(rng.integers(n)))


@torch.no_grad()
def randomise(model: RandomNetwork) -> RandomNetwork:
    """Weights that keep the signal strong, vectors and statistics that are not the identity, in place: a fresh
    BatchNorm hides a channel that is normalised with another's statistics."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.4 / parameter[0].numel() ** 0.5)
        else:
            parameter.uniform_(-0.5, 0.5)
    for module in model.modules():
        if (
            isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm))
            and module.weight is not None
        ):
            module.weight.uniform_(0.5, 1.5)
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model


class NetworkMaker(PartMaker):
    """Makes networks, and parts that hold other parts; `depth` is how deep those may be nested."""

    def network(self, size: int) -> RandomNetwork:
        stem, shape = self.plain(Shape(3, size))
        parts, shapes = [stem], [shape]
        for _ in range(2 + self.draw(3)):
            part, shape = self.down(shape) if shape.size > 4 and self.chance(20) else self.part(shape, NESTING)
            parts.append(part)
            shapes.append(shape)
        taps = [len(parts) - 1]
        if self.chance(30):  # a second output: early or late, another head
            taps.append(self.draw(len(parts)))
        return RandomNetwork(parts, [self.head(shapes[tap]) for tap in taps], taps)

    def head(self, shape: Shape) -> nn.Module:
        channels, size = shape
        if self.chance(15):  # a map
            return nn.Conv2d(channels, 3, 1)
        pooled = self.pick(1, 2, size)
        pool = nn.Identity() if pooled == size else self.pick(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)(pooled)
        features = channels * pooled**2
        return nn.Sequential(pool, nn.Flatten(), *self.classifier(features))

    def classifier(self, features: int) -> list[nn.Module]:
        if not self.chance(50):
            return [nn.Linear(features, 4)]
        hidden = self.width()
        norm = self.pick(nn.Identity, nn.Identity, nn.BatchNorm1d, nn.LayerNorm)(hidden)
        return [nn.Linear(features, hidden), norm, self.activation(hidden), nn.Dropout(0.1), nn.Linear(hidden, 4)]

    def part(self, shape: Shape, depth: int) -> Part:
        simple = [self.plain, self.depthwise, self.grouped, self.around, self.shuffled, self.padded, self.cut,
                  self.halved, self.sequence, self.mixed]  # fmt: skip
        nested = [self.residual, self.residual, self.concat, self.gated, self.squeezed, self.past, self.split,
                  self.shared, self.hourglass, self.wired]  # fmt: skip
        if shape.channels > MOST_CHANNELS:
            return self.plain(shape)
        if depth and self.chance(60):
            return self.pick(*nested)(shape, depth - 1)
        return self.pick(*simple)(shape)

    def chain(self, shape: Shape, depth: int, channels: int | None = None, active: bool = True) -> Part:
        """One to three parts; the last is a convolution where it must give so many `channels`, `active` or linear."""
        parts = []
        for _ in range(1 + self.draw(2)):
            part, shape = self.part(shape, depth)
            parts.append(part)
        if channels is not None:
            part, shape = self.plain(shape, channels, active)
            parts.append(part)
        return nn.Sequential(*parts), shape

    # ---- parts with parts in them -------------------------------------------------------------------------------

    def shortcut(self, inputs: int, outputs: int) -> nn.Module:
        if inputs == outputs and self.chance(75):
            return nn.Identity()
        if inputs < outputs and self.chance(70):
            return self.pad(1, outputs - inputs)
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def residual(self, shape: Shape, depth: int) -> Part:
        channels = self.pick(shape.channels, shape.channels, shape.channels + self.width(), self.width())
        in_place = self.chance(30)
        body, after = self.chain(shape, depth, channels, active=not in_place)
        total = layers.Sum([body, self.shortcut(shape.channels, channels)], in_place)
        return nn.Sequential(total, self.activation(channels)), after

    def concat(self, shape: Shape, depth: int) -> Part:
        made = [self.chain(shape, depth) for _ in range(2 + self.draw(2))]
        branches, shapes = [module for module, _ in made], [after for _, after in made]
        if self.chance(40):  # dense: the input itself too
            branches, shapes = [*branches, nn.Identity()], [*shapes, shape]
        return layers.Concat(branches), Shape(sum(s.channels for s in shapes), shape.size)

    def gated(self, shape: Shape, depth: int) -> Part:
        """Two branches multiplied; or one gated by a map with a single channel."""
        channels = self.width()
        body, after = self.chain(shape, depth, channels)
        gate = nn.Conv2d(shape.channels, self.pick(channels, channels, 1), 1)
        return layers.Gate(body, nn.Sequential(gate, self.pick(nn.Sigmoid(), nn.Hardsigmoid(), nn.Tanh()))), after

    def squeezed(self, shape: Shape, depth: int) -> Part:
        """Squeeze and excitation behind a chain."""
        body, after = self.chain(shape, depth)
        hidden = self.width()
        gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(after.channels, hidden, 1), self.activation(hidden),
            nn.Conv2d(hidden, after.channels, 1), self.pick(nn.Sigmoid(), nn.Hardsigmoid()),
        )  # fmt: skip
        return nn.Sequential(body, layers.Gate(nn.Identity(), gate)), after

    def past(self, shape: Shape, depth: int) -> Part:
        """Half the channels through a chain, half past it."""
        channels = self.width()
        conv, before = self.plain(shape, 2 * channels)
        branch, after = self.chain(Shape(channels, before.size), depth)
        return nn.Sequential(conv, layers.Halves(branch)), Shape(channels + after.channels, shape.size)

    def split(self, shape: Shape, depth: int) -> Part:
        """Two or three parts of any size, each through a chain or past one."""
        sizes: list[int] = []
        left = shape.channels
        while left and len(sizes) < 3:
            sizes.append(left if len(sizes) == 2 else 1 + self.draw(left))
            left -= sizes[-1]
        parts = [Shape(size, shape.size) for size in sizes]
        made = [self.chain(part, depth) if self.chance(60) else (nn.Identity(), part) for part in parts]
        return layers.Parts(sizes, [m for m, _ in made]), Shape(sum(s.channels for _, s in made), shape.size)

    def shared(self, shape: Shape, depth: int) -> Part:
        """A chain applied twice: in a row, in two branches, or two layers with one weight."""
        channels = shape.channels
        way = self.draw(3)
        if way == 2:
            first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
            second.weight = first.weight
            return nn.Sequential(self.finish(first, *shape), self.finish(second, *shape)), shape
        chain, _ = self.chain(shape, depth, channels)
        if way == 0:
            return nn.Sequential(chain, self.activation(channels), chain), shape
        before, _ = self.plain(shape, channels)
        join = self.pick(layers.Sum, layers.Concat)
        branches = [chain, nn.Sequential(before, chain)]
        return join(branches), Shape(channels * (1 if join is layers.Sum else 2), shape.size)

    def hourglass(self, shape: Shape, depth: int) -> Part:
        """Down, a chain, up again (transposed convolution or interpolation), with a shortcut around (U-Net)."""
        if shape.size < 3:
            return self.chain(shape, depth)
        first, low = self.down(shape)
        chain, low = self.chain(low, depth)
        channels = self.width()
        path = nn.Sequential(first, chain, self.finish(self.up(low, channels, shape.size), channels, shape.size))
        return layers.Concat([path, nn.Identity()]), Shape(channels + shape.channels, shape.size)

    def up(self, shape: Shape, channels: int, size: int) -> nn.Module:
        """From half the `size` back to it."""
        if self.chance(40):
            return nn.Sequential(nn.Upsample(size), self.convolution(shape.channels, channels))
        kernel = 2 + size % 2  # what gives an even size back, and an odd one
        groups = self.pick(1, self.divisor(shape.channels, channels))
        return nn.ConvTranspose2d(shape.channels, channels, kernel, stride=2, padding=kernel // 3, groups=groups)

    def wired(self, shape: Shape, depth: int) -> Part:
        count = 2 + self.draw(3)
        nodes = [self.chain(shape, depth, shape.channels)[0] if depth else self.plain(shape, shape.channels)[0]
                 for _ in range(count)]  # fmt: skip
        sources = [self.subset(i + 1) for i in range(count + 1)]
        return layers.Wiring(nodes, sources), Shape(shape.channels * len(sources[-1]), shape.size)

    def subset(self, count: int) -> list[int]:
        """Some of the numbers below `count`: the last one, so that the chain never breaks, and others by chance."""
        return [*(i for i in range(count - 1) if self.chance(40)), count - 1]
