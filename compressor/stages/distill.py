"""Recovery: training on, with the original model or another as teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from compressor.artifact import Torch
from compressor.errors import InputError, Unsuitable
from compressor.loading import torchfile
from compressor.stages.folds import crossed
from compressor.stages.mask import held
from compressor.task import Task
from compressor.training import augment, mixing
from compressor.training.recovery import aimed, clean, epochs_for, made_up, recover
from compressor.training.settings import DEFAULT, Training

SEEN = (
    "folds: every fold begins with weights that the model was given with, which may have been "
    "trained on what the fold holds out: its mean is the better for it (that of --student is not)"
)

Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


def distill(
    artifact: Torch,
    task: Task,
    into: Path,
    *,
    training: Training = DEFAULT,
    loss: str | dict[str, Weight] = "auto",
    temperature: Positive = 4.0,
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5,
    layers: tuple[str, ...] | None = None,
    synthesize: Annotated[int, Field(ge=16)] | None = None,
    folds: Annotated[int, Field(ge=2)] | None = None,
) -> Torch:
    """Trains on, with ``weight`` on what the teacher says and the rest on labels.

    The teacher is the task's original model, or those of ``--teacher``. ``loss`` names what of it
    is imitated, one of :data:`~compressor.training.losses.LOSSES` (``distill`` is ``kd``), or is a
    table of losses and their weights, user's functions among them; ``labels`` is plain fine-tuning.
    ``auto`` is ``labels`` where every example has one and nobody named a teacher or a student,
    which nothing beat where it was measured (benchmarks/training), and ``distill`` otherwise.
    ``layers`` are ``STUDENT=TEACHER`` for losses on hidden layers, which are paired by their names
    otherwise. Training examples without a label count for the teacher's part only.

    Without data, ``synthesize`` makes so many examples from the teacher's batch statistics (Yin et
    al. 2020), and the teacher alone is imitated. ``folds`` adds to the facts what the same training
    reaches in cross-validation; what it begins with has seen all of it, unless it is a student.

    The weights that do best on the validation split stay; frozen parameters stay as they are.
    Training that was killed goes on from its last epoch. Raises :class:`Unsuitable` without data
    and where every parameter is frozen.
    """
    if task.splits is None and synthesize:
        task = made_up(task, synthesize)
    if task.splits is None:
        raise Unsuitable("no data to train on: add --data SPEC, or set synthesize")
    how = replace(training, epochs=training.epochs or epochs_for(task))
    aim = aimed(task, loss, weight, temperature, layers)
    model, edits = torchfile.open_model(artifact, task)
    facts: dict[str, Any] = {}
    if folds:

        def again(part: Task) -> nn.Module:
            one, _ = torchfile.open_model(artifact, part)
            with held(one, artifact, how.shard):
                # When to stop would be chosen by what it is judged on.
                recover(one, part, replace(how, patience=None), aim, keep="last")
            return one

        facts["folds"] = crossed(task, folds, again)
        if not any(step["stage"] == "student" for step in artifact.steps):
            facts["note"] = SEEN
    key = f"{artifact.digest} {how.to_json()} {aim} {task.reads} {task.seed}"
    with held(model, artifact, how.shard):
        fitted = recover(model, task, how, aim, into=into, key=key)
    path = into.with_name(into.name + torchfile.SUFFIX)
    torchfile.write(path, model, torchfile.origin(artifact), edits)
    clean(into)
    settings = {
        **how.to_json(),
        "loss": loss,
        "temperature": temperature,
        "weight": weight,
        "layers": layers and list(layers),
        "synthesize": synthesize,
        "folds": folds,
    }
    facts |= {"losses": dict(aim.weights), "training": fitted.facts, "history": fitted.history}
    return artifact.then(path, "torch", "distill", settings, **facts)


def suited(task: Task, **settings: Any) -> None:
    """Raises :class:`InputError` for settings that do not fit the task, before any work."""
    if task.splits is not None and settings["synthesize"]:
        raise InputError(f"synthesize {settings['synthesize']} makes up examples where there are "
                         f"none, and there is data ({task.data}): leave it out")  # fmt: skip
    given = {name: settings[name] for name in ("loss", "weight", "layers")}
    aimed(task, **given)
    trainable(task, **settings)


def trainable(task: Task, **settings: Any) -> None:
    """What the settings of training ask of the task; raises :class:`InputError`."""
    for name in settings["augment"]:
        if ":" in name and name not in task.functions:
            raise InputError(f"augment {name!r} is code to run: add --augment {name} if you trust "
                             "it")  # fmt: skip
    if task.splits is None:
        return
    head = tuple(map(torch.from_numpy, task.splits.train.head(2)[0]))
    if settings["augment"]:
        augment.checked(settings["augment"], task.kind)
        ends = torch.zeros(head[0].shape[1]), torch.ones(head[0].shape[1])
        augment.augmentation(settings["augment"], head[0], *ends, task.functions)
    mixing.fits(head, settings["mixup"], settings["cutmix"])
    if settings["cutmix"] and task.kind == "segmentation":
        raise InputError(f"cutmix {settings['cutmix']:g}: a patch would keep the labels of the "
                         "picture it covers in a segmentation: leave it out")  # fmt: skip
