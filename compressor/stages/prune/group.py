"""The nouns of pruning: what goes together (unit), and where (slice) and with whom (group)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Slice(NamedTuple):
    """Positions ``at`` along axis ``dim`` of the tensor ``parameter`` (a parameter or a buffer)."""

    parameter: str
    dim: int
    at: tuple[int, ...]


Unit = tuple[Slice, ...]
"""The least that can be cut: everything in the model that is of one channel.

For channel 3 of a convolution that feeds a BatchNorm and a convolution these are row 3 of the
first weight, element 3 of the statistics, and slice 3 of axis 1 of the second weight. Channels
that are added to each other share a unit; a head of attention is one unit.
"""


class Write(NamedTuple):
    """An attribute of a layer that counts units: ``kept * each`` is written back to it."""

    module: str
    attribute: str
    each: int


@dataclass(frozen=True)
class Group:
    """Units of which any may be cut: the channels of one layer and of all that it is coupled to.

    ``root`` is the layer that makes the channels (the first one, where several are coupled);
    ``layers`` are all that a cut touches. Most groups have one strand. Where a layer has one size
    for several independent things (the layers and directions of an LSTM), each is a strand, and
    every strand loses the same number of units. ``each`` is how many channels of ``root`` a unit
    is.
    """

    root: str
    layers: tuple[str, ...]
    strands: tuple[tuple[Unit, ...], ...]
    kind: Literal["channels", "heads", "head dimensions", "hidden units"] = "channels"
    each: int = 1
    writes: tuple[Write, ...] = ()
    scales: tuple[Slice, ...] = ()
    """Slices to multiply by sqrt(kept / width): queries whose code divides by the root of what is
    left of their width, where the dense model divided by the root of all of it."""

    @property
    def width(self) -> int:
        """Units in each strand."""
        return len(self.strands[0])


class Cut(NamedTuple):
    """Units ``gone`` of ``group``: for each strand the positions of its units, all equally many."""

    group: Group
    gone: tuple[tuple[int, ...], ...]

    @property
    def kept(self) -> int:
        """Units left in each strand."""
        return self.group.width - len(self.gone[0])
