"""The convolutional net of the PyTorch MNIST example."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from compressor.zoo.argument import Size, at_least


def cnn(in_channels: Size = 1, image_size: Size = 28, classes: Size = 10) -> nn.Module:
    """Two 3x3 convolutions, one pooling, two linear layers (github.com/pytorch/examples, mnist).

    float32 ``(batch, in_channels, image_size, image_size)`` to logits ``(batch, classes)``;
    ``image_size`` is at least 6.
    """
    at_least(6, image_size, "cnn")
    side = (image_size - 4) // 2
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(in_channels, 32, 3),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(32, 64, 3),
        "relu2": nn.ReLU(),
        "pool": nn.MaxPool2d(2),
        "dropout1": nn.Dropout(0.25),
        "flatten": nn.Flatten(1),
        "fc1": nn.Linear(64 * side * side, 128),
        "relu3": nn.ReLU(),
        "dropout2": nn.Dropout(0.5),
        "fc2": nn.Linear(128, classes),
    }
    return nn.Sequential(OrderedDict(layers))
