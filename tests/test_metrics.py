"""Metrics and fidelity: what each number is, worked by hand, and what holds for any outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.testing import assert_array_equal

from compressor.errors import InputError
from compressor.measure.fidelity import FLOOR_DB, fidelity
from compressor.metrics import (
    METRICS,
    RESERVED,
    Metric,
    metric_of,
    metrics_of,
    odds,
    own,
    scores,
    value,
)
from compressor.task import KINDS, Array, Input, Kind, Task

JUDGED = [kind for kind in KINDS if kind != "custom"]  # that one has no metric or loss of ours

# Hypothesis looks at the clock by itself, and this machine may be busy.

# Two pictures of 2 x 2 pixels. Output of the first: classes 0 1 / 1 1, of the second: all 2.
PICTURES = np.moveaxis(np.eye(3)[np.array([[[0, 1], [1, 1]], [[2, 2], [2, 2]]])], -1, 1)
MASKS = np.array([[[0, 1], [0, 1]], [[2, 2], [2, 2]]])
LOGITS = np.array([[9.0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]])

LN2 = float(np.log(2))
"""What an even guess between two costs."""

BY_HAND: list[tuple[Kind, str, Any, Any, list[float]]] = [
    ("classification", "accuracy", LOGITS, [0, 6, 5], [1, 1, 0]),
    ("classification", "top5", LOGITS, [0, 1, 2], [1, 0, 1]),
    ("classification", "top5", [[1.0, 2.0]], [0], [1]),
    ("classification", "cross_entropy", [[2.0, 2.0], [0.0, 1e4]], [0, 0], [LN2, 1e4]),
    ("binary", "accuracy", [0.1, -0.1, 3.0, 0.0], [1, 1, 0, 0], [1, 0, 0, 1]),
    ("binary", "cross_entropy", [0.0, -1e4, 1e4], [1, 1, 1], [LN2, 1e4, 0]),
    (
        "multilabel",
        "accuracy",
        [[1.0, -1, 1, -1], [1.0, 1, 1, 1]],
        [[1, 0, 0, 0]] * 2,
        [0.75, 0.25],
    ),
    ("multilabel", "exact_match", [[1.0, -1], [1.0, 1]], [[1, 0], [1, 0]], [1, 0]),
    ("multilabel", "cross_entropy", [[0.0, 0.0], [0.0, 20]], [[1, 0], [1, 0]], [LN2, LN2 / 2 + 10]),
    ("regression", "mse", [[1.0, 2.0], [0.0, 0.0]], [[0, 4], [0, 0]], [2.5, 0]),
    ("regression", "mae", [[1.0, 2.0], [0.0, 0.0]], [[0, 4], [0, 0]], [1.5, 0]),
    ("segmentation", "pixel_accuracy", PICTURES, MASKS, [0.75, 1]),
    # Class 0: 1 of 2 pixels, class 1: 2 of 3, class 2 is in neither; then class 2 alone.
    ("segmentation", "image_iou", PICTURES, MASKS, [(1 / 2 + 2 / 3) / 2, 1]),
    ("segmentation", "cross_entropy", np.zeros((2, 2, 2, 2)), MASKS % 2, [LN2, LN2]),
]
"""Scores of each example."""

DECIDED = np.eye(3)[[0, 1, 1, 0]] * 9
CLASSES = [0, 0, 1, 0]
# Class 0: 2 of 2 that were said, 2 of 3 that are; class 1: 1 of 2, 1 of 1; class 2 is in neither.
SIGNS, SIDES = [1.0, 2.0, 3.0, -1.0, -2.0], [1, 1, 0, 1, 0]
# Ranks 3 2 1 4 5 from above; of the six pairs of a true one above one that is not, 3 hold.

WHOLE: list[tuple[Kind, str, Any, Any, float]] = [
    ("classification", "precision", DECIDED, CLASSES, (1 + 1 / 2) / 2),
    ("classification", "recall", DECIDED, CLASSES, (2 / 3 + 1) / 2),
    ("classification", "f1", DECIDED, CLASSES, (4 / 5 + 2 / 3) / 2),
    ("classification", "precision_weighted", DECIDED, CLASSES, 3 / 4 * 1 + 1 / 4 * 1 / 2),
    ("classification", "recall_weighted", DECIDED, CLASSES, 3 / 4),
    ("classification", "f1_weighted", DECIDED, CLASSES, 3 / 4 * 4 / 5 + 1 / 4 * 2 / 3),
    ("classification", "roc_auc", [[0.0, 1], [0, 2], [0, 3], [0, 2]], [0, 0, 1, 1], 3.5 / 4),
    ("binary", "precision", SIGNS, SIDES, 2 / 3),
    ("binary", "recall", SIGNS, SIDES, 2 / 3),
    ("binary", "f1", SIGNS, SIDES, 2 / 3),
    ("binary", "roc_auc", SIGNS, SIDES, 3 / 6),
    ("multilabel", "precision", [[1.0, 1], [1, -1]], [[1, 0], [0, 0]], (1 / 2 + 0) / 2),
    ("multilabel", "recall", [[1.0, 1], [1, -1]], [[1, 0], [0, 0]], (1 + 0) / 2),
    ("multilabel", "f1", [[1.0, 1], [1, -1]], [[1, 0], [0, 0]], (2 / 3 + 0) / 2),
    ("multilabel", "roc_auc", [[1.0, 1], [1, -1]], [[1, 0], [0, 1]], (1 / 2 + 0) / 2),
    (
        "regression",
        "r2",
        [[1.0, 1], [2, 1], [3, 1]],
        [[1, 0], [2, 1], [4, 2]],
        (1 - 3 / 14 + 0) / 2,
    ),
]
"""Numbers over all examples."""


@pytest.mark.parametrize(("kind", "name", "outputs", "targets", "wanted"), BY_HAND)
def test_scores_worked_by_hand(
    kind: Kind, name: str, outputs: Any, targets: Any, wanted: list[float]
) -> None:
    metric, given = METRICS[kind][name], (np.array(outputs), np.array(targets))
    found = scores(metric, *given)
    assert found is not None
    assert found.dtype == np.float64
    assert found.tolist() == pytest.approx(wanted)
    assert value(metric, *given) == pytest.approx(np.mean(wanted))


@pytest.mark.parametrize(("kind", "name", "outputs", "targets", "wanted"), WHOLE)
def test_numbers_worked_by_hand(
    kind: Kind, name: str, outputs: Any, targets: Any, wanted: float
) -> None:
    given = np.array(outputs), np.array(targets)
    assert value(METRICS[kind][name], *given) == pytest.approx(wanted)
    assert scores(METRICS[kind][name], *given) is None


def test_every_metric_is_worked_by_hand() -> None:
    assert set(METRICS) == set(KINDS) == set(get_args(Kind))
    known = [(kind, name) for kind, metrics in METRICS.items() for name in metrics]
    assert set(known) == {case[:2] for case in [*BY_HAND, *WHOLE]}
    assert not {name for _, name in known} & set(RESERVED)


EVERY = {case[:2]: (np.array(case[2]), np.array(case[3])) for case in [*BY_HAND, *WHOLE]}


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_an_axis_of_one_changes_nothing(kind: Kind, name: str) -> None:
    """Targets of shape (n, 1) for (n,), and back, never pair every example with every other."""
    metric, (outputs, targets) = METRICS[kind][name], EVERY[kind, name]
    if kind in ("binary", "regression"):
        outputs, targets = outputs.reshape(-1), targets.reshape(-1)
        flat = value(metric, outputs, targets)
        assert value(metric, outputs[:, None], targets) == flat
        assert value(metric, outputs, targets[:, None]) == flat
        known = scores(metric, outputs, targets)
        assert known is None or known.shape == (len(targets),)
    else:
        wanted = value(metric, outputs, targets)
        assert value(metric, outputs, targets[:, None]) == pytest.approx(wanted)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_targets_of_another_shape_are_refused(kind: Kind, name: str) -> None:
    outputs, targets = EVERY[kind, name]
    with pytest.raises(ValueError, match="reshape"):
        value(METRICS[kind][name], outputs, np.concatenate([targets] * 2))


def drawn(kind: Kind, seed: int, count: int = 40, classes: int = 4) -> tuple[Array, Array]:
    """Outputs that know something of the targets, with ties, and targets of every class."""
    rng = np.random.default_rng(seed)
    shape = {"binary": (count,), "segmentation": (count, classes, 2, 3)}.get(kind, (count, classes))
    outputs = np.round(8 * rng.standard_normal(shape)) / 4
    if kind == "regression":
        return outputs, outputs + rng.standard_normal(shape)
    if kind == "segmentation":
        return outputs, rng.integers(0, classes, (count, 2, 3))
    targets = rng.integers(0, 2, shape)
    if kind == "classification":
        targets = rng.integers(0, classes, count)
        targets[:classes] = np.arange(classes)
        outputs += 2 * np.eye(classes)[targets]
    else:
        targets[0], targets[1] = 0, 1
        outputs += targets
    return outputs, targets


def torchmetrics(kind: Kind, name: str, outputs: Array, targets: Array) -> float:
    """What torchmetrics, or PyTorch where it has none, makes of probabilities."""
    import torch
    import torchmetrics.functional as theirs
    from torch.nn import functional

    stem = name.removesuffix("_weighted")
    said, known = torch.tensor(outputs), torch.tensor(targets)
    chances = said.sigmoid() if kind in ("binary", "multilabel") else said.softmax(1)
    if name in ("mse", "mae", "r2"):
        names = {"mse": "mean_squared_error", "mae": "mean_absolute_error", "r2": "r2_score"}
        return float(getattr(theirs, names[name])(said, known))
    if name == "cross_entropy":
        if kind in ("binary", "multilabel"):
            return float(functional.binary_cross_entropy_with_logits(said, known.double()))
        return float(functional.cross_entropy(said, known))
    sort = {"classification": "multiclass", "segmentation": "multiclass"}.get(kind, kind)
    task = {"multiclass": {"num_classes": 4}, "multilabel": {"num_labels": 4}}.get(sort, {})
    known_as = {"f1": "f1_score", "roc_auc": "auroc", "pixel_accuracy": "accuracy"}
    more: dict[str, Any] = {"average": "macro" if stem == name else "weighted"}
    if stem in ("accuracy", "pixel_accuracy"):
        more = {"average": "micro"}
    if sort == "binary" or name == "exact_match":
        more = {}
    function = getattr(theirs.classification, f"{sort}_{known_as.get(stem, stem)}")
    return float(function(chances, known, **task, **more))


@pytest.mark.parametrize(
    ("kind", "name"),
    sorted(set(EVERY) - {("segmentation", "image_iou"), ("classification", "top5")}),
)
def test_the_number_is_that_of_torchmetrics(kind: Kind, name: str) -> None:
    """Which divides in single precision. Its mean IoU leaves out no class, and it has no top 5."""
    for seed in range(5):
        given = drawn(kind, seed)
        assert value(METRICS[kind][name], *given) == pytest.approx(
            torchmetrics(kind, name, *given), abs=1e-6
        )


def softmax(outputs: Array) -> Array:
    powers = np.exp(outputs)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("seed", range(5))
def test_the_number_is_that_of_scikit_learn(seed: int) -> None:
    from sklearn import metrics as theirs

    def said(kind: Kind) -> dict[str, float]:
        return {name: value(how, *drawn(kind, seed)) for name, how in METRICS[kind].items()}

    outputs, targets = drawn("classification", seed)
    known: dict[Kind, dict[str, float]] = {"classification": {}}
    for average, end in (("macro", ""), ("weighted", "_weighted")):
        three = theirs.precision_recall_fscore_support(
            targets, outputs.argmax(axis=1), average=average, zero_division=0
        )
        names = [f"{name}{end}" for name in ("precision", "recall", "f1")]
        known["classification"] |= dict(zip(names, three, strict=False))
    chances = softmax(outputs)
    known["classification"] |= {
        "accuracy": theirs.accuracy_score(targets, outputs.argmax(axis=1)),
        "top5": 1.0,
        "roc_auc": theirs.roc_auc_score(targets, chances, multi_class="ovr"),
        "cross_entropy": theirs.log_loss(targets, chances),
    }
    outputs, targets = drawn("binary", seed)
    three = theirs.precision_recall_fscore_support(targets, outputs > 0, average="binary")
    known["binary"] = dict(zip(("precision", "recall", "f1"), three, strict=False)) | {
        "accuracy": theirs.accuracy_score(targets, outputs > 0),
        "roc_auc": theirs.roc_auc_score(targets, outputs),
        "cross_entropy": theirs.log_loss(targets, 1 / (1 + np.exp(-outputs))),
    }
    outputs, targets = drawn("multilabel", seed)
    known["multilabel"] = {
        "accuracy": 1 - theirs.hamming_loss(targets, outputs > 0),
        "exact_match": theirs.accuracy_score(targets, outputs > 0),
        **{
            name: getattr(theirs, f"{name}_score")(targets, outputs > 0, average="macro")
            for name in ("precision", "recall", "f1")
        },
        "roc_auc": theirs.roc_auc_score(targets, outputs),
        "cross_entropy": np.mean(
            [
                theirs.log_loss(t, 1 / (1 + np.exp(-o)))
                for t, o in zip(targets.T, outputs.T, strict=True)
            ]
        ),
    }
    outputs, targets = drawn("regression", seed)
    known["regression"] = {
        "mse": theirs.mean_squared_error(targets, outputs),
        "mae": theirs.mean_absolute_error(targets, outputs),
        "r2": theirs.r2_score(targets, outputs),
    }
    for kind, wanted in known.items():
        assert said(kind) == pytest.approx(wanted, abs=1e-12)


@given(arrays.arrays(np.float32, (3, 4), elements=st.floats(-60, 60, width=32)))
def test_odds_are_those_of_the_softmax_probability(outputs: Any) -> None:
    powers = np.exp(outputs.astype(np.longdouble))
    rest = np.stack([np.delete(powers, at, axis=1).sum(axis=1) for at in range(4)], axis=1)
    np.testing.assert_allclose(odds(outputs), np.log(powers / rest).astype(float), atol=1e-9)


def test_probabilities_that_round_to_one_are_still_ranked() -> None:
    outputs = np.array([[0.0, 60.0], [0.0, 50.0], [1.0, 0.0], [0.0, 55.0]])
    assert value(METRICS["classification"]["roc_auc"], outputs, np.array([1, 0, 0, 1])) == 1.0


@pytest.mark.parametrize(
    ("kind", "outputs", "targets"),
    [
        ("classification", np.eye(3), [0, 1, 1]),
        ("binary", [1.0, 2.0], [1, 1]),
        ("multilabel", np.eye(2), [[0, 1], [1, 1]]),
        ("classification", [[np.nan, 1.0], [0.0, 1.0]], [0, 1]),
    ],
)
def test_roc_auc_is_not_defined_without_both_sorts(kind: Kind, outputs: Any, targets: Any) -> None:
    assert np.isnan(value(METRICS[kind]["roc_auc"], np.array(outputs), np.array(targets)))


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_that_is_no_class_of_the_model(label: int) -> None:
    """Of a file that is judged on data it was not made for: never right, and no cross-entropy."""
    targets = np.array([0, 1, 2, label])
    found = {
        name: value(how, np.eye(4, 3), targets) for name, how in METRICS["classification"].items()
    }
    assert np.isnan(found.pop("cross_entropy"))
    assert found["accuracy"] == 0.75
    pixels = np.full((1, 2, 2), label)
    each = scores(METRICS["segmentation"]["cross_entropy"], np.zeros((1, 3, 2, 2)), pixels)
    assert np.isnan(each).all()  # type: ignore[arg-type]


def test_r2_is_not_defined_of_targets_that_do_not_vary() -> None:
    assert np.isnan(value(METRICS["regression"]["r2"], np.arange(3.0), np.full(3, 0.1)))


def test_large_outputs_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, targets = drawn("segmentation", 1)
    whole = value(METRICS["segmentation"]["cross_entropy"], outputs, targets)
    flat, _ = drawn("classification", 1)
    ranked = odds(flat)
    monkeypatch.setattr("compressor.metrics.AT_ONCE", 100)
    assert value(METRICS["segmentation"]["cross_entropy"], outputs, targets) == whole
    assert_array_equal(odds(flat), ranked)


@given(st.data(), st.sampled_from(sorted(set(JUDGED) - {"regression"})))
def test_scores_lie_between_zero_and_one(data: st.DataObject, kind: Kind) -> None:
    count, classes = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 7))
    shape = {"binary": (count,), "segmentation": (count, classes, 2, 3)}.get(kind, (count, classes))
    outputs = data.draw(arrays.arrays(np.float32, shape, elements=st.floats(width=32)))
    labels, above = {
        "classification": ((count,), classes),
        "segmentation": ((count, 2, 3), classes),
    }.get(kind, (shape, 2))
    targets = data.draw(arrays.arrays(np.int64, labels, elements=st.integers(0, above - 1)))
    for name, metric in METRICS[kind].items():
        if name == "cross_entropy":
            assert not metric.higher_is_better
            continue
        assert metric.higher_is_better
        found = value(metric, outputs, targets)
        assert 0 <= found <= 1 + 1e-12 or (name == "roc_auc" and np.isnan(found))
        each = scores(metric, outputs, targets)
        assert each is None or (each.shape == (count,) and ((each >= 0) & (each <= 1)).all())


@given(arrays.arrays(np.float32, (4, 3), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_errors_are_finite_and_zero_for_the_target_itself(outputs: Any) -> None:
    for metric in (METRICS["regression"][name] for name in ("mse", "mae")):
        assert not metric.higher_is_better
        assert np.asarray(scores(metric, outputs, outputs)).tolist() == [0.0] * 4
        assert np.isfinite(value(metric, outputs, -outputs))


def test_half_precision_is_widened_before_the_difference() -> None:
    outputs = np.array([60000.0], dtype=np.float16)
    assert value(METRICS["regression"]["mae"], outputs, -outputs) == 2 * float(outputs[0])


def test_the_first_metric_is_the_budgets() -> None:
    assert {kind: metric_of(kind) for kind in JUDGED} == {
        "classification": "accuracy",
        "binary": "accuracy",
        "multilabel": "accuracy",
        "regression": "mse",
        "segmentation": "pixel_accuracy",
    }
    assert metric_of("regression", "mae") == "mae"
    with pytest.raises(InputError, match="'top5' is unknown for binary: choose from accuracy"):
        metric_of("binary", "top5")


# --- a user's own ---

OUTPUTS, TARGETS = drawn("classification", 3)


def task(**more: Any) -> Task:
    return Task("t", "binary", lambda: None, {}, (Input("x", (1,)),), "accuracy", **more)  # type: ignore[arg-type, return-value]


def test_the_metrics_of_a_task() -> None:
    assert metrics_of(task()) is METRICS["binary"]
    mine = {**METRICS["binary"], "mine": Metric(None)}
    assert metrics_of(task(metrics=mine)) is mine


def test_own_scores_are_averaged_and_an_own_number_is_itself() -> None:
    def margin(outputs: Array, targets: Array) -> Any:
        return outputs[np.arange(len(targets)), targets].astype(np.float32)

    def largest(outputs: Array, targets: Array) -> Any:
        return outputs.max()

    largest.higher_is_better = False  # type: ignore[attr-defined]
    each, all_of_it = own("margin", margin), own("largest", largest)
    assert_array_equal(
        scores(each, OUTPUTS, TARGETS), np.asarray(margin(OUTPUTS, TARGETS), np.float64)
    )
    assert value(each, OUTPUTS, TARGETS) == pytest.approx(margin(OUTPUTS, TARGETS).mean())
    assert value(all_of_it, OUTPUTS, TARGETS) == OUTPUTS.max()
    assert scores(all_of_it, OUTPUTS, TARGETS) is None
    assert (each.higher_is_better, all_of_it.higher_is_better) == (True, False)


@pytest.mark.parametrize("kind", ["a number", "each example", "torchmetrics"])
def test_an_own_metric_may_be_of_torch(kind: str) -> None:
    import torch
    from torchmetrics.classification import MulticlassF1Score

    def error(outputs: Array, targets: Array) -> Any:
        every = torch.nn.functional.cross_entropy(
            torch.from_numpy(outputs), torch.from_numpy(targets), reduction="none"
        )
        return every if kind == "each example" else every.mean()

    f1 = MulticlassF1Score(4, average="macro")
    metric = own("mine", f1 if kind == "torchmetrics" else error)
    known = METRICS["classification"]["f1" if kind == "torchmetrics" else "cross_entropy"]
    for part in (slice(20), slice(None)):  # nothing is left of the call before
        assert value(metric, OUTPUTS[part], TARGETS[part]) == pytest.approx(
            value(known, OUTPUTS[part], TARGETS[part]), abs=1e-6
        )
    assert (scores(metric, OUTPUTS, TARGETS) is None) == (kind != "each example")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            lambda outputs, targets: outputs,
            r"gives the shape \(40, 4\) for 40 examples: return one",
        ),
        (lambda outputs, targets: targets[:3], r"gives the shape \(3,\) for 40"),
        (lambda outputs, targets: float("nan"), "gives NaN for outputs"),
        (lambda outputs, targets: np.where(targets == 0, np.nan, 1.0), "gives NaN for outputs"),
        (
            lambda outputs, targets: 1 // 0,
            r"fails on outputs \(40, 4\) and targets \(40,\): integer",
        ),
        (lambda outputs, targets: None, "fails on outputs|gives NaN"),
        (lambda outputs, targets: "good", "fails on outputs"),
        (lambda outputs: 1.0, "fails on outputs"),
    ],
)
def test_an_own_metric_that_is_wrong_is_said_in_one_line(function: Any, said: str) -> None:
    metric = own("mine", function)
    with pytest.raises(InputError, match=f"metric 'mine' ({said})") as told:
        value(metric, OUTPUTS, TARGETS)
    assert "\n" not in str(told.value)


def test_outputs_that_are_no_numbers_are_not_the_functions_fault() -> None:
    metric = own("mine", lambda outputs, targets: outputs.mean())
    assert np.isnan(value(metric, np.where(OUTPUTS > 2, np.nan, OUTPUTS), TARGETS))


@pytest.mark.parametrize("name", [*RESERVED, ""])
def test_a_name_that_reports_need_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"cannot be named '{name}': give it another name"):
        own(name, lambda outputs, targets: 1.0)


def test_what_cannot_be_called_is_no_metric() -> None:
    with pytest.raises(InputError, match="metric 'mine' is a float: give a function"):
        own("mine", 0.5)  # type: ignore[arg-type]


def test_metrics_need_no_torch() -> None:
    code = "import sys, compressor.metrics; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- fidelity ---


def outputs_of(kind: Kind, values: list[float]) -> Any:
    shape = (1, len(values), 1, 1) if kind == "segmentation" else (1, len(values))
    return np.array(values, dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("kind", JUDGED)
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


@given(st.data(), st.sampled_from(JUDGED))
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
