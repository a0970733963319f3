"""Random numbers that a forward draws: the same for two networks, or none at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


def _generators(gpus: list[int]) -> list[torch.Generator]:
    return [torch.default_generator, *(torch.cuda.default_generators[gpu] for gpu in gpus)]


@contextlib.contextmanager
def seeded(gpus: list[int], seed: int = 0) -> Iterator[None]:
    """While it is open, torch draws by `seed`, on the CPU and on `gpus`; global random state is put back afterwards."""
    with torch.random.fork_rng(gpus):
        for generator in _generators(gpus):
            generator.manual_seed(seed)
        yield


class Still(TorchDispatchMode):
    """While it is open, every random number of torch is replaced by its centre (a probability, a mean, the input of a
    dropout), or by a half if it has none: a slim network draws fewer numbers than a masked one, and so others.

    Args:
        gpus: whose generators are watched, beside the CPU's.
    """

    def __init__(self, gpus: list[int]) -> None:
        super().__init__()
        self.generators = _generators(gpus)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        # attention has the tag for its dropout: in eval mode it draws nothing, and counts
        before = self._states()
        result = func(*args, **kwargs)
        drawn = kwargs.get("generator") is not None or not all(map(torch.equal, before, self._states()))
        return tree_map_only(Tensor, lambda x: _middle(func, x, args), result) if drawn else result

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]


def _middle(func: Any, drawn: Tensor, args: tuple[Any, ...]) -> Tensor:
    """What stands for `drawn`, which `func` gave for `args`."""
    if not drawn.is_floating_point():
        return drawn.fill_(drawn.dtype == torch.bool)  # dropout keeps all; of indices the first
    around = args[0] if args and isinstance(args[0], Tensor) and args[0].is_floating_point() else None
    if around is None or around.shape != drawn.shape or func.overloadpacket.__name__.endswith(("_like", "_")):
        return drawn.fill_(0.5)
    return drawn.copy_(around)
