"""VGG for small images (Simonyan and Zisserman 2014, with batch normalisation)."""

from __future__ import annotations

from torch import nn

from compressor.zoo.argument import Size, at_least

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the 3x3 convolutions of configuration D; each stage ends in a 2x2 pooling."""


def vgg16(in_channels: Size = 3, image_size: Size = 32, classes: Size = 10) -> nn.Module:
    """Thirteen convolutions and, as usual on CIFAR, one linear layer in place of three.

    float32 ``(batch, in_channels, image_size, image_size)`` to logits ``(batch, classes)``;
    ``image_size`` is at least 32.
    """
    at_least(32, image_size, "vgg16")
    layers: list[nn.Module] = []
    channels = in_channels
    for stage in STAGES:
        for width in stage:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        layers.append(nn.MaxPool2d(2))
    side = image_size // 32
    return nn.Sequential(*layers, nn.Flatten(1), nn.Linear(channels * side * side, classes))
