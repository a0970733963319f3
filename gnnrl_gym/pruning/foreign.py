"""Foreign modules without parameters (a lambda shortcut, a shuffle) that hold numbers of channels: whether the traced
graph, with the numbers edited, may stand for the module. A trace is of one batch, one image size and eval mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from gnnrl_gym.backends import gpus_of
from gnnrl_gym.copies import copy_of
from gnnrl_gym.graph.groups import ChannelGroups
from gnnrl_gym.graph.trace import shape_of

_SIZES = ((2, 1), (1, 2))  # how many times the batch and the image of the example


@dataclass(frozen=True)
class Foreign:
    """A module of the dense network, with the nodes of its inputs and of its output."""

    module: nn.Module
    sources: list[fx.Node]
    result: fx.Node
    groups: ChannelGroups

    @torch.no_grad()
    def may_be(self, replacement: Callable[[np.ndarray], nn.Module]) -> bool:
        """Whether the module goes wrong on fewer channels and ``replacement(kept)`` never does: neither in training,
        nor on another batch or image size that the module takes."""
        if any(node.op == "call_function" and node not in self.groups.values for node in (*self.sources, self.result)):
            return False  # nothing says which channels are whose
        dense, trained = copy_of(self.module).eval(), copy_of(self.module).train()
        given = self._noise(1, 1)
        expected = _result(dense, given)
        if expected is None or all(self._does(dense, given, expected, kept) for kept in _plans(self.groups)):
            return False
        if not _equal(_result(trained, given), expected):
            return False
        pairs = [(given, expected), *self._other_sizes(dense, expected)]
        made = [(replacement(kept), kept) for kept in _plans(self.groups)]
        return all(self._does(module, *pair, kept) for module, kept in made for pair in pairs)

    def _other_sizes(self, dense: nn.Module, usual: Tensor) -> list[tuple[list[Tensor], Tensor]]:
        """Inputs of other sizes, and what `dense` gives for those that it takes. One that makes more samples of a
        larger image, or more channels, is written for images of one size."""
        found = [(given, _result(dense, given)) for given in (self._noise(*size) for size in _SIZES)]
        dim, samples = self.groups.values[self.result][0], (2 * len(usual), len(usual))
        return [
            (given, result)
            for (given, result), count in zip(found, samples, strict=True)
            if result is not None and result.dim() == usual.dim() and result.shape[dim] == usual.shape[dim]
            if len(result) == (count if dim else len(usual))
        ]

    def _does(self, module: nn.Module, given: list[Tensor], expected: Tensor, kept: np.ndarray) -> bool:
        """Whether `module` gives the kept channels of `expected` for those of `given`."""
        cut = [self._cut(x, node, kept) for x, node in zip(given, self.sources, strict=True)]
        return _equal(_result(module, cut), self._cut(expected, self.result, kept))

    def _cut(self, x: Tensor, node: fx.Node, kept: np.ndarray) -> Tensor:
        if node not in self.groups.values:
            return x
        dim, owner = self.groups.values[node]
        return x.index_select(dim, torch.from_numpy(np.flatnonzero(np.append(kept, True)[owner])).to(x.device))

    def _noise(self, batch: int, image: int) -> list[Tensor]:
        """Inputs like the example's, `batch` times as many and `image` times as large each way."""
        generator, given = torch.Generator().manual_seed(0), []
        for node in self.sources:
            channels, like = self.groups.values.get(node, (1, None))[0], node.meta["val"]
            shape = [
                size if d == channels else size * batch if d == 0 else size * image if size > 1 else 1
                for d, size in enumerate(shape_of(node))
            ]
            fits = like.is_floating_point() or like.is_complex()
            noise = torch.randn(shape, generator=generator) if fits else torch.zeros(shape)
            given.append(noise.to(like.device, like.dtype))
        return given


def _plans(groups: ChannelGroups) -> list[np.ndarray]:
    """All but the first unit of each group, all but the last, about half of them by chance, and the other half."""
    last = np.cumsum(groups.widths)
    start, end = (np.isin(np.arange(last[-1]), ends) for ends in (last - groups.widths, last - 1))
    half = np.random.default_rng(0).random(last[-1]) < 0.5
    return [~start, ~end, half | start, ~half | end]  # never an empty layer


def _result(module: nn.Module, given: list[Tensor]) -> Tensor | None:
    """What `module` gives, if that is a tensor: it may take no inputs like these."""
    try:
        with torch.random.fork_rng(gpus_of(given)):
            result = module(*given)
    except Exception:  # whatever a forward raises
        return None
    return result if isinstance(result, Tensor) else None


def _equal(found: Tensor | None, expected: Tensor) -> bool:
    try:
        torch.testing.assert_close(found, expected, equal_nan=True)
    except (AssertionError, TypeError):  # not equal, or nothing
        return False
    return True
