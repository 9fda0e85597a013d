"""A multilayer perceptron for tables."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from compressor.zoo.argument import Size


def mlp(features: Size, outputs: Size, hidden: Sequence[Size] = (64, 64)) -> nn.Module:
    """Linear layers with ReLU between: float32 ``(batch, features)`` to ``(batch, outputs)``.

    ``hidden`` are the widths in between; none makes it a linear model.
    """
    widths = (features, *hidden)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for at, (before, after) in enumerate(pairwise(widths), 1):
        layers[f"fc{at}"], layers[f"relu{at}"] = nn.Linear(before, after), nn.ReLU()
    layers["head"] = nn.Linear(widths[-1], outputs)
    return nn.Sequential(layers)
