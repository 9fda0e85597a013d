"""What a quantized graph costs in outputs and in accuracy, before anything is measured for real."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import StageError, one_line
from compressor.measure.environment import cores
from compressor.measure.fidelity import FLOOR_DB, fidelity
from compressor.metrics import metrics_of, value
from compressor.stages.graph import opened
from compressor.task import Array, Inputs, Task
from compressor.training.evaluation import evaluate

if TYPE_CHECKING:
    import onnx_ir as ir

MOST = 2048
"""Validation examples that a search looks at; the report's verdict reads all of them."""

BATCH = 32

PERFECT = 200.0
"""Decibels of a graph whose outputs do not differ at all."""


class Judge:
    """Compares graphs with the float one that they come from.

    ``source`` is that graph, ``held`` are batches of calibration inputs that no range was taken
    from. Accuracy is that of the task's metric on the validation split, against the original model.
    ``together``: what a graph answers depends on the whole batch, so it gets the target's.
    """

    def __init__(
        self, source: ir.Model, task: Task, held: Sequence[Inputs], *, together: bool = False
    ) -> None:
        self._task = task
        self._size = task.target.batch if together else BATCH
        self._held = [
            tuple(part[at : at + self._size] for part in given)
            for given in held
            for at in range(0, len(given[0]), self._size)
        ]
        self._names = [str(value.name) for value in source.graph.inputs]
        self._wanted = self._outputs(source, self._held)

    def sqnr(self, model: ir.Model) -> float:
        """Signal-to-quantization-noise ratio of the first output on the held batches, in dB."""
        got = self._outputs(model, self._held)
        if not np.isfinite(got).all():
            return FLOOR_DB
        found = fidelity(self._task.kind, self._wanted, got)["sqnr_db"]
        return PERFECT if found is None else float(found)

    def drop(self, model: ir.Model) -> float | None:
        """Accuracy lost against the original model, as budgets count; ``None`` without data,
        infinite where the metric is not finite."""
        if self._task.splits is None:
            return None
        inputs = (given for given, _ in self._validation.batches(self._size))
        targets = np.concatenate([target for _, target in self._validation.batches(1024)])
        how = metrics_of(self._task)[self._task.metric]
        got = value(how, self._outputs(model, inputs), targets)
        if not math.isfinite(got):
            return math.inf
        if how.higher_is_better:
            return self._original - got
        return (got - self._original) / (self._original or 1.0)

    @cached_property
    def _validation(self) -> Any:
        assert self._task.splits is not None
        split = self._task.splits.validate
        return split.take(np.arange(min(MOST, len(split))))

    @cached_property
    def _original(self) -> float:
        how = metrics_of(self._task)[self._task.metric]
        return evaluate(self._task.model(), self._validation, how)

    def _outputs(self, model: ir.Model, batches: Iterable[Inputs]) -> Array:
        try:
            with opened(model, threads=cores()) as run:
                parts = [run(dict(zip(self._names, given, strict=True)))[0] for given in batches]
        except Exception as error:
            raise StageError(f"onnxruntime cannot run the graph: {one_line(error, 160)}") from error
        return np.concatenate(parts)
