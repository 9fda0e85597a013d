"""Figures derived from raw values: summaries, intervals, verdicts. NumPy only."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.errors import InputError
from compressor.metrics import Array, Metric, Whole
from compressor.metrics import scores as scores_of
from compressor.metrics import value as value_of

Blocks = Sequence[Sequence[float]]

ENOUGH = {"p90": 64, "p99": 662}
"""Samples that a percentile needs: so many that at least two of them lie above the true
percentile with 99 % confidence (``p**n + n * (1 - p) * p**(n - 1) <= 0.01``)."""

LEAST_EFFECT = 0.02
"""A speed-up smaller than this is called the same, on however quiet a machine."""

SAME = 0.05
"""What lies within this with its whole interval is called the same, however noisy the machine."""

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


RESTART = 0.03
"""Prior spread (as a log ratio) of a speed-up from one start of the processes to the next: memory
is laid out anew. benchmarks/measuring/restarts.py has what it is for real models."""

PRIOR = 4
"""Degrees of freedom that :data:`RESTART` counts for against the restarts that were seen."""


def speedup(
    reference: Blocks, blocks: Blocks, seed: int = 0, processes: Sequence[int] = ()
) -> dict[str, float]:
    """How many times faster ``blocks`` are: ratio of medians, with a 95 % bootstrap interval.

    Both hold the same number of blocks, taken in the same rounds; ``processes`` says how many
    rounds each start of the processes took, in order. The bootstrap is hierarchical: rounds are
    drawn again in pairs within each process, so that what slowed a whole round down touches both
    sides, and every draw is moved by what another start could change. Two or three starts cannot be
    drawn again honestly (they would seem to vary less than they do), so that part is drawn from
    Student's t around their spread, which :data:`RESTART` stands in for while they are few. Without
    ``processes`` the interval says nothing of restarts: enough to compare within one.

    >>> speedup([[2.0], [2.0]], [[1.0], [1.0]])
    {'value': 2.0, 'low': 2.0, 'high': 2.0}
    """
    rounds = min(len(reference), len(blocks))
    starts = _starts(processes or (rounds,), rounds)
    rng = np.random.default_rng(seed)
    value = math.log(_median(reference[:rounds]) / _median(blocks[:rounds]))
    drawn = np.concatenate(
        [rng.integers(start, end, (RESAMPLES, end - start)) for start, end in starts], axis=1
    )
    logs = np.log(_medians(reference[:rounds], drawn) / _medians(blocks[:rounds], drawn))
    if processes:
        moved = rng.standard_t(PRIOR + len(starts) - 1, RESAMPLES)
        moved *= _restarting(reference, blocks, starts)
        # Both ways, so that 1 / ratio gives 1 / interval.
        logs = np.concatenate([logs + moved, logs - moved])
    low, high = _interval(logs)
    # The pooled median may lie outside an interval made of thinned blocks by a hair.
    return {
        "value": math.exp(value),
        "low": math.exp(min(low, value)),
        "high": math.exp(max(high, value)),
    }


def _median(blocks: Blocks) -> float:
    return float(np.median(np.concatenate([np.asarray(block, float) for block in blocks])))


def _starts(processes: Sequence[int], rounds: int) -> list[tuple[int, int]]:
    """First round and end of each process, of ``rounds`` in all."""
    ends = np.minimum(np.cumsum(processes), rounds)
    pairs = zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)
    return [(start, end) for start, end in pairs if end > start]


def _restarting(reference: Blocks, blocks: Blocks, starts: Sequence[tuple[int, int]]) -> float:
    """Standard error of the log ratio of medians that the choice of processes makes."""
    freedom, seen = len(starts) - 1, 0.0
    if freedom:
        logs = [_log_ratios(reference, blocks, *span) for span in starts]
        inside = statistics.fmean(_error(each) ** 2 for each in logs)
        seen = max(0.0, statistics.variance(each.mean() for each in logs) - inside)
    variance = (PRIOR * RESTART**2 + freedom * seen) / (PRIOR + freedom)
    # A median over a few starts varies by up to so much more than their mean.
    factor = math.sqrt(math.pi / 2) if freedom else 1.0
    return factor * math.sqrt(variance / len(starts))


def _log_ratios(reference: Blocks, blocks: Blocks, start: int, end: int) -> NDArray[np.float64]:
    """Of each round's medians."""
    pairs = zip(reference[start:end], blocks[start:end], strict=True)
    # Of a few dozen values: NumPy's median takes ten times as long.
    return np.array(
        [math.log(statistics.median(one) / statistics.median(other)) for one, other in pairs]
    )


def reach(reference: Blocks, blocks: Blocks) -> float:
    """Standard error of the mean log ratio over the rounds; infinite for fewer than two."""
    return _error(_log_ratios(reference, blocks, 0, len(blocks)))


def _error(logs: NDArray[np.float64]) -> float:
    return float(logs.std(ddof=1)) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf


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

    An effect must exceed both :data:`LEAST_EFFECT` and the machine's noise ``floor`` (as a ratio
    minus 1). An interval that touches 1 is never faster or slower; one that reaches beyond
    :data:`SAME` is not the same.
    """
    band, near = 1 + max(LEAST_EFFECT, floor), 1 + SAME
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
    have no bound to add, nor have other scores, so theirs is a bootstrap over examples: it has no
    width where all scores are equal.
    """
    if reference.shape != scores.shape or reference.ndim != 1 or not len(scores):
        raise ValueError(f"scores of the same examples: {reference.shape} and {scores.shape}")
    lost = reference - scores if higher_is_better else scores - reference
    if higher_is_better and all(one.min() >= 0 and one.max() <= 1 for one in (reference, scores)):
        value, count = float(lost.mean()), len(lost) + 2
        middle = float(lost.sum()) / count
        reach = Z * math.sqrt(((float((lost**2).sum()) + 2) / count - middle**2) / count)
        return {"value": value, "low": max(middle - reach, -1.0), "high": min(middle + reach, 1.0)}
    unit = np.ones(len(lost)) if higher_is_better else reference
    whole = float(unit.mean()) or 1.0
    value = float(lost.mean()) / whole
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES):
        at = rng.integers(0, len(lost), len(lost))
        means.append(float(lost[at].mean()) / (float(unit[at].mean()) or whole))
    low, high = _interval(np.array(means))
    return {"value": value, "low": min(low, value), "high": max(high, value)}


Z = 1.959964
"""Standard errors on either side of a 95 % interval."""

OWN = 200
"""Resamples that a user's own number over all examples is taken of: it may take its time."""

FEWEST = 100
"""Resamples of any other, where :data:`WORK` leaves no more."""

WORK = 100_000_000
"""Values, over all resamples, that one sort of number is made of: about a second."""

DRAWN = 64
"""Resamples at once: what they need stays in the cache."""


def drops(
    metrics: Mapping[str, Metric],
    reference: Array,
    outputs: Array,
    targets: Array,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """What was lost of each metric, as in :func:`drop`: ``{name: {"value", "low", "high"}}``.

    ``reference`` and ``outputs`` are two models' on the same examples, first axis the example. A
    metric that is no mean of scores gets a percentile bootstrap over examples, both models on the
    same ones. Drops of R2 and ROC AUC are absolute, since more of them is better; those of
    cross-entropy are relative, since it is an error. Where the two decide alike a bootstrap has no
    width, which proves nothing: an interval of decisions is at least as wide as that of an accuracy
    of as many examples of which none differs. What is not defined for either is left out.
    """
    found: dict[str, dict[str, float]] = {}
    alike: dict[Any, dict[str, Whole]] = defaultdict(dict)
    for name, metric in metrics.items():
        better = metric.higher_is_better
        if metric.whole is not None:
            alike[metric.whole.seen][name] = metric.whole
            continue
        before, after = (scores_of(metric, side, targets) for side in (reference, outputs))
        if before is None or after is None:
            found[name] = _lost(_own(metric, reference, outputs, targets, seed), better)
        elif np.isfinite(before.mean()) and np.isfinite(after.mean()):
            found[name] = drop(before, after, higher_is_better=better, seed=seed)
    for seen, wholes in alike.items():
        with np.errstate(invalid="ignore", over="ignore"):  # of outputs that are not finite
            sides = seen(reference), seen(outputs)
            drawn = _redrawn(wholes, *sides, targets, seed)
        least = Z * math.sqrt(2) / (len(targets) + 2) if sides[0].dtype.kind != "f" else 0.0
        for name, values in drawn.items():
            found[name] = _lost(values, metrics[name].higher_is_better, least)
    return {name: found[name] for name in metrics if _known(found.get(name))}


def _known(lost: Mapping[str, float] | None) -> bool:
    return lost is not None and all(map(math.isfinite, lost.values()))


def _lost(values: NDArray[np.float64], better: bool, least: float = 0.0) -> dict[str, float]:
    """The drop of ``values``, shape ``(2, 1 + draws)``: of both models, on all examples first."""
    before, after = values
    with np.errstate(invalid="ignore"):
        if better:
            lost = before - after
        else:
            whole = before[0] or 1.0
            lost = (after - before) / np.where(before == 0, whole, before)
    value, drawn = float(lost[0]), lost[1:][np.isfinite(lost[1:])]
    if len(drawn) < len(lost) // 2:
        return {"value": math.nan, "low": math.nan, "high": math.nan}
    low, high = _interval(drawn)
    return {"value": value, "low": min(low, value - least), "high": max(high, value + least)}


def _own(
    metric: Metric, reference: Array, outputs: Array, targets: Array, seed: int
) -> NDArray[np.float64]:
    """A user's number of both models, shape ``(2, 1 + OWN)``; NaN for draws it fails on."""
    rng = np.random.default_rng(seed)
    sides = reference, outputs
    found = [[value_of(metric, side, targets) for side in sides]]
    for _ in range(OWN):
        at = rng.integers(0, len(targets), len(targets))
        try:
            found.append([value_of(metric, side[at], targets[at]) for side in sides])
        except InputError:  # it works on all: this draw has, say, no example of some class
            found.append([math.nan, math.nan])
    return np.array(found).T


def _redrawn(
    wholes: Mapping[str, Whole], before: Array, after: Array, targets: Array, seed: int
) -> dict[str, NDArray[np.float64]]:
    """Name to the values of both models, shape ``(2, 1 + draws)``; ``wholes`` see the same.

    ``before`` and ``after`` are what they see. Examples that are alike in all of it are one cell of
    a multinomial draw.
    """
    first, cell = _cells(before, after, targets)
    sides = before[first], after[first]
    sizes = len(first) * (before.shape[1] if before.ndim > 1 else 1)
    draws = min(RESAMPLES, max(FEWEST, WORK // sizes))
    weighed = {
        name: [whole.weighed(side, targets[first]) for side in sides]
        for name, whole in wholes.items()
    }
    taken = [
        {name: np.stack([one(counts) for one in both]) for name, both in weighed.items()}
        for counts in _counts(cell, draws, seed)
    ]
    return {name: np.concatenate([part[name] for part in taken], axis=1) for name in wholes}


def _cells(before: Array, after: Array, targets: Array) -> tuple[Array, Array]:
    """One example of each cell, and the cell of each example; of floats each is its own."""
    if before.dtype.kind == "f":
        every = np.arange(len(targets))
        return every, every
    columns = [part.reshape(len(targets), -1) for part in (targets, before, after)]
    _, first, cell = np.unique(
        np.concatenate(columns, axis=1), axis=0, return_index=True, return_inverse=True
    )
    return first, cell.reshape(-1)


def _counts(cell: Array, draws: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How many of each cell there are, ``(cells, 1)``, then in each draw, a few draws at a time."""
    size, cells = len(cell), int(cell.max()) + 1
    yield np.bincount(cell, minlength=cells)[:, None].astype(np.float64)
    rng = np.random.default_rng(seed)
    for start in range(0, draws, DRAWN):
        drawn = [
            np.bincount(cell[rng.integers(0, size, size)], minlength=cells)
            for _ in range(min(DRAWN, draws - start))
        ]
        yield np.ascontiguousarray(np.stack(drawn, axis=1), dtype=np.float64)


def mcnemar(reference: Array, scores: Array) -> dict[str, Any]:
    """Whether two models are right equally often: ``{"better", "worse", "p"}``.

    Both are 1 where the model is right and 0 where it is wrong, shape ``(n,)``. ``better`` examples
    only the second has right, ``worse`` only the first; ``p`` is the exact two-sided binomial
    probability of a split at least as uneven (McNemar 1947, Psychometrika 12, without his
    approximation by chi squared).

    >>> mcnemar(np.array([1, 1, 1, 0]), np.array([0, 0, 0, 0]))
    {'better': 0, 'worse': 3, 'p': 0.25}
    """
    better, worse = (int(np.sum(one)) for one in (scores > reference, scores < reference))
    changed, term, total = better + worse, 1, 0
    for k in range(min(better, worse) + 1):
        total += term
        term = term * (changed - k) // (k + 1)
    return {"better": better, "worse": worse, "p": min(1.0, 2 * total / 2**changed)}
