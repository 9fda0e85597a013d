"""Metrics: how good each single example's output is. NumPy only.

Every metric is a mean of per-example scores, so that a drop can be judged on the same examples in
pairs (:func:`compressor.measure.statistics.drop`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.errors import InputError
from compressor.task import Kind

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """``score(outputs, targets) -> (n,)`` and whether more of it is better."""

    score: Callable[[NDArray[Any], NDArray[Any]], Scores]
    higher_is_better: bool = True


def top1(outputs: NDArray[Any], targets: NDArray[Any]) -> Scores:
    """1 where the largest of ``(n, classes)`` outputs is the target, ``(n,)`` or ``(n, 1)``."""
    return np.asarray(outputs.argmax(axis=1) == targets.reshape(len(outputs)), dtype=np.float64)


def top5(outputs: NDArray[Any], targets: NDArray[Any]) -> Scores:
    """1 where the target is among the five largest outputs (all of them where fewer)."""
    best = np.argsort(outputs, axis=1)[:, -5:]
    return np.asarray((best == targets.reshape(len(outputs), 1)).any(axis=1), dtype=np.float64)


def sign(outputs: NDArray[Any], targets: NDArray[Any]) -> Scores:
    """Share of logits on the right side of 0; outputs ``(n,)`` or ``(n, labels)``, targets 0/1."""
    right = (outputs > 0) == (targets.reshape(outputs.shape) > 0.5)
    return np.asarray(right.reshape(len(right), -1).mean(axis=1), dtype=np.float64)


def exact(outputs: NDArray[Any], targets: NDArray[Any]) -> Scores:
    """1 where every label of the example is right."""
    return np.asarray(sign(outputs, targets) == 1.0, dtype=np.float64)


def squared(outputs: NDArray[Any], targets: NDArray[Any]) -> Scores:
    """Mean squared error of each example."""
    return np.asarray((_apart(outputs, targets) ** 2).mean(axis=1))


def absolute(outputs: NDArray[Any], targets: NDArray[Any]) -> Scores:
    """Mean absolute error of each example."""
    return np.asarray(np.abs(_apart(outputs, targets)).mean(axis=1))


def _apart(outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    # Widened before the difference: half precision overflows at 65504.
    apart = outputs.astype(np.float64) - targets.reshape(outputs.shape)
    return np.asarray(apart.reshape(len(apart), -1))


def pixels(outputs: NDArray[Any], targets: NDArray[Any]) -> Scores:
    """Share of pixels whose largest output is the target; ``(n, classes, h, w)``, ``(n, h, w)``."""
    predicted = outputs.argmax(axis=1)
    right = predicted == targets.reshape(predicted.shape)
    return np.asarray(right.reshape(len(right), -1).mean(axis=1), dtype=np.float64)


def image_iou(outputs: NDArray[Any], targets: NDArray[Any]) -> Scores:
    """Intersection over union of each image, averaged over the classes in output or target."""
    predicted = outputs.argmax(axis=1)
    true = targets.reshape(predicted.shape).reshape(len(predicted), -1)
    predicted = predicted.reshape(true.shape)
    total, present = np.zeros(len(true)), np.zeros(len(true))
    for label in range(outputs.shape[1]):
        union = ((predicted == label) | (true == label)).sum(axis=1)
        shared = ((predicted == label) & (true == label)).sum(axis=1)
        total += np.divide(shared, union, out=np.zeros(len(true)), where=union > 0)
        present += union > 0
    return np.asarray(total / present)


METRICS: dict[Kind, dict[str, Metric]] = {
    "classification": {"accuracy": Metric(top1), "top5": Metric(top5)},
    "binary": {"accuracy": Metric(sign)},
    "multilabel": {"accuracy": Metric(sign), "exact_match": Metric(exact)},
    "regression": {"mse": Metric(squared, False), "mae": Metric(absolute, False)},
    "segmentation": {"pixel_accuracy": Metric(pixels), "image_iou": Metric(image_iou)},
}
"""What can be measured for each kind of task; budgets use the first unless ``--metric`` says so."""


def metric_of(kind: Kind, name: str | None = None) -> str:
    """The metric's name: ``name`` when the kind has it, the kind's first one when not given."""
    known = METRICS[kind]
    if name is not None and name not in known:
        raise InputError(f"--metric {name!r} is unknown for {kind}: choose from {', '.join(known)}")
    return name or next(iter(known))
