"""What training is fed with: batches as tensors, read ahead where reading takes time."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.data.demand import OnDemand
from compressor.measure.environment import cores
from compressor.task import Array, Split

THREADS_AT_MOST = 4
AHEAD = 2
"""Batches that are ready or under way, for each thread."""

READ_AT_ONCE = 64
COMPARED = 32
"""Examples that are read twice to see whether they are the same both times."""

Fed = tuple[tuple[Tensor, ...], Tensor]


def batches(
    split: Split, steps: Sequence[NDArray[np.intp]], *, workers: int, pin: bool
) -> Generator[Fed]:
    """``((input, ...), targets)`` for every step, in order, as tensors on the CPU.

    A step is an array of positions in the split, 0 to below its length, as :meth:`Split.take` has
    them. With 0 ``workers`` the caller's thread fetches, and the tensors are the fetched arrays
    themselves; with more, that many threads are at most ``2 * workers`` batches ahead. The batches
    are the same for every number. What a fetch raises is raised at its own step. The threads end
    with the iterator, also where it is closed early. ``pin`` puts batches where CUDA copies them
    from without waiting; without CUDA it does nothing.
    """
    pin = pin and torch.cuda.is_available()
    if workers == 0:
        for at in steps:
            yield _fetched(split, at, pin)
        return
    # Threads, not processes: decoding and NumPy let other threads run, nothing has to be pickled,
    # and a forked copy of a process that already computes in threads may hang.
    waiting = deque(steps)
    ahead: deque[Future[Fed]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="batches")
    try:
        while waiting or ahead:
            while waiting and len(ahead) < AHEAD * workers:
                ahead.append(pool.submit(_fetched, split, waiting.popleft(), pin))
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def automatic(split: Split) -> int:
    """How many workers :func:`batches` should have for this split.

    None for arrays in memory; for pictures and mapped files one for each core, 4 at most. A data
    set of the user's own has a single one, which reads ahead and never beside itself: it may seek
    in one open file, and would then give wrong examples without a word.
    """
    if not isinstance(split.fetch, OnDemand):
        return 0
    return min(THREADS_AT_MOST, cores()) if split.fetch.parallel else 1


def resident(split: Split, limit_bytes: int) -> Split:
    """The same examples in the same order, read into memory once.

    A split that would take more than ``limit_bytes`` is returned as it is, and so is one whose
    arrays are in memory already, that gives other examples when it is asked again, as a data set
    that draws crops does, or whose examples are not all of one shape and dtype.
    """
    if not isinstance(split.fetch, OnDemand) or not len(split):
        return split
    inputs, targets = split.head(1)
    if len(split) * sum(part.nbytes for part in (*inputs, targets)) > limit_bytes:
        return split
    if not steady(split):
        return split
    whole = [np.empty((len(split), *part.shape[1:]), part.dtype) for part in (*inputs, targets)]
    starts = range(0, len(split), READ_AT_ONCE)
    steps = [np.arange(start, min(start + READ_AT_ONCE, len(split))) for start in starts]
    read = batches(split, steps, workers=automatic(split), pin=False)
    for start, (parts, told) in zip(starts, read, strict=True):
        for kept, part in zip(whole, (*parts, told), strict=True):
            values = part.numpy()
            if values.shape[1:] != kept.shape[1:] or values.dtype != kept.dtype:
                return split
            kept[start : start + READ_AT_ONCE] = values
    return Split.arrays(tuple(whole[:-1]), whole[-1])


def steady(split: Split) -> bool:
    """Whether the first examples of a split are the same when they are asked for again."""
    once, again = ([*x, y] for x, y in (split.head(COMPARED), split.head(COMPARED)))
    return all(a.tobytes() == b.tobytes() for a, b in zip(once, again, strict=True))


def _fetched(split: Split, at: NDArray[np.intp], pin: bool) -> Fed:
    inputs, targets = split.fetch(split.indices[at])
    return tuple(_tensor(part, pin) for part in inputs), _tensor(targets, pin)


def _tensor(values: Array, pin: bool) -> Tensor:
    # A user's split may give a view that must not be written to, which PyTorch warns of.
    tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
    return tensor.pin_memory() if pin else tensor
