"""Where compression hurts: the classes that lost most, and the examples."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.measure.statistics import drop
from compressor.metrics import METRICS, labels, metrics_of, scores, sign, signs, squared
from compressor.task import Array, Split, Task

Row = dict[str, Any]
Scores = NDArray[np.float64]

LARGEST = float(np.finfo(np.float32).max)
SHOWN = 4
"""Values of an output that are written out."""

SIDE = 64
SIDES = range(8, 513)
"""Sides in pixels of what is taken for an image; shorter is a table, longer is no thumbnail."""

CLASSES = 50
"""Classes that a confusion matrix has at most: its cells are their square."""


def confusion(task: Task, outputs: Array, targets: Array) -> list[list[int]] | None:
    """Examples of each true class (row) by what was said of them (column), all classes in order.

    ``None`` for tasks without classes, or with more than :data:`CLASSES`, and where a target is no
    class of the model.
    """
    if task.kind not in ("classification", "binary"):
        return None
    size, true = 2 if task.kind == "binary" else outputs.shape[1], _true(task, targets)
    if size > CLASSES or true.min() < 0 or true.max() >= size:
        return None
    said = signs(outputs)[:, 0] if task.kind == "binary" else labels(outputs)
    counts = np.bincount(true * size + said, minlength=size * size)
    table: list[list[int]] = counts.reshape(size, size).tolist()
    return table


def classes(
    task: Task, reference: Array, outputs: Array, targets: Array, limit: int = 20
) -> list[Row] | None:
    """What each class lost, the surest loss first.

    ``{"class", "n", "metric", "baseline", "value", "drop"}``.

    ``reference`` and ``outputs`` are the baseline's and the artifact's on the same examples, first
    axis the example. Examples go by their true class; of several labels, each is judged over all
    examples. ``metric`` is the task's or, where that has no score for each example, the kind's
    first; ``baseline`` and ``value`` are its mean there, and ``drop`` is that of
    :func:`compressor.measure.statistics.drop`. Sorted by the drop's lower end: a class of three
    examples that lost one is no worse than one of a thousand that lost a hundred. Beyond ``limit``
    the rest is one row, which says in ``"classes"`` for how many it stands. ``None`` for tasks
    without classes.
    """
    if task.kind not in ("classification", "binary", "multilabel"):
        return None
    metric, found = _by_class(task, reference, outputs, targets)
    better = metrics_of(task)[metric].higher_is_better
    rows = [(_row(name, metric, *pair, better), pair) for name, pair in found.items()]
    rows.sort(key=lambda row: -row[0]["drop"]["low"])
    kept = [row for row, _ in rows[:limit]]
    if rest := [pair for _, pair in rows[limit:]]:
        before, after = (np.concatenate(side) for side in zip(*rest, strict=True))
        kept.append({**_row("others", metric, before, after, better), "classes": len(rest)})
    return kept


def _by_class(
    task: Task, reference: Array, outputs: Array, targets: Array
) -> tuple[str, dict[str, tuple[Scores, Scores]]]:
    """The metric, and class to the scores of the two on its examples."""
    first = next(iter(METRICS[task.kind]))
    if task.kind == "multilabel":
        known = targets.reshape(outputs.shape)
        return first, {
            str(label): (
                sign(reference[:, label], known[:, label]),
                sign(outputs[:, label], known[:, label]),
            )
            for label in range(outputs.shape[1])
        }
    true = _true(task, targets)
    for name in (task.metric, first):
        how = metrics_of(task)[name]
        before, after = (scores(how, side, targets) for side in (reference, outputs))
        if before is not None and after is not None and np.isfinite([before, after]).all():
            break
    assert before is not None
    assert after is not None
    return name, {str(one): (before[true == one], after[true == one]) for one in np.unique(true)}


def _true(task: Task, targets: Array) -> NDArray[np.int64]:
    """The true class of each example, shape ``(n,)``."""
    flat = targets.reshape(len(targets), -1)[:, 0]
    return np.asarray(flat > 0.5 if task.kind == "binary" else flat, dtype=np.int64)


def _row(name: str, metric: str, before: Scores, after: Scores, better: bool) -> Row:
    return {
        "class": name,
        "n": len(before),
        "metric": metric,
        "baseline": float(before.mean()),
        "value": float(after.mean()),
        "drop": drop(before, after, higher_is_better=better),
    }


def worst(
    task: Task, split: Split, reference: Array, outputs: Array, targets: Array, count: int = 12
) -> list[Row] | None:
    """The examples that lost most against the baseline, the worst first, at most ``count``.

    ``{"example", "target", "baseline", "output", "lost", "picture"}``: ``example`` is the position
    in ``split``, whose outputs and targets the arrays hold in order. Of classes, those that the
    baseline had right and the artifact has wrong, by ``lost``, the margin between the true class
    and the best other one that went (in units of the outputs); of several labels, by the labels
    that went wrong; of numbers, those whose squared error rose, by its rise. ``picture`` is a
    thumbnail of the input where that is an image, read for these examples only. ``None`` for
    segmentation and custom tasks, whose outputs no word of ours describes.
    """
    if task.kind in ("segmentation", "custom"):
        return None
    before, after = _finite(reference), _finite(outputs)
    known = targets.reshape(len(targets), -1)
    lost = {
        "classification": _margins,
        "binary": _sides,
        "multilabel": _labels,
        "regression": _errors,
    }[task.kind](before, after, known)
    positions = [int(at) for at in np.argsort(-lost, kind="stable")[:count] if lost[at] > 0]
    if not positions:
        return []
    inputs, _ = split.take(np.asarray(positions)).head(len(positions))
    said = _numbers if task.kind == "regression" else _classes
    return [
        {
            "example": at,
            "target": said(task, known[at], true=True),
            "baseline": said(task, before[at], true=False),
            "output": said(task, after[at], true=False),
            "lost": float(lost[at]),
            "picture": thumbnail(inputs[0][row]) if len(inputs) == 1 else None,
        }
        for row, at in enumerate(positions)
    ]


def _finite(outputs: Array) -> NDArray[np.float64]:
    """Shape ``(n, values)``; what is not a number is as wrong as can be, and JSON can hold it."""
    wide = outputs.reshape(len(outputs), -1).astype(np.float64)
    return np.nan_to_num(wide, nan=-LARGEST, posinf=LARGEST, neginf=-LARGEST)


def _margins(before: Scores, after: Scores, known: Array) -> Scores:
    true = known[:, :1].astype(np.int64)

    def margin(outputs: Scores) -> Scores:
        own = np.take_along_axis(outputs, true, axis=1)[:, 0]
        others = outputs.copy()
        np.put_along_axis(others, true, -math.inf, axis=1)
        return np.asarray(own - others.max(axis=1))

    # A tie may go either way: right is what argmax, and with it the metric, calls right.
    turned = (before.argmax(axis=1) == true[:, 0]) & (after.argmax(axis=1) != true[:, 0])
    return np.where(turned, margin(before) - margin(after), 0.0)


def _sides(before: Scores, after: Scores, known: Array) -> Scores:
    truth = known[:, 0] > 0.5
    turned = ((before[:, 0] > 0) == truth) & ((after[:, 0] > 0) != truth)
    return np.where(turned, np.abs(before[:, 0] - after[:, 0]), 0.0)


def _labels(before: Scores, after: Scores, known: Array) -> Scores:
    truth = known > 0.5
    wrong = ((after > 0) != truth).sum(axis=1) - ((before > 0) != truth).sum(axis=1)
    return np.asarray(wrong, dtype=np.float64)


def _errors(before: Scores, after: Scores, known: Array) -> Scores:
    return squared(after, known) - squared(before, known)


def _classes(task: Task, values: Array, *, true: bool) -> str:
    """The class, or the labels, that an output or a target names."""
    if task.kind == "multilabel":
        held = np.flatnonzero(values > (0.5 if true else 0.0))
        return _listed([str(label) for label in held]) or "none"
    if task.kind == "binary":
        return str(int(values[0] > (0.5 if true else 0.0)))
    return str(int(values[0]) if true else int(values.argmax()))


def _numbers(task: Task, values: Array, *, true: bool) -> str:
    return _listed([f"{value:.4g}" for value in values])


def _listed(words: list[str]) -> str:
    return ", ".join(words[:SHOWN] + ["…"] * (len(words) > SHOWN))


def thumbnail(image: Array) -> str | None:
    """A PNG in base64, at most 64 pixels wide and high, of one input of shape ``(1 | 3, h, w)``.

    Its least value is black, its largest white. ``None`` for what does not look like an image.
    """
    from PIL import Image

    floats = np.issubdtype(image.dtype, np.floating)
    if not floats or image.ndim != 3 or image.shape[0] not in (1, 3):
        return None
    if not all(side in SIDES for side in image.shape[1:]):
        return None
    values = np.nan_to_num(image.astype(np.float64), posinf=LARGEST, neginf=-LARGEST)
    low, high = float(values.min()), float(values.max())
    scaled = np.zeros_like(values) if high == low else (values - low) / (high - low)
    levels = np.round(scaled * 255).astype(np.uint8)
    picture = Image.fromarray(levels[0] if len(levels) == 1 else np.moveaxis(levels, 0, 2))
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=9)
    return base64.b64encode(file.getvalue()).decode("ascii")
