"""How good a plan is: slim -> recalibrate -> accuracy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnrl_gym.evaluation.folding import fold, foldable_pairs
from gnnrl_gym.graph.groups import Floats, Ints
from gnnrl_gym.pruning.network import PrunableNetwork
from gnnrl_gym.pruning.recalibration import recalibrate
from gnnrl_gym.zoo.split import Split

CPU_BATCH, GPU_BATCH = 64, 1024  # a CPU is fastest where activations stay in its cache


def resolve_device(device: str) -> torch.device:
    """ "auto" is the GPU when there is one.

    Raises:
        ValueError: the device does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"Unknown device {device!r}: use auto, cpu or cuda.") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' but torch sees no GPU here. Use device='auto' or 'cpu'.")
    return found


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Outputs [N, classes] of `model` in eval mode for `images` [N, C, H, W]."""
    model.eval()
    return torch.cat([model(part) for part in images.split(GPU_BATCH if images.is_cuda else CPU_BATCH)])


def accuracy(model: nn.Module, split: Split) -> float:
    """Top-1 accuracy in [0, 1] of `model` (eval mode, on its own device) on a whole split."""
    device, correct = next(model.parameters()).device, 0
    for images, labels in split.batches(GPU_BATCH):
        images = images.to(device).contiguous(memory_format=torch.channels_last)
        predicted = logits(model, images).argmax(1).cpu()
        correct += int((predicted == labels).sum())
    return correct / len(split)


def _fast(model: nn.Module, device: torch.device) -> nn.Module:
    """On the device, channels last: the layout that CPU and GPU convolutions are fastest in."""
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


class PlanEvaluator:
    """Scores plans of one network on the search split.

    Args:
        network: the dense network and its groups.
        train: images for recalibration and sensitivity.
        search: images for the score; `take` fewer of them beforehand to be faster.
        recalibration_images: how many of the training images re-estimate the BatchNorm statistics.
        device: where candidates run.
    """

    def __init__(
        self,
        network: PrunableNetwork,
        train: Split,
        search: Split,
        recalibration_images: int = 256,
        device: torch.device | None = None,
    ) -> None:
        self.network = network
        self.device = device or torch.device("cpu")
        images, labels = train.take(recalibration_images, seed=1).tensors()
        self._calibration = self._on_device(images)
        self._calibration_labels = labels.to(self.device)
        images, labels = search.tensors()
        self._search, self._labels = self._on_device(images), labels.to(self.device)
        self._pairs = foldable_pairs(network.channels)
        self._scores: dict[bytes, float] = {}

    def _on_device(self, images: Tensor) -> Tensor:
        return images.to(self.device).contiguous(memory_format=torch.channels_last)

    def build(self, widths: Ints) -> nn.Module:
        """The recalibrated slim network of a plan [A]."""
        return recalibrate(_fast(self.network.slim(widths), self.device), self._calibration)

    def score(self, widths: Ints) -> float:
        """Top-1 accuracy in [0, 1] on the search images of a plan [A]; the same plan has the same score."""
        key = widths.astype(">i8").tobytes()
        if key not in self._scores:
            predicted = logits(fold(self.build(widths), self._pairs), self._search).argmax(1)
            self._scores[key] = int((predicted == self._labels).sum()) / len(self._labels)
        return self._scores[key]

    def sensitivity(self) -> Floats:
        """Loss rise [A] when only one group is halved, on the recalibration images: measured once, no evaluation."""
        full = self.network.widths
        base = self._loss(full)
        halves = [full - (full - (full + 1) // 2) * (torch.arange(len(full)).numpy() == g) for g in range(len(full))]
        return torch.tensor([self._loss(plan) - base for plan in halves], dtype=torch.float64).numpy()

    def _loss(self, widths: Ints) -> float:
        outputs = logits(fold(self.build(widths), self._pairs), self._calibration)
        return float(F.cross_entropy(outputs, self._calibration_labels))
