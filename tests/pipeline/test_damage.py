"""Where compression hurts: classes and examples, from outputs."""

from __future__ import annotations

import base64
import importlib
import io
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from compressor.measure.statistics import drop
from compressor.metrics import METRICS, own, sign, value
from compressor.pipeline.damage import CLASSES, classes, confusion, thumbnail, worst
from compressor.task import UNLABELLED, Array, Input, Kind, Split, Splits, Task

document = importlib.import_module("compressor.pipeline.document")
"""The package has a function of that name."""

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
    assert score is not None
    assert {row["metric"] for row in rows} == {metric}
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


@pytest.mark.parametrize("metric", ["f1", "roc_auc", "mine"])
def test_what_has_no_score_of_each_example_is_judged_by_the_first_metric(metric: str) -> None:
    given = drawn("classification", 5)
    judge = task("classification", metric)
    mine = own("mine", lambda outputs, targets: 0.5)
    judge = replace(judge, metrics={**METRICS["classification"], "mine": mine})
    rows = classes(judge, *given)
    assert rows == classes(task("classification"), *given)
    assert {row["metric"] for row in rows or []} == {"accuracy"}


def test_classes_by_an_error() -> None:
    before, after, targets = drawn("classification", 5)
    rows = classes(task("classification", "cross_entropy"), before, after, targets) or []
    how = METRICS["classification"]["cross_entropy"]
    for row in rows:
        mine = targets == int(row["class"])
        was, now = value(how, before[mine], targets[mine]), value(how, after[mine], targets[mine])
        assert (row["metric"], row["baseline"], row["value"]) == ("cross_entropy", was, now)
        assert row["drop"]["value"] == pytest.approx((now - was) / was)


@pytest.mark.parametrize("kind", ["classification", "binary"])
@given(seeds)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_confusion_matrix_is_that_of_scikit_learn(kind: Kind, seed: int) -> None:
    from sklearn.metrics import confusion_matrix

    _, outputs, targets = drawn(kind, seed)
    said = outputs.argmax(axis=1) if kind == "classification" else outputs[:, 0] > 0
    known = np.arange(5 if kind == "classification" else 2)
    wanted = confusion_matrix(targets.reshape(-1), said.astype(int), labels=known)
    assert confusion(task(kind), outputs, targets) == wanted.tolist()
    assert confusion(task(kind), outputs, targets.reshape(-1, 1)) == wanted.tolist()


def test_what_has_no_confusion_matrix() -> None:
    for kind in ("regression", "multilabel"):
        before, _, targets = drawn(kind, 0)
        assert confusion(task(kind), before, targets) is None
    targets = np.zeros(2, np.int64)
    assert confusion(task("classification"), np.zeros((2, CLASSES)), targets) is not None
    assert confusion(task("classification"), np.zeros((2, CLASSES + 1)), targets) is None
    for label in (3, -1):  # a file that is not of this data
        assert confusion(task("classification"), np.zeros((2, 3)), targets + label) is None


# --- as the document has it ---


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


def judging(metric: str, labels: Array, **more: Any) -> Task:
    rng = np.random.default_rng(1)
    parts = [
        Split.arrays(rng.standard_normal((len(known), 4)).astype(np.float32), known)
        for known in (labels, np.arange(30) % 3)
    ]
    splits = Splits(parts[0], parts[1], parts[0], parts[1])
    found = replace(task("classification", metric), model=network, splits=splits)
    return replace(found, **more)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "roc_auc", "cross_entropy"])
def test_the_gap_is_of_labelled_training_examples(metric: str) -> None:
    labels = np.arange(700) % 3
    labels[5:400] = UNLABELLED
    judge, how = judging(metric, labels), METRICS["classification"][metric]
    seen = document._seen(judge, 12)
    assert seen is not None
    assert len(seen) == 305
    assert judge.splits is not None
    inputs, known = judge.splits.train.head(700)
    there = labels != UNLABELLED
    with torch.no_grad():
        outputs = network()(torch.from_numpy(inputs[0])).numpy()
    train = value(how, outputs[there], known[there])
    found = document.gap(judge, network(), seen, {metric: 0.25, "n": 30})
    assert found is not None
    assert found["train"] == pytest.approx(train, abs=1e-6)
    assert (found["test"], found["n"]) == (0.25, 305)
    apart = found["train"] - 0.25
    assert found["value"] == pytest.approx(apart if how.higher_is_better else -apart)


def test_there_is_no_gap_without_labels_or_test() -> None:
    nothing = np.full(40, UNLABELLED)
    assert document._seen(judging("accuracy", nothing), 12) is None
    assert document._seen(judging("accuracy", np.zeros(40, np.int64), labelled=False), 12) is None
    assert document._seen(replace(judging("accuracy", nothing), splits=None), 12) is None
    judge = judging("accuracy", np.arange(40) % 3)
    seen = document._seen(judge, 12)
    assert document.gap(judge, network(), None, {"accuracy": 0.5}) is None
    assert document.gap(judge, network(), seen, {"skipped": "no data"}) is None
    one = judging("roc_auc", np.zeros(40, np.int64))
    assert document.gap(one, network(), document._seen(one, 12), {"roc_auc": 0.5}) is None


def test_the_gap_is_taken_on_no_more_examples_than_time_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge = judging("accuracy", np.arange(900) % 3)
    for limit, wanted in ((1, 256), (12 * 500, 500), (1e12, 900)):
        monkeypatch.setattr(document, "WORK", limit)
        seen = document._seen(judge, 12)
        assert seen is not None
        assert len(seen) == len(set(seen.indices.tolist())) == wanted
    monkeypatch.setattr(document, "SEEN", 300)
    assert len(document._seen(judge, 12) or ()) == 300


def test_a_document_says_where_it_hurts_and_only_the_others_hurt() -> None:
    judge = judging("accuracy", np.arange(40) % 3)
    assert judge.splits is not None
    before, true = np.eye(3)[np.arange(30) % 3], np.arange(30) % 3
    outputs = {"baseline": {"test": before}, "a": {"test": before[::-1]}, "b": {"test": before.T}}
    measured: Any = SimpleNamespace(targets={"test": true})
    whole = {name: document.hurt(judge, measured, outputs, name) for name in (*outputs, "c")}
    assert whole["baseline"]["confusion"] == [[10, 0, 0], [0, 10, 0], [0, 0, 10]]
    assert whole["a"]["confusion"] == [[0, 0, 10], [0, 10, 0], [10, 0, 0]]
    assert (whole["baseline"]["classes"], whole["baseline"]["worst"]) == (None, None)
    assert [row["class"] for row in whole["a"]["classes"]] == ["0", "2", "1"]
    assert whole["a"]["worst"]
    assert whole["b"] == whole["c"] == {"confusion": None, "classes": None, "worst": None}


def test_what_the_task_is_measured_by() -> None:
    said = document.about(judging("cross_entropy", np.arange(40) % 3))
    assert said["higher_is_better"] is False
    assert said["metrics"] == {name: name != "cross_entropy" for name in METRICS["classification"]}


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
    assert how.score is not None
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
