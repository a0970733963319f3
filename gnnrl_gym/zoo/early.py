"""The two networks that are pruned before they are trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

DROPOUT = 0.3
_CNN_LAYERS = ((64, 2), (128, 1), (256, 2), (512, 1))  # channels and stride of each convolution
_MLP_LAYERS = (784, 300, 100)


def cnn_4(num_classes: int = 10) -> nn.Sequential:
    """Four 3x3 convolutions, 64 (stride 2), 128, 256 (stride 2), 512, each with ReLU, dropout 0.3 and BatchNorm, and
    one linear layer. Images [N, 3, 32, 32] -> [N, num_classes]. 960 filters, 1.9 million parameters, 114 million MACs.

    The network of "Heuristic Approach Towards Early Compression of Neural Networks" (Sanchez, Reyes 2020). PyTorch's
    own initialisation.
    """
    layers: list[nn.Module] = []
    before = 3
    for channels, stride in _CNN_LAYERS:
        layers += [nn.Conv2d(before, channels, 3, stride, 1), nn.ReLU(), nn.Dropout(DROPOUT), nn.BatchNorm2d(channels)]
        before = channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * 8 * 8, num_classes))


def mlp_300_100(num_classes: int = 10) -> nn.Sequential:
    """784-300-100-`num_classes` with ReLU, for images of 784 values: 266,200 weights with ten classes.

    Initialised as LeNet-300-100 in Frankle and Carbin 2019 (section 2): Glorot normal weights, zero biases.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip(_MLP_LAYERS, (*_MLP_LAYERS[1:], num_classes), strict=True):
        linear = nn.Linear(before, after)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class EarlyNetwork:
    """A network by name.

    Attributes:
        build: makes it with random weights, from its number of classes.
        input_shape: (C, H, W) of its images.
        granularity: what a mask of it keeps: ``channels`` (filters) or ``unstructured`` (weights).
    """

    build: Callable[[int], nn.Module]
    input_shape: tuple[int, int, int]
    granularity: str


EARLY = {
    "cnn-4": EarlyNetwork(cnn_4, (3, 32, 32), "channels"),
    "mlp-300-100": EarlyNetwork(mlp_300_100, (1, 28, 28), "unstructured"),
}
