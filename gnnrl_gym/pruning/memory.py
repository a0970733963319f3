"""Peak activation memory in closed form: which tensors live together, and how large each is at any plan.

Counted are the tensors that the operations of the traced network hand to each other, each from the operation that
makes it to its last reader, outputs to the end; and the network's input, which its caller holds all the while. While
an operation runs, its inputs and its output live together. Views and operations in place share the storage of their
source, which counts once. Not counted: parameters and buffers, what a kernel allocates and frees inside itself
(workspaces, the indices of a max-pool), the allocator's rounding, and references that Python frames hold longer than
needed. So it is what an executor needs that frees every tensor after its last reader; plain eager mode may hold the
input of a nested module until that module is done.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from gnnrl_gym.graph.groups import ChannelGroups, Floats, Ints
from gnnrl_gym.graph.trace import Trace


@dataclass(frozen=True)
class PeakMemory:
    """``max_o [w, 1] . alive[:, o]`` bytes for widths w.

    Attributes:
        alive: bytes that live while operation o runs, affine in the widths, [A + 1, O]. Floats so that BLAS multiplies
            them; all figures are far below 2^53, so they are exact.
    """

    alive: Floats

    def peak(self, widths: Ints) -> Ints:
        """Bytes, int64 [...], for widths [..., A]."""
        w = widths.astype(np.float64)
        return np.asarray((w @ self.alive[:-1] + self.alive[-1]).max(-1).astype(np.int64))


def peak_memory(trace: Trace, groups: ChannelGroups) -> PeakMemory:
    """Liveness of all activations of a traced network."""
    order = {node: i for i, node in enumerate(trace.graph.nodes)}
    rows, lives = [], []
    for holders, size in _activations(trace):
        alive = np.zeros(len(order))
        if holders[0].op == "placeholder":
            alive[:] = 1
        else:
            last = max(order[node] for holder in holders for node in (holder, *holder.users))
            alive[order[holders[0]] : last + 1] = 1
        rows.append(_bytes_row(holders, size, groups))
        lives.append(alive)
    # most moments are as another one: only the different ones are kept
    return PeakMemory(np.unique(np.stack(rows, 1) @ np.stack(lives), axis=1))


def _activations(trace: Trace) -> list[tuple[list[fx.Node], int]]:
    """For every storage the nodes that hold it, the one that makes it first, then its aliases; and its bytes.

    The trace's fake tensors share storages exactly as the real ones do, so no operation needs to be known here.
    """
    holders: dict[int, list[fx.Node]] = defaultdict(list)
    sizes: dict[int, int] = {}
    for node in trace.graph.nodes:
        tensors = [v for v in tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
        for value in tensors:
            storage = value.untyped_storage()
            # an input may be a part of something larger of the caller's
            whole = value.numel() * value.element_size() if node.op == "placeholder" else storage.nbytes()
            sizes.setdefault(storage._cdata, int(whole))
        for key in dict.fromkeys(v.untyped_storage()._cdata for v in tensors):
            holders[key].append(node)
    fixed = trace.tensors.keys() | trace.constants.keys()  # parameters, buffers and constants
    return [(nodes, sizes[key]) for key, nodes in holders.items() if nodes[0].name not in fixed]


def _bytes_row(holders: list[fx.Node], size: int, groups: ChannelGroups) -> Ints:
    """The `size` bytes of one storage as a row [A + 1]. Where no holder tells its channels it counts whole."""
    for node in holders:
        value = node.meta["val"]
        if size and node in groups.values and value.numel() * value.element_size() == size:
            owner = groups.values[node][1]
            return groups.kept_row(owner) * (size // len(owner))
    return np.append(np.zeros(len(groups.widths), np.int64), size)
