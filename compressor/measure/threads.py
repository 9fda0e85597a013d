"""How many threads PyTorch computes with while a stage runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from compressor.measure.counting import macs
from compressor.measure.environment import cores
from compressor.task import Inputs

SMALL_STEP = 100_000_000
"""MACs of a forward step below which threads wait for each other longer than they work: the digits
CNN took 5.1 s with one thread, 7.2 s with two, and minutes beside a busy neighbour."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Work of many small operations: pruning ResNet-50 took 1.7 s so, 24 s with two threads beside
    a busy neighbour. Sums in one thread are also the same everywhere."""
    with _threads(1):
        yield


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def threads_for(
    model: nn.Module, example: Inputs, batch_size: int, processes: int = 1
) -> Iterator[None]:
    """One thread for a model whose step is too small to share, all cores for any other.

    The rule reads the model only, so that the same run always computes with the same threads.
    ``processes`` on this machine that compute at the same time share its cores.
    """
    if macs(model, example) * batch_size < SMALL_STEP:
        with one_thread():
            yield
    else:
        with _threads(max(1, cores() // processes)):
            yield
