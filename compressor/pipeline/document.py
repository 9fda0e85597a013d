"""``report.json``: what was made and measured, as the contract has it (schema 1)."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.artifact import Artifact, replacing
from compressor.loading import torchfile
from compressor.measure import counting
from compressor.measure.counting import Counted
from compressor.measure.environment import absent, affinity, environment
from compressor.measurement import SETTINGS, TORCH, Measurement, Target
from compressor.metrics import metrics_of
from compressor.pipeline import damage, verdict
from compressor.pipeline.making import Maker
from compressor.pipeline.measuring import Measured
from compressor.pipeline.verdict import Choice, Outputs, Row
from compressor.recipe import BASELINE, SCHEMES
from compressor.task import Split, Task, labelled

if TYPE_CHECKING:
    from torch import nn

SAMPLES = "samples.json.gz"

SEEN = 10_000
"""Training examples that the generalisation gap is taken on at most."""

WORK = 5e11
"""Multiply-accumulates that one artifact's may take: about ten seconds."""

GPU = (
    "int8 on cuda: onnxruntime's CUDA provider has few 8-bit kernels, and most of an int8 graph "
    "falls back to the CPU; --quantize fp16 is the format for it"
)


def document(
    task: Task,
    maker: Maker,
    measured: Measured,
    targets: Sequence[Target],
    budget: float,
) -> dict[str, Any]:
    """The report, but for what only the caller knows (name, command, date, model)."""
    # Accuracy is judged where the primary target runs, or else on the first target that ran.
    outputs: Outputs = next(iter(measured.outputs.values()), {})
    names = list(maker.onnx)

    def judged(name: str, split: str) -> tuple[Row, Row | None]:
        return verdict.judged(task, measured.targets, outputs, name, split)

    fields = {name: judged(name, "test") for name in names}
    validated = {name: judged(name, "validate")[0] for name in names}
    choice = verdict.choose(
        task,
        names,
        [row for row in measured.rows if row["primary"]],
        validated,
        {name: accuracy for name, (accuracy, _) in fields.items()},
        budget,
        [name for name in names if _narrowed(maker.onnx[name])],
    )
    allowed = [name for name in names if verdict.within(validated[name], budget)]
    whole, uncounted = _whole(maker)
    seen = _seen(task, whole["macs"])
    return {
        "environment": machine(measured, targets[0]),
        "recipe": [step.to_json() for step in maker.resolved],
        "task": about(task),
        "inputs": fed(task),
        "artifacts": [
            {
                **_artifact(maker, name, choice, *fields[name], budget, seen, whole),
                **hurt(task, measured, outputs, name),
            }
            for name in names
        ],
        "measurements": measured.rows,
        "best_per_target": [
            {**target.to_json(), "artifact": found}
            for target in targets
            if (found := verdict.best_on(measured.rows, target, allowed or [BASELINE]))
        ],
        "primary": targets[0].to_json(),
        "max_drop": budget,
        "budget_held": choice.held,
        "best": choice.best,
        "recommendation": choice.sentence,
        "warnings": [*maker.warnings, *uncounted, *_on_gpu(maker, measured, targets)],
        "stages": maker.stages + measured.stages,
        "samples": SAMPLES,
        "failed": maker.failed,
        "missed": maker.missed,
        "finished": not maker.failed,
    }


def machine(measured: Measured, primary: Target) -> Row:
    """``environment``: the machine, and how quiet it was on the ``primary`` target."""
    return {
        **environment(),
        "load": measured.load,
        "providers": measured.providers,
        "threads": {
            "spinning": SETTINGS["session.intra_op.allow_spinning"] == "1",
            "affinity": affinity(),
        },
        "noise_floor": measured.floors.get(primary),
    }


def about(task: Task) -> Row:
    """``task``: what the artifacts are judged on."""
    return {
        "name": task.name,
        "kind": task.kind,
        "data": task.data,
        "labels": None if task.labelled else "the model's own answers",
        "splits": task.splits.sizes() if task.splits else None,
        "metric": task.metric,
        "higher_is_better": metrics_of(task)[task.metric].higher_is_better,
        "metrics": {name: how.higher_is_better for name, how in metrics_of(task).items()},
    }


def fed(task: Task) -> list[Row]:
    """``inputs``: what one example is, in the order of the file's inputs."""
    return [{**asdict(one), "shape": list(one.shape)} for one in task.inputs]


def described(made: Artifact, folder: Path, accuracy: Row, budget: float) -> Row:
    """What an artifact is as a file in ``folder``, and how its ``accuracy`` field is judged."""
    lost = accuracy.get("drop")
    return {
        "name": made.name,
        "path": made.path.relative_to(folder).as_posix(),
        "sha256": made.digest,
        "form": made.form,
        "source": made.source.relative_to(folder).as_posix() if made.source else None,
        "steps": list(made.steps),
        "size_bytes": made.size_bytes,
        "within_budget": None if lost is None else lost["value"] <= budget,
        "proven": None if lost is None else lost["high"] <= budget,
        "accuracy": accuracy,
    }


def hurt(
    task: Task, measured: Measured, outputs: Outputs, name: str, reference: str = BASELINE
) -> Row:
    """``confusion`` of ``name`` on test; ``classes`` and ``worst``: what it lost there against the
    reference, and where."""
    nothing: Row = {"confusion": None, "classes": None, "worst": None}
    theirs, ours = (outputs.get(one, {}).get("test") for one in (name, reference))
    if task.splits is None or theirs is None:
        return nothing
    true = measured.targets["test"]
    shape = next(by["test"].shape for by in outputs.values() if "test" in by)
    if theirs.shape != shape:  # it is not judged either
        return nothing
    found = {**nothing, "confusion": damage.confusion(task, theirs, true)}
    if name == reference or ours is None or ours.shape != theirs.shape:
        return found
    return {
        **found,
        "classes": damage.classes(task, ours, theirs, true),
        "worst": damage.worst(task, task.splits.test, ours, theirs, true),
    }


def _narrowed(made: Artifact) -> bool:
    """Whether the artifact computes with fewer bits than it was trained with."""
    return any(step["stage"] in ("quantize", "qat") for step in made.steps)


def _on_gpu(maker: Maker, measured: Measured, targets: Sequence[Target]) -> list[str]:
    """What else to ask for where int8 was asked for and a GPU of CUDA was measured."""
    names = (SCHEMES.get(str(step.settings.get("scheme")), step.name) for step in maker.resolved)
    asked = any(name.startswith("int8") for name in names)
    ran = any(
        target.provider == "cuda"
        and target.runtime not in TORCH
        and absent(target, measured.providers) is None
        for target in targets
    )
    return [GPU] if asked and ran else []


def _artifact(
    maker: Maker,
    name: str,
    choice: Choice,
    accuracy: Row,
    fidelity: Row | None,
    budget: float,
    seen: Split | None,
    whole: Row,
) -> Row:
    made, task = maker.onnx[name], maker.task
    if maker.original is None:
        model, _ = torchfile.open_model(maker.float_of(name), task)
        costs = _costs(model, task)
    else:  # what is made of an ONNX file computes the same, with fewer bits
        model, costs = task.model(), whole
    return {
        **described(made, maker.folder.path, accuracy, budget),
        **costs,
        "best": name == choice.best,
        "fidelity": fidelity,
        # The torch file of what is narrowed is another model.
        "gap": None if _narrowed(made) else gap(task, model, seen, accuracy),
    }


def _costs(model: nn.Module, task: Task) -> Row:
    return {"params": counting.params(model), "macs": counting.macs(model, task.examples(1))}


def _whole(maker: Maker) -> tuple[Row, list[str]]:
    """``params`` and ``macs`` of the baseline, and what to say of those that were not counted."""
    if maker.original is None:
        return _costs(maker.task.model(), maker.task), []
    found = counting.counted(maker.onnx[BASELINE].path, maker.task.inputs)
    return {"params": found.params, "macs": found.macs}, uncounted(BASELINE, found)


def uncounted(name: str, found: Counted) -> list[str]:
    """What to say of an artifact whose multiply-accumulates could not all be counted."""
    first = "; ".join(found.uncounted[:3])
    more = f" and {len(found.uncounted) - 3} more" if len(found.uncounted) > 3 else ""
    return [f"{name}: MACs are unknown: {first}{more}"] if found.uncounted else []


def gap(task: Task, model: nn.Module, seen: Split | None, accuracy: Row) -> Row | None:
    """The generalisation gap: ``{"train", "test", "value", "n"}`` of the task's metric.

    ``train`` is that of ``model`` on the ``n`` examples of ``seen``, ``test`` that of its
    ``accuracy`` field. ``value`` is how much better the model is where it was trained, in the
    metric's own unit: train - test, for errors test - train. ``None`` where one is not known.
    """
    from compressor.training.evaluation import evaluate

    test = accuracy.get(task.metric)
    if seen is None or test is None:
        return None
    how = metrics_of(task)[task.metric]
    train = evaluate(model, seen, how)
    if not math.isfinite(train):
        return None
    apart = train - test if how.higher_is_better else test - train
    return {"train": train, "test": test, "value": apart, "n": len(seen)}


def _seen(task: Task, macs: int | None) -> Split | None:
    """Training examples with labels, drawn by the task's seed; no more than :data:`WORK` allows a
    model of so many ``macs``."""
    if task.splits is None or not task.labelled:
        return None
    train = task.splits.train
    count = int(np.clip(WORK / max(1, macs or 0), min(len(train), 256), SEEN))
    order = np.random.default_rng(task.seed).permutation(len(train))
    kept: list[int] = []
    for at in range(0, len(order), 256):
        if len(kept) >= count:
            break
        part = order[at : at + 256]
        _, targets = train.take(part).head(len(part))
        kept += part[labelled(targets)].tolist()
    return train.take(np.sort(kept[:count])) if kept else None


def write_samples(path: Path, raw: Sequence[Measurement]) -> None:
    """Every raw value that was measured, as compressed JSON."""
    lines = [
        {
            "artifact": one.artifact,
            **one.target.to_json(),
            "quantity": one.quantity,
            "unit": one.unit,
            "warmup": one.warmup,
            "values": one.values,
            "processes": one.processes,
            "skipped": one.skipped,
        }
        for one in raw
    ]
    with replacing(path) as beside:
        beside.write_bytes(gzip.compress(json.dumps(lines).encode(), mtime=0))
