"""How good a model is on a split, in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn

from compressor.loading.task import first
from compressor.metrics import Metric, Scores, scores, value
from compressor.task import Array, Split
from compressor.training.world import ALONE, here, together

EVALUATED = 8 << 20
"""Bytes of inputs that are evaluated together: what a network makes of them is many times that,
5 GB for 256 pictures of 224x224 in EfficientNet-lite0."""


def evaluate(model: nn.Module, split: Split, how: Metric) -> float:
    """The metric over the split, in PyTorch; the model is left in eval mode.

    Processes that train together share the examples.
    """
    with _shared(split):
        each = scored(model, split, how)
        if each is not None:
            return float(each.mean())
        return value(how, *_all(model, split))


def _shared(split: Split) -> AbstractContextManager[None]:
    """Around the evaluation of a split; each does one that is too small to share on its own."""
    return together(here() if len(split) >= here().size else ALONE)


def _all(model: nn.Module, split: Split) -> tuple[Array, Array]:
    """Outputs and targets of the whole split."""
    world, parts = here(), zip(*_outputs(model, split), strict=True)
    joined = (torch.from_numpy(np.concatenate(part)) for part in parts)
    outputs, targets = (world.gathered(part, len(split)).numpy() for part in joined)
    return outputs, targets


def scored(model: nn.Module, split: Split, how: Metric) -> Scores | None:
    """The metric of each example of the split, shape ``(n,)``, where it has such; leaves the model
    in eval mode."""
    if not how.apart:
        return scores(how, *_all(model, split))
    found = [np.zeros(0)]
    for outputs, targets in _outputs(model, split):
        each = scores(how, outputs, targets)
        if each is None:
            return None
        found.append(each)
    return here().gathered(torch.from_numpy(np.concatenate(found)), len(split)).numpy()


def _outputs(model: nn.Module, split: Split) -> Iterator[tuple[Array, Array]]:
    """Outputs and targets of this process's share of the split, in batches."""
    model.eval()
    device = device_of(model)
    one = sum(part.nbytes for part in split.head(1)[0])
    size = max(1, min(256, EVALUATED // max(one, 1)))
    with torch.no_grad():
        for inputs, targets in split.take(here().mine(np.arange(len(split)))).batches(size):
            given = (torch.from_numpy(part).to(device) for part in inputs)
            yield first(model(*given)).cpu().numpy(), targets


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: the device of its first tensor, the CPU where it has none."""
    own: Tensor | None = next(iter(model.state_dict().values()), None)
    return torch.device("cpu") if own is None else own.device
