"""What moves the weights, and how fast: optimisers and schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from compressor.training.settings import Training

Parameters = Sequence[nn.Parameter]

STAIRS = 3
"""A step schedule has so many stairs of equal length, each a tenth of the one before ..."""

LAST = 0.01
"""... and an exponential one ends at this share of the rate."""


def _fused(own: Parameters, training: Training) -> bool:
    """Whether Adam can move all weights in one kernel.

    For an MLP of 64 units that takes 80 us instead of 220, for one of 512 units 0.4 ms instead of
    5.6, on one core.
    """
    return not training.shard and all(one.is_floating_point() for one in own)


OPTIMISERS: dict[str, Callable[[Parameters, Training], Optimizer]] = {
    "adam": lambda own, how: Adam(
        own, how.learning_rate, weight_decay=how.weight_decay, fused=_fused(own, how)
    ),
    "adamw": lambda own, how: AdamW(
        own, how.learning_rate, weight_decay=how.weight_decay, fused=_fused(own, how)
    ),
    # Not fused: it alone takes the sparse gradients of an embedding.
    "sgd": lambda own, how: SGD(
        own, how.learning_rate, how.momentum, weight_decay=how.weight_decay
    ),
    "nesterov": lambda own, how: SGD(
        own, how.learning_rate, how.momentum, weight_decay=how.weight_decay, nesterov=True
    ),
    "rmsprop": lambda own, how: RMSprop(
        own, how.learning_rate, momentum=how.momentum, weight_decay=how.weight_decay
    ),
}

SCHEDULES: dict[str, Callable[[Optimizer, int], LRScheduler]] = {
    "constant": lambda optimiser, steps: LambdaLR(optimiser, lambda step: 1.0),
    "step": lambda optimiser, steps: StepLR(optimiser, math.ceil(steps / STAIRS)),
    "exponential": lambda optimiser, steps: ExponentialLR(optimiser, LAST ** (1 / steps)),
    "cosine": lambda optimiser, steps: CosineAnnealingLR(optimiser, steps),
}
"""From the optimiser and the number of steps left; ``one-cycle`` has its warm-up built in (Smith
and Topin 2019)."""


def scheduled(optimiser: Optimizer, training: Training, steps: int) -> LRScheduler:
    """The schedule over ``steps`` steps of the optimiser, its warm-up first."""
    steps = max(steps, 1)
    if training.schedule == "one-cycle":
        # A cycle of one step would be its end alone, a 250,000th of the rate.
        total, rise = max(steps, 2), float(training.warmup)
        return OneCycleLR(
            optimiser,
            training.learning_rate,
            total,
            # A rise of exactly one step is a division by zero in PyTorch: begin at the top.
            pct_start=0.0 if rise * total == 1 else rise,
            # Adam's first beta goes against the rate; a momentum that was asked for stays.
            cycle_momentum=training.optimizer in ("adam", "adamw"),
        )
    rising = round(training.warmup * steps)
    then = SCHEDULES[training.schedule](optimiser, max(steps - rising, 1))
    if not rising:
        return then
    first = LinearLR(optimiser, 1 / (rising + 1), 1.0, rising)
    return SequentialLR(optimiser, [first, then], [rising])
