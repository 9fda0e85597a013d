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
    """1 where the largest of ``(n, classes)`` outputs is the target ``(n,)``."""
    return np.asarray(outputs.argmax(axis=1) == targets, dtype=np.float64)


def top5(outputs: NDArray[Any], targets: NDArray[Any]) -> Scores:
    """1 where the target is among the five largest outputs (all of them where fewer)."""
    best = np.argsort(outputs, axis=1)[:, -5:]
    return np.asarray((best == targets[:, None]).any(axis=1), dtype=np.float64)


def sign(outputs: NDArray[Any], targets: NDArray[Any]) -> Scores:
    """Share of logits on the right side of 0; outputs ``(n,)`` or ``(n, labels)``, targets 0/1."""
    right = (outputs > 0).reshape(len(outputs), -1) == (targets > 0.5).reshape(len(targets), -1)
    return np.asarray(right.mean(axis=1), dtype=np.float64)


def exact(outputs: NDArray[Any], targets: NDArray[Any]) -> Scores:
    """1 where every label of the example is right."""
    return np.asarray(sign(outputs, targets) == 1.0, dtype=np.float64)


def squared(outputs: NDArray[Any], targets: NDArray[Any]) -> Scores:
    """Mean squared error of each example."""
    apart = outputs.reshape(len(outputs), -1) - targets.reshape(len(targets), -1)
    return np.asarray((apart.astype(np.float64) ** 2).mean(axis=1))


def absolute(outputs: NDArray[Any], targets: NDArray[Any]) -> Scores:
    """Mean absolute error of each example."""
    apart = outputs.reshape(len(outputs), -1) - targets.reshape(len(targets), -1)
    return np.asarray(np.abs(apart.astype(np.float64)).mean(axis=1))


def pixels(outputs: NDArray[Any], targets: NDArray[Any]) -> Scores:
    """Share of pixels whose largest output is the target; ``(n, classes, h, w)``, ``(n, h, w)``."""
    right = (outputs.argmax(axis=1) == targets).reshape(len(targets), -1)
    return np.asarray(right.mean(axis=1), dtype=np.float64)


def image_iou(outputs: NDArray[Any], targets: NDArray[Any]) -> Scores:
    """Intersection over union of each image, averaged over the classes that occur in it."""
    predicted = outputs.argmax(axis=1).reshape(len(targets), -1)
    true = targets.reshape(len(targets), -1)
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
