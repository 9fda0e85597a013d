"""MobileNetV2 (Sandler et al. 2018). Parameters are named as in torchvision: its weights load."""

from __future__ import annotations

from torch import Tensor, nn

from compressor.zoo.argument import Size

STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Table 2 of the paper: expansion t, channels c, blocks n, stride s of the first block."""


def unit(channels: int, width: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Module:
    """Convolution, batch normalisation and ReLU6."""
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Widen by ``expansion``, depthwise 3x3, narrow without activation; shortcut where it fits."""

    def __init__(self, channels: int, width: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.residual = stride == 1 and channels == width
        self.conv = nn.Sequential(
            *([unit(channels, wide)] if expansion > 1 else []),
            unit(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Stem, inverted residuals, 1280 features, average over the image, linear head."""

    def __init__(self, in_channels: int, stem_stride: int, classes: int) -> None:
        super().__init__()
        layers = [unit(in_channels, 32, 3, stem_stride)]
        channels = 32
        for expansion, width, blocks, stride in STAGES:
            for index in range(blocks):
                first = stride if index == 0 else 1
                layers.append(InvertedResidual(channels, width, expansion, first))
                channels = width
        layers.append(unit(channels, 1280))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def mobilenet_v2(
    in_channels: Size = 3,
    image_size: Size = 224,
    classes: Size = 1000,
    stem_stride: Size | None = None,
) -> nn.Module:
    """MobileNetV2, width 1.0.

    float32 ``(batch, in_channels, image_size, image_size)`` to logits ``(batch, classes)``.
    ``stem_stride`` is by default the paper's 2, and 1 for images below 64 pixels: a stride of 32
    in all would leave nothing of them.
    """
    if stem_stride is None:
        stem_stride = 2 if image_size >= 64 else 1
    return MobileNetV2(in_channels, stem_stride, classes)
