"""Cross-validation: what the same training reaches when every example is held out once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from compressor.data.demand import targets
from compressor.errors import InputError
from compressor.metrics import metrics_of
from compressor.task import Array, Batch, Split, Task, labelled
from compressor.training.evaluation import evaluate

LEAST = 2
"""Examples that a fold needs."""


def crossed(task: Task, folds: int, trained: Callable[[Task], nn.Module]) -> dict[str, Any]:
    """``{"folds", "n", "metric", "each", "mean", "deviation"}``: the metric on every fold.

    The examples of ``train`` and ``validate`` that have a label are dealt to ``folds`` parts, each
    with its share of every class; ``trained`` gets the task with one part as ``validate`` and the
    others, and all without a label, as ``train``, and must choose nothing by ``validate``: it is
    what the fold is judged on. Raises :class:`InputError` for fewer examples than parts of two.
    """
    assert task.splits is not None
    whole = _both(task.splits.train, task.splits.validate)
    told = np.concatenate([*targets(task.splits.train, 4096), *targets(task.splits.validate, 4096)])
    order = np.random.default_rng((task.seed, folds)).permutation(len(whole))
    order = order[labelled(told)[order]] if task.labelled else order
    if len(order) < LEAST * folds:
        raise InputError(
            f"folds = {folds}: there are {len(order)} labelled examples of train and validate, and "
            f"a fold needs {LEAST}: give fewer folds or more data"
        )
    if task.kind == "classification":
        order = order[np.argsort(told[order], kind="stable")]
    metric, each = metrics_of(task)[task.metric], []
    for part in range(folds):
        held = order[part::folds]
        rest = np.setdiff1d(np.arange(len(whole)), held)
        splits = replace(task.splits, train=whole.take(rest), validate=whole.take(held))
        model = trained(replace(task, splits=splits))
        each.append(evaluate(model, splits.validate, metric))
    return {
        "folds": folds,
        "n": len(order),
        "metric": task.metric,
        "each": each,
        "mean": float(np.mean(each)),
        "deviation": float(np.std(each, ddof=1)),
    }


def _both(first: Split, second: Split) -> Split:
    """The examples of two splits as one."""

    def fetch(at: Array) -> Batch:
        parts = [
            (split.fetch(split.indices[at[here] - start]), here)
            for split, here, start in ((first, at < len(first), 0),
                                       (second, at >= len(first), len(first)))
            if here.any()
        ]  # fmt: skip
        order = np.argsort(np.concatenate([np.flatnonzero(here) for _, here in parts]))
        columns = zip(*(inputs for (inputs, _), _ in parts), strict=True)
        inputs = tuple(np.concatenate(column)[order] for column in columns)
        return inputs, np.concatenate([targets for (_, targets), _ in parts])[order]

    return Split(fetch, np.arange(len(first) + len(second)))
