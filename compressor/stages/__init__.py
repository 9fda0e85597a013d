"""One verb a file. A stage is a plain function, and its signature is the schema of its settings.

``stage(artifact, task, into, *, settings...) -> Artifact``: it loads its own copy of ``artifact``,
changes it freely and writes the next one to ``into`` plus the suffix of its form. The annotation
of ``artifact`` (:data:`~compressor.artifact.Torch` or :data:`~compressor.artifact.Onnx`) says which
form it takes; the runner exports where it has to. A setting whose type is :class:`Training` stands
for all of that class's fields, flat among the others.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from compressor.artifact import Artifact
from compressor.errors import InputError, one_line
from compressor.recipe import BASELINE, Recipe, Step
from compressor.stages.distill import distill, trainable
from compressor.stages.distill import suited as distillable
from compressor.stages.export import export
from compressor.stages.mask import fraction, mask
from compressor.stages.prune import asked, prune
from compressor.stages.prune import suited as prunable
from compressor.stages.qat import qat
from compressor.stages.quantize import fitted, quantize
from compressor.stages.sparsify import sparsify
from compressor.stages.student import student
from compressor.stages.student import suited as taught
from compressor.task import Task
from compressor.training.settings import Training, together, unsharded

Stage = Callable[..., Artifact]

STAGES: dict[str, Stage] = {
    "student": student,
    "prune": prune,
    "distill": distill,
    "sparsify": sparsify,
    "mask": mask,
    "export": export,
    "quantize": quantize,
    "qat": qat,
}


TRAINING = tuple(field.name for field in fields(Training))

CHECKS: dict[str, Callable[..., object]] = {
    "distill": together,
    "sparsify": unsharded,
    "qat": unsharded,
    "prune": asked,
    "mask": fraction,
    "quantize": fitted,
}
"""What settings have to be together; each raises :class:`InputError`."""

SUITED: dict[str, Callable[..., None]] = {
    "prune": prunable,
    "student": taught,
    "distill": distillable,
    "sparsify": trainable,
    "qat": trainable,
}
"""What settings ask of the task; each raises :class:`InputError`."""


def form_taken(stage: Stage) -> str:
    """``"torch"`` or ``"onnx"``: what the stage's signature says of its artifact."""
    return _form(stage, "artifact")


def _form(stage: Stage, where: str) -> str:
    return str(get_args(get_type_hints(stage, include_extras=True)[where])[1])


def settings_of(stage: Stage) -> dict[str, tuple[Any, Any]]:
    """Name, annotation and default of every setting, from the stage's signature."""
    hints = get_type_hints(stage, include_extras=True)
    found: dict[str, tuple[Any, Any]] = {}
    for name, parameter in inspect.signature(stage).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if hints[name] is not Training:
            found[name] = hints[name], parameter.default
            continue
        inner = get_type_hints(Training, include_extras=True)
        found |= {key: (hint, getattr(parameter.default, key)) for key, hint in inner.items()}
    return found


def perform(stage: Stage, artifact: Artifact, task: Task, into: Path, **settings: Any) -> Artifact:
    """Calls a stage with flat settings, as a recipe has them."""
    hints = get_type_hints(stage)
    for name, parameter in inspect.signature(stage).parameters.items():
        if hints[name] is Training:
            own = {key: settings.pop(key) for key in TRAINING if key in settings}
            settings[name] = replace(parameter.default, **own)
    return stage(artifact, task, into, **settings)


def bound(step: Step) -> Step:
    """The step with every setting validated against its stage's signature, defaults filled in.

    Raises :class:`InputError` with the step, the setting, the value seen and what is allowed.
    """
    from pydantic import TypeAdapter, ValidationError

    if step.stage not in STAGES:
        raise InputError(f"stage {step.stage!r} is unknown: choose from {', '.join(STAGES)}")
    stage = STAGES[step.stage]
    known = settings_of(stage)
    for name in step.settings:
        if name not in known:
            raise InputError(
                f"step {step.name!r}: {step.stage} has no setting {name!r}; "
                f"it has {', '.join(known)}"
            )
    settings: dict[str, Any] = {}
    for name, (hint, default) in known.items():
        if name not in step.settings and default is inspect.Parameter.empty:
            raise InputError(f"step {step.name!r}: {step.stage} needs the setting {name!r}")
        value = step.settings.get(name, default)
        try:
            # Through JSON, where a list may stand for a tuple, but "3" or true is no number.
            text = json.dumps(value, allow_nan=False)
            settings[name] = TypeAdapter(hint).validate_json(text, strict=True)
        except ValidationError as error:
            # Of several types that a setting may have, the one that came furthest says why.
            said = max(error.errors(), key=lambda each: len(each["loc"]))["msg"]
            said = said[0].lower() + said[1:]
            raise InputError(f"step {step.name!r}: {name} = {value!r:.100}: {said}") from None
        except (TypeError, ValueError) as error:
            raise InputError(
                f"step {step.name!r}: {name} = {value!r:.100} is no plain value: {one_line(error)}"
            ) from None
    try:
        CHECKS.get(step.stage, dict)(**settings)
    except InputError as error:
        raise InputError(f"step {step.name!r}: {error}") from None
    return replace(step, settings=settings)


def fitting(step: Step, task: Task) -> None:
    """Raises :class:`InputError` where a bound step asks for what the task does not have."""
    try:
        if step.stage in SUITED:
            SUITED[step.stage](task, **step.settings)
    except InputError as error:
        raise InputError(f"step {step.name!r}: {error}") from None


def bind(recipe: Recipe) -> Recipe:
    """Every step bound, before any work starts.

    Raises :class:`InputError` as well for a step that starts from a model of the wrong form.
    """
    forms = {BASELINE: "torch"}
    for step in (whole := tuple(bound(step) for step in recipe)):
        # Torch artifacts are exported, so they can stand for ONNX ones, but not the other way.
        if form_taken(STAGES[step.stage]) == "torch" != forms[step.source]:
            raise InputError(
                f"step {step.name!r}: {step.stage} takes a PyTorch model, and {step.source!r} is "
                "already ONNX: start it from a step before that"
            )
        forms[step.name] = _form(STAGES[step.stage], "return")
    return whole
