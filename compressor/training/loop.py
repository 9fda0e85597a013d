"""The training loop: one function that reads from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.errors import StageError
from compressor.loading.task import first
from compressor.measure.threads import threads_for
from compressor.metrics import METRICS
from compressor.task import Kind, Splits
from compressor.training.evaluation import evaluate

Epoch = dict[str, float]


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

    Raises :class:`StageError` when the loss or the metric becomes NaN or infinite; the model then
    holds its best weights.
    """
    threads = threads_for(model, splits.train.head(1)[0], batch_size)
    # Dropout draws from the global generator, whose state is the caller's.
    with threads, torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        order = np.random.default_rng(seed)
        steps = math.ceil(len(splits.train) / batch_size)
        optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, max_lr=learning_rate, total_steps=max(epochs * steps, 1), pct_start=0.2
        )
        better = METRICS[kind][metric].higher_is_better
        best, kept = evaluate(model, splits.validate, kind, metric), _state(model)
        history: list[Epoch] = []

        def check(title: str, value: float, epoch: int) -> None:
            if not math.isfinite(value):
                model.load_state_dict(kept)
                raise StageError(
                    f"the {title} became {value} in epoch {epoch}; lower learning_rate "
                    f"({learning_rate:g})"
                )

        for epoch in range(1, epochs + 1):
            model.train()
            total, count = 0.0, 0
            for inputs, targets in splits.train.batches(batch_size, order):
                if len(targets) == 1 and steps > 1:
                    schedule.step()
                    continue  # batch normalisation has no statistics of one example
                batch = tuple(map(torch.from_numpy, inputs))
                value = loss(first(model(*batch)), batch, torch.from_numpy(targets))
                check("loss", value.item(), epoch)
                optimiser.zero_grad(set_to_none=True)
                value.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
                total, count = total + value.item() * len(targets), count + len(targets)
            seen = evaluate(model, splits.validate, kind, metric)
            check(f"{metric} on validate", seen, epoch)
            if seen > best if better else seen < best:
                best, kept = seen, _state(model)
            history.append({"epoch": epoch, "loss": total / count, metric: seen})
            progress(epoch, epochs, history[-1])
        model.load_state_dict(kept)
        model.eval()
        return history


def _state(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
