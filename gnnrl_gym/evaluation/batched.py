"""Many candidates in one forward: their images in one batch, the dense weights for all, channels gated per candidate.

A GPU spends a small network's forward on launching kernels, and its host on cutting weights. Here K candidates share
both: the batch [K * N, C, H, W] holds N images of every candidate, candidates one after the other. What a removed
channel holds does not matter as long as nobody reads it, so only readers are gated: inputs of convolutions and linear
layers, unless they are zero there anyway, since BatchNorm writes zeros. BatchNorm keeps statistics per candidate. The
price: a removed channel is still computed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gnnrl_gym.copies import activations
from gnnrl_gym.evaluation.gates import gated, norms, read_units
from gnnrl_gym.evaluation.layout import fitting_layout
from gnnrl_gym.graph.channels import operator_name
from gnnrl_gym.graph.groups import Ints
from gnnrl_gym.graph.trace import module_path
from gnnrl_gym.pruning.network import PrunableNetwork
from gnnrl_gym.pruning.recalibration import BATCH, recalibrate
from gnnrl_gym.pruning.sparsity import SparseNetwork

CHUNK, IMAGES = 32, 256  # candidates, and images of each, in one forward
MOST = 2**31 - 1  # elements of a tensor that all of a GPU's kernels can count
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class CandidateNorm(nn.Module):
    """BatchNorm of K candidates with statistics of their own: [K * N, C, ...] -> the same, zero in removed channels.

    Args:
        norm: the dense network's.
        units: unit that owns each channel, -1 where none does, [C].

    Attributes:
        mean, var: running statistics [K, C] since `start`; those of removed channels mean nothing.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, units: Ints) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        self.units, self.eps = units, norm.eps
        weight = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight.detach().clone()
        bias = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias.detach().clone()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def start(self, keep: Tensor) -> None:
        """New candidates, which keep the channels `keep` (bool [K, C]), without any statistics yet."""
        self.keep, self.batches = keep, 0
        self.mean, self.var = (self.weight.new_zeros(keep.shape) for _ in range(2))
        self.train()

    def settle(self) -> None:
        """From now on normalise by the running statistics."""
        self.eval()
        self._affine = self._scale_and_shift(self.mean, self.var)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (len(self.keep), -1))
        affine = self._scale_and_shift(*self._measure(x)) if self.training else self._affine
        scale, shift = (_beside(value.to(x.dtype), x, 2) for value in affine)
        return torch.addcmul(shift, x, scale).flatten(0, 1)

    def _measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [K, C] of a batch, which enter the running ones as in PyTorch with momentum None."""
        var, mean = torch.var_mean(x, [1, *range(3, x.dim())], correction=0)
        count = x.numel() // mean.numel()
        self.batches += 1
        self.mean += (mean - self.mean) / self.batches
        self.var += (var * (count / (count - 1)) - self.var) / self.batches
        return mean, var

    def _scale_and_shift(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        scale = (var + self.eps).rsqrt() * self.weight
        return scale * self.keep, (self.bias - mean * scale) * self.keep


class _Gate:
    """Forward pre-hook: zeroes the removed channels, along `dim` of [K, N, ...], of what a module reads."""

    def __init__(self, module: nn.Module, units: Ints, dim: int) -> None:
        self.units, self.dim = units, dim
        module.register_forward_pre_hook(self)

    def start(self, keep: Tensor) -> None:
        self.keep = keep

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].unflatten(0, (len(self.keep), -1))
        return torch.where(_beside(self.keep, x, self.dim), x, 0).flatten(0, 1), *args[1:]


class BatchedCandidates:
    """Up to `chunk` plans of one network at once, in a gated copy of the dense network.

    Args:
        network: one without an `obstacle`.
        device: where the copy runs; default: where the network is.
        chunk: plans in one forward, of `IMAGES` images each, or fewer plans of more; less where a tensor would be
            larger than `MOST`; halved for good when the GPU's memory is too small.

    Attributes:
        model: the gated network, [K * N, C, H, W] -> [K * N, classes]. `calibrate` says for which plans.
        norms: its BatchNorms by their path.
    """

    def __init__(self, network: PrunableNetwork, device: torch.device | None = None, chunk: int = CHUNK) -> None:
        self.network, self.chunk = network, max(1, min(chunk, MOST // (IMAGES * _largest(network))))
        dense: Any = network.model.get_submodule
        self.norms = {path: CandidateNorm(dense(path), units) for path, units in norms(network)}
        # deepcopy takes what its memo already holds: every occurrence of a norm becomes the new one
        memo = activations(network.model) | {id(dense(path)): norm for path, norm in self.norms.items()}
        model: Any = copy.deepcopy(network.model, memo).eval().requires_grad_(False)
        example = network.example_input[0]
        self.layout = fitting_layout(torch.cat([example, example]), network.model)  # BatchNorm can't train on one
        self.model = model.to(device, memory_format=self.layout)
        where = {path: (units, dim) for path, units, dim in gated(network)}  # a layer that runs twice is named twice
        self.gates = [_Gate(self.model.get_submodule(path), *place) for path, place in where.items()]

    def accuracies(
        self, plans: Sequence[Ints], calibration: Tensor, images: Tensor, labels: Tensor, dtype: torch.dtype
    ) -> list[float]:
        """Top-1 accuracy in [0, 1] of each plan [A] on `images` [N, C, H, W] and `labels` [N].

        Args:
            calibration: images [M, C, H, W] for the BatchNorm statistics, in float32; all data on the network's device.
            dtype: of the scores: float32 or bfloat16.

        Raises:
            torch.OutOfMemoryError: even one candidate is too large.
        """
        done: list[float] = []
        while len(done) < len(plans):
            part = plans[len(done) : len(done) + self.chunk]
            try:
                done += self._accuracies(part, calibration, images, labels, dtype)
                continue
            except torch.OutOfMemoryError:
                if self.chunk == 1:
                    raise
            # outside of the handler: the exception would keep what the failed forward holds
            self.chunk //= 2
            torch.cuda.empty_cache()
        return done

    @torch.inference_mode()
    def _accuracies(
        self, plans: Sequence[Ints], calibration: Tensor, images: Tensor, labels: Tensor, dtype: torch.dtype
    ) -> list[float]:
        with torch.autocast(images.device.type, enabled=False):  # a caller's
            self.calibrate(plans, calibration)
        correct = torch.zeros(len(plans), dtype=torch.int64, device=images.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            size = IMAGES * self.chunk // len(plans)  # as large a batch where there are few plans
            parts = -(-len(images) // size)
            for part, truth in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
                correct += (self.logits(part).argmax(-1) == truth).sum(1)
        return [count / len(labels) for count in correct.tolist()]  # the only wait for the device

    def calibrate(self, plans: Sequence[Ints], images: Tensor) -> None:
        """From now on the candidates are `plans` [K, A], with statistics as `recalibrate` takes them from `images`."""
        kept = np.stack([np.append(self.network.kept(plan), True) for plan in plans])  # unit -1, nobody's, stays
        self._count = len(plans)
        parts: list[CandidateNorm | _Gate] = [*self.norms.values(), *self.gates]
        for part in parts:
            part.start(torch.from_numpy(kept[:, part.units]).to(images.device))
        for batch in images.tensor_split(max(len(images) // BATCH, 1)) if self.norms else ():
            self.model(self._stacked(batch))
        for norm in self.norms.values():
            norm.settle()

    def logits(self, images: Tensor) -> Tensor:
        """Outputs [K, N, classes] of the candidates for `images` [N, C, H, W]."""
        return self.model(self._stacked(images)).unflatten(0, (self._count, -1))

    def _stacked(self, images: Tensor) -> Tensor:
        stacked = images.repeat(self._count, *[1] * (images.dim() - 1))
        return stacked.contiguous(memory_format=self.layout)


# ---- which networks -----------------------------------------------------------------------------------------------


def obstacle(network: PrunableNetwork) -> str | None:
    """Why plans of `network` can't be scored as one batch, or None where they can.

    Frozen channels (under LayerNorm or GroupNorm, say) and whole attention heads are no obstacle. Obstacles are:
    weights pruned one by one, weights that no torch.nn layer of their own applies, BatchNorm without running
    statistics, and a forward that does more with the batch than to hand it on, which a trial with random plans shows.
    """
    if isinstance(network, SparseNetwork):
        return "single weights are pruned, not channels"
    if len(network.example_input) != 1 or not isinstance(network.example_input[0], Tensor):
        return "its input is not one batch of images"
    for node in network.trace.operations():
        path = module_path(node)
        module: Any = network.model.get_submodule(path)
        if operator_name(node) == "batch_norm":
            plain = type(module).forward is nn.modules.batchnorm._BatchNorm.forward and module.track_running_stats
        else:
            plain = read_units(network, node) is None or type(module).forward in [layer.forward for layer in _LAYERS]
        if not plain:
            return f"{operator_name(node)} in '{path}' ({type(module).__name__}) can't be gated"
    return None if _agrees(network) else "on a trial batch it differs from its slim networks"


@torch.no_grad()
def _agrees(network: PrunableNetwork) -> bool:
    """Whether a few random plans give the logits of their slim networks, however the images are divided into batches;
    in float64, where rounding is no excuse."""
    rng, example = np.random.default_rng(0), network.example_input[0]
    plans = [np.ones_like(network.widths), *rng.integers(1, network.widths + 1, (2, len(network.widths)))]
    images = torch.randn(5, *example.shape[1:], generator=torch.Generator().manual_seed(0)).to(example.device).double()
    try:
        batched = BatchedCandidates(network)
        batched.model.double()
        batched.calibrate(plans, images)
        found = torch.cat([batched.logits(images[:2]), batched.logits(images[2:])], 1)
        expected = torch.stack([recalibrate(network.slim(plan).double(), images)(images) for plan in plans])
    except Exception:  # whatever a forward raises on an unusual batch
        return False
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 1e-6 * expected.abs().max())


def _largest(network: PrunableNetwork) -> int:
    """Elements, for one image, of the largest tensor of a forward."""
    values = (node.meta.get("val") for node in network.trace.operations())
    images = len(network.example_input[0])
    return max(value.numel() // images for value in values if isinstance(value, Tensor))


def _beside(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """[K, C] as what lies along dimension 0 and `dim` of `x`, and is broadcast along the others."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = values.shape
    return values.view(shape)
