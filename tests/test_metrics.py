"""Metrics and fidelity: what each number is, worked by hand, and what holds for any outputs."""

from __future__ import annotations

import json
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.testing import assert_array_equal

from compressor.errors import InputError
from compressor.measure.fidelity import FLOOR_DB, fidelity
from compressor.metrics import METRICS, metric_of
from compressor.task import KINDS, Kind

# Hypothesis looks at the clock by itself, and this machine may be busy.

# Two pictures of 2 x 2 pixels. Output of the first: classes 0 1 / 1 1, of the second: all 2.
PICTURES = np.moveaxis(np.eye(3)[np.array([[[0, 1], [1, 1]], [[2, 2], [2, 2]]])], -1, 1)
MASKS = np.array([[[0, 1], [0, 1]], [[2, 2], [2, 2]]])
LOGITS = np.array([[9.0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]])

BY_HAND: list[tuple[Kind, str, Any, Any, list[float]]] = [
    ("classification", "accuracy", LOGITS, [0, 6, 5], [1, 1, 0]),
    ("classification", "top5", LOGITS, [0, 1, 2], [1, 0, 1]),
    ("classification", "top5", [[1.0, 2.0]], [0], [1]),
    ("binary", "accuracy", [0.1, -0.1, 3.0, 0.0], [1, 1, 0, 0], [1, 0, 0, 1]),
    (
        "multilabel",
        "accuracy",
        [[1.0, -1, 1, -1], [1.0, 1, 1, 1]],
        [[1, 0, 0, 0]] * 2,
        [0.75, 0.25],
    ),
    ("multilabel", "exact_match", [[1.0, -1], [1.0, 1]], [[1, 0], [1, 0]], [1, 0]),
    ("regression", "mse", [[1.0, 2.0], [0.0, 0.0]], [[0, 4], [0, 0]], [2.5, 0]),
    ("regression", "mae", [[1.0, 2.0], [0.0, 0.0]], [[0, 4], [0, 0]], [1.5, 0]),
    ("segmentation", "pixel_accuracy", PICTURES, MASKS, [0.75, 1]),
    # Class 0: 1 of 2 pixels, class 1: 2 of 3, class 2 is in neither; then class 2 alone.
    ("segmentation", "image_iou", PICTURES, MASKS, [(1 / 2 + 2 / 3) / 2, 1]),
]


@pytest.mark.parametrize(("kind", "name", "outputs", "targets", "scores"), BY_HAND)
def test_scores_worked_by_hand(
    kind: Kind, name: str, outputs: Any, targets: Any, scores: list[float]
) -> None:
    found = METRICS[kind][name].score(np.array(outputs), np.array(targets))
    assert found.dtype == np.float64
    assert found.tolist() == pytest.approx(scores)


def test_every_metric_is_worked_by_hand() -> None:
    assert set(METRICS) == set(KINDS) == set(get_args(Kind))
    known = {(kind, name) for kind, metrics in METRICS.items() for name in metrics}
    assert known == {(kind, name) for kind, name, *_ in BY_HAND}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name, *_ in BY_HAND])
def test_an_axis_of_one_changes_nothing(kind: Kind, name: str) -> None:
    """Targets of shape (n, 1) for (n,), and back, never pair every example with every other."""
    score = METRICS[kind][name].score
    _, _, outputs, targets, scores = next(case for case in BY_HAND if case[:2] == (kind, name))
    outputs, targets = np.array(outputs), np.array(targets)
    if kind in ("binary", "regression"):
        outputs, targets = outputs.reshape(-1), targets.reshape(-1)
        flat = score(outputs, targets)
        assert_array_equal(score(outputs[:, None], targets), flat)
        assert_array_equal(score(outputs, targets[:, None]), flat)
        assert flat.shape == (len(targets),)
    else:
        assert score(outputs, targets[:, None]).tolist() == pytest.approx(scores)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name, *_ in BY_HAND])
def test_targets_of_another_shape_are_refused(kind: Kind, name: str) -> None:
    _, _, outputs, targets, _ = next(case for case in BY_HAND if case[:2] == (kind, name))
    wrong = np.concatenate([np.array(targets)] * 2)
    with pytest.raises(ValueError, match="reshape"):
        METRICS[kind][name].score(np.array(outputs), wrong)


@given(st.data(), st.sampled_from(sorted({case[0] for case in BY_HAND} - {"regression"})))
def test_scores_lie_between_zero_and_one(data: st.DataObject, kind: Kind) -> None:
    count, classes = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 7))
    shape = {"binary": (count,), "segmentation": (count, classes, 2, 3)}.get(kind, (count, classes))
    outputs = data.draw(arrays.arrays(np.float32, shape, elements=st.floats(width=32)))
    labels, above = {
        "classification": ((count,), classes),
        "segmentation": ((count, 2, 3), classes),
    }.get(kind, (shape, 2))
    targets = data.draw(arrays.arrays(np.int64, labels, elements=st.integers(0, above - 1)))
    for metric in METRICS[kind].values():
        scores = metric.score(outputs, targets)
        assert scores.shape == (count,)
        assert ((scores >= 0) & (scores <= 1)).all()
        assert metric.higher_is_better


@given(arrays.arrays(np.float32, (4, 3), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_errors_are_finite_and_zero_for_the_target_itself(outputs: Any) -> None:
    for metric in METRICS["regression"].values():
        assert not metric.higher_is_better
        assert metric.score(outputs, outputs).tolist() == [0.0] * 4
        assert np.isfinite(metric.score(outputs, -outputs)).all()


def test_half_precision_is_widened_before_the_difference() -> None:
    outputs = np.array([60000.0], dtype=np.float16)
    assert METRICS["regression"]["mae"].score(outputs, -outputs).tolist() == [2 * float(outputs[0])]


def test_the_first_metric_is_the_budgets() -> None:
    assert {kind: metric_of(kind) for kind in KINDS} == {
        "classification": "accuracy",
        "binary": "accuracy",
        "multilabel": "accuracy",
        "regression": "mse",
        "segmentation": "pixel_accuracy",
    }
    assert metric_of("regression", "mae") == "mae"
    with pytest.raises(InputError, match="'top5' is unknown for binary: choose from accuracy"):
        metric_of("binary", "top5")


# --- fidelity ---


def outputs_of(kind: Kind, values: list[float]) -> Any:
    shape = (1, len(values), 1, 1) if kind == "segmentation" else (1, len(values))
    return np.array(values, dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_outputs_are_an_exact_match(kind: Kind) -> None:
    same = outputs_of(kind, [1.0, -2.0, 3.0])
    assert fidelity(kind, same, same.copy()) == {
        "sqnr_db": None,
        "top1_agreement": None if kind == "regression" else 1.0,
        "max_abs_diff": 0.0,
        "n": 1,
    }


def test_a_noise_of_a_tenth_is_twenty_decibels() -> None:
    wanted = np.array([[3.0, 4.0], [0.0, 0.0]])
    found = fidelity("classification", wanted, wanted + np.array([[0.3, -0.4], [0, 0]]))
    assert found["sqnr_db"] == pytest.approx(20)
    assert found["max_abs_diff"] == pytest.approx(0.4)
    assert found["n"] == 2


@pytest.mark.parametrize(
    ("kind", "wanted", "got", "agreement"),
    [
        ("classification", [[1, 2], [2, 1]], [[0, 1], [0, 1]], 0.5),
        ("binary", [1, -1, 1, -1], [1, 1, 1, -1], 0.75),
        ("multilabel", [[1, -1], [1, 1]], [[1, 1], [1, 1]], 0.75),
        ("segmentation", PICTURES, PICTURES[::-1], 0.0),
        ("regression", [1.0, 2.0], [1.0, 2.5], None),
    ],
)
def test_agreement_is_the_share_of_equal_decisions(
    kind: Kind, wanted: Any, got: Any, agreement: float | None
) -> None:
    assert fidelity(kind, np.array(wanted), np.array(got))["top1_agreement"] == agreement


def test_noise_on_a_signal_of_zeros_is_no_exact_match() -> None:
    silent, noisy = np.zeros((2, 3)), np.full((2, 3), 1e-3)
    assert fidelity("regression", silent, noisy)["sqnr_db"] == FLOOR_DB
    assert fidelity("regression", np.full((2, 3), 1e-9), noisy)["sqnr_db"] == FLOOR_DB
    assert fidelity("regression", silent, silent)["sqnr_db"] is None


def test_outputs_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="outputs of the same examples"):
        fidelity("binary", np.zeros(3), np.zeros((3, 1)))


any_float = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.data(), st.sampled_from(KINDS))
def test_fidelity_is_strict_json_for_any_finite_outputs(data: st.DataObject, kind: Kind) -> None:
    shape = (2, 3, 1, 1) if kind == "segmentation" else (2, 3)
    wanted, got = (
        data.draw(arrays.arrays(np.float32, shape, elements=any_float)) for _ in range(2)
    )
    found = fidelity(kind, wanted, got)
    json.dumps(found, allow_nan=False)
    assert (found["sqnr_db"] is None) == bool((wanted == got).all())
    assert found["sqnr_db"] is None or found["sqnr_db"] >= FLOOR_DB
    assert found["max_abs_diff"] >= 0


@pytest.mark.parametrize("scale", [1e-200, 1e-45, 1e38, 1e300])
def test_decibels_do_not_depend_on_the_scale(scale: float) -> None:
    """Squares of these would be zero or infinite."""
    wanted = np.array([[3.0, 4.0]])
    found = fidelity("regression", wanted * scale, wanted * scale * 1.1)
    assert found["sqnr_db"] == pytest.approx(20)
