"""How good a model is on a split, in PyTorch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compressor.loading.task import first
from compressor.metrics import METRICS
from compressor.task import Kind, Split

EVALUATED = 8 << 20
"""Bytes of inputs that are evaluated together: what a network makes of them is many times that,
5 GB for 256 pictures of 224x224 in EfficientNet-lite0."""


def evaluate(model: nn.Module, split: Split, kind: Kind, metric: str) -> float:
    """Mean of the metric over the split, in PyTorch; the model is left in eval mode."""
    return float(scores(model, split, kind, metric).mean())


def scores(model: nn.Module, split: Split, kind: Kind, metric: str) -> NDArray[np.float64]:
    """The metric of each example of the split, shape ``(n,)``; leaves the model in eval mode."""
    model.eval()
    found = []
    one = sum(part.nbytes for part in split.head(1)[0])
    size = max(1, min(256, EVALUATED // max(one, 1)))
    with torch.inference_mode():
        for inputs, targets in split.batches(size):
            outputs = first(model(*map(torch.from_numpy, inputs))).numpy()
            found.append(METRICS[kind][metric].score(outputs, targets))
    return np.concatenate(found)
