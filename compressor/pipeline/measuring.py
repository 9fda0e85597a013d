"""From artifacts to measurements: every artifact on every target, and its outputs on the splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compressor.artifact import Artifact
from compressor.measure import protocol
from compressor.measure.environment import environment
from compressor.measure.process import Worker
from compressor.measure.protocol import Observed, observe
from compressor.measurement import PROVIDERS, Measurement, Target
from compressor.pipeline import verdict
from compressor.pipeline.making import watched
from compressor.pipeline.verdict import Outputs, Row
from compressor.task import Array, Inputs, Task

SYNTHETIC = 256
"""Made-up examples on which fidelity is measured where there is no data."""


@dataclass
class Measured:
    """What measuring gave. ``outputs`` are by provider and batch size, artifact and split;
    ``targets`` are those of whole splits; ``load`` is the machine's before measuring."""

    providers: list[str]
    load: float | None
    targets: dict[str, Array]
    rows: list[Row] = field(default_factory=list)
    raw: list[Measurement] = field(default_factory=list)
    outputs: dict[tuple[str, int], Outputs] = field(default_factory=dict)
    floors: dict[Target, dict[str, Any]] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)


def measure(
    task: Task,
    artifacts: Sequence[Artifact],
    skipped: Mapping[str, str],
    targets: Sequence[Target],
    seconds: float,
    say: Callable[[str], None],
    detail: Callable[[str], None],
) -> Measured:
    """Measures ONNX ``artifacts`` on ``targets``, the primary one first.

    Outputs are taken for each provider and batch size, which they depend on (dynamic quantization
    looks at the whole batch), but not for each thread count. ``skipped`` artifacts become rows with
    their reason.
    """
    with Worker() as worker:
        present = worker.ask("providers")["providers"]
    inputs, known = _whole_splits(task)
    measured = Measured(present, environment()["load"], known)
    for target in targets:
        say(f"measure on {target}")
        with watched() as seen:
            observed = _observe(task, artifacts, target, measured, inputs, seconds, detail)
        measured.stages.append(
            {"stage": "measure", "artifact": None, "cached": False, "target": str(target), **seen}
        )
        measured.raw += observed.measurements
        floor = verdict.floor_of(observed)
        if floor is not None:
            measured.floors[target] = floor
        primary = target == targets[0]
        rows = verdict.rows(observed, target, task, primary)
        for row in rows:
            if "skipped" not in row:
                outputs = measured.outputs.get((target.provider, target.batch), {})
                row |= verdict.as_run(task, known, outputs, row["artifact"], "test")
        measured.rows += rows
        measured.rows += [
            {"artifact": name, **target.to_json(), "primary": primary, "skipped": why}
            for name, why in skipped.items()
        ]
    return measured


def _observe(
    task: Task,
    artifacts: Sequence[Artifact],
    target: Target,
    measured: Measured,
    inputs: dict[str, Inputs],
    seconds: float,
    detail: Callable[[str], None],
) -> Observed:
    wanted = PROVIDERS[target.provider]
    if wanted not in measured.providers:
        observed = Observed()
        for artifact in artifacts:
            protocol.skip(observed, artifact.name, target, f"onnxruntime here has no {wanted}")
        return observed
    taken = (target.provider, target.batch)
    predict = {} if taken in measured.outputs else inputs
    feed = task.splits.calibrate.head(target.batch)[0] if task.splits else task.examples(1)
    observed = observe(
        [artifact.checked() for artifact in artifacts],
        target,
        feed,
        predict=predict,
        seconds=seconds,
        seed=task.seed,
        progress=detail,
    )
    if predict:
        measured.outputs[taken] = observed.outputs
    return observed


def _whole_splits(task: Task) -> tuple[dict[str, Inputs], dict[str, Array]]:
    """The inputs on which outputs are wanted, and their targets, as whole arrays, read once."""
    if task.splits is None:
        return {"synthetic": task.examples(SYNTHETIC)}, {}
    inputs, targets = {}, {}
    for name in ("validate", "test"):
        batches = list(getattr(task.splits, name).batches(4096))
        parts = zip(*(batch[0] for batch in batches), strict=True)
        inputs[name] = tuple(np.concatenate(part) for part in parts)
        targets[name] = np.concatenate([batch[1] for batch in batches])
    return inputs, targets
