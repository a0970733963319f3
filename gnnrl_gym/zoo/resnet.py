"""Residual networks for small images (He et al., "Deep Residual Learning", 2016, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ZeroPadShortcut(nn.Module):
    """Parameter-free shortcut: a strided slice, then zero channels on both sides ("option A" in He et al.).

    Args:
        stride: step of the spatial slice, in pixels.
        front: zero channels put before the input's.
        back: zero channels put after the input's.

    Shapes:
        ``[N, C, H, W] -> [N, front + C + back, ceil(H / stride), ceil(W / stride)]``.
    """

    stride: int
    front: int
    back: int

    def __init__(self, stride: int, front: int, back: int) -> None:
        super().__init__()
        self.stride = stride
        self.set_channel_padding(front, back)

    def set_channel_padding(self, front: int, back: int) -> None:
        """Sets the numbers of zero channels; slimming calls it once it knows which of them are kept.

        Raises:
            ValueError: if either is negative, which would crop channels instead.
        """
        if front < 0 or back < 0:
            raise ValueError(f"channel padding must not be negative, got front={front}, back={back}")
        self.front = front
        self.back = back

    def forward(self, x: Tensor) -> Tensor:
        """Slices and pads ``x``; see the class for the shapes."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, self.back))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, front={self.front}, back={self.back}"


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    front = (out_channels - in_channels) // 2
    return ZeroPadShortcut(stride, front, out_channels - in_channels - front)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them.

    Shapes:
        ``[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return self.relu(out)  # type: ignore[no-any-return]


def _stage(in_channels: int, out_channels: int, depth: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    rest = [BasicBlock(out_channels, out_channels) for _ in range(depth - 1)]
    return nn.Sequential(first, *rest)


class CifarResNet(nn.Module):
    """Three stages of basic blocks; the published networks have 6 * depth_per_stage + 2 layers.

    Args:
        depth_per_stage: blocks in each stage: 3 for ResNet-20, 9 for ResNet-56.
        num_classes: outputs of the last layer.
        widths: channels of the three stages, never falling (the shortcut can only add channels).
        in_channels: channels of the images.

    Shapes:
        ``[N, in_channels, H, W] -> [N, num_classes]`` logits, for any H and W.

    Raises:
        ValueError: if a size is not positive, or ``widths`` are not three that never fall.
    """

    def __init__(
        self,
        depth_per_stage: int,
        num_classes: int = 10,
        widths: Sequence[int] = (16, 32, 64),
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if min(depth_per_stage, num_classes, in_channels, *widths) < 1:
            raise ValueError("depth_per_stage, num_classes, in_channels and widths must be at least 1")
        if len(widths) != 3 or list(widths) != sorted(widths):
            raise ValueError(f"widths must be three that never fall, got {tuple(widths)}")
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], depth_per_stage, stride=1)
        self.layer2 = _stage(widths[0], widths[1], depth_per_stage, stride=2)
        self.layer3 = _stage(widths[1], widths[2], depth_per_stage, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.linear = nn.Linear(widths[2], num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        """He et al. 2015: variance 2 / fan-in, which keeps activations' scale through ReLU."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
