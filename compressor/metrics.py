"""Metrics: how good a model's outputs are. NumPy only.

A metric is the mean of per-example scores, or one number over all examples, such as F1. Either way
a drop is judged on the same examples in pairs (:func:`compressor.measure.statistics.drops`).
Outputs are logits throughout. Definitions are those of torchmetrics, to which the tests hold them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compressor.errors import InputError, one_line
from compressor.task import Kind, Task

Array = NDArray[Any]
Scores = NDArray[np.float64]
Weighed = Callable[[Scores], Scores]
Rate = Callable[[Scores, Scores, Scores], Scores]

RESERVED = ("n", "drop", "drops", "mcnemar", "skipped")
"""Names in a report's accuracy that are no metric's."""

AT_ONCE = 1 << 22
"""Values of the outputs that are widened at a time."""


class Whole(NamedTuple):
    """A number over all examples, for any number of resamples of them at once.

    ``seen(outputs)`` is what it looks at, first axis the example: examples that are alike in it and
    in their targets are interchangeable. ``weighed(seen, targets)`` is a function of counts, shape
    ``(n, draws)``, how often each draw has each example. It gives ``(draws,)`` values, NaN where
    the number is not defined.
    """

    seen: Callable[[Array], Array]
    weighed: Callable[[Array, Array], Weighed]


@dataclass(frozen=True)
class Metric:
    """What ``score`` gives each example, or ``whole`` all of them; and whether more is better.

    ``apart`` says that ``score`` may be asked about a part of the examples at a time.

    ``score(outputs, targets)`` is ``(n,)``; a user's own (:func:`own`) may be one number instead.
    Callers use :func:`value`, and :func:`scores` where they need those of each example.
    """

    score: Callable[[Array, Array], Scores] | None = None
    higher_is_better: bool = True
    whole: Whole | None = None
    apart: bool = True


def value(metric: Metric, outputs: Array, targets: Array) -> float:
    """The metric of all examples together.

    NaN where it is not defined: ROC AUC without a class, most metrics of outputs that are not
    finite.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        if metric.whole is not None:
            once = metric.whole.weighed(metric.whole.seen(outputs), targets)
            return float(once(np.ones((len(outputs), 1)))[0])
        assert metric.score is not None
        return float(np.mean(metric.score(outputs, targets)))


def scores(metric: Metric, outputs: Array, targets: Array) -> Scores | None:
    """Per-example scores, shape ``(n,)``, whose mean is the metric; ``None`` where it has none."""
    if metric.score is None:
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        found = metric.score(outputs, targets)
    return found if found.ndim == 1 else None


# Means of scores.


def top1(outputs: Array, targets: Array) -> Scores:
    """1 where the largest of ``(n, classes)`` outputs is the target, ``(n,)`` or ``(n, 1)``."""
    return np.asarray(outputs.argmax(axis=1) == targets.reshape(len(outputs)), dtype=np.float64)


def top5(outputs: Array, targets: Array) -> Scores:
    """1 where the target is among the five largest outputs (all of them where fewer)."""
    best = np.argsort(outputs, axis=1)[:, -5:]
    return np.asarray((best == targets.reshape(len(outputs), 1)).any(axis=1), dtype=np.float64)


def sign(outputs: Array, targets: Array) -> Scores:
    """Share of logits on the right side of 0; outputs ``(n,)`` or ``(n, labels)``, targets 0/1."""
    right = (outputs > 0) == (targets.reshape(outputs.shape) > 0.5)
    return np.asarray(right.reshape(len(right), -1).mean(axis=1), dtype=np.float64)


def exact(outputs: Array, targets: Array) -> Scores:
    """1 where every label of the example is right."""
    return np.asarray(sign(outputs, targets) == 1.0, dtype=np.float64)


def squared(outputs: Array, targets: Array) -> Scores:
    """Mean squared error of each example."""
    return np.asarray((_apart(outputs, targets) ** 2).mean(axis=1))


def absolute(outputs: Array, targets: Array) -> Scores:
    """Mean absolute error of each example."""
    return np.asarray(np.abs(_apart(outputs, targets)).mean(axis=1))


def _apart(outputs: Array, targets: Array) -> Scores:
    # Widened before the difference: half precision overflows at 65504.
    apart = outputs.astype(np.float64) - targets.reshape(outputs.shape)
    return np.asarray(apart.reshape(len(apart), -1))


def pixels(outputs: Array, targets: Array) -> Scores:
    """Share of pixels whose largest output is the target; ``(n, classes, h, w)``, ``(n, h, w)``."""
    predicted = outputs.argmax(axis=1)
    right = predicted == targets.reshape(predicted.shape)
    return np.asarray(right.reshape(len(right), -1).mean(axis=1), dtype=np.float64)


def image_iou(outputs: Array, targets: Array) -> Scores:
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


def cross_entropy(outputs: Array, targets: Array) -> Scores:
    """``-log softmax`` at the target in nats, classes on axis 1; the mean over the pixels.

    NaN for a target that is no class of the model.
    """
    given = targets.reshape(len(outputs), 1, *outputs.shape[2:]).astype(np.int64)
    known = np.clip(given, 0, outputs.shape[1] - 1)
    found = [np.zeros(0)]
    for part in _parts(outputs):
        wide = outputs[part].astype(np.float64)
        wide -= wide.max(axis=1, keepdims=True)
        own = np.take_along_axis(wide, known[part], axis=1)[:, 0]
        lost = np.log(np.exp(wide).sum(axis=1)) - own
        lost[(known != given)[part][:, 0]] = np.nan
        found.append(lost.reshape(len(lost), -1).mean(axis=1))
    return np.concatenate(found)


def bit_entropy(outputs: Array, targets: Array) -> Scores:
    """Binary cross-entropy of logits in nats, the mean over the example's labels."""
    wide = outputs.astype(np.float64)
    lost = np.logaddexp(0, wide) - wide * targets.reshape(outputs.shape)
    return np.asarray(lost.reshape(len(lost), -1).mean(axis=1))


def _parts(outputs: Array) -> Iterator[slice]:
    """Examples, few enough that another copy of their outputs does not matter."""
    step = max(1, AT_ONCE * len(outputs) // max(outputs.size, 1))
    return (slice(at, at + step) for at in range(0, len(outputs), step))


# Numbers over all examples. What a rate is made of has the shape (classes, draws): how many are
# ``right``, how many the model ``said`` and how many are ``true``.


def precision(right: Scores, said: Scores, true: Scores) -> Scores:
    """How much of what was said is right; 0 where nothing was said."""
    return _share(right, said)


def recall(right: Scores, said: Scores, true: Scores) -> Scores:
    """How much of what is true was said; 0 where nothing is true."""
    return _share(right, true)


def f1(right: Scores, said: Scores, true: Scores) -> Scores:
    """The harmonic mean of precision and recall; 0 where there is nothing of either."""
    return _share(2 * right, said + true)


def _share(part: Scores, whole: Scores) -> Scores:
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)


def macro(rate: Rate) -> Metric:
    """The plain mean over the classes that are said or true. That of the recall is what others
    call balanced accuracy, where every class is there."""
    return Metric(whole=Whole(labels, partial(_over_classes, rate, weighted=False)))


def weighted(rate: Rate) -> Metric:
    """The mean over the classes by how many examples each has."""
    return Metric(whole=Whole(labels, partial(_over_classes, rate, weighted=True)))


def over_labels(rate: Rate) -> Metric:
    """Of logits: the plain mean over the labels, of which a binary task has one."""
    return Metric(whole=Whole(signs, partial(_over_labels, rate)))


def labels(outputs: Array) -> Array:
    """The class of the largest of ``(n, classes)`` outputs, shape ``(n,)``."""
    return np.asarray(outputs.argmax(axis=1))


def signs(outputs: Array) -> Array:
    """Which of ``(n, labels)`` logits are above 0."""
    return np.asarray(outputs.reshape(len(outputs), -1) > 0)


def logits(outputs: Array) -> Array:
    """The outputs themselves, ``(n, values)``."""
    return outputs.reshape(len(outputs), -1).astype(np.float64)


def odds(outputs: Array) -> Array:
    """``log(p / (1 - p))`` of each class's softmax probability, ``(n, classes)``.

    In the order of the probabilities, and distinct where those round to 1.
    """
    found = [np.zeros((0, outputs.shape[1]))]
    for part in _parts(outputs):
        wide = outputs[part].astype(np.float64)
        top = wide.argmax(axis=1)[:, None]
        wide -= np.take_along_axis(wide, top, axis=1)
        powers = np.exp(wide)
        rest = powers.sum(axis=1, keepdims=True) - powers
        # The difference would cancel for the largest: its rest is summed without it.
        np.put_along_axis(powers, top, 0.0, axis=1)
        np.put_along_axis(rest, top, powers.sum(axis=1, keepdims=True), axis=1)
        with np.errstate(divide="ignore"):
            found.append(wide - np.log(rest))
    return np.concatenate(found)


def _over_classes(rate: Rate, said: Array, targets: Array, *, weighted: bool) -> Weighed:
    known = targets.reshape(said.shape).astype(np.int64)
    classes, at = np.unique(np.concatenate([said, known]), return_inverse=True)
    by_said, by_true = np.split(at, 2)
    hit = said == known

    def weigh(counts: Scores) -> Scores:
        right, found, true = (
            _totals(index, each, len(classes))
            for index, each in (
                (by_true[hit], counts[hit]),
                (by_said, counts),
                (by_true, counts),
            )
        )
        weights = true if weighted else np.asarray(found + true > 0, np.float64)
        return np.asarray((weights * rate(right, found, true)).sum(axis=0) / weights.sum(axis=0))

    return weigh


def _totals(index: Array, counts: Scores, size: int) -> Scores:
    """Row ``i``: the sum of the rows of ``counts`` whose ``index`` is ``i``."""
    order = np.argsort(index, kind="stable")
    used, starts = np.unique(index[order], return_index=True)
    total = np.zeros((size, counts.shape[1]))
    if len(used):
        total[used] = np.add.reduceat(counts[order], starts, axis=0)
    return total


def _over_labels(rate: Rate, said: Array, targets: Array) -> Weighed:
    known = targets.reshape(said.shape) > 0.5

    def weigh(counts: Scores) -> Scores:
        parts = (each.T.astype(np.float64) @ counts for each in (said & known, said, known))
        return np.asarray(rate(*parts).mean(axis=0))

    return weigh


def _one_vs_rest(ranked: Array, targets: Array) -> Weighed:
    known = targets.reshape(len(ranked)).astype(np.int64)
    return _roc_auc(ranked, known[:, None] == np.arange(ranked.shape[1]))


def _each_label(ranked: Array, targets: Array) -> Weighed:
    return _roc_auc(ranked, targets.reshape(ranked.shape) > 0.5)


def _roc_auc(ranked: Array, true: Array) -> Weighed:
    """The mean over the columns of the chance that a true example ranks above one that is not.

    Ties count half (Mann and Whitney 1947). Without both sorts of examples in each column it is
    not defined; a draw may lack them, and has the mean of the others.
    """
    if np.isnan(ranked).any() or true.all(axis=0).any() or not true.any(axis=0).all():
        return lambda counts: np.full(counts.shape[1], np.nan)
    sorted_once = [_ranks(*column) for column in zip(ranked.T, true.T, strict=True)]

    def weigh(counts: Scores) -> Scores:
        areas = np.stack([_area(*ranks, counts) for ranks in sorted_once])
        defined = np.isfinite(areas)
        return _share(np.where(defined, areas, 0).sum(axis=0), defined.sum(axis=0)) + np.where(
            defined.any(axis=0), 0.0, np.nan
        )

    return weigh


def _ranks(values: Array, true: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Positions of the true and the others, these in order; where to cut the others so that no
    part has a true one inside, and the parts that lie below each true one and up to it."""
    own, rest = np.flatnonzero(true), np.flatnonzero(~true)
    rest = rest[np.argsort(values[rest], kind="stable")]
    below, upto = (np.searchsorted(values[rest], values[own], side) for side in ("left", "right"))
    cuts = np.unique(np.concatenate([[0, len(rest)], below, upto]))
    return own, rest, cuts, np.searchsorted(cuts, below), np.searchsorted(cuts, upto)


def _area(
    own: Array, rest: Array, cuts: Array, below: Array, upto: Array, counts: Scores
) -> Scores:
    parts = np.add.reduceat(counts[rest], cuts[:-1], axis=0)
    running = np.concatenate([np.zeros((1, counts.shape[1])), np.cumsum(parts, axis=0)])
    mine = counts[own]
    pairs = mine.sum(axis=0) * running[-1]
    won = np.einsum("nd,nd->d", mine, running[below] + running[upto]) / 2
    return np.asarray(np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0))


def _explained(outputs: Array, targets: Array) -> Weighed:
    """R2 of each value, 1 - squared errors / squared distances from the mean; their plain mean.

    Not defined where targets do not vary.
    """
    known = targets.reshape(outputs.shape).astype(np.float64)
    known = known - known.mean(axis=0)
    errors = np.asarray(_apart(outputs, targets) ** 2)

    def weigh(counts: Scores) -> Scores:
        middle = known.T @ counts / counts.sum(axis=0)
        spread = (known**2).T @ counts - counts.sum(axis=0) * middle**2
        # What is left of equal values is rounding.
        flat = spread <= 1e-12 * (known**2).sum(axis=0)[:, None]
        lost = np.divide(errors.T @ counts, spread, out=np.full(flat.shape, np.nan), where=~flat)
        return np.asarray(1 - lost.mean(axis=0))

    return weigh


METRICS: dict[Kind, dict[str, Metric]] = {
    "classification": {
        "accuracy": Metric(top1),
        "top5": Metric(top5),
        "precision": macro(precision),
        "recall": macro(recall),
        "f1": macro(f1),
        "precision_weighted": weighted(precision),
        "recall_weighted": weighted(recall),
        "f1_weighted": weighted(f1),
        "roc_auc": Metric(whole=Whole(odds, _one_vs_rest)),
        "cross_entropy": Metric(cross_entropy, False),
    },
    "binary": {
        "accuracy": Metric(sign),
        "precision": over_labels(precision),
        "recall": over_labels(recall),
        "f1": over_labels(f1),
        "roc_auc": Metric(whole=Whole(logits, _each_label)),
        "cross_entropy": Metric(bit_entropy, False),
    },
    "multilabel": {
        "accuracy": Metric(sign),
        "exact_match": Metric(exact),
        "precision": over_labels(precision),
        "recall": over_labels(recall),
        "f1": over_labels(f1),
        "roc_auc": Metric(whole=Whole(logits, _each_label)),
        "cross_entropy": Metric(bit_entropy, False),
    },
    "regression": {
        "mse": Metric(squared, False),
        "mae": Metric(absolute, False),
        "r2": Metric(whole=Whole(logits, _explained)),
    },
    "segmentation": {
        "pixel_accuracy": Metric(pixels),
        "image_iou": Metric(image_iou),
        "cross_entropy": Metric(cross_entropy, False),
    },
    "custom": {},
}
"""What can be measured for each kind of task; budgets use the first unless ``--metric`` says so."""


def metric_of(kind: Kind, name: str | None = None) -> str:
    """The metric's name: ``name`` when the kind has it, the kind's first one when not given."""
    known = METRICS[kind]
    if not known:
        raise InputError(f"a {kind} task has no metric but yours: add --metric PKG.MOD:FUNCTION")
    if name is not None and name not in known:
        raise InputError(f"--metric {name!r} is unknown for {kind}: choose from {', '.join(known)}")
    return name or next(iter(known))


def metrics_of(task: Task) -> Mapping[str, Metric]:
    """All that the task is measured by: its kind's metrics and those of its own."""
    return task.metrics or METRICS[task.kind]


def own(name: str, function: Callable[[Any, Any], Any]) -> Metric:
    """The metric of a user's ``function(outputs, targets)``: ``(n,)`` scores or one number.

    It gets arrays, the first output and the targets as the data has them; a ``torch.nn.Module``,
    as the metrics of torchmetrics are, gets tensors. More is better unless its attribute
    ``higher_is_better`` is ``False``. Raises :class:`InputError`, then or when it is called, for a
    name that a report needs, and for a function that fails, gives another shape or gives NaN for
    finite outputs.
    """
    if name in RESERVED or not name:
        raise InputError(f"a metric cannot be named {name!r}: give it another name")
    if not callable(function):
        raise InputError(f"metric {name!r} is a {type(function).__name__}: give a function")

    def score(outputs: Array, targets: Array) -> Scores:
        try:
            found: Scores = np.asarray(_called(function, outputs, targets), dtype=np.float64)
        except Exception as error:
            raise InputError(
                f"metric {name!r} fails on outputs {outputs.shape} and targets {targets.shape}: "
                f"{one_line(error, 160)}"
            ) from error
        if found.shape not in ((), (len(outputs),)):
            raise InputError(
                f"metric {name!r} gives the shape {found.shape} for {len(outputs)} examples: "
                "return one number, or one for each example"
            )
        if np.isnan(found).any() and np.isfinite(outputs).all():
            raise InputError(
                f"metric {name!r} gives NaN for outputs {outputs.shape} that are all finite: "
                "return numbers"
            )
        return found

    better = getattr(function, "higher_is_better", True) is not False
    return Metric(score, better, apart=False)


def _called(function: Callable[[Any, Any], Any], outputs: Array, targets: Array) -> Any:
    torch = sys.modules.get("torch")  # which a module has imported
    if torch is None or not isinstance(function, torch.nn.Module):
        return function(outputs, targets)
    if hasattr(function, "reset"):
        function.reset()  # metrics of torchmetrics add up what they are called with
    with torch.inference_mode():
        return function(torch.tensor(outputs), torch.tensor(targets))
