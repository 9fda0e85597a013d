"""Running histograms of activations, and the ranges that 8-bit quantization gets from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from compressor.errors import StageError
from compressor.task import Array

CELLS = 4096
"""Cells on either side of zero, of which the farther side has more than half in use."""

LEAST = -160
"""Exponent of an empty histogram: below the smallest float32."""

BULK = 99.8
"""Percent of the elements of which a sample is enough; the tails decide where to clip."""

TINY = 1e-30
"""A narrower range has a scale that float32 holds badly; such a tensor counts as zero."""

SHRINKING = 2.0 ** -(np.arange(51) / 10)
"""Candidates for a clipped end, as parts of the whole range: 1 to 1/32, 7 % apart. All pairs of
120 candidates for each end were at most 0.1 dB better on ten kinds of data."""

Floats = NDArray[np.float64]


class Range(NamedTuple):
    """What a quantized tensor can hold, in the tensor's own unit: ``low <= 0 <= high``.

    Zero is always in it, and exact on the grid, as padding and ReLU need.
    """

    low: float
    high: float


class Histogram:
    """A running histogram of one tensor, of 64 KiB whatever it has seen.

    Cell ``i`` holds values from ``i * width`` up to ``(i + 1) * width``. The width is a power of
    two and grows with the largest value; growing merges neighbours, which keeps them exact. So a
    histogram without samples depends on the values alone, not on their order or batches.

    ``low`` and ``high`` are the smallest and largest value of all, ``total`` is their number.
    ``counts`` (float64, cells from ``-CELLS`` to ``CELLS - 1``) holds all but exact zeros, which
    ``zeros`` counts: every range holds them without an error, and after a ReLU they would drown the
    others. ``bulk`` is where a sample stands for all, from when ``total`` was ``half``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.low, self.high = math.inf, -math.inf
        self.total = self.half = 0
        self.zeros = 0.0
        self.bulk = Range(-math.inf, math.inf)
        self.exponent = LEAST
        self.counts = np.zeros(2 * CELLS)

    @property
    def width(self) -> float:
        """Of a cell, in the tensor's unit; a power of two."""
        return math.ldexp(1 / CELLS, self.exponent)

    def add(self, values: Array, at: NDArray[np.int64] | None = None) -> None:
        """Counts ``values``, floats of any shape.

        With ``at`` the values at these flat positions stand for the others, except in the tails
        (0.2 % of what came before), which are counted whole, as are ``low`` and ``high``. Raises
        :class:`StageError` for NaN or infinity.
        """
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())  # NaN wins both
        if not (math.isfinite(low) and math.isfinite(high)):
            raise StageError(
                f"activations of tensor {self.name} are not finite: from {low} to {high}; "
                "look for NaN or infinity in the calibration data and the model"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._grow()
        flat = values.ravel()
        if at is None:
            self._count(flat, 1)
        else:
            seen, bulk = flat[at], self.bulk
            weight = flat.size / seen.size
            self._count(seen[(seen >= bulk.low) & (seen <= bulk.high)], weight)
            if low < bulk.low or high > bulk.high:
                self._count(flat[(flat < bulk.low) | (flat > bulk.high)], 1)
        self.total += flat.size
        if self.total >= 2 * self.half:
            self.half, self.bulk = self.total, percentile(self, share=BULK)

    def _count(self, values: Array, weight: float) -> None:
        cells = np.floor(values * np.float64(1 / self.width)).astype(np.int64)
        zeros = values.size - int(np.count_nonzero(values))
        found = np.bincount(cells + CELLS, minlength=2 * CELLS)
        found[CELLS] -= zeros
        self.counts += weight * found
        self.zeros += weight * zeros

    def _grow(self) -> None:
        largest = max(-self.low, self.high)
        exponent = math.frexp(largest)[1] if largest else LEAST
        if exponent <= self.exponent:
            return
        shift = min(exponent - self.exponent, CELLS.bit_length())  # by then one cell on each side
        merged = np.zeros_like(self.counts)
        np.add.at(merged, (np.arange(-CELLS, CELLS) >> shift) + CELLS, self.counts)
        self.counts, self.exponent = merged, exponent


def minmax(histogram: Histogram, levels: int = 256) -> Range:
    """All that was seen."""
    return _range(min(histogram.low, 0.0), max(histogram.high, 0.0))


def percentile(histogram: Histogram, levels: int = 256, share: float = 99.99) -> Range:
    """The range that holds ``share`` percent of the elements and leaves out as many at each end."""
    tail = (1 - share / 100) / 2 * (histogram.counts.sum() + histogram.zeros)
    edges = np.arange(CELLS, -1.0, -1.0) * histogram.width
    below, above = histogram.counts[:CELLS], histogram.counts[: CELLS - 1 : -1]
    low, high = (
        float(np.interp(tail, np.concatenate([[0], np.cumsum(side)]), edges))
        for side in (below, above)
    )
    low, high = max(0.0 - low, min(histogram.low, 0.0)), min(high, max(histogram.high, 0.0))
    return _range(low, high) if low < high else minmax(histogram)


def entropy(histogram: Histogram, levels: int = 256) -> Range:
    """The range whose quantized distribution is nearest to the float one, by KL divergence.

    Of Migacz, "8-bit inference with TensorRT" (2017), for ranges with two ends: either is searched,
    what lies beyond it is counted into the outermost occupied cell inside, and a level spreads its
    share evenly over its occupied cells. Levels finer than a cell are not tried. Exact zeros are
    left out.
    """
    total = histogram.counts.sum()
    if not total:
        return minmax(histogram)
    share = histogram.counts / total
    occupied = np.flatnonzero(share)
    running, number, own = (_running(x) for x in (share, share > 0, _xlogy(share, share)))

    def divergence(low: Floats, high: Floats) -> Floats:
        bounds, _ = _grid(low, high, levels)
        at = np.clip(np.rint(bounds) + CELLS, 0, 2 * CELLS).astype(np.int64)
        first, last = at[:, 0], at[:, -1]
        mass, cells = np.diff(running[at]), np.diff(number[at])
        level = mass / np.maximum(cells, 1)  # what quantization leaves in each of its cells
        inside = running[last] - running[first]
        found = own[last] - own[first] - _xlogy(mass, level).sum(axis=1) + _xlogy(1, inside)
        filled = cells > 0
        for out, cell, outermost in (
            (running[first], np.searchsorted(occupied, first), filled.argmax(axis=1)),
            (
                running[-1] - running[last],
                np.searchsorted(occupied, last) - 1,
                levels - 1 - filled[:, ::-1].argmax(axis=1),
            ),
        ):
            there = share[occupied[np.clip(cell, 0, len(occupied) - 1)]]
            found += _xlogy(there + out, there + out) - _xlogy(there, there)
            found -= _xlogy(out, level[np.arange(len(level)), outermost])
        step = (high - low) / (levels - 1)
        return np.where((step >= 1) & (cells.sum(axis=1) > 1), found, np.inf)

    return _searched(histogram, divergence)


def mse(histogram: Histogram, levels: int = 256) -> Range:
    """The range of least expected squared error, of rounding and clipping together.

    Either end is searched, as in Banner et al., "Post training 4-bit quantization of convolutional
    networks for rapid-deployment" (2019), with the histogram in place of a fitted distribution.
    """
    moments = _moments(histogram)
    return _searched(histogram, lambda low, high: _error(histogram, moments, low, high, levels))


METHODS: dict[str, Callable[..., Range]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
"""Ways to choose a range, called with a histogram and, if not 256, the number of levels."""


def sqnr(histogram: Histogram, chosen: Range, levels: int = 256) -> float:
    """Expected signal to quantization noise in dB, rounding and clipping together.

    Values are taken as even within a cell. Infinite where there is no noise.
    """
    moments, width = _moments(histogram), histogram.width
    low, high = np.array([[chosen.low], [chosen.high]]) / width
    noise = float(_error(histogram, moments, low, high, levels)[0])
    signal = float(moments[2, -1])
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


def best(
    histogram: Histogram, methods: Sequence[str] = tuple(METHODS), levels: int = 256
) -> tuple[str, Range]:
    """The method of highest :func:`sqnr`, the first of equals, and its range."""
    found = {name: METHODS[name](histogram, levels) for name in methods}
    name = max(found, key=lambda name: sqnr(histogram, found[name], levels))
    return name, found[name]


def _range(low: float, high: float) -> Range:
    """A tensor of zeros gets 0 to 1, as any scale is right and none may be 0."""
    return Range(low, high) if high - low > TINY else Range(0.0, 1.0)


def _searched(histogram: Histogram, loss: Callable[[Floats, Floats], Floats]) -> Range:
    """The range of least ``loss``, which takes the ends of many candidates in cells.

    Both ends shrink together first, then one after the other, twice.
    """
    whole = minmax(histogram)
    lows, highs = (SHRINKING * end / histogram.width for end in whole)
    at = int(loss(lows, highs).argmin())
    low, high = at, at
    for _ in range(2 if whole.low < 0 < whole.high else 0):
        high = int(loss(np.full_like(highs, lows[low]), highs).argmin())
        low = int(loss(lows, np.full_like(lows, highs[high])).argmin())
    return _range(whole.low * float(SHRINKING[low]), whole.high * float(SHRINKING[high]))


def _grid(low: Floats, high: Floats, levels: int) -> tuple[Floats, Floats]:
    """Bounds between the levels (``levels + 1`` a row) and the levels, of each candidate.

    The outer bounds lie half a step beyond the outer levels. Zero is a level.
    """
    step = ((high - low) / (levels - 1))[:, None]
    first = -np.rint(-low[:, None] / step)
    return (first - 0.5 + np.arange(levels + 1)) * step, (first + np.arange(levels)) * step


def _moments(histogram: Histogram) -> Floats:
    """Integrals of 1, x and x squared over the counts up to each edge: (3, 2 * CELLS + 1)."""
    edges = np.arange(-CELLS, CELLS + 1.0)
    return np.stack(
        [_running(histogram.counts * np.diff(edges**power) / power) for power in (1, 2, 3)]
    )


def _error(histogram: Histogram, moments: Floats, low: Floats, high: Floats, levels: int) -> Floats:
    """Sum of squared errors, in cells squared, of each candidate."""
    bounds, centres = _grid(low, high, levels)
    bounds[:, 0], bounds[:, -1] = -CELLS, CELLS  # what is clipped goes to the outer levels
    bounds = np.clip(bounds, -CELLS, CELLS)
    cell = np.minimum(np.floor(bounds), CELLS - 1)
    at = cell.astype(np.int64) + CELLS
    mass, mean, square = (
        np.diff(
            moments[power - 1][at] + histogram.counts[at] * (bounds**power - cell**power) / power
        )
        for power in (1, 2, 3)
    )
    errors: Floats = np.maximum(square - 2 * centres * mean + centres**2 * mass, 0).sum(axis=1)
    return errors


def _running(values: Array) -> Floats:
    """Sums of the first 0, 1, ... values."""
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _xlogy(x: Array | float, y: Array) -> Floats:
    """``x * log(y)``, and 0 where there is nothing to count."""
    return x * np.log(y, out=np.zeros_like(y), where=y > 0)
