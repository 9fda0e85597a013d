"""Residual networks (He et al. 2015): for CIFAR (section 4.2) and for ImageNet (section 4.1).

The ImageNet nets name their parameters as torchvision does, so that its weights load.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from compressor.zoo.argument import Size


def conv(channels: int, width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size up to its stride; the normalisation after it shifts."""
    return nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)


def shortcut(channels: int, width: int, stride: int) -> nn.Module | None:
    """The projection of option B where the shape changes, ``None`` where it stays."""
    if stride == 1 and channels == width:
        return None
    return nn.Sequential(conv(channels, width, 1, stride), nn.BatchNorm2d(width))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the shortcut."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(channels, width, stride)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y = y + (x if self.downsample is None else self.downsample(x))
        rectified: Tensor = self.relu2(y)
        return rectified


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside the shortcut; the 3x3 has the stride (version 1.5)."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        wide = width * self.expansion
        self.conv1 = conv(channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = conv(width, wide, 1)
        self.bn3 = nn.BatchNorm2d(wide)
        self.downsample = shortcut(channels, wide, stride)
        self.relu3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y = y + (x if self.downsample is None else self.downsample(x))
        rectified: Tensor = self.relu3(y)
        return rectified


def residual(
    block: type[BasicBlock | Bottleneck],
    depths: Sequence[int],
    width: int,
    stem: Mapping[str, nn.Module],
    classes: int,
) -> nn.Module:
    """The stem, stages of ``depths`` blocks, the average over the image and a linear head.

    Each stage after the first halves the image and doubles the ``width``. Weights start as in
    He et al. 2015, "Delving deep into rectifiers".
    """
    layers = OrderedDict(stem)
    channels = width
    for number, depth in enumerate(depths):
        blocks = []
        for index in range(depth):
            stride = 2 if number > 0 and index == 0 else 1
            blocks.append(block(channels, width << number, stride))
            channels = (width << number) * block.expansion
        layers[f"layer{number + 1}"] = nn.Sequential(*blocks)
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten(1)
    layers["fc"] = nn.Linear(channels, classes)
    model = nn.Sequential(layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def cifar(blocks: int, in_channels: int, classes: int) -> nn.Module:
    """Section 4.2: a 3x3 stem and three stages of 16, 32 and 64 channels, ``blocks`` in each."""
    stem = {"conv1": conv(in_channels, 16, 3), "bn1": nn.BatchNorm2d(16), "relu": nn.ReLU()}
    return residual(BasicBlock, [blocks] * 3, 16, stem, classes)


def imagenet(
    block: type[BasicBlock | Bottleneck], depths: Sequence[int], in_channels: int, classes: int
) -> nn.Module:
    """Section 4.1: a 7x7 stem with pooling and four stages of 64 to 512 channels."""
    stem = {
        "conv1": conv(in_channels, 64, 7, 2),
        "bn1": nn.BatchNorm2d(64),
        "relu": nn.ReLU(inplace=True),
        "maxpool": nn.MaxPool2d(3, 2, padding=1),
    }
    return residual(block, depths, 64, stem, classes)


def resnet20(in_channels: Size = 3, classes: Size = 10) -> nn.Module:
    """ResNet-20 of CIFAR: float32 ``(batch, in_channels, H, W)`` to logits ``(batch, classes)``."""
    return cifar(3, in_channels, classes)


def resnet56(in_channels: Size = 3, classes: Size = 10) -> nn.Module:
    """ResNet-56 of CIFAR: float32 ``(batch, in_channels, H, W)`` to logits ``(batch, classes)``."""
    return cifar(9, in_channels, classes)


def resnet18(in_channels: Size = 3, classes: Size = 1000) -> nn.Module:
    """ResNet-18: float32 ``(batch, in_channels, H, W)`` to logits ``(batch, classes)``."""
    return imagenet(BasicBlock, (2, 2, 2, 2), in_channels, classes)


def resnet50(in_channels: Size = 3, classes: Size = 1000) -> nn.Module:
    """ResNet-50: float32 ``(batch, in_channels, H, W)`` to logits ``(batch, classes)``."""
    return imagenet(Bottleneck, (3, 4, 6, 3), in_channels, classes)
