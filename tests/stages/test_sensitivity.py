"""Sensitivity curves: what they say is what a real cut loses, and looking changes nothing."""

from __future__ import annotations

import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from standing import small_cnn, splits_of, task_of
from torch import nn
from torch.nn import functional as F  # noqa: N812  (the name that the field uses)

from compressor import Split, Splits, Task
from compressor.loading.edits import apply
from compressor.stages.prune import Sound
from compressor.stages.prune.criteria import scored
from compressor.stages.prune.ranking import Scores, chosen
from compressor.stages.prune.sensitivity import (
    FEWEST,
    MOST,
    SHARES,
    WORST,
    Curve,
    Damage,
    curves,
    damages,
    zeroed,
)
from compressor.task import Array, Batch

SHAPE = (1, 8, 8)


def data(count: int = 200) -> Splits:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, *SHAPE)).astype(np.float32)
    return splits_of(x, rng.integers(0, 5, count))


def looked(task: Task) -> tuple[Sound, Scores, list[Curve]]:
    sound = Sound(task.model(), task, "heads")
    scores = scored(sound.model, sound.groups, task, "l2")
    return sound, scores, curves(sound.model, sound.groups, scores, task)


# --- what a curve says ---


def test_a_curve_is_what_the_real_cut_loses() -> None:
    """Zeroing is proven to be cutting, so the loss of the cut model is the curve's."""
    task = task_of(small_cnn(), SHAPE, splits=data())
    sound, scores, found = looked(task)
    assert task.splits is not None
    (x,), y = task.splits.calibrate.head(MOST)
    assert len(y) < MOST
    dense = sound.dense(torch.from_numpy(x)).detach()

    def lost(outputs: torch.Tensor) -> float:
        return float(F.cross_entropy(outputs, torch.from_numpy(y)))

    assert [curve.root for curve in found] == [group.root for group in sound.groups]
    for group, strands, curve in zip(sound.groups, scores, found, strict=True):
        assert curve.shares == (0.0, *SHARES)
        assert curve.loss[0] == 0
        right = (dense.argmax(1).numpy() == y).mean()
        assert curve.metric[0] == pytest.approx(right)
        for share, loss, metric in zip(curve.shares, curve.loss, curve.metric, strict=True):
            if share:
                cut = chosen(group, strands, round(group.width * (1 - share)))
                small = apply(task.model(), sound.edits([cut]))
                outputs = small(torch.from_numpy(x)).detach()
                assert loss == pytest.approx(lost(outputs) - lost(dense), abs=1e-5)
                right = (outputs.argmax(1).numpy() == y).mean()
                assert metric == pytest.approx(right, abs=0.02)  # float32 ties


@pytest.mark.parametrize(
    "name", ["residual", "lstm, two layers", "vit, separate", "text", "many heads"]
)
def test_without_data_the_output_s_own_change_counts(name: str) -> None:
    family = FAMILIES[name]
    task = task_of(family.build(), kind=family.kind, inputs=family.inputs)
    sound, _, found = looked(task)
    assert len(found) == len(sound.groups)
    for curve in found:
        assert curve.shares[0] == 0
        assert list(curve.shares) == sorted(curve.shares)
        assert curve.loss[0] == 0
        assert min(curve.loss) >= 0
        assert max(curve.loss) > 0
        assert np.isfinite(curve.loss).all()
        assert np.isnan(curve.metric).all()


def test_a_single_channel_cannot_go() -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
    _, _, found = looked(task_of(model, (4,)))
    widths = dict(zip([curve.root for curve in found], found, strict=True))
    for curve in found:
        assert math.isfinite(curve.at_half())
    if "0" in widths:
        assert widths["0"].shares == (0.0,) * 4
    assert widths["2"].shares == (0.0, *(pytest.approx(each) for each in (1 / 3, 1 / 3, 2 / 3)))


def test_a_dead_group_loses_nothing() -> None:
    model = small_cnn()
    with torch.no_grad():
        for tensor in (*model[0].parameters(), *model[1].parameters()):  # type: ignore[index]
            tensor.zero_()
    for splits in (None, data(50)):
        _, _, (dead, alive) = looked(task_of(model, SHAPE, splits=splits))
        assert dead.loss == (0.0,) * 4
        assert dead.at_half() == 0
        assert max(map(abs, alive.loss)) > 1e-5


# --- damage ---

rises = st.floats(width=32)
"""Also infinite, negative and not a number."""


def curve_of(*points: tuple[float, float]) -> Curve:
    shares, loss = zip((0.0, 0.0), *sorted(points, key=lambda point: point[0]), strict=True)
    return Curve("root", shares, loss, (math.nan,) * len(shares))


points = st.lists(st.tuples(st.floats(0, 0.95), rises), max_size=6)


@given(points)
def test_the_rise_at_half_is_a_number(given: list[tuple[float, float]]) -> None:
    assert 0 <= curve_of(*given).at_half() <= WORST


@given(points, points)
def test_the_rise_at_half_is_at_least_all_that_came_before(
    given: list[tuple[float, float]], after: list[tuple[float, float]]
) -> None:
    """Points beyond half count only as far as the line leads to them."""
    before = [(share / 2, loss) for share, loss in given]
    found = curve_of(*before, (0.5, 0.0)).at_half()
    seen = [min(loss, WORST) for _, loss in before if not math.isnan(loss)]
    worst = WORST if any(math.isnan(loss) for _, loss in before) else 0.0
    assert found == max(worst, 0.0, *seen)
    beyond = [(0.6 + share / 4, loss) for share, loss in after]
    assert curve_of(*before, (0.5, 0.0), *beyond).at_half() == found


@pytest.mark.parametrize(
    ("points", "half"),
    [
        ([(0.25, 1.0), (0.5, 3.0), (0.75, 9.0)], 3.0),
        ([(0.25, 1.0), (0.75, 3.0)], 2.0),
        ([(0.25, 4.0), (0.5, 3.0)], 4.0),  # what was lost does not come back
        ([(0.25, -1.0), (0.5, -2.0)], 0.0),
        ([(0.25, 2.0)], 2.0),
        ([], 0.0),
        ([(0.5, math.nan)], WORST),
        ([(0.25, math.inf), (0.5, 0.1)], WORST),
        ([(0.5, -math.inf)], 0.0),
        ([(0.0, 0.0), (0.5, 1.0), (0.5, 1.0)], 1.0),  # narrow groups round two shares to one count
    ],
)
def test_the_rise_at_half(points: list[tuple[float, float]], half: float) -> None:
    assert curve_of(*points).at_half() == pytest.approx(half)


@given(st.floats(1e-9, 1e12), st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_damage_never_falls(weight: float, shares: list[float]) -> None:
    damage = Damage(weight)
    found = [damage(share) for share in sorted(shares)]
    assert np.isfinite(found).all()
    assert found == sorted(found)
    assert damage(0) == 0
    assert damage(0.5) == pytest.approx(weight)
    assert damage(0.9) == pytest.approx(33 * weight)


@given(st.integers(2, 500))
def test_each_unit_costs_more_than_the_one_before(width: int) -> None:
    found = [Damage(1.0)(gone / width) for gone in range(width)]
    each = np.diff(found)
    assert (np.diff(each) > 0).all()


curve = points.map(lambda given: curve_of(*given))
works = st.floats(1e-6, 1)


@given(st.lists(st.tuples(curve, works), min_size=1, max_size=8))
def test_sensitivity_weighs_the_work_by_at_most_three(given: list[tuple[Curve, float]]) -> None:
    curves, work = zip(*given, strict=True)
    found = damages(curves, work)
    factors = [damage.weight / part for damage, part in zip(found, work, strict=True)]
    assert np.isfinite(factors).all()
    assert 1 / 3 - 1e-9 <= min(factors) <= max(factors) <= 3 + 1e-9
    # More sensitive is never less damaged.
    order = sorted(range(len(curves)), key=lambda at: curves[at].at_half())
    for here, there in pairwise(order):
        assert factors[here] <= factors[there] * (1 + 1e-9)


@given(points, st.lists(works, min_size=1, max_size=8))
def test_equal_curves_leave_damage_to_the_work(
    given: list[tuple[float, float]], work: list[float]
) -> None:
    half = curve_of(*given).at_half()
    found = [damage.weight for damage in damages([curve_of(*given)] * len(work), work)]
    factor = 1 if half > 1e-9 else 1 / 3  # nothing hurts: all count equally little
    assert found == pytest.approx([part * factor for part in work])


def test_damage_grows_with_the_root_of_sensitivity() -> None:
    curves = [curve_of((0.5, loss)) for loss in (0.25, 1.0, 4.0, 1e4, math.nan, 1e-8, 1.0)]
    found = [damage.weight for damage in damages(curves, [2.0] * 7)]
    assert found == pytest.approx([1, 2, 4, 6, 6, 2 / 3, 2])


# --- looking changes nothing ---


@pytest.mark.parametrize("name", ["residual", "unet", "lstm, both ways", "multihead attention"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    family = FAMILIES[name]
    task = task_of(family.build(), kind=family.kind, inputs=family.inputs)
    sound = Sound(task.model(), task, "heads")
    scores = scored(sound.model, sound.groups, task, "l2")
    before = {key: value.clone() for key, value in sound.model.state_dict().items()}
    grads = [parameter.requires_grad for parameter in sound.model.parameters()]
    first = curves(sound.model, sound.groups, scores, task)
    after = sound.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [parameter.requires_grad for parameter in sound.model.parameters()] == grads
    assert not any(parameter.is_inference() for parameter in sound.model.parameters())
    again = curves(sound.model, sound.groups, scores, task)
    assert [curve.loss for curve in again] == [curve.loss for curve in first]


def test_a_model_in_training_mode_stays_in_it() -> None:
    task = task_of(small_cnn(), SHAPE)
    sound = Sound(task.model(), task, "heads")
    scores = scored(sound.model, sound.groups, task, "l2")
    curves(sound.model.train(), sound.groups, scores, task)
    assert sound.model.training


class Broken(Exception):
    pass


@settings(max_examples=15)
@given(st.integers(1, 15), st.booleans())
def test_zeros_are_there_in_the_block_only(count: int, fails: bool) -> None:
    task = task_of(small_cnn(), SHAPE)
    sound = Sound(task.model(), task, "heads")
    group = sound.groups[0]
    before = {key: value.clone() for key, value in sound.dense.state_dict().items()}
    cut = chosen(group, [torch.arange(16.0)], count)
    gone = list(range(16 - count))
    with torch.no_grad():
        try:
            with zeroed(sound.dense, cut):
                state = sound.dense.state_dict()
                for name, dim in (("0.weight", 0), ("0.bias", 0), ("1.bias", 0), ("3.weight", 1)):
                    assert not state[name].index_select(dim, torch.tensor(gone)).any()
                    left = torch.arange(16 - count, 16)
                    kept = before[name].index_select(dim, left)
                    assert torch.equal(state[name].index_select(dim, left), kept)
                if fails:
                    raise Broken
        except Broken:
            pass
    after = sound.dense.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


# --- what is read ---


def test_only_the_calibration_split_is_read_and_not_much_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = data(2000)
    seen: list[int] = []

    def refused(at: Array) -> Batch:
        raise AssertionError("not for choices")

    def watched(at: Array) -> Batch:
        seen.append(len(at))
        batch: Batch = whole.calibrate.fetch(at)
        return batch

    closed = Split(refused, np.arange(2000))
    calibrate = Split(watched, whole.calibrate.indices)
    splits = Splits(closed, closed, calibrate, closed)
    task = task_of(small_cnn(), SHAPE, splits=splits)
    _, _, found = looked(task)
    assert all(np.isfinite(curve.metric).all() for curve in found)
    assert 0 < sum(seen) <= MOST
    # The dearer the model, the fewer, but never less than a few.
    seen.clear()
    monkeypatch.setattr(sys.modules[curves.__module__], "WORK", 1.0)
    looked(task)
    assert seen == [FEWEST]
