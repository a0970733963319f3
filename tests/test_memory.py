"""Peak memory in closed form, against storages that are really alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import images, random_plans
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gnnrl_gym import PrunableNetwork
from gnnrl_gym.zoo import load_model


class Concatenating(nn.Module):
    """Concatenation, a channel shuffle that copies, chunks, views, and operations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3), nn.Conv2d(12, 8, 1)
        self.mix, self.head = nn.Conv2d(16, 20, 1), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.stem(x))
        x = torch.cat([self.left(x), self.right(x)[..., 1:-1, 1:-1]], 1).relu_()
        batch, _, height, width = x.shape
        x = x.view(batch, 2, -1, height, width).transpose(1, 2).contiguous().view(batch, -1, height, width)
        a, b = self.mix(x).chunk(2, 1)
        return self.head((a.sigmoid() * b).mean((2, 3)))


class Residual(nn.Module):
    """The first tensor lives on across the block, and the block widens in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 24, 1), nn.Conv2d(24, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(self.up(x).relu())
        return self.head(x.flatten(2).mean(2))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: load_model("resnet20", "random"),
    "concatenation": Concatenating,
    "residual": Residual,
    "mobilenet_v2": lambda: load_model("mobilenet_v2", "random"),
}


class Storages(TorchDispatchMode):
    """Bytes of the storages that exist, of those that were made while it was on."""

    def __init__(self, fixed: list[Tensor]) -> None:
        super().__init__()
        self.fixed = {tensor.untyped_storage()._cdata for tensor in fixed}
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self.fixed:
                storage = value.untyped_storage()
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> int:
        return sum(size for reference, size in self.seen.values() if not reference.expired())


def measured_peak(module: nn.Module, x: Tensor) -> int:
    """Bytes alive after each operation of the freshly traced module, run by an interpreter that frees what nobody
    reads any more, and its input."""
    program = torch.export.export(module.eval(), (x,), strict=False).module()
    storages, peak = Storages([x, *program.parameters(), *program.buffers()]), 0

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            nonlocal peak
            result = super().run_node(n)
            peak = max(peak, storages.alive())
            return result

    with torch.no_grad(), storages:
        Watch(program).run(x)  # type: ignore[arg-type]
    return peak + x.numel() * x.element_size()


def test_an_input_that_is_part_of_something_larger_counts_alone() -> None:
    whole = PrunableNetwork(Residual(), images(1, 3, 8, 8))
    part = PrunableNetwork(Residual(), images(9, 3, 8, 8)[:1])
    assert part.memory(part.widths) == whole.memory(whole.widths)


@pytest.mark.parametrize("name", NETWORKS)
def test_memory_is_what_the_storages_of_the_built_network_take(name: str) -> None:
    x = images(2, 3, 32, 32)
    network = PrunableNetwork(NETWORKS[name](), x)
    plans = np.vstack([network.widths, random_plans(network, 5)])
    peaks = [network.memory(plan) for plan in plans]
    assert peaks == [measured_peak(network.slim(plan), x) for plan in plans]
    assert len(set(peaks)) > 2
    np.testing.assert_array_equal(network.memory(plans), peaks)
    assert type(peaks[0]) is int and network.memory(plans).dtype == np.int64


def test_memory_by_hand() -> None:
    network = PrunableNetwork(Residual(), images(1, 3, 8, 8))
    stem, up = (network.group_names.index(name) for name in ("stem", "up"))
    widths = network.widths
    # the input, the stem's output that waits, the wide tensor before and after its ReLU
    assert network.memory(widths) == 4 * 64 * (3 + 6 + 24 + 24)
    widths[up] = 1  # the input, the stem's output, the block's, their sum
    assert network.memory(widths) == 4 * 64 * (3 + 6 + 6 + 6)
    widths[stem] = 2
    assert network.memory(widths) == 4 * 64 * (3 + 2 + 2 + 2)


class Growing(nn.Module):
    """Begins with a tensor of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.cat([x.new_zeros(len(x), 0), self.first(x)], 1))


def test_empty_tensors_take_nothing() -> None:
    network = PrunableNetwork(Growing(), images(1, 4))
    assert network.memory([3]) == 4 * (4 + 3 + 3)


def test_memory_never_rises_when_a_width_falls() -> None:
    network = PrunableNetwork(Concatenating(), images(1, 3, 16, 16))
    for plan in random_plans(network, 20):
        for group in np.flatnonzero(plan > 1):
            assert network.memory(plan - (np.arange(len(plan)) == group)) <= network.memory(plan)
