"""Examples that are read when they are asked for: how the rest of the house can tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressor.task import Array, Batch, Split

At = NDArray[np.intp]


@dataclass(frozen=True)
class OnDemand:
    """A ``fetch`` of :class:`Split` that reads or decodes its examples anew at every call.

    ``targets`` gives the targets at the same positions without reading the inputs, where it is
    known how. ``parallel`` says that several threads may read at once: a data set of the user's
    own may seek in one open file.
    """

    read: Callable[[At], Batch]
    targets: Callable[[At], Array] | None = None
    parallel: bool = False

    def __call__(self, at: At) -> Batch:
        return self.read(at)


def targets_at(split: Split, at: At) -> Array:
    """The targets that ``split.fetch(at)`` gives, of pictures without decoding them."""
    if isinstance(split.fetch, OnDemand) and split.fetch.targets:
        return split.fetch.targets(at)
    return split.fetch(at)[1]


def targets(split: Split, size: int) -> Iterator[Array]:
    """All targets of a split in order, ``size`` at a time; inputs are read only where they must."""
    for start in range(0, len(split), size):
        yield targets_at(split, split.indices[start : start + size])
