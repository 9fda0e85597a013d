"""The training loop: one function that reads from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.errors import StageError
from compressor.loading.task import first
from compressor.measure.counting import macs
from compressor.metrics import METRICS
from compressor.task import Inputs, Kind, Split, Splits

Epoch = dict[str, float]

SMALL_STEP = 100_000_000
"""MACs of a forward step below which threads wait for each other longer than they work: the digits
CNN took 5.1 s with one thread, 7.2 s with two, and minutes beside a busy neighbour."""


def fit(
    model: nn.Module,
    splits: Splits,
    loss: Callable[[Tensor, tuple[Tensor, ...], Tensor], Tensor],
    *,
    kind: Kind,
    metric: str,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    progress: Callable[[int, int, Epoch], None] = lambda epoch, epochs, facts: None,
) -> list[Epoch]:
    """Trains ``model`` in place with Adam under a one-cycle schedule; gives the history.

    ``loss(outputs, inputs, targets)`` is minimised over ``splits.train``. After every epoch the
    metric is taken on ``splits.validate``; the best weights seen, those before training included,
    are the ones that stay. The same seed gives the same weights on the same machine and threads.

    Raises :class:`StageError` when the loss becomes NaN or infinite; the model then holds its best
    weights.
    """
    with threads_for(model, splits.train.head(1)[0], batch_size):
        torch.manual_seed(seed)  # dropout draws from the global generator
        order = np.random.default_rng(seed)
        steps = math.ceil(len(splits.train) / batch_size)
        optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, max_lr=learning_rate, total_steps=max(epochs * steps, 1), pct_start=0.2
        )
        better = METRICS[kind][metric].higher_is_better
        best, kept = evaluate(model, splits.validate, kind, metric), _state(model)
        history: list[Epoch] = []
        for epoch in range(1, epochs + 1):
            model.train()
            total = 0.0
            for inputs, targets in splits.train.batches(batch_size, order):
                if len(targets) == 1 and steps > 1:
                    schedule.step()
                    continue  # batch normalisation has no statistics of one example
                batch = tuple(map(torch.from_numpy, inputs))
                value = loss(first(model(*batch)), batch, torch.from_numpy(targets))
                if not torch.isfinite(value):
                    model.load_state_dict(kept)
                    raise StageError(
                        f"the loss became {value.item()} in epoch {epoch}; lower learning_rate "
                        f"({learning_rate:g})"
                    )
                optimiser.zero_grad(set_to_none=True)
                value.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
                total += value.item() * len(targets)
            seen = evaluate(model, splits.validate, kind, metric)
            if seen > best if better else seen < best:
                best, kept = seen, _state(model)
            history.append({"epoch": epoch, "loss": total / len(splits.train), metric: seen})
            progress(epoch, epochs, history[-1])
        model.load_state_dict(kept)
        model.eval()
        return history


@contextmanager
def threads_for(model: nn.Module, example: Inputs, batch_size: int) -> Iterator[None]:
    """One thread for a model whose step is too small to share, all of them for any other.

    The rule reads the model only, so that the same run always computes with the same threads.
    """
    before = torch.get_num_threads()
    if macs(model, example) * batch_size < SMALL_STEP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _state(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def evaluate(model: nn.Module, split: Split, kind: Kind, metric: str) -> float:
    """Mean of the metric over the split, in PyTorch; the model is left in eval mode."""
    model.eval()
    scores = []
    with torch.inference_mode():
        for inputs, targets in split.batches(256):
            outputs = first(model(*map(torch.from_numpy, inputs))).numpy()
            scores.append(METRICS[kind][metric].score(outputs, targets))
    return float(np.concatenate(scores).mean())
