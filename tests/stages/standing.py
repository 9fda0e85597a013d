"""What the tests of stages stand on: a task around any model, and its artifact at rest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compressor import Artifact, Split, Splits, Task
from compressor.loading import torchfile
from compressor.stages import export
from compressor.task import Array, Input, Kind


def task_of(
    reference: nn.Module,
    *shapes: tuple[int, ...],
    kind: Kind = "classification",
    splits: Splits | None = None,
    **changes: Any,
) -> Task:
    """A task around ``reference``, with one float input for every shape."""
    reference.eval()
    names = ["input"] if len(shapes) == 1 else [f"input_{at}" for at in range(len(shapes))]
    given: dict[str, Any] = {
        "name": "model",
        "kind": kind,
        "model": lambda: copy.deepcopy(reference),
        "source": {"factory": "live:tests", "arguments": {}},
        "inputs": tuple(Input(name, shape) for name, shape in zip(names, shapes, strict=True)),
        "metric": "mse" if kind == "regression" else "accuracy",
        "splits": splits,
    }
    return Task(**{**given, **changes})


def at_rest(task: Task, folder: Path, name: str = "model") -> Artifact:
    path = folder / f"{name}.safetensors"
    torchfile.write(path, task.model(), task.source)
    return Artifact.of(path, "torch")


def exported(task: Task, folder: Path, name: str = "source") -> Artifact:
    return export(at_rest(task, folder), task, folder / name)


def splits_of(x: Array | tuple[Array, ...], y: Array) -> Splits:
    """The same examples in three parts: 3/5 train and calibrate, 1/5 validate, 1/5 test."""
    whole, fifth = Split.arrays(x, y), len(y) // 5
    train = whole.take(np.arange(3 * fifth))
    return Splits(
        train,
        whole.take(np.arange(3 * fifth, 4 * fifth)),
        train,
        whole.take(np.arange(4 * fifth, len(y))),
    )


def settled(model: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    """With batch statistics of these inputs, in eval mode."""
    with torch.no_grad():
        model.train()(*inputs)
    return model.eval()


def small_cnn(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return settled(
        nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 5),
        ),
        torch.randn(8, 1, 8, 8),
    )
