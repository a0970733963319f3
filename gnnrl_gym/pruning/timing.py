"""The operations of a traced network, alone on a bench: how long does one take at a share of its channels?"""

from __future__ import annotations

import hashlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from gnnrl_gym.graph.arguments import cloned
from gnnrl_gym.graph.channels import Channels, Key, Product, operator_name
from gnnrl_gym.graph.groups import ChannelGroups, Ints
from gnnrl_gym.graph.trace import Trace, shape_of

WARM_UP = 2
Axes = tuple[tuple[int, int], ...]  # (dimension, axis of the operation that it scales with)


@dataclass(frozen=True)
class Operand:
    """A tensor argument: its full shape, and which of its dimensions shrink with which axis."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: Axes
    slot: str  # operands with one slot share memory: activations are warm when they are read, weights are not


@dataclass(frozen=True)
class Operation:
    """An operation that takes time.

    Attributes:
        rows: for axis 0 (channels read) and 1 (channels written) the affine row [A + 1] of what is kept; an axis
            without channels is a constant 1.
        sizes: channels along both axes of the dense network.
        weighted: a convolution or matrix product with a weight.
        outputs_per_group: channels that a convolution group writes, where whole groups go; else None.
        steps: numbers of which the channels along both axes are multiples.
    """

    node: fx.Node
    operands: dict[fx.Node, Operand]
    rows: tuple[Ints, Ints]
    sizes: tuple[int, int]
    weighted: bool
    outputs_per_group: int | None
    steps: tuple[int, int]

    @property
    def key(self) -> str:
        """Equal for operations that take equally long: operator, shapes, settings."""

        def plain(node: fx.Node) -> str:
            operand = self.operands[node]
            return f"{list(operand.shape)} {operand.dtype} {operand.axes}"

        args, kwargs = tree_map(lambda a: plain(a) if isinstance(a, fx.Node) else a, (self.node.args, self.node.kwargs))
        text = f"{self.node.target} {args} {kwargs} {self.sizes} {self.outputs_per_group}"
        return f"{operator_name(self.node)} {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def call(self, counts: tuple[int, int], memory: dict[str, Tensor], device: torch.device) -> Callable[[], Any]:
        """The operation at `counts` channels along its axes, ready to run on noise that lies in `memory`."""

        def operand(argument: Any) -> Any:
            return self._tensor(argument, counts, memory, device) if isinstance(argument, fx.Node) else argument

        args, kwargs = tree_map(operand, (self.node.args, self.node.kwargs))
        args = list(args)
        if self.outputs_per_group:
            names = [argument.name for argument in self.node.target._schema.arguments]  # type: ignore[union-attr]
            args[names.index("groups")] = counts[0] // self.outputs_per_group
        target: Any = self.node.target
        return lambda: target(*args, **kwargs)

    def _tensor(
        self, node: fx.Node, counts: tuple[int, int], memory: dict[str, Tensor], device: torch.device
    ) -> Tensor:
        operand = self.operands[node]
        shape = list(operand.shape)
        for dim, axis in operand.axes:
            shape[dim] = max(round(shape[dim] * counts[axis] / self.sizes[axis]), 1)
        if not operand.dtype.is_floating_point:
            return torch.zeros(shape, dtype=operand.dtype, device=device)
        whole, size = int(np.prod(operand.shape)), int(np.prod(shape))
        slot = f"{operand.slot} {operand.dtype}"
        if slot not in memory or memory[slot].numel() < whole:
            memory[slot] = torch.rand(whole, dtype=operand.dtype, device=device)
        return memory[slot][:size].view(shape)


def operations(trace: Trace, channels: Channels, groups: ChannelGroups) -> list[Operation]:
    """What computes or copies; views cost nothing worth measuring."""
    products = {product.node: product for product in channels.products}
    working = (node for node in trace.operations() if _works(node))
    return [_operation(node, products.get(node), trace, channels, groups) for node in working]


def _works(node: fx.Node) -> bool:
    """Whether the operation writes: into new memory, or in place."""
    value = node.meta.get("val")
    schema = getattr(node.target, "_schema", None)
    if schema is None or not isinstance(value, Tensor):
        return False
    sources = [n.meta.get("val") for n in node.all_input_nodes]
    shared = {v.untyped_storage()._cdata for v in sources if isinstance(v, Tensor)}
    return schema.is_mutable or value.untyped_storage()._cdata not in shared


def _operation(
    node: fx.Node, product: Product | None, trace: Trace, channels: Channels, groups: ChannelGroups
) -> Operation:
    factors = product.factors if product else ()
    written = factors[0] if len(factors) == 2 else None  # of the weight whose dimensions are two different axes
    operands = {n: _operand(n, i, written, trace, groups) for i, n in enumerate(node.all_input_nodes)}
    if written:
        owners = [groups.owner[factors[1]], groups.owner[factors[0]]]
        per_group, steps = None, (1, _convolution_groups(node))
    else:
        one = np.full(1, -1)
        owners = [_channels_of(node, factors, groups), one]
        per_group = channels.grouped.get(factors[0][0]) if factors else None
        steps = (per_group or 1, 1)
    rows = (groups.kept_row(owners[0]), groups.kept_row(owners[1]))
    return Operation(node, operands, rows, (len(owners[0]), len(owners[1])), bool(factors), per_group, steps)


def _convolution_groups(node: fx.Node) -> int:
    """Of a layer with two axes; 1 where it is no convolution, too."""
    if operator_name(node) not in ("conv1d", "conv2d", "conv3d"):
        return 1
    images, weight = (shape_of(n) for n in node.all_input_nodes[:2])
    return images[1] // weight[1]


def _channels_of(node: fx.Node, factors: tuple[Any, ...], groups: ChannelGroups) -> Ints:
    """Owners of the channels that an operation with one axis scales with."""
    if factors:
        return groups.owner[factors[0]]
    known = [groups.values[n][1] for n in (node, *node.all_input_nodes) if n in groups.values]
    scaled = [owner for owner in known if (owner >= 0).any()]
    return scaled[0] if scaled else np.full(1, -1)


def _operand(node: fx.Node, place: int, written: Key | None, trace: Trace, groups: ChannelGroups) -> Operand:
    value = node.meta["val"]
    name = trace.tensors.get(node.name)
    if name is None:
        dim, owner = groups.values.get(node, (0, np.full(1, -1)))
        axes: Axes = ((dim, 0),) if (owner >= 0).any() else ()
        return Operand(tuple(value.shape), value.dtype, axes, f"activation {place}")
    owned = [d for d in range(value.dim()) if (name, d) in groups.owner and (groups.owner[name, d] >= 0).any()]
    # a weight has one dimension along what it writes, another along what it reads; a bias lies along what is written
    axes = tuple((d, int(written is not None and (name != written[0] or d == written[1]))) for d in owned)
    return Operand(tuple(value.shape), value.dtype, axes, name)


def take_turns(
    calls: Sequence[Callable[..., Any]], repeats: int, device: torch.device, inputs: tuple[Any, ...] = ()
) -> list[float]:
    """Median seconds of each call, with `inputs`. They take turns: what else the machine does hits all alike, and
    weights have left the caches when their turn comes again, as in a forward."""
    times: list[list[float]] = [[] for _ in calls]
    with torch.inference_mode():
        for turn in range(repeats + WARM_UP):
            for call, seconds in zip(calls, times, strict=True):
                elapsed = _once(call, device, cloned(inputs))  # which a forward may change in place
                if turn >= WARM_UP:
                    seconds.append(elapsed)
    return [statistics.median(seconds) for seconds in times]


def _once(call: Callable[..., Any], device: torch.device, inputs: tuple[Any, ...]) -> float:
    wait_for(device)  # the copies of the inputs are not timed
    start = time.perf_counter()
    call(*inputs)
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def place(device: torch.device) -> str:
    """Where a measurement holds: the processor or GPU, the threads, torch's version."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    threads = f"{torch.get_num_threads()} threads"
    return f"{processor()}, {os.cpu_count()} cores, {capability}, {threads}, torch {torch.__version__}"


def processor() -> str:
    """The processor in words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
