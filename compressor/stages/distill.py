"""Recovery: fine-tuning with distillation from the original model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressor.artifact import Torch
from compressor.errors import Unsuitable
from compressor.loading import torchfile
from compressor.loading.task import first
from compressor.stages.mask import held
from compressor.task import Task
from compressor.training.loop import Epoch, fit
from compressor.training.losses import LOSSES

EXAMPLES = 60_000
"""Without ``epochs``: so many that about this many examples are seen ..."""

MOST_EPOCHS = 60
"""... but never more than this."""


def distill(
    artifact: Torch,
    task: Task,
    into: Path,
    *,
    epochs: Annotated[int, Field(ge=1)] | None = None,
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3,
    batch_size: Annotated[int, Field(ge=2)] = 64,
    loss: Literal["distill", "labels"] = "distill",
    temperature: Annotated[float, Field(gt=0)] = 4.0,
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5,
) -> Torch:
    """Trains on, with ``weight`` on the teacher's outputs and the rest on labels.

    The teacher is the task's original model (Hinton et al. 2015; outputs are matched by squared
    error where the task is a regression). ``loss = "labels"`` is plain fine-tuning. ``epochs`` of
    ``None`` means as many as show about 60,000 examples, 1 to 60. The weights that do best on the
    validation split stay.

    Frozen parameters stay as they are. Raises :class:`Unsuitable` without data and where every
    parameter is frozen.
    """
    if task.splits is None:
        raise Unsuitable("no data to train on: add --data SPEC")
    resolved = epochs or epochs_for(task)
    model, edits = torchfile.open_model(artifact, task)
    with held(model, artifact):
        history = recover(
            model,
            task,
            epochs=resolved,
            learning_rate=learning_rate,
            batch_size=batch_size,
            loss=loss,
            temperature=temperature,
            weight=weight,
        )
    path = into.with_name(into.name + torchfile.SUFFIX)
    torchfile.write(path, model, task.source, edits)
    settings = {
        "epochs": resolved,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "loss": loss,
        "temperature": temperature,
        "weight": weight,
    }
    return artifact.then(path, "torch", "distill", settings, history=history)


def taught(
    task: Task, temperature: float = 4.0, weight: float = 0.5
) -> Callable[[Tensor, tuple[Tensor, ...], Tensor], Tensor]:
    """The loss of recovery: ``weight`` on the outputs of the task's original model, the rest on
    labels."""
    teacher = task.model().eval()
    labels, imitation = LOSSES[task.kind]

    def loss(outputs: Tensor, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        value = labels(outputs, targets)
        if weight:
            with torch.no_grad():
                goal = first(teacher(*inputs))
            value = (1 - weight) * value + weight * imitation(outputs, goal, temperature)
        return value

    return loss


def epochs_for(task: Task) -> int:
    """As many epochs as show about :data:`EXAMPLES` examples of the task's training split."""
    assert task.splits is not None
    return max(1, min(MOST_EPOCHS, math.ceil(EXAMPLES / len(task.splits.train))))


def recover(
    model: nn.Module,
    task: Task,
    *,
    epochs: int,
    learning_rate: float = 3e-3,
    batch_size: int = 64,
    loss: str = "distill",
    temperature: float = 4.0,
    weight: float = 0.5,
) -> list[Epoch]:
    """Trains ``model`` in place, as :func:`distill` does; gives the history.

    Raises :class:`Unsuitable` where every parameter is frozen.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise Unsuitable("every parameter is frozen: nothing can be trained")
    assert task.splits is not None
    return fit(
        model,
        task.splits,
        taught(task, temperature, weight if loss == "distill" else 0.0),
        kind=task.kind,
        metric=task.metric,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=task.seed,
    )
