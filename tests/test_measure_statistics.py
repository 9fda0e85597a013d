"""Figures, intervals and verdicts: what holds for any raw values."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import InputError
from compressor.measure import statistics
from compressor.measure.statistics import (
    ENOUGH,
    FEWEST,
    LEAST_EFFECT,
    OWN,
    PRIOR,
    RESTART,
    SAME,
    drop,
    drops,
    mcnemar,
    noise_floor,
    speedup,
    summary,
    verdict,
)
from compressor.metrics import METRICS, own, value
from compressor.task import KINDS, Array, Kind

# Hypothesis looks at the clock by itself, and this machine may be busy.

times = st.floats(1e-3, 1e3)
blocks = st.lists(st.lists(times, min_size=1, max_size=9), min_size=1, max_size=9)
ratios = st.floats(0.01, 100.0)
bits = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
shares = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=60)
error = st.just(0.0) | st.floats(1e-9, 1e6)
errors = st.lists(st.tuples(error, error), min_size=1, max_size=30)


def pair(scores: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    both = np.array(scores, dtype=float)
    return both[:, 0], both[:, 1]


@given(blocks)
def test_a_summary_is_numpys_over_all_values(taken: list[list[float]]) -> None:
    values = np.concatenate([np.array(block) for block in taken])
    found = summary(taken)
    assert found["n"] == len(values)
    assert found["min"] == values.min()
    assert found["p50"] == np.median(values)
    assert found["mean"] == values.mean()


@pytest.mark.parametrize(("name", "q", "needed"), [("p90", 90, 64), ("p99", 99, 662)])
def test_a_percentile_needs_its_samples(name: str, q: int, needed: int) -> None:
    values = np.random.default_rng(q).random(needed)
    assert summary([values])[name] == np.percentile(values, q)
    assert summary([values[:-1]])[name] is None


@pytest.mark.parametrize(("name", "p"), [("p90", 0.9), ("p99", 0.99)])
def test_enough_is_the_least_count_of_its_formula(name: str, p: float) -> None:
    def missed(n: int) -> float:  # at most one of n lies above
        return p**n + n * (1 - p) * p ** (n - 1)

    assert ENOUGH[name] == next(n for n in itertools.count(2) if missed(n) <= 0.01)


@given(blocks, ratios)
def test_c_times_as_long_is_c_times_slower(taken: list[list[float]], c: float) -> None:
    longer = [[value * c for value in block] for block in taken]
    assert list(speedup(longer, taken).values()) == pytest.approx([c, c, c], rel=1e-12)


@given(st.data(), st.integers(0, 9))
def test_a_speedup_and_its_reverse_are_reciprocal(data: st.DataObject, seed: int) -> None:
    ours = data.draw(blocks)
    theirs = data.draw(
        st.lists(st.lists(times, min_size=1), min_size=len(ours), max_size=len(ours))
    )
    one, other = speedup(ours, theirs, seed), speedup(theirs, ours, seed)
    assert one == speedup(ours, theirs, seed)
    assert one["low"] <= one["value"] <= one["high"]
    assert [1 / one["value"], 1 / one["high"], 1 / one["low"]] == pytest.approx(
        [other["value"], other["low"], other["high"]], rel=1e-12
    )


def test_the_interval_of_a_speedup_depends_on_the_seed_alone() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.gamma(9, size=(2, 12, 5))
    assert speedup(ours, theirs, 1) == speedup(ours, theirs, 1) != speedup(ours, theirs, 2)


def test_what_slows_a_round_down_for_both_does_not_widen_the_interval() -> None:
    weather = np.random.default_rng(0).uniform(1, 5, (20, 1))
    assert speedup(2 * weather, weather) == {"value": 2.0, "low": 2.0, "high": 2.0}


def restarted(spread: float, starts: int, rng: Any) -> tuple[Any, Any]:
    """Rounds of two equal models whose every start has a speed of its own, hardly any noise."""
    shape = (starts * 10, 7)
    own = np.exp(spread * rng.standard_normal((2, starts))).repeat(10, axis=1)[..., None]
    return tuple(own * np.exp(0.01 * rng.standard_normal((2, *shape))))


@given(st.data(), st.integers(1, 4), st.integers(0, 9))
def test_restarts_keep_a_speedup_reciprocal_and_only_widen_it(
    data: st.DataObject, starts: int, seed: int
) -> None:
    size = st.lists(st.lists(times, min_size=1, max_size=3), min_size=4, max_size=12)
    ours = data.draw(size)
    theirs = data.draw(
        st.lists(st.lists(times, min_size=1, max_size=3), min_size=len(ours), max_size=len(ours))
    )
    parts = [len(ours) // starts] * (starts - 1)
    processes = (*parts, len(ours) - sum(parts))
    one, other = speedup(ours, theirs, seed, processes), speedup(theirs, ours, seed, processes)
    assert one["low"] <= one["value"] <= one["high"]
    assert one["low"] < one["high"], "a start of the processes is never all that there is"
    assert [1 / one["value"], 1 / one["high"], 1 / one["low"]] == pytest.approx(
        [other["value"], other["low"], other["high"]], rel=1e-9
    )


def test_one_start_gets_the_interval_of_the_prior() -> None:
    """Without any noise only the restarts are left: Student's t with PRIOR degrees of freedom."""
    steady = [[1.0]] * 8
    found = speedup(steady, steady, processes=(8,))
    assert found["value"] == 1
    assert found["high"] == pytest.approx(1 / found["low"])
    assert PRIOR == 4
    assert np.log(found["high"]) == pytest.approx(2.776 * RESTART, rel=0.2)
    assert speedup(steady, steady) == {"value": 1, "low": 1, "high": 1}


def test_more_starts_make_a_narrower_interval() -> None:
    def width(starts: int) -> float:
        found = speedup([[1.0]] * 8 * starts, [[1.0]] * 8 * starts, processes=(8,) * starts)
        return found["high"] / found["low"] - 1

    assert width(9) < 0.5 * width(3) < 0.3 * width(1)


@pytest.mark.parametrize(("starts", "spread"), [(1, 0.03), (3, 0.03), (3, 0.05), (9, 0.05)])
def test_the_interval_covers_what_a_restart_changes(
    monkeypatch: pytest.MonkeyPatch, starts: int, spread: float
) -> None:
    """The ratio of both models' starts differs by ``spread`` in all."""
    monkeypatch.setattr(statistics, "RESAMPLES", 400)  # fast
    rng = np.random.default_rng(starts)
    found = [
        speedup(*restarted(spread / np.sqrt(2), starts, rng), seed, (10,) * starts)
        for seed in range(200)
    ]
    assert np.mean([one["low"] <= 1 <= one["high"] for one in found]) >= 0.90
    without = [speedup(*restarted(spread / np.sqrt(2), starts, rng), seed) for seed in range(200)]
    assert np.mean([one["low"] <= 1 <= one["high"] for one in without]) < 0.75, (
        "that is what the widening is for"
    )


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(0, 1))
def test_a_verdict_is_one_of_four_and_needs_the_whole_interval(
    one: float, other: float, floor: float
) -> None:
    low, high = sorted((one, other))
    band, near = 1 + max(LEAST_EFFECT, floor), 1 + SAME
    holds = {
        "faster": low > band,
        "slower": high < 1 / band,
        "same": 1 / near <= low and high <= near,
    }
    expected = [said for said, held in holds.items() if held] or ["inconclusive"]
    assert verdict(low, high, floor) == expected[0]
    if low <= 1 <= high:
        assert verdict(low, high, floor) in ("same", "inconclusive")


def test_the_floor_of_the_machine_is_what_an_effect_must_exceed() -> None:
    assert [verdict(1.05, 1.10, floor) for floor in (0.0, 0.07)] == ["faster", "inconclusive"]
    assert [verdict(0.91, 0.95, floor) for floor in (0.0, 0.07)] == ["slower", "inconclusive"]
    assert verdict(1.001, 1.019) == "same", "real, but nobody would notice"
    assert {verdict(0.96, 1.04, floor) for floor in (0.0, 0.07, 0.5)} == {"same"}
    assert {verdict(0.90, 1.10, floor) for floor in (0.0, 0.07, 0.5)} == {"inconclusive"}, (
        "a noisy machine proves nothing"
    )


@given(blocks)
def test_the_same_times_have_no_noise_and_others_never_less(taken: list[list[float]]) -> None:
    assert noise_floor(taken, taken) == 0
    doubled = [[2 * value for value in block] for block in taken]
    assert noise_floor(taken, doubled) == noise_floor(doubled, taken) == 1
    turned = taken[::-1]
    assert noise_floor(taken, turned) >= 0
    assert noise_floor(taken, turned) == pytest.approx(noise_floor(turned, taken), rel=1e-12)


@given(bits | shares, st.randoms(use_true_random=False))
def test_a_drop_of_scores_is_their_difference_whatever_the_order(scores: Any, order: Any) -> None:
    found = drop(*pair(scores), higher_is_better=True)
    reference, got = pair(scores)
    assert found["value"] == pytest.approx(float((reference - got).mean()), abs=1e-15)
    assert -1 <= found["low"] <= found["value"] <= found["high"] <= 1
    assert found["low"] < found["high"]
    order.shuffle(scores)
    assert drop(*pair(scores), higher_is_better=True) == pytest.approx(found, abs=1e-12)
    swapped = drop(got, reference, higher_is_better=True)
    assert [swapped["low"], swapped["high"]] == pytest.approx([-found["high"], -found["low"]])


@pytest.mark.parametrize("count", [1, 10, 360, 10_000])
def test_no_example_that_differs_is_no_proof_of_no_drop(count: int) -> None:
    right = np.ones(count)
    found = drop(right, right, higher_is_better=True)
    assert found["value"] == 0
    assert found["low"] == -found["high"]
    # The rule of three: n examples without an event leave room for a share of about 3 / n.
    assert 2.7 / (count + 2) < found["high"] < 3 / (count + 2)


def test_the_interval_of_bonett_and_price() -> None:
    """Worked by hand: 100 examples, 10 lost and 4 won: 11 and 5 of 102."""
    lost, won = np.arange(100) < 10, np.arange(100) >= 96
    found = drop(1.0 - won, 1.0 - lost, higher_is_better=True)
    middle, spread = 6 / 102, np.sqrt((16 / 102 - (6 / 102) ** 2) / 102)
    assert found["value"] == pytest.approx(0.06)
    assert found["low"] == pytest.approx(middle - 1.96 * spread, abs=1e-5)
    assert found["high"] == pytest.approx(middle + 1.96 * spread, abs=1e-5)


@settings(max_examples=25)
@given(errors)
def test_a_drop_of_errors_is_relative_to_the_reference(scores: Any) -> None:
    reference, got = pair(scores)
    found = drop(reference, got, higher_is_better=False)
    whole = reference.mean() or 1.0
    assert found["value"] == pytest.approx((got.mean() - reference.mean()) / whole, rel=1e-6)
    assert found["low"] <= found["value"] <= found["high"]
    assert found == drop(reference, got, higher_is_better=False)


def test_twice_the_error_is_a_drop_of_one_and_equal_errors_have_no_width() -> None:
    errors = np.random.default_rng(0).chisquare(1, 50)
    assert drop(errors, 2 * errors, higher_is_better=False) == {"value": 1, "low": 1, "high": 1}
    assert drop(errors, errors, higher_is_better=False) == {"value": 0, "low": 0, "high": 0}
    nothing = np.zeros(50)
    assert drop(nothing, nothing + 0.5, higher_is_better=False)["value"] == 0.5, "absolute"


def test_a_reference_that_is_nearly_always_exact_keeps_one_scale() -> None:
    """Resamples that miss its only error must not fall back to absolute errors."""
    reference = np.array([0.0] * 9 + [1000.0])
    found = drop(reference, reference + 1, higher_is_better=False)
    assert found["value"] == pytest.approx(0.01)
    assert found["high"] < 0.02


@pytest.mark.parametrize(("one", "other"), [((3,), (4,)), ((3, 1), (3, 1)), ((0,), (0,))])
def test_scores_of_other_examples_are_refused(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="scores of the same examples"):
        drop(np.zeros(one), np.zeros(other), higher_is_better=True)


def covered(draw: Any, truth: float, higher_is_better: bool, repeats: int) -> float:
    """The share of seeded repeats whose interval holds the truth."""
    rng = np.random.default_rng(2026)
    found = [drop(*draw(rng), higher_is_better=higher_is_better) for _ in range(repeats)]
    return float(np.mean([one["low"] <= truth <= one["high"] for one in found]))


@pytest.mark.parametrize(
    ("count", "lost", "won"), [(100, 0.02, 0.01), (360, 0.01, 0.0), (50, 0.2, 0.1)]
)
def test_the_interval_of_right_and_wrong_covers(count: int, lost: float, won: float) -> None:
    def draw(rng: np.random.Generator) -> tuple[Any, Any]:
        what = rng.choice(3, count, p=[lost, won, 1 - lost - won])
        return (what != 1).astype(float), (what != 0).astype(float)

    assert covered(draw, lost - won, True, 2000) >= 0.90


def test_the_interval_of_shares_covers() -> None:
    """A segmentation's pixel accuracies: 0.90 and 0.88 on average, correlated."""

    def draw(rng: np.random.Generator) -> tuple[Any, Any]:
        reference = rng.beta(9, 1, 100)
        return reference, reference * rng.beta(88, 2, 100)

    assert covered(draw, 0.9 - 0.9 * 88 / 90, True, 2000) >= 0.90


def test_the_interval_of_squared_errors_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Residuals of a compressed regression: the original's and a little noise."""
    monkeypatch.setattr(statistics, "RESAMPLES", 400)  # fast

    def draw(rng: np.random.Generator) -> tuple[Any, Any]:
        residual = rng.standard_normal(100)
        return residual**2, (residual + 0.5 * rng.standard_normal(100)) ** 2

    assert covered(draw, 0.25, False, 300) >= 0.90


def test_scores_without_bounds_have_an_absolute_drop() -> None:
    """Decibels, say: an interval for shares would claim that no more than 1 can be lost."""
    reference = np.random.default_rng(0).normal(30, 2, 50)
    found = drop(reference, reference - 3, higher_is_better=True)
    assert list(found.values()) == pytest.approx([3, 3, 3])


# --- numbers over all examples ---


def models(kind: Kind, seed: int, count: int = 60, classes: int = 3) -> tuple[Array, Array, Array]:
    """Outputs of two models that are much alike, and targets of which both know something."""
    rng = np.random.default_rng(seed)
    shape = (count,) if kind == "binary" else (count, classes)
    noise = rng.standard_normal(shape)
    if kind == "classification":
        targets = rng.permutation(np.arange(count) % classes)
        noise += 2 * np.eye(classes)[targets]
    elif kind == "regression":
        targets = noise + rng.standard_normal(shape)
    else:
        halves = (np.arange(count) % 2).reshape(-1, *shape[1:] and (1,))
        targets = rng.permuted(np.broadcast_to(halves, shape), axis=0)
        noise += 2 * targets
    return noise, noise + 0.5 * rng.standard_normal(shape), targets


WHOLE = [
    (kind, name)
    for kind, metrics in METRICS.items()
    for name, metric in metrics.items()
    if metric.whole
]


@pytest.mark.parametrize(("kind", "name"), WHOLE)
def test_a_drop_is_that_of_real_resamples(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, name: str
) -> None:
    """Pooled cells, sorted once and weighted: nothing but the time may differ."""
    monkeypatch.setattr(statistics, "RESAMPLES", 130)  # of more than one part, the last not full
    metric, (before, after, targets) = METRICS[kind][name], models(kind, 3)
    rng = np.random.default_rng(7)
    lost = []
    for _ in range(130):
        at = rng.integers(0, len(targets), len(targets))
        lost.append(value(metric, before[at], targets[at]) - value(metric, after[at], targets[at]))
    lost.sort()
    found = drops({name: metric}, before, after, targets, seed=7)[name]
    whole = value(metric, before, targets) - value(metric, after, targets)
    assert found["value"] == pytest.approx(whole, abs=1e-12)
    least = 0.0 if name in ("roc_auc", "r2") else 1.959964 * np.sqrt(2) / 62
    wanted = [min(lost[3], whole - least), max(lost[-4], whole + least)]
    assert [found["low"], found["high"]] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("kind", "name"), WHOLE)
def test_a_resample_is_what_torchmetrics_makes_of_it(kind: Kind, name: str) -> None:
    from test_metrics import torchmetrics

    metric, (outputs, _, targets) = METRICS[kind][name], models(kind, 5, classes=4)
    assert metric.whole is not None
    rng = np.random.default_rng(5)
    counts = np.stack([np.bincount(rng.integers(0, 60, 60), minlength=60) for _ in range(4)], 1)
    found = metric.whole.weighed(metric.whole.seen(outputs), targets)(counts.astype(float))
    for draw, got in zip(counts.T, found, strict=True):
        at = np.repeat(np.arange(60), draw)
        assert got == pytest.approx(torchmetrics(kind, name, outputs[at], targets[at]), abs=1e-6)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"segmentation"}))
def test_every_metric_has_its_drop_and_the_reverse_of_it(kind: Kind) -> None:
    before, after, targets = models(kind, 1)
    found = drops(METRICS[kind], before, after, targets)
    assert list(found) == list(METRICS[kind])
    back = drops(METRICS[kind], after, before, targets)
    for name, metric in METRICS[kind].items():
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
        was, now = value(metric, before, targets), value(metric, after, targets)
        if metric.higher_is_better:
            assert found[name]["value"] == pytest.approx(was - now, abs=1e-12)
            assert [back[name][key] for key in ("value", "low", "high")] == pytest.approx(
                [-found[name][key] for key in ("value", "high", "low")]
            )
        else:
            assert found[name]["value"] == pytest.approx((now - was) / was), "relative"
    assert found == drops(METRICS[kind], before, after, targets), "the seed decides"


def test_equal_decisions_are_no_proof_and_equal_ranks_have_no_width() -> None:
    before, _, targets = models("classification", 2)
    found = drops(METRICS["classification"], before, 2 * before, targets)
    for name in (
        "precision",
        "recall",
        "f1",
        "precision_weighted",
        "recall_weighted",
        "f1_weighted",
    ):
        assert found[name]["value"] == 0
        assert (
            found[name]["high"] == pytest.approx(found["accuracy"]["high"]) == -found[name]["low"]
        )
    same = drops(METRICS["classification"], before, before, targets)
    assert same["roc_auc"] == {"value": 0, "low": 0, "high": 0}


@pytest.mark.parametrize("change", [np.nan, "one class"])
def test_what_is_not_defined_has_no_drop(change: Any) -> None:
    before, after, targets = models("classification", 2)
    if change == "one class":
        targets = np.zeros_like(targets)
        assert "accuracy" in drops(METRICS["classification"], before, after, targets)
    else:
        after = np.full_like(after, np.nan)
    found = drops(METRICS["classification"], before, after, targets)
    assert "roc_auc" not in found
    assert ("cross_entropy" in found) == (change == "one class")
    constant = np.ones((60, 1))
    assert list(drops(METRICS["regression"], before[:, :1], after[:, :1], constant)) == (
        ["mse", "mae", "r2"][:2] if change == "one class" else []
    )


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"segmentation"}))
def test_drops_of_outputs_that_are_no_numbers_are_finite_or_absent(
    kind: Kind, broken: float
) -> None:
    before, after, targets = models(kind, 2)
    for part in (slice(None), slice(0, 1)):
        after[part] = broken
        for lost in drops(METRICS[kind], before, after, targets).values():
            assert np.isfinite(list(lost.values())).all()


def test_a_draw_without_a_class_has_the_mean_of_the_others() -> None:
    before, after, targets = models("classification", 4)
    targets[targets == 2] = 1
    targets[0] = 2  # missing in a third of the draws
    found = drops({"roc_auc": METRICS["classification"]["roc_auc"]}, before, after, targets)
    assert np.isfinite(list(found["roc_auc"].values())).all()


def test_many_classes_get_fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    counts = statistics._counts

    def counted(cell: Array, draws: int, seed: int) -> Any:
        drawn.append(draws)
        return counts(cell, 2, seed)

    monkeypatch.setattr(statistics, "_counts", counted)
    for work in (10**9, 180 * 400, 1):
        monkeypatch.setattr(statistics, "WORK", work)
        drops({"roc_auc": METRICS["classification"]["roc_auc"]}, *models("classification", 1))
    assert drawn == [statistics.RESAMPLES, 400, FEWEST]


def test_the_interval_of_f1_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models over three classes, of which one is rare; the truth is that of many examples."""
    monkeypatch.setattr(statistics, "RESAMPLES", 200)  # fast
    f1 = {"f1": METRICS["classification"]["f1"]}
    rng = np.random.default_rng(2026)

    def draw(count: int) -> tuple[Array, Array, Array]:
        targets = rng.choice(3, count, p=[0.5, 0.4, 0.1])
        first = rng.standard_normal((count, 3)) + 2 * np.eye(3)[targets]
        return first, first + 0.7 * rng.standard_normal(first.shape), targets

    before, after, targets = draw(400_000)
    truth = value(f1["f1"], before, targets) - value(f1["f1"], after, targets)
    found = [drops(f1, *draw(200), seed)["f1"] for seed in range(200)]
    assert np.mean([one["low"] <= truth <= one["high"] for one in found]) >= 0.90


@pytest.mark.parametrize("better", [True, False])
def test_an_own_number_is_resampled_and_own_scores_are_paired(better: bool) -> None:
    calls: list[int] = []

    def apart(outputs: Array, targets: Array) -> Any:
        calls.append(len(targets))
        return np.abs(outputs - targets).max()

    def each(outputs: Array, targets: Array) -> Any:
        return np.abs(outputs - targets).max(axis=1)

    apart.higher_is_better = each.higher_is_better = better  # type: ignore[attr-defined]
    before, after, targets = models("regression", 1)
    mine = {"apart": own("apart", apart), "each": own("each", each)}
    found = drops(mine, before, after, targets)
    was, now = apart(before, targets), apart(after, targets)
    assert found["apart"]["value"] == pytest.approx(was - now if better else (now - was) / was)
    assert found["apart"]["low"] <= found["apart"]["value"] <= found["apart"]["high"]
    assert OWN <= len(calls) / 2 <= OWN + 3
    assert found["each"] == drop(
        each(before, targets), each(after, targets), higher_is_better=better
    )


def test_an_own_number_that_fails_on_a_resample_is_taken_of_the_others() -> None:
    def fussy(outputs: Array, targets: Array) -> float:
        if len(np.unique(targets)) < 4:
            raise ValueError("all four classes are needed")
        return float(np.mean(outputs.argmax(axis=1) == targets))

    before, after, targets = models("classification", 1)
    targets[0] = 3  # missing in a third of the draws
    found = drops({"fussy": own("fussy", fussy)}, before, after, targets)["fussy"]
    assert found["low"] < found["value"] < found["high"]
    targets[0] = 0
    with pytest.raises(InputError, match="all four classes are needed"):
        drops({"fussy": own("fussy", fussy)}, before, after, targets)


def test_half_of_the_draws_are_needed() -> None:
    seen: list[int] = []

    def rare(outputs: Array, targets: Array) -> float:
        seen.append(1)
        if len(seen) > 2 + OWN // 2:
            raise ValueError("no more")
        return 0.5

    before, after, targets = models("binary", 1)
    assert drops({"rare": own("rare", rare)}, before, after, targets) == {}


# --- McNemar ---


@given(bits)
def test_mcnemar_is_the_exact_binomial_test(scores: Any) -> None:
    from scipy.stats import binomtest

    before, after = pair(scores)
    found = mcnemar(before, after)
    assert found["better"] == sum(now and not was for was, now in scores)
    assert found["worse"] == sum(was and not now for was, now in scores)
    changed = found["better"] + found["worse"]
    wanted = binomtest(found["better"], changed).pvalue if changed else 1.0
    assert found["p"] == pytest.approx(wanted, rel=1e-9)
    assert mcnemar(after, before)["p"] == found["p"]


def test_mcnemar_of_many_changes() -> None:
    worse = np.arange(20_000) < 10_100
    assert mcnemar(worse, ~worse)["p"] == pytest.approx(0.1593, abs=1e-4)
    assert mcnemar(np.ones(20_000), np.zeros(20_000))["p"] == 0.0
