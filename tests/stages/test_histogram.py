"""Running histograms: what they count, however it comes, and the ranges they give."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compressor import StageError
from compressor.stages.quantize.histogram import (
    CELLS,
    METHODS,
    Histogram,
    Range,
    _error,
    _moments,
    best,
    sqnr,
)
from compressor.task import Array

ANY = hnp.arrays(
    np.float32, st.integers(1, 200), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=True)
)

DATA: dict[str, Callable[[np.random.Generator], Array]] = {
    "normal": lambda rng: rng.standard_normal(50_000),
    "relu": lambda rng: np.maximum(rng.standard_normal(50_000), 0),
    "relu6": lambda rng: np.clip(3 * rng.standard_normal(50_000), 0, 6),
    "heavy": lambda rng: rng.standard_t(3, 50_000),
    "heavier": lambda rng: np.abs(rng.standard_t(1.5, 50_000)),
    "outlier": lambda rng: np.append(rng.standard_normal(50_000), [-50, 200]),
    "shifted": lambda rng: 10 + rng.standard_normal(50_000),
    "sparse": lambda rng: rng.standard_normal(50_000) * (rng.random(50_000) < 0.001),
}


def drawn(kind: str, seed: int = 0) -> Array:
    return np.asarray(DATA[kind](np.random.default_rng(seed)), np.float32)


def counted(*parts: Array) -> Histogram:
    histogram = Histogram("x")
    for part in parts:
        histogram.add(part)
    return histogram


def error_of(x: Array, chosen: Range, levels: int = 256) -> float:
    """Mean squared error of ``x`` quantized for real."""
    step = (chosen.high - chosen.low) / (levels - 1)
    zero = round(-chosen.low / step)
    at = np.clip(np.rint(x.astype(np.float64) / step) + zero, 0, levels - 1)
    return float((((at - zero) * step - x) ** 2).mean())


def sqnr_of(x: Array, chosen: Range, levels: int = 256) -> float:
    return 10 * math.log10((x.astype(np.float64) ** 2).mean() / error_of(x, chosen, levels))


# --- counting


@settings(max_examples=40)
@given(ANY, st.integers(0, 99), st.lists(st.integers(0, 200), max_size=6))
def test_order_and_division_change_nothing(x: Array, seed: int, cuts: list[int]) -> None:
    whole = counted(x)
    shuffled = np.random.default_rng(seed).permutation(x)
    parts = counted(*np.split(shuffled, sorted(cuts)))
    assert (parts.low, parts.high) == (whole.low, whole.high) == (x.min(), x.max())
    assert parts.total == whole.total == x.size
    assert (parts.exponent, parts.zeros) == (whole.exponent, whole.zeros)
    np.testing.assert_array_equal(parts.counts, whole.counts)


@settings(max_examples=40)
@given(ANY)
def test_every_value_is_in_the_cell_that_holds_it(x: Array) -> None:
    histogram = counted(x)
    assert histogram.counts.sum() + histogram.zeros == x.size
    edges = np.arange(-CELLS, CELLS + 1) * histogram.width
    wanted, _ = np.histogram(x[x != 0].astype(np.float64), edges)
    # NumPy's last cell holds its right edge too; ours never reaches that.
    np.testing.assert_array_equal(histogram.counts, wanted)


@settings(max_examples=40)
@given(ANY)
def test_more_than_half_of_a_side_is_in_use(x: Array) -> None:
    histogram = counted(x)
    largest = np.abs(x).max()
    assert largest == 0 or CELLS / 2 <= largest / histogram.width < CELLS


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(bad: float) -> None:
    x = np.ones((2, 3), np.float32)
    x[1, 2] = bad
    with pytest.raises(StageError, match=r"activations of tensor x are not finite: from .* to "):
        counted(x)


def test_nothing_is_no_value() -> None:
    histogram = counted(np.zeros((0, 3), np.float32))
    assert histogram.total == 0
    assert all(method(histogram, 256) == Range(0, 1) for method in METHODS.values())


def test_half_precision_counts_like_single() -> None:
    x = drawn("normal").astype(np.float16)
    np.testing.assert_array_equal(counted(x).counts, counted(x.astype(np.float32)).counts)


# --- ranges


@settings(max_examples=40)
@given(ANY, st.sampled_from(sorted(METHODS)), st.sampled_from([16, 128, 256]))
def test_ranges_hold_zero_and_nothing_unseen(x: Array, method: str, levels: int) -> None:
    low, high = METHODS[method](counted(x), levels)
    assert low <= 0 <= high
    assert low < high
    if np.abs(x).max() > 1e-20:
        assert min(x.min(), 0) <= low
        assert high <= max(x.max(), 0)


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-40, 3e38])
def test_constants_have_a_range(value: float) -> None:
    histogram = counted(np.full(100, value, np.float32))
    wanted = {5.0: (0, 5), -3.0: (-3, 0), 3e38: (0, np.float32(3e38))}.get(value, (0, 1))
    for name, method in METHODS.items():
        found = method(histogram, 256)
        assert list(found) == pytest.approx(list(wanted), rel=1e-3), name
        assert sqnr(histogram, found) > 60 or value == 1e-40


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("levels", [256, 16])
def test_expected_sqnr_is_that_of_quantizing(kind: str, levels: int) -> None:
    x = drawn(kind)
    histogram = counted(x)
    for method in METHODS.values():
        found = method(histogram, levels)
        assert sqnr(histogram, found, levels) == pytest.approx(sqnr_of(x, found, levels), abs=0.2)


@pytest.mark.parametrize("kind", DATA)
def test_mse_is_near_the_best_of_all_pairs(kind: str) -> None:
    x = drawn(kind)
    histogram = counted(x)
    parts, moments = np.geomspace(1 / 32, 1, 30), _moments(histogram)
    highs = parts * max(histogram.high, 0) / histogram.width
    least = min(
        _error(histogram, moments, np.full_like(highs, low), highs, 256).min()
        for low in np.unique(parts * min(histogram.low, 0) / histogram.width)
    )
    highest = 10 * math.log10(moments[2, -1] / least)
    assert sqnr(histogram, METHODS["mse"](histogram, 256)) > highest - 0.15


@settings(max_examples=20)
@given(st.floats(90, 99.99), st.integers(0, 5), st.sampled_from(["normal", "heavy", "relu"]))
def test_a_percentile_is_that_of_numpy(share: float, seed: int, kind: str) -> None:
    x = drawn(kind, seed)
    histogram = counted(x)
    found = METHODS["percentile"](histogram, 256, share)
    tail = (100 - share) / 2
    low, high = np.percentile(x, [tail, 100 - tail], method="inverted_cdf")
    # In the tails neighbours lie cells apart: one rank more or less is allowed.
    assert (
        abs((x < found.low).mean() - (x < low).mean())
        <= 3 / x.size + (np.abs(x - found.low) <= histogram.width).mean()
    )
    assert (
        abs((x > found.high).mean() - (x > high).mean())
        <= 3 / x.size + (np.abs(x - found.high) <= histogram.width).mean()
    )


def test_entropy_cuts_an_outlier_off_and_leaves_an_even_spread() -> None:
    rng = np.random.default_rng(0)
    even = counted(rng.uniform(-1, 1, 100_000).astype(np.float32))
    assert METHODS["entropy"](even, 256) == pytest.approx((-1, 1), abs=0.1)
    assert METHODS["entropy"](counted(drawn("outlier")), 256).high < 50


@pytest.mark.parametrize("kind", ["normal", "heavy", "outlier"])
def test_mirrored_data_has_the_mirrored_range(kind: str) -> None:
    x = drawn(kind)
    for name, method in METHODS.items():
        here, there = method(counted(x), 256), method(counted(-x), 256)
        one, other = sqnr(counted(x), here), sqnr(counted(-x), there)
        assert one == pytest.approx(other, abs=1 if name == "entropy" else 0.1), name


@pytest.mark.parametrize("kind", DATA)
def test_best_is_the_method_of_highest_sqnr(kind: str) -> None:
    histogram = counted(drawn(kind))
    name, chosen = best(histogram)
    assert chosen == METHODS[name](histogram, 256)
    assert sqnr(histogram, chosen) == max(
        sqnr(histogram, method(histogram, 256)) for method in METHODS.values()
    )
    assert best(histogram, ["entropy"])[0] == "entropy"


# --- samples


@pytest.mark.parametrize("kind", ["normal", "relu", "relu6", "heavy", "heavier"])
@pytest.mark.parametrize("seed", range(3))
def test_a_sample_of_the_bulk_gives_nearly_the_same_range(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    full, sampled = Histogram("x"), Histogram("x")
    for batch in range(8):
        x = drawn(kind, 100 * seed + batch)
        full.add(x)
        sampled.add(x, rng.integers(0, x.size, 2000) if batch else None)
    assert (full.low, full.high, full.total) == (sampled.low, sampled.high, sampled.total)
    assert sampled.counts.sum() + sampled.zeros == pytest.approx(full.total, rel=0.01)
    for name, decibels in {"percentile": 0.2, "mse": 0.1}.items():
        wanted, found = METHODS[name](full, 256), METHODS[name](sampled, 256)
        assert sqnr(full, found) == pytest.approx(sqnr(full, wanted), abs=decibels), name
    wanted, found = METHODS["percentile"](full, 256), METHODS["percentile"](sampled, 256)
    # Where 40 values lie outside, the next of a heavy tail is far.
    near = 0.1 if kind.startswith("heav") else 0.02
    assert list(found) == pytest.approx(list(wanted), rel=near, abs=1e-9)
