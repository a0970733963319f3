"""How good a plan is: slim -> recalibrate -> accuracy."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnrl_gym.evaluation.batched import BatchedCandidates, obstacle
from gnnrl_gym.evaluation.determinism import deterministic
from gnnrl_gym.evaluation.folding import fold, foldable_pairs
from gnnrl_gym.evaluation.layout import fitting_layout
from gnnrl_gym.evaluation.precision import fitting_dtype
from gnnrl_gym.evaluation.quick import can_be_quick, cast_weights, replace_relus
from gnnrl_gym.evaluation.workers import Threads, Workers
from gnnrl_gym.graph.groups import Floats, Ints
from gnnrl_gym.pruning.network import PrunableNetwork
from gnnrl_gym.pruning.recalibration import eager, recalibrate
from gnnrl_gym.zoo.split import Split

CPU_BATCH, GPU_BATCH = 64, 1024  # a CPU is fastest where activations stay in its cache
GPU_PIXELS = 2**22  # of a batch on a GPU: 1,024 images of 64 x 64, 83 of 224 x 224. More fill its memory, not its cores
# MACs of an image. A larger network fills a GPU alone, and in one batch its removed channels are computed all the same.
# Estimated from 10 ms of launches and cutting per candidate and 100 TFLOPS; `gnnrl bench gpu-evaluation` would tell.
LARGE = 500_000_000


def resolve_device(device: str) -> torch.device:
    """ "auto" is the GPU when there is one.

    Raises:
        ValueError: the device does not exist here.
    """
    if device == "auto":
        return _numbered(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"Unknown device {device!r}: use auto, cpu or cuda.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ValueError(f"device={device!r} but torch sees {count or 'no'} GPU here. Use device='auto' or 'cpu'.")
    return _numbered(found)


def _numbered(device: torch.device) -> torch.device:
    """A GPU by its number: which one is current differs from thread to thread."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Outputs [N, classes] of `model` in eval mode for `images` [N, C, H, W]."""
    model = eager(model).eval()
    size = max(1, min(GPU_BATCH, GPU_PIXELS // images[0, 0].numel())) if images.is_cuda else CPU_BATCH
    while True:
        try:
            # copies, which cost next to nothing: a forward may change its input in place
            return torch.cat([model(part.clone()) for part in images.split(size)])
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2  # outside of the handler: the exception would keep what the failed forward holds
        torch.cuda.empty_cache()


def accuracy(model: nn.Module, split: Split) -> float:
    """Top-1 accuracy in [0, 1] of `model` (eval mode, on its own device) on a whole split."""
    device, correct = next(model.parameters()).device, 0
    layout = fitting_layout(split.batch(torch.arange(min(2, len(split))))[0].to(device), model)
    for images, labels in split.batches(GPU_BATCH):
        images = images.to(device).contiguous(memory_format=layout)
        predicted = logits(model, images).argmax(1).cpu()
        correct += int((predicted == labels).sum())
    return correct / len(split)


class PlanEvaluator:
    """Scores plans of one network on the search split.

    Args:
        network: the dense network and its groups.
        train: images for recalibration and sensitivity.
        search: images for the score; `take` fewer of them beforehand to be faster.
        recalibration_images: how many of the training images re-estimate the BatchNorm statistics.
        device: where candidates run.
        precision: auto, float32 or bfloat16, of scores (`fitting_dtype`); what `build` returns is float32.
        batched: whether `prefetch` puts candidates into one batch (`gnnrl_gym.evaluation.batched`); None: on a GPU,
            unless the network is large.

    Attributes:
        evaluations: plans scored so far, repeated ones included.
        workers: who measures plans, where `gnnrl_gym.evaluation.workers.scored_by` has said it; else None.
    """

    def __init__(
        self,
        network: PrunableNetwork,
        train: Split,
        search: Split,
        recalibration_images: int = 256,
        device: torch.device | None = None,
        precision: str = "auto",
        batched: bool | None = None,
    ) -> None:
        self.network = network
        self.device = device or torch.device("cpu")
        self.batched = self._worth_a_batch() if batched is None else batched
        self.dtype = fitting_dtype(precision, network, self.device)
        self.evaluations = 0
        self.workers: Workers | None = None
        images, labels = train.take(recalibration_images, seed=1).tensors()
        layout = fitting_layout(images[:2].to(network.example_input[0].device), network.model)
        self._channels_last = layout == torch.channels_last  # itself it can't be unpickled by Ray's processes
        self._calibration = self._on_device(images)
        self._calibration_labels = labels.to(self.device)
        images, labels = search.tensors()
        self._search, self._labels = self._on_device(images), labels.to(self.device)
        self._pairs = foldable_pairs(network)
        bfloat16_on_cpu = self.device.type == "cpu" and self.dtype == torch.bfloat16
        self._quick = bfloat16_on_cpu and can_be_quick(network)
        self._scores: dict[bytes, float] = {}

    @property
    def layout(self) -> torch.memory_format:
        """The memory layout of candidates and images."""
        return torch.channels_last if self._channels_last else torch.contiguous_format

    def _worth_a_batch(self) -> bool:
        return self.device.type == "cuda" and self.network.macs(self.network.widths) <= LARGE

    def _on_device(self, images: Tensor) -> Tensor:
        return images.to(self.device).contiguous(memory_format=self.layout)

    def build(self, widths: Ints) -> nn.Module:
        """The recalibrated slim network of a plan [A]."""
        return recalibrate(self._cut(widths), self._calibration)

    def _cut(self, widths: Ints) -> nn.Module:
        return self._fast(self.network.slim(widths))

    def _fast(self, model: nn.Module) -> nn.Module:
        """On the device, in the layout that its convolutions are fastest in."""
        return model.to(self.device, memory_format=self.layout)  # type: ignore[call-overload,no-any-return]

    def score(self, widths: Ints) -> float:
        """One evaluation: Top-1 accuracy in [0, 1] of a plan [A] on the search images. Equal plans always get the same
        score."""
        self.evaluations += 1
        key = plan_key(widths)
        if key not in self._scores and (self.batched or self.workers):
            self.prefetch([widths])  # as those that come several at a time, so that all are rounded alike
        if key not in self._scores:
            self._scores[key] = self._measure(widths)
        return self._scores[key]

    def prefetch(self, plans: Sequence[Ints]) -> None:
        """Measure plans that are about to be scored side by side: in one batch on a GPU, with the same scores but for
        rounding; on a CPU a thread for each, as many as torch may use; or by the `workers`.

        No evaluation by itself. Small batches don't fill a GPU or several cores, several candidates do.
        """
        missing = {plan_key(plan): plan for plan in plans if plan_key(plan) not in self._scores}
        if self.batched and missing and self._candidates:
            self._scores = self._in_one_batch(self._candidates, plans) | self._scores
        elif missing and (workers := self._workers_for(len(plans))):
            self._scores.update(zip(missing, workers(self._measure, list(missing.values())), strict=True))

    def _workers_for(self, count: int) -> Workers | None:
        """Who measures `count` plans, those that are known, too: a resumed search has to measure a single one that is
        missing as the first one did, on one thread."""
        several = self.device.type == "cpu" and min(count, torch.get_num_threads()) > 1
        return self.workers or (Threads() if several else None)

    def _in_one_batch(self, candidates: BatchedCandidates, plans: Sequence[Ints]) -> dict[bytes, float]:
        """Scores of all `plans`, those that are known, too: a resumed search knows more of them, and how many are in a
        batch decides on rounding. Where the memory is too small even for one candidate: no scores, and no batch is
        tried again."""
        batch, data = {plan_key(plan): plan for plan in plans}, (self._calibration, self._search, self._labels)
        with contextlib.suppress(torch.OutOfMemoryError):
            found = candidates.accuracies(list(batch.values()), *data, self.dtype)
            return dict(zip(batch, found, strict=True))
        warnings.warn(
            "Candidates are scored one by one, not in one batch: the GPU's memory is too small for that.", stacklevel=3
        )
        self.batched = False
        torch.cuda.empty_cache()
        return {}

    @cached_property
    def _candidates(self) -> BatchedCandidates | None:
        if reason := obstacle(self.network):
            warnings.warn(f"Candidates are scored one by one, not in one batch: {reason}.", stacklevel=3)
            return None
        return BatchedCandidates(self.network, self.device)

    def remember(self, widths: Ints, accuracy: float) -> None:
        """Take a score that an earlier run has measured."""
        self._scores[plan_key(widths)] = accuracy

    def _measure(self, widths: Ints) -> float:
        predicted = self._outputs(widths, self._search).argmax(1)
        return int((predicted == self._labels).sum()) / len(self._labels)

    def _outputs(self, widths: Ints, images: Tensor) -> Tensor:
        module = self._cut(widths)  # which may train it: not under autocast
        if self._quick:
            replace_relus(module)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            folded = fold(recalibrate(module, self._calibration), self._pairs)
            return logits(cast_weights(folded) if self._quick else folded, images).float()

    def sensitivity(self) -> Floats:
        """Loss rise [A] when only one group is halved, on the recalibration images: measured once, no evaluation."""
        full = self.network.widths
        halves = [full - (full // 2) * (np.arange(len(full)) == group) for group in range(len(full))]
        with deterministic(self.device):
            losses = np.array(self._each(self._loss, [full, *halves]))
        return losses[1:] - losses[0]

    def _each(self, measure: Callable[[Ints], float], plans: Sequence[Ints]) -> list[float]:
        """`measure` of every plan; a GPU works them off one by one, and holds one network's activations at a time."""
        return Threads()(measure, plans) if self.device.type == "cpu" else [measure(plan) for plan in plans]

    def _loss(self, widths: Ints) -> float:
        return float(F.cross_entropy(self._outputs(widths, self._calibration), self._calibration_labels))


def plan_key(widths: Ints) -> bytes:
    """Bytes that identify a plan [A], on every machine alike."""
    return widths.astype(">i8").tobytes()
