"""Averaged weights (Polyak and Juditsky 1992): often better than the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """An exponential moving average of a model's weights and statistics.

    ``decay`` is reached slowly, ``min(decay, (1 + n) / (10 + n))`` at update ``n``, so that the
    first weights do not linger. What is no float (a counter) is the model's own.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._own = model.state_dict()
        self._decay = decay
        self.updates = 0
        self.state = {name: tensor.clone() for name, tensor in self._own.items()}
        self._floats = [name for name, tensor in self._own.items() if tensor.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the model's weights as they are now."""
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averaged = [self.state[name] for name in self._floats]
        step = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        step(averaged, [self._own[name] for name in self._floats], None)
        for name, tensor in self._own.items():
            if not tensor.is_floating_point():
                self.state[name].copy_(tensor)

    @contextmanager
    def worn(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        before = {name: tensor.clone() for name, tensor in self._own.items()}
        self._put(self.state)
        try:
            yield
        finally:
            self._put(before)

    @torch.no_grad()
    def _put(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self._own.items():
            tensor.copy_(state[name])

    def restore(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Goes on from an average that was kept."""
        for name, tensor in state.items():
            self.state[name].copy_(tensor)
        self.updates = updates
