"""Cross-validation: what the same training reaches when every example is held out once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from compressor.errors import InputError
from compressor.metrics import metrics_of
from compressor.task import Array, Batch, Split, Task
from compressor.training.evaluation import evaluate

LEAST = 2
"""Examples that a fold needs."""


def crossed(task: Task, folds: int, trained: Callable[[Task], nn.Module]) -> dict[str, Any]:
    """``{"folds", "n", "metric", "each", "mean", "deviation"}``: the metric on every fold.

    The examples of ``train`` and ``validate`` are dealt to ``folds`` parts; ``trained`` gets the
    task with one part as ``validate`` and the others as ``train``, and must choose nothing by
    ``validate``: it is what the fold is judged on. Raises :class:`InputError` for fewer examples
    than parts of two.
    """
    assert task.splits is not None
    whole = _both(task.splits.train, task.splits.validate)
    if len(whole) < LEAST * folds:
        raise InputError(f"folds = {folds}: there are {len(whole)} examples of train and validate, "
                         f"and a fold needs {LEAST}: give fewer folds or more data")  # fmt: skip
    order = np.random.default_rng((task.seed, folds)).permutation(len(whole))
    metric, each = metrics_of(task)[task.metric], []
    for part in range(folds):
        held = order[part::folds]
        rest = np.setdiff1d(order, held)
        splits = replace(task.splits, train=whole.take(rest), validate=whole.take(held))
        model = trained(replace(task, splits=splits))
        each.append(evaluate(model, splits.validate, metric))
    return {
        "folds": folds,
        "n": len(whole),
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
