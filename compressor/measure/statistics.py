"""Figures derived from raw values: summaries, intervals, verdicts. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Blocks = Sequence[Sequence[float]]

ENOUGH = {"p90": 64, "p99": 662}
"""Samples that a percentile needs: so many that at least two of them lie above the true
percentile with 99 % confidence (``p**n + n * (1 - p) * p**(n - 1) <= 0.01``)."""

LEAST_EFFECT = 0.02
"""A speed-up smaller than this is called the same, on however quiet a machine."""

SAME = 0.1
"""Nothing further apart than this is called the same."""

RESAMPLES = 1000


def summary(blocks: Blocks) -> dict[str, Any]:
    """``min, p50, p90, p99, mean, n`` of all values; a percentile is ``None`` below its samples.

    >>> summary([[1.0, 2.0, 3.0]])
    {'min': 1.0, 'p50': 2.0, 'p90': None, 'p99': None, 'mean': 2.0, 'n': 3}
    """
    values = np.concatenate([np.asarray(block, dtype=float) for block in blocks])
    count = len(values)

    def percentile(name: str, q: float) -> float | None:
        return float(np.percentile(values, q)) if count >= ENOUGH[name] else None

    return {
        "min": float(values.min()),
        "p50": float(np.median(values)),
        "p90": percentile("p90", 90),
        "p99": percentile("p99", 99),
        "mean": float(values.mean()),
        "n": count,
    }


def speedup(reference: Blocks, blocks: Blocks, seed: int = 0) -> dict[str, float]:
    """How many times faster ``blocks`` are: ratio of medians, with a 95 % bootstrap interval.

    Both hold the same number of blocks, taken in the same rounds. Rounds are drawn again in pairs,
    so that what slowed a whole round down touches both sides.

    >>> speedup([[2.0], [2.0]], [[1.0], [1.0]])
    {'value': 2.0, 'low': 2.0, 'high': 2.0}
    """
    rounds = min(len(reference), len(blocks))
    value = float(np.median(np.concatenate([np.asarray(b, float) for b in reference])))
    value /= float(np.median(np.concatenate([np.asarray(b, float) for b in blocks])))
    drawn = np.random.default_rng(seed).integers(0, rounds, (RESAMPLES, rounds))
    ours, theirs = _medians(reference[:rounds], drawn), _medians(blocks[:rounds], drawn)
    low, high = _interval(ours / theirs)
    # The pooled median may lie outside an interval made of thinned blocks by a hair.
    return {"value": value, "low": min(low, value), "high": max(high, value)}


THIN = 31
"""Values that stand for a block in the bootstrap: its evenly spaced order statistics."""


def _medians(blocks: Blocks, drawn: NDArray[np.intp]) -> NDArray[np.float64]:
    """The pooled median of each draw of blocks, shape ``(len(drawn),)``.

    Pooled, not the median of block medians: where calls come in two speeds, the two differ.
    """
    size = min(THIN, *map(len, blocks))
    thin = []
    for block in blocks:
        ordered = np.sort(np.asarray(block, dtype=float))
        at = (2 * np.arange(size) + 1) * len(ordered) // (2 * size)
        thin.append(ordered[at])
    stacked = np.stack(thin)
    some = max(1, 1_000_000 // stacked.size)  # draws at once: memory stays small
    return np.concatenate(
        [
            np.median(stacked[drawn[at : at + some]].reshape(-1, stacked.size), axis=1)
            for at in range(0, len(drawn), some)
        ]
    )


def _interval(resampled: NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95 %. Values of the sample itself, so that 1 / ratio gives 1 / interval."""
    ordered = np.sort(resampled)
    tail = len(ordered) // 40
    return float(ordered[tail]), float(ordered[-tail - 1])


def verdict(low: float, high: float, floor: float = 0.0) -> str:
    """``faster``, ``same``, ``slower`` or ``inconclusive`` for a speed-up's interval.

    The effect must exceed both :data:`LEAST_EFFECT` and the machine's noise ``floor`` (as a ratio
    minus 1). An interval that touches 1 is never faster or slower; one that reaches beyond
    :data:`SAME` is not the same, however noisy the machine.
    """
    band = 1 + max(LEAST_EFFECT, floor)
    near = min(band, 1 + SAME)
    if low > band:
        return "faster"
    if high < 1 / band:
        return "slower"
    if low >= 1 / near and high <= near:
        return "same"
    return "inconclusive"


def noise_floor(first: Blocks, second: Blocks, seed: int = 0) -> float:
    """How far the same model, timed against itself, seems to differ: ratio minus 1."""
    ratio = speedup(first, second, seed)
    return max(ratio["high"], 1 / ratio["low"]) - 1


SPREAD, DRIFT = 0.25, 0.10


def noise_flags(blocks: Blocks) -> list[str]:
    """What makes these samples doubtful, each with its remedy; empty when nothing does."""
    values = np.concatenate([np.asarray(block, dtype=float) for block in blocks])
    low, middle, high = np.percentile(values, [25, 50, 75])
    flags = []
    if (high - low) / middle > SPREAD:
        flags.append(
            f"spread: the middle half spans over {SPREAD:.0%} of the median; close other programs"
        )
    medians = np.array([np.median(block) for block in blocks])
    half = len(medians) // 2
    if half >= 2:
        drift = float(np.median(medians[half:]) / np.median(medians[:half]) - 1)
        if abs(drift) > DRIFT:
            flags.append(f"drift: the halves differ by over {DRIFT:.0%}; let the machine settle")
    if len(values) < ENOUGH["p90"]:
        flags.append("few samples; give it longer with --bench-time normal or full")
    return flags


def drop(
    reference: NDArray[np.float64],
    scores: NDArray[np.float64],
    *,
    higher_is_better: bool,
    seed: int = 0,
) -> dict[str, float]:
    """What was lost against ``reference``: per-example scores of the same examples, shape ``(n,)``.

    For metrics where higher is better the drop is absolute, for errors relative to the reference's
    mean (absolute where that is 0); positive is worse. The 95 % interval pairs the examples. For
    scores between 0 and 1 it is the adjusted Wald interval of Bonett and Price (2012): one more
    example is lost and one more won, which keeps it honest where few or no examples differ. Errors
    have no bound to add, so theirs is a bootstrap over examples: it has no width where all scores
    are equal.
    """
    if reference.shape != scores.shape or reference.ndim != 1 or not len(scores):
        raise ValueError(f"scores of the same examples: {reference.shape} and {scores.shape}")
    lost = reference - scores if higher_is_better else scores - reference
    if higher_is_better:
        value, count = float(lost.mean()), len(lost) + 2
        middle = float(lost.sum()) / count
        reach = 1.959964 * math.sqrt(((float((lost**2).sum()) + 2) / count - middle**2) / count)
        return {"value": value, "low": max(middle - reach, -1.0), "high": min(middle + reach, 1.0)}
    whole = float(reference.mean()) or 1.0
    value = float(lost.mean()) / whole
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES):
        at = rng.integers(0, len(lost), len(lost))
        means.append(float(lost[at].mean()) / (float(reference[at].mean()) or whole))
    low, high = _interval(np.array(means))
    return {"value": value, "low": min(low, value), "high": max(high, value)}
