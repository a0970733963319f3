"""At which channel counts operations are measured, and how long they take at any other.

Every operation is measured at a grid of channel counts (read x written), and interpolated between them. Many kernels
work on blocks of channels, so a convolution of 33 channels takes as long as one of 48; below a block there may be
smaller kernels, for powers of two. Others, of another processor or for smaller images, don't. So one more measurement
between any two counts of the grid, a probe just above the lower one, tells how far counts are to be rounded up there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, product

import numpy as np
import torch

from gnnrl_gym.graph.groups import Floats, Ints
from gnnrl_gym.pruning.timing import Operation

SHARES = (0.1, 0.4, 0.7, 1.0)  # of channels at which operations are measured; 0.1 is the environment's floor
Grid = list[list[float]]  # seconds at K = len(SHARES) counts read x K written, and a row of the K - 1 probes
Counts = tuple[int, int]  # channels read and written


def vector_size(device: torch.device) -> int:
    """Channels of a vector register, which is what kernels work on at a time."""
    return 16 if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def measured_at(op: Operation, vector: int) -> list[Counts]:
    """Counts at which an operation is measured: of the grid, then of the probes. `vector` as in `OperationGrids`."""
    grid = product(*(_knots(op, axis, vector) for axis in (0, 1)))
    return [*grid, *zip(*(_probes(op, axis, vector) for axis in (0, 1)), strict=True)]


def as_grid(op: Operation, seconds: Mapping[Counts, float], vector: int) -> Grid:
    """Of the seconds where the operation could be measured. What runs at its full size only (a channel number among
    its arguments) scales with its channels."""
    full = seconds.get(op.sizes, 0.0)

    def at(counts: Counts) -> float:
        return seconds.get(counts, full * counts[0] * counts[1] / (op.sizes[0] * op.sizes[1]))

    found = [at(counts) for counts in measured_at(op, vector)]
    return [found[start : start + len(SHARES)] for start in range(0, len(found), len(SHARES))]


class OperationGrids:
    """Seconds of `L` operations for any plan. They never fall when a width grows.

    Args:
        operations: what computes.
        grids: what was measured, by the key of the operation.
        vector: channels of a vector register of the machine that measured.
    """

    def __init__(self, operations: Sequence[Operation], grids: Mapping[str, Grid], vector: int) -> None:
        self.operations, self.vector = operations, vector
        self._rows = np.array([[op.rows[axis] for op in operations] for axis in (0, 1)], float).transpose(0, 2, 1)
        self._knots = np.array([[_knots(op, axis, vector) for op in operations] for axis in (0, 1)], float)  # [2, L, K]
        self._blocks = np.array([_block(op, vector) for op in operations], float)
        measured = np.array([grids[op.key][:-1] for op in operations])
        # more channels never take less: what noise says otherwise is smoothed out
        self._grids = np.maximum.accumulate(np.maximum.accumulate(measured, 1), 2)  # [L, K, K]
        self._probes = np.array([grids[op.key][-1] for op in operations])  # [L, K - 1]
        self._blockiness = self._fitted_blockiness()

    def seconds(self, widths: Ints) -> Floats:
        """Seconds of all operations together, [...], for plans [..., A]."""
        counts = np.stack([widths.astype(np.float64) @ rows[:-1] + rows[-1] for rows in self._rows])
        return self._interpolated(counts, self._blockiness).sum(-1)

    def figures(self) -> dict[str, Grid]:
        """The grids, by the key of the operation."""
        parts = zip(self.operations, self._grids, self._probes, strict=True)
        return {op.key: [*grid.tolist(), probes.tolist()] for op, grid, probes in parts}

    def _interpolated(self, counts: Floats, blockiness: Floats) -> Floats:
        """Seconds of every operation [..., L] at counts [2, ..., L] of the channels that it reads and writes."""
        (i, s), (j, t) = (self._between(axis, counts[axis], blockiness) for axis in (0, 1))
        at, grid = np.arange(len(self.operations)), self._grids
        lower = (1 - t) * grid[at, i, j] + t * grid[at, i, j + 1]
        upper = (1 - t) * grid[at, i + 1, j] + t * grid[at, i + 1, j + 1]
        return np.asarray((1 - s) * lower + s * upper)

    def _between(self, axis: int, counts: Floats, blockiness: Floats) -> tuple[Ints, Floats]:
        """Number of the knot below, and how far the way to the next one is, [..., L]."""
        knots, at = self._knots[axis], np.arange(len(self.operations))
        below = (counts[..., None] >= knots[:, 1:-1]).sum(-1)
        left, right = knots[at, below], knots[at, below + 1]
        counts = counts + blockiness[at, below] * (rounded(counts, self._blocks) - counts)
        return below, np.clip((counts - left) / np.maximum(right - left, 1e-9), 0, 1)

    def _fitted_blockiness(self) -> Floats:
        """How far counts are rounded up to blocks between two knots, in [0, 1], such that the probes are met,
        [L, K - 1]."""
        counts = np.array([[_probes(op, axis, self.vector) for op in self.operations] for axis in (0, 1)], float)
        ends = (np.full_like(self._probes, share) for share in (0, 1))
        smooth, blocky = (self._interpolated(counts.transpose(0, 2, 1), end).T for end in ends)
        rise = blocky - smooth  # where it is nothing, it says nothing
        return np.clip(np.divide(self._probes - smooth, rise, out=np.zeros_like(rise), where=rise > 0), 0, 1)


def rounded(counts: Floats, blocks: Floats) -> Floats:
    """Channel counts rounded up to what kernels work on: whole blocks, and below a block a power of two."""
    small = 2 ** np.ceil(np.log2(np.maximum(counts, 1)))
    return np.minimum(np.ceil(counts / blocks) * blocks, small)


def _block(op: Operation, vector: int) -> int:
    """Channels that the kernels of an operation work on at a time."""
    return vector if op.weighted else 1


def _knots(op: Operation, axis: int, vector: int) -> list[int]:
    """The grid's counts along an axis: whole blocks and whole convolution groups."""
    size, step = op.sizes[axis], op.steps[axis]
    if not op.rows[axis][:-1].any():  # frozen
        return [size] * len(SHARES)
    blocks = rounded(np.ceil(np.array(SHARES) * size), np.array(_block(op, vector), float)).astype(int).tolist()
    return [min(-(-count // step) * step, size) for count in blocks]


def _probes(op: Operation, axis: int, vector: int) -> list[int]:
    """The counts just above all knots but the last."""
    knots, step = _knots(op, axis, vector), op.steps[axis]
    return [min(low + step, high) for low, high in pairwise(knots)]
