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
    ours = np.array([np.median(block) for block in reference[:rounds]])
    theirs = np.array([np.median(block) for block in blocks[:rounds]])
    value = float(np.median(np.concatenate([np.asarray(b, float) for b in reference])))
    value /= float(np.median(np.concatenate([np.asarray(b, float) for b in blocks])))
    drawn = np.random.default_rng(seed).integers(0, rounds, (RESAMPLES, rounds))
    ratios = np.median(ours[drawn], axis=1) / np.median(theirs[drawn], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    # The pooled median may lie outside an interval made of block medians by a hair.
    return {"value": value, "low": min(float(low), value), "high": max(float(high), value)}


def verdict(low: float, high: float, floor: float = 0.0) -> str:
    """``faster``, ``same``, ``slower`` or ``inconclusive`` for a speed-up's interval.

    The effect must exceed both :data:`LEAST_EFFECT` and the machine's noise ``floor`` (as a ratio
    minus 1). An interval that touches 1 is never faster or slower.
    """
    band = 1 + max(LEAST_EFFECT, floor)
    if low > band:
        return "faster"
    if high < 1 / band:
        return "slower"
    if low >= 1 / band and high <= band:
        return "same"
    return "inconclusive"


def noise_floor(first: Blocks, second: Blocks, seed: int = 0) -> float:
    """How far the same model, timed against itself, seems to differ: ratio minus 1."""
    ratio = speedup(first, second, seed)
    return math.exp(max(abs(math.log(ratio["low"])), abs(math.log(ratio["high"])))) - 1


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
        flags.append("few samples; give it longer with --bench-time normal")
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
    mean (absolute where that is 0); positive is worse. The 95 % interval pairs the examples: for
    scores of 0 and 1 the adjusted Wald interval of Bonett and Price (2012), which stays honest when
    few or no examples differ; otherwise a bootstrap over examples.
    """
    if reference.shape != scores.shape or reference.ndim != 1 or not len(scores):
        raise ValueError(f"scores of the same examples: {reference.shape} and {scores.shape}")
    lost = reference - scores if higher_is_better else scores - reference
    scale = 1.0 if higher_is_better else float(reference.mean()) or 1.0
    value = float(lost.mean()) / scale
    both = np.concatenate([reference, scores])
    if higher_is_better and np.isin(both, (0.0, 1.0)).all():
        count = len(lost)
        worse = (float((lost > 0).sum()) + 1) / (count + 2)
        better = (float((lost < 0).sum()) + 1) / (count + 2)
        middle = worse - better
        reach = 1.959964 * math.sqrt(max(worse + better - middle**2, 0.0) / (count + 2))
        return {"value": value, "low": max(middle - reach, -1.0), "high": min(middle + reach, 1.0)}
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES):
        at = rng.integers(0, len(lost), len(lost))
        below = 1.0 if higher_is_better else float(reference[at].mean()) or 1.0
        means.append(float(lost[at].mean()) / below)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"value": value, "low": min(float(low), value), "high": max(float(high), value)}
