"""A small U-Net (Ronneberger et al. 2015) for segmentation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressor.errors import InputError
from compressor.zoo.argument import Size


def double(channels: int, width: int) -> nn.Module:
    """Two 3x3 convolutions that keep the size, each with batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Two levels down, two up; every level up also reads what the level down saw."""

    def __init__(self, in_channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.down1 = double(in_channels, width)
        self.pool1 = nn.MaxPool2d(2)
        self.down2 = double(width, 2 * width)
        self.pool2 = nn.MaxPool2d(2)
        self.bottom = double(2 * width, 4 * width)
        self.widen2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up2 = double(4 * width, 2 * width)
        self.widen1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up1 = double(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(self.pool1(fine))
        y = self.bottom(self.pool2(coarse))
        y = self.up2(torch.cat([coarse, self.widen2(y)], 1))
        y = self.up1(torch.cat([fine, self.widen1(y)], 1))
        logits: Tensor = self.head(y)
        return logits


def unet(
    in_channels: Size = 1, image_size: Size = 32, classes: Size = 2, width: Size = 16
) -> nn.Module:
    """U-Net of two levels, ``width`` channels at full size.

    float32 ``(batch, in_channels, image_size, image_size)`` to logits
    ``(batch, classes, image_size, image_size)``; ``image_size`` is a multiple of 4.
    """
    if image_size % 4:
        raise InputError(
            f"zoo model 'unet' needs an image size that is a multiple of 4, not {image_size}"
        )
    return UNet(in_channels, classes, width)
