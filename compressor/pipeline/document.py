"""``report.json``: what was made and measured, as the contract has it (schema 1)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compressor.artifact import Artifact, replacing
from compressor.loading import torchfile
from compressor.measure import counting
from compressor.measure.environment import absent, affinity, environment
from compressor.measurement import SETTINGS, TORCH, Measurement, Target
from compressor.metrics import METRICS
from compressor.pipeline import damage, verdict
from compressor.pipeline.making import Maker
from compressor.pipeline.measuring import Measured
from compressor.pipeline.verdict import Choice, Outputs, Row
from compressor.recipe import BASELINE, SCHEMES
from compressor.task import Task

SAMPLES = "samples.json.gz"

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
    return {
        "environment": machine(measured, targets[0]),
        "recipe": [step.to_json() for step in maker.resolved],
        "task": about(task),
        "inputs": fed(task),
        "artifacts": [
            {
                **_artifact(maker, name, choice, *fields[name], budget),
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
        "warnings": [*maker.warnings, *_on_gpu(maker, measured, targets)],
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
        "splits": task.splits.sizes() if task.splits else None,
        "metric": task.metric,
        "higher_is_better": METRICS[task.kind][task.metric].higher_is_better,
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
    """``classes`` and ``worst``: what ``name`` lost on test against the reference, and where."""
    both = [outputs.get(one, {}).get("test") for one in (reference, name)]
    ours, theirs = both
    if name == reference or task.splits is None or ours is None or theirs is None:
        return {"classes": None, "worst": None}
    if ours.shape != theirs.shape:
        return {"classes": None, "worst": None}
    true = measured.targets["test"]
    return {
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
    maker: Maker, name: str, choice: Choice, accuracy: Row, fidelity: Row | None, budget: float
) -> Row:
    made = maker.onnx[name]
    model, _ = torchfile.open_model(maker.float_of(name), maker.task)
    return {
        **described(made, maker.folder.path, accuracy, budget),
        "params": counting.params(model),
        "macs": counting.macs(model, maker.task.examples(1)),
        "best": name == choice.best,
        "fidelity": fidelity,
    }


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
