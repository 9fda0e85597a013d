"""Where compression hurts: classes and examples, from outputs."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from compressor.measure.statistics import drop
from compressor.metrics import METRICS, sign
from compressor.pipeline.damage import classes, thumbnail, worst
from compressor.task import Array, Input, Kind, Split, Task

seeds = st.integers(0, 2**32 - 1)


def task(kind: Kind, metric: str | None = None) -> Task:
    """A task of which only the kind and the metric matter."""
    first = metric or next(iter(METRICS[kind]))
    return Task("t", kind, lambda: None, {}, (Input("x", (4,)),), first)  # type: ignore[arg-type, return-value]


def split(count: int, shape: tuple[int, ...] = (4,)) -> Split:
    """``count`` examples, each filled with its own position."""
    inputs = np.zeros((count, *shape), np.float32)
    inputs += np.arange(count, dtype=np.float32).reshape(-1, *(1,) * len(shape))
    return Split.arrays(inputs, np.zeros(count))


def drawn(kind: Kind, seed: int, count: int = 60, labels: int = 5) -> tuple[Array, Array, Array]:
    """Outputs of the baseline, of an artifact that is near to it, and targets."""
    rng = np.random.default_rng(seed)
    width = 1 if kind == "binary" else labels
    before = rng.standard_normal((count, width)).astype(np.float32)
    after = before + rng.standard_normal(before.shape).astype(np.float32)
    targets = {
        "classification": rng.integers(0, labels, count),
        "binary": rng.integers(0, 2, (count, 1)),
        "multilabel": rng.integers(0, 2, (count, labels)),
        "regression": rng.standard_normal((count, labels)),
    }[kind]
    return before, after, targets


@given(seeds, st.sampled_from(["accuracy", "top5"]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_classes_add_up_to_the_whole(seed: int, metric: str) -> None:
    before, after, targets = drawn("classification", seed, labels=8)
    rows = classes(task("classification", metric), before, after, targets)
    assert rows is not None
    score = METRICS["classification"][metric].score
    assert {row["class"] for row in rows} == {str(one) for one in np.unique(targets)}
    assert sum(row["n"] for row in rows) == len(targets)
    for side, outputs in (("baseline", before), ("value", after)):
        total = sum(row["n"] * row[side] for row in rows) / len(targets)
        assert total == pytest.approx(score(outputs, targets).mean())
    lows = [row["drop"]["low"] for row in rows]
    assert lows == sorted(lows, reverse=True)
    for row in rows:
        mine = targets == int(row["class"])
        scores = score(before[mine], targets[mine]), score(after[mine], targets[mine])
        assert row["drop"] == drop(*scores, higher_is_better=True)
        assert row["baseline"] - row["value"] == pytest.approx(row["drop"]["value"])


@given(seeds, st.integers(1, 12))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_rest_is_one_row(seed: int, limit: int) -> None:
    before, after, targets = drawn("classification", seed, labels=8)
    whole = classes(task("classification"), before, after, targets)
    cut = classes(task("classification"), before, after, targets, limit)
    assert whole is not None
    assert cut is not None
    assert cut[:limit] == whole[:limit]
    rest = whole[limit:]
    assert len(cut) == min(len(whole), limit) + bool(rest)
    if rest:
        assert cut[-1]["class"] == "others"
        assert cut[-1]["classes"] == len(rest)
        assert cut[-1]["n"] == sum(row["n"] for row in rest)


def test_a_binary_task_has_two_classes_and_labels_are_judged_one_by_one() -> None:
    before, after, targets = drawn("binary", 3)
    for shaped in (targets, targets[:, 0], targets.astype(np.float32)):
        rows = classes(task("binary"), before, after, shaped)
        assert rows is not None
        assert sorted(row["class"] for row in rows) == ["0", "1"]
    before, after, targets = drawn("multilabel", 3)
    rows = classes(task("multilabel", "exact_match"), before, after, targets)
    assert rows is not None
    assert {row["n"] for row in rows} == {60}
    for row in rows:
        at = int(row["class"])
        assert row["baseline"] == sign(before[:, at], targets[:, at]).mean()


def test_what_has_no_classes() -> None:
    assert classes(task("regression"), *drawn("regression", 0)) is None
    images = np.zeros((2, 3, 4, 4))
    where = np.zeros((2, 4, 4))
    assert classes(task("segmentation"), images, images, where) is None
    assert worst(task("segmentation"), split(2), images, images, where) is None


@given(seeds, st.integers(1, 20))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_worst_were_right_and_are_wrong(seed: int, count: int) -> None:
    before, after, targets = drawn("classification", seed)
    rows = worst(task("classification"), split(60), before, after, targets, count)
    assert rows is not None
    turned = (before.argmax(1) == targets) & (after.argmax(1) != targets)
    assert len(rows) == min(count, turned.sum())
    lost = [row["lost"] for row in rows]
    assert lost == sorted(lost, reverse=True)
    for row in rows:
        at = row["example"]
        assert turned[at]
        assert row["target"] == row["baseline"] == str(targets[at])
        assert row["output"] == str(after[at].argmax())
        assert row["picture"] is None


@pytest.mark.parametrize("kind", ["binary", "multilabel", "regression"])
@given(seeds)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_the_worst_have_lower_scores(kind: Kind, seed: int) -> None:
    before, after, targets = drawn(kind, seed)
    rows = worst(task(kind), split(60), before, after, targets, 60)
    assert rows is not None
    how = next(iter(METRICS[kind].values()))
    fell = how.score(before, targets) - how.score(after, targets)
    worse = fell > 0 if how.higher_is_better else fell < 0
    assert {row["example"] for row in rows} == set(np.flatnonzero(worse).tolist())
    if kind == "regression":
        for row in rows:
            assert row["lost"] == pytest.approx(-fell[row["example"]])


def test_what_they_said() -> None:
    before = np.array([[1.0, -1.0, 2.0, 3.0, 4.0, 5.0]])
    (row,) = worst(task("multilabel"), split(1), before, -before, before > 0) or []
    assert row["target"] == row["baseline"] == "0, 2, 3, 4, …"
    assert (row["output"], row["lost"]) == ("1", 6.0)
    (row,) = worst(task("multilabel"), split(1), before, -abs(before), before > 0) or []
    assert row["output"] == "none"
    (row,) = worst(task("regression"), split(1), before[:, :1], before[:, 1:2], before[:, :1]) or []
    assert (row["target"], row["output"], row["lost"]) == ("1", "-1", 4.0)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["classification", "binary", "multilabel", "regression"])
def test_what_is_no_number_is_lost_and_fits_into_json(kind: Kind, broken: float) -> None:
    before, after, targets = drawn(kind, 1)
    after[::2] = broken
    rows = worst(task(kind), split(60), before, after, targets, 60)
    json.dumps([rows, classes(task(kind), before, after, targets)], allow_nan=False)
    assert rows


def test_nothing_lost() -> None:
    before, _, targets = drawn("classification", 1)
    assert worst(task("classification"), split(60), before, before, targets) == []


def test_only_the_worst_are_read() -> None:
    before, after, targets = drawn("classification", 1, 60)
    asked: list[int] = []
    images = split(60, (1, 8, 8))

    def fetch(at: Any) -> Any:
        asked.extend(at.tolist())
        return images.fetch(at)

    rows = worst(task("classification"), Split(fetch, images.indices), before, after, targets, 3)
    assert rows is not None
    assert asked == [row["example"] for row in rows]
    assert all(row["picture"] for row in rows)


def pixels(text: str | None) -> Array:
    assert text is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@given(st.sampled_from([1, 3]), st.integers(8, 90), st.integers(8, 90), seeds)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_thumbnail(channels: int, high: int, wide: int, seed: int) -> None:
    image = np.random.default_rng(seed).standard_normal((channels, high, wide)).astype(np.float32)
    found = thumbnail(image)
    assert found == thumbnail(image * 4)  # only how its values lie to each other
    shown = pixels(found)
    assert max(shown.shape[:2]) == min(64, max(high, wide))
    if max(high, wide) <= 64:
        low, top = image.min(), image.max()
        wanted = (image - low) / (top - low) * 255
        same = shown if channels == 3 else shown[..., None]
        assert np.abs(same - np.moveaxis(wanted, 0, 2)).max() <= 1
        assert (shown.min(), shown.max()) == (0, 255)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((2, 8, 8), np.float32),
        np.zeros((1, 7, 8), np.float32),
        np.zeros((1, 8, 513), np.float32),
        np.zeros((8, 8), np.float32),
        np.zeros((1, 8, 8), np.int64),
        np.zeros((4,), np.float32),
    ],
)
def test_what_is_no_image(image: Array) -> None:
    assert thumbnail(image) is None


def test_a_flat_or_broken_image_is_drawn() -> None:
    assert not pixels(thumbnail(np.full((1, 8, 8), 7.0))).any()
    image = np.zeros((3, 512, 512), np.float32)
    image[0, 0, 0], image[1, 1, 1] = np.nan, np.inf
    assert pixels(thumbnail(image)).shape == (64, 64, 3)
