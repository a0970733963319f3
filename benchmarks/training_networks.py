"""The networks that the general policy learns on: small, of several kinds, none of those it is measured on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from agents.provenance import digest_of_data
from gnnrl_gym.evaluation.finetuning import finetune
from gnnrl_gym.files import write_atomic
from gnnrl_gym.zoo import DataSplits
from gnnrl_gym.zoo.resnet import CifarResNet


def _conv(before: int, after: int, stride: int = 1) -> nn.Sequential:
    norm = nn.BatchNorm2d(after)
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), norm, nn.ReLU())


class _Head(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def vgg(widths: tuple[int, ...] = (16, 32, 32, 64, 64, 128)) -> nn.Module:
    """Plain convolutions, a stride at every other one."""
    before = (3, *widths)
    convolutions = [_conv(a, b, 1 + i % 2) for i, (a, b) in enumerate(zip(before, widths, strict=False))]
    return nn.Sequential(*convolutions, _Head(widths[-1]))


def mobile() -> nn.Module:
    """Inverted residuals: depthwise convolutions."""
    rows = [(16, 16, 1, 2), (16, 24, 2, 4), (24, 24, 1, 4), (24, 40, 2, 4), (40, 40, 1, 4)]
    return nn.Sequential(_conv(3, 16, 1), *(InvertedResidual(*row) for row in rows), _Head(40))


class ProjectedResNet(ResNet):
    """torchvision's ResNet for 32 x 32 pixels: projected shortcuts."""

    def __init__(self, block: type[BasicBlock | Bottleneck], layers: list[int]) -> None:
        super().__init__(block, layers, num_classes=10)
        self.expansion = block.expansion
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.maxpool = nn.Identity()  # type: ignore[assignment]
        self._narrow(4)

    def _narrow(self, by: int) -> None:
        """The same topology with a share of the channels."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                inputs = module.in_channels if module.in_channels == 3 else module.in_channels // by
                module.in_channels, module.out_channels = inputs, module.out_channels // by
                module.weight = nn.Parameter(torch.empty(module.out_channels, inputs, *module.kernel_size))
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.BatchNorm2d):
                module.__init__(module.num_features // by)  # type: ignore[misc]
        self.fc = nn.Linear(512 * self.expansion // by, 10)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet8": lambda: CifarResNet(1),
    "resnet14": lambda: CifarResNet(2),
    "vgg": vgg,
    "mobile": mobile,
    "projected": lambda: ProjectedResNet(BasicBlock, [1, 1, 1, 1]),
    "bottleneck": lambda: ProjectedResNet(Bottleneck, [1, 1, 1, 1]),
}


def trained(name: str, data: DataSplits, folder: Path, epochs: int, images: int, seed: int = 0) -> nn.Module:
    """A network of `NETWORKS`, trained on some of the train split, and kept in `folder` under what decides it."""
    torch.manual_seed(seed)
    model, path = NETWORKS[name](), folder / f"{name}-{epochs}-{images}-{seed}-{digest_of_data(data)}.pt"
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    some = DataSplits(**{**vars(data), "train": data.train.take(images, seed=seed)})
    finetune(model, some, epochs, learning_rate=0.1, seed=seed)
    state: dict[str, Tensor] = model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: torch.save(state, file))
    return model.eval()
